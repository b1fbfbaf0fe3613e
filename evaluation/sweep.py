"""The guidance curve: draw and evaluate samples for each of several settings; one table and one plot of all of them.

    python evaluate.py sweep --cfg-scale 1.0 1.25 1.5 --t-max 600 999 --reference VIRTUAL_imagenet256_labeled.npz \\
        --out sweep -- --model DiTSEM-XL/2 --num-fid-samples 50000

In: the values of each swept flag, of which all combinations are tried; flags of evaluate.py and of its agreement; and,
after --, flags of the sampling script. Out: OUT/{setting}/ with the samples of each, OUT/sweep.json, OUT/sweep.txt (the
table) and OUT/sweep.png (the plot; needs matplotlib). The same command run again continues; no finished setting is
repeated, so values may be added. Settings without guidance (--cfg-scale 1) differ by no interval of it: drawn once.
"""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from diffusion.samplers import SAMPLERS
from dlc.machine.cli import ArgumentParser, number, one_line
from dlc.machine.files import DirectoryLock, read_json, write_bytes, write_json, write_whole
from dlc.machine.records import check_values, list_of
from dlc.sampling.conditions import ClassLabels, ComputedCodes
from dlc.sampling.sampling_flags import sampling_parser
from evaluation.agreement import add_agreement_flags, check_agreement_flags, check_before_drawing
from evaluation.comparison import needs_reference, networks_of
from evaluation.flags import add_comparison_flags, check_comparison_flags, comparison_of, wanted_metrics
from evaluation.networks import NETWORKS, find_networks
from evaluation.reference import Reference, open_reference
from evaluation.report import NAMES

FORMAT_VERSION = 1
ROOT = Path(__file__).parents[1]
SCRIPTS = {ComputedCodes.script: "DiTSEM-XL/2", ClassLabels.script: "DiT-XL/2"}  # and the model of each by default
ENVIRONMENT = dict(os.environ)  # of the programs that are launched: the checks may join this one to a process group
LIST_OF_TEXT = list_of(((lambda value: isinstance(value, str)), "text"))
LIST_OF_OBJECTS = list_of(((lambda value: isinstance(value, dict)), "an object"))
# flags of the sampling scripts that can be swept: the type of a value
SWEPT = {
    "cfg-scale": number(float, 1),
    "t-min": number(int, 0, 999),
    "t-max": number(int, 0, 999),
    "num-sampling-steps": number(int, 2, 1000),
    "sampler": str,
}
UNGUIDED = {"t-min": 0, "t-max": 999}  # what the interval counts as without guidance

#################################################################################
#                                   Settings                                    #
#################################################################################


def all_settings(values: dict[str, list]) -> list[dict]:
    """The combinations of values by flag, in order, each once: dicts by flag."""
    settings = []
    for combination in itertools.product(*values.values()):
        setting = dict(zip(values, combination))
        if setting not in settings:
            settings.append(setting)
    return settings


def drawn_as(setting: dict) -> dict:
    """The setting whose samples a setting's are: without guidance, the interval of guidance makes no difference."""
    if setting.get("cfg-scale") != 1:
        return setting
    return {flag: UNGUIDED.get(flag, value) for flag, value in setting.items()}


def name_of(setting: dict) -> str:
    """A folder's name, such as cfg-scale-1.25_t-max-600."""
    return "_".join(f"{flag}-{str(value).replace('+', 'p')}" for flag, value in setting.items())


def words_of(setting: dict) -> str:
    return ", ".join(f"{flag} {value}" for flag, value in setting.items())


class Sweep:
    """OUT/: what is known of each setting. Results are kept of settings that this launch does not ask for, too.

    Args:
        out: OUT/.
        flags: "sampling", of that script, and "evaluation", of evaluate.py, that all settings share.

    Raises ValueError where OUT holds a sweep with other flags.
    """

    def __init__(self, out, flags: dict[str, list[str]]):
        self.out, self.flags, self.results = Path(out), flags, []
        self.path = self.out / "sweep.json"
        if self.path.exists():
            values = read_json(self.path)
            kinds = dict(sampling=LIST_OF_TEXT, evaluation=LIST_OF_TEXT, results=LIST_OF_OBJECTS)
            check_values(self.path, values, kinds, kinds)
            for what, given in flags.items():
                if values[what] != given:
                    raise ValueError(
                        f"{self.out} holds a sweep with other flags of {what}: {one_line(' '.join(values[what]), 80)} "
                        f"there, {one_line(' '.join(given), 80)} here; give another --out"
                    )
            self.results = values["results"]
            for result in self.results:
                wanted = dict(setting=dict, metrics=dict)
                if not all(isinstance(result.get(key), kind) for key, kind in wanted.items()):
                    raise ValueError(f"{self.path} is not a sweep's: a result lacks its setting or its metrics")

    def result_of(self, setting: dict) -> dict | None:
        """The metrics of a setting, by name; None where it is not finished."""
        wanted = drawn_as(setting)
        return next((result["metrics"] for result in self.results if result["setting"] == wanted), None)

    def add(self, setting: dict, metrics: dict) -> None:
        self.results.append(dict(setting=drawn_as(setting), metrics=metrics))
        write_json(self.path, dict(format_version=FORMAT_VERSION, **self.flags, results=self.results))

    def run(self, settings: list[dict], measure, say=print) -> list[tuple[dict, dict]]:
        """(setting, metrics) of all settings. measure(setting, folder) draws and evaluates one that is not known."""
        for place, setting in enumerate(settings, 1):
            if self.result_of(setting) is None:
                say(f"setting {place} of {len(settings)}: {words_of(drawn_as(setting))}")
                self.add(setting, measure(drawn_as(setting), self.out / name_of(drawn_as(setting))))
        return [(setting, self.result_of(setting)) for setting in settings]


#################################################################################
#                               Table and plot                                  #
#################################################################################


def numbers_of(results: list[tuple[dict, dict]]) -> list[str]:
    """The names of the metrics that some setting has, those of a table of evaluate.py alone."""
    return [name for name in (*NAMES, "code_agreement") if any(name in metrics for _, metrics in results)]


def table_of(results: list[tuple[dict, dict]]) -> str:
    """The results as lines of aligned columns."""
    names = numbers_of(results)
    rows = [[*results[0][0], *names]]
    for setting, metrics in results:
        numbers = [f"{metrics[name]:.4g}" if name in metrics else "-" for name in names]
        rows.append([*map(str, setting.values()), *numbers])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(row, widths)) for row in rows) + "\n"


def draw_curves(results: list[tuple[dict, dict]], path: Path) -> None:
    """Plot each metric over the flag that has most values, a line per combination of the others.

    Raises ImportError where matplotlib is not installed.
    """
    from matplotlib.figure import Figure  # no display, and no state of pyplot

    flags, names = list(results[0][0]), numbers_of(results)
    values = {flag: list(dict.fromkeys(setting[flag] for setting, _ in results)) for flag in flags}
    axis = max(flags, key=lambda flag: (len(values[flag]) if flag != "sampler" else 0, -flags.index(flag)))
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.4 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    lines = {}
    for setting, metrics in results:
        others = tuple((flag, value) for flag, value in setting.items() if flag != axis and len(values[flag]) > 1)
        lines.setdefault(others, []).append((setting[axis], metrics))
    for name, panel in zip(names, grid):
        for others, points in lines.items():
            points = sorted((x, metrics[name]) for x, metrics in points if name in metrics)
            panel.plot(*zip(*points), marker="o", markersize=4, label=words_of(dict(others)))
        panel.set(xlabel=axis, ylabel=NAMES.get(name, (name.replace("_", " "),))[0])
        panel.grid(alpha=0.3)
    if len(lines) > 1:
        grid[0].legend(fontsize="small")
    for panel in grid[len(names) :]:
        panel.set_axis_off()
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=120))


def report(results: list[tuple[dict, dict]], out: Path, say=print) -> None:
    """Print and write the table, and draw the plot where matplotlib is there."""
    table = table_of(results)
    say(table, end="")
    write_bytes(out / "sweep.txt", table.encode())
    try:
        draw_curves(results, out / "sweep.png")
        say(f"written to {out / 'sweep.txt'}; look at {out / 'sweep.png'}")
    except ImportError:
        say(f"written to {out / 'sweep.txt'}; for a plot, pip install matplotlib and run the same command again")


#################################################################################
#                                    Command                                    #
#################################################################################


def add_sweep_flags(add) -> None:
    for flag, kind in SWEPT.items():
        add(f"--{flag}", type=kind, nargs="+", help=f"try these values of the sampling script's --{flag} [its default]")
    add("--reference", help="compare with this, as evaluate.py does [none]")
    add("--agreement", action="store_true", help="measure code agreement too, as evaluate.py agreement does")
    add("--out", default="sweep", help="write samples, results, table and plot here")
    add("--script", choices=SCRIPTS, default=ComputedCodes.script, help="draw with this script")
    add("--processes", type=number(int, 1), default=1, help="start so many processes per launch, such as one per GPU")
    add("--discard", action="store_true", help="remove the samples of a setting once it is evaluated")


def left_by(argv: list[str], *known) -> list[str]:
    """The flags that none of these functions adds."""
    parser = ArgumentParser("", add_help=False)
    for add_flags in known:
        add_flags(parser.add_argument)
    return parser.parse_known_args(argv)[1]


def parse_args(argv: list[str]):
    """The parser; all flags before --; those after it; and both as lists of texts, by the program that gets them.

    Those of the others are parsed here too, so that a mistake is not found after hours of sampling.
    """
    own, sampling = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = ArgumentParser(__doc__, usage="%(prog)s FLAGS -- FLAGS OF THE SAMPLING SCRIPT")
    add_sweep_flags(parser.add_argument)
    add_comparison_flags(parser.add_argument_group("handed on to evaluate.py").add_argument)
    add_agreement_flags(parser.add_argument_group("handed on to evaluate.py agreement").add_argument)
    args = parser.parse_args(own)
    drawing = sampling_parser("", args.script, SCRIPTS[args.script]).parse_args(sampling)
    handed = dict(
        sampling=sampling,
        evaluation=left_by(own, add_sweep_flags, add_agreement_flags),
        agreement=left_by(own, add_sweep_flags, add_comparison_flags),
    )
    return parser, args, drawing, handed


def is_compared(args) -> bool:
    """Whether evaluate.py is to measure something."""
    return bool(args.reference) or bool(args.metrics) and not needs_reference(args.metrics)


def check_flags(args, handed: dict[str, list[str]]) -> dict[str, list]:
    """The values of the swept flags. Raises ValueError for flags that clash, and where there is nothing to do."""
    check_comparison_flags(args)
    check_agreement_flags(args)
    values = {flag: getattr(args, flag.replace("-", "_")) for flag in SWEPT}
    values = {flag: given for flag, given in values.items() if given is not None}
    if not values:
        raise ValueError(f"nothing to sweep: give values of one or more of --{', --'.join(SWEPT)}")
    given = {text.split("=")[0] for text in handed["sampling"]}
    for flag in values:
        if f"--{flag}" in given:
            raise ValueError(f"--{flag} after -- is a flag that is swept: give its values before --")
    if "--sample-dir" in given:
        raise ValueError("--sample-dir after -- is for sweep to choose: give --out")
    if not is_compared(args) and handed["evaluation"]:
        raise ValueError(f"{handed['evaluation'][0]} goes with --reference: without one only --agreement is measured")
    if not args.agreement and handed["agreement"]:
        raise ValueError(f"{handed['agreement'][0]} goes with --agreement")
    if not is_compared(args) and not args.agreement:
        raise ValueError("nothing to measure: give --reference, --agreement or both")
    if args.features not in NETWORKS:
        raise ValueError(f"--features {args.features}: stored features are not of samples that a sweep draws")
    if args.reference and not Path(args.reference).exists():
        raise ValueError(f"--reference {args.reference} does not exist")
    if (args.crop or args.resize) and not (args.reference and Path(args.reference).is_dir()):
        raise ValueError("--crop and --resize are for folders, and --reference is none")
    if args.agreement and args.script != ComputedCodes.script:
        raise ValueError(f"--agreement is of samples for codes, which {args.script} does not draw")
    for setting in all_settings(values):
        if setting.get("t-min", 0) > setting.get("t-max", 999):
            raise ValueError(f"t-min {setting['t-min']} is above t-max {setting['t-max']}: leave one of them out")
        if setting.get("sampler", "ddpm") not in SAMPLERS:
            raise ValueError(f"--sampler {setting['sampler']}: wanted one of {', '.join(SAMPLERS)}")
    return values


def check_measures(args, drawing) -> None:
    """Raise ValueError for what would hinder the evaluation of samples that are yet to be drawn."""
    if is_compared(args):
        reference = open_reference(args.reference, args.crop, args.resize) if args.reference else Reference(None)
        paths = find_networks(args, networks_of(args.features, wanted_metrics(args)))
        networks = {name: NETWORKS[name](path, torch.device("cpu")) for name, path in paths.items()}
        comparison_of(args, reference, networks, None).check_counts(drawing.num_fid_samples)
    if args.agreement:
        check_before_drawing(args, drawing, SCRIPTS[args.script])


def flags_of(setting: dict) -> list[str]:
    return [text for flag, value in setting.items() for text in (f"--{flag}", str(value))]


def launch(processes: int, script: Path, flags: list[str], what: str) -> None:
    """Run a script of ours by so many processes. Raises ValueError where it fails, which it explains itself."""
    prefix = [sys.executable]
    if processes > 1:
        prefix += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    status = subprocess.run([*prefix, str(script), *flags], env=ENVIRONMENT).returncode
    if status:
        raise ValueError(f"{what} ended with exit status {status} (see above)")


def draw_and_evaluate(args, handed: dict[str, list[str]], setting: dict, folder: Path) -> dict:
    """Draw the samples of a setting into a folder and evaluate them. Returns the metrics by name."""
    what = words_of(setting)
    launch(
        args.processes,
        ROOT / args.script,
        [*handed["sampling"], *flags_of(setting), "--sample-dir", str(folder)],
        f"sampling with {what}",
    )
    sets = sorted(folder.glob("*.npz"))
    if len(sets) != 1:
        raise ValueError(f"{folder} holds {len(sets)} .npz, wanted the one just drawn: remove the others")
    evaluate, metrics = ROOT / "evaluate.py", sets[0].with_suffix(".metrics.json")
    if is_compared(args):
        reference = ["--reference", args.reference] if args.reference else []
        flags = [str(sets[0]), *reference, *handed["evaluation"]]
        launch(args.processes, evaluate, flags, f"evaluation with {what}")
    if args.agreement:
        flags = ["agreement", str(sets[0]), *handed["agreement"]]
        launch(args.processes, evaluate, flags, f"agreement with {what}")
    found = read_json(metrics)
    values = dict(found.get("metrics", {}))
    if args.agreement:
        values["code_agreement"] = found["code_agreement"]["share"]
    if args.discard:
        shutil.rmtree(sets[0].with_suffix(""))
        sets[0].unlink()
    return values


def main():
    parser, args, drawing, handed = parse_args(sys.argv[1:])
    with parser.one_line_errors():
        settings = all_settings(check_flags(args, handed))
        measured = [*(["--reference", args.reference] if args.reference else []), *handed["evaluation"]]
        measured += ["--agreement", *handed["agreement"]] if args.agreement else []
        sweep = Sweep(args.out, dict(sampling=handed["sampling"], evaluation=measured))
        if any(sweep.result_of(setting) is None for setting in settings):
            check_measures(args, drawing)
        lock = DirectoryLock(args.out)
        lock.acquire()
    with parser.kept_on_error("finished settings are kept", "--processes", (ValueError, OSError)):
        results = sweep.run(settings, lambda *setting: draw_and_evaluate(args, handed, *setting))
        report(results, sweep.out)
    lock.release()


if __name__ == "__main__":
    main()
