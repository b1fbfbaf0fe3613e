"""The guidance curve: draw and evaluate samples for each of several settings; one table and one plot of all of them.

    python evaluate.py sweep --cfg-scale 1.0 1.25 1.5 --t-max 600 999 --reference VIRTUAL_imagenet256_labeled.npz \\
        --out sweep -- --model DiTSEM-XL/2 --num-fid-samples 50000

In: the values of each swept flag, of which all combinations are tried; flags of evaluate.py; and, after --, flags of
the sampling script. Out: OUT/{setting}/ with the samples of each, OUT/sweep.json, OUT/sweep.txt (the table) and
OUT/sweep.png (the plot; needs matplotlib). The same command run again continues; no finished setting is repeated, so
values may be added. Settings without guidance (--cfg-scale 1) differ by no interval of it and are drawn once.
"""

import itertools
import shutil
import subprocess
import sys
from pathlib import Path

from diffusion.samplers import SAMPLERS
from dlc.cli import ArgumentParser, number, one_line
from dlc.disk import DirectoryLock, check_values, list_of, read_json, write_bytes, write_json, write_whole
from dlc.evaluation.flags import add_comparison_flags, check_comparison_flags
from dlc.evaluation.networks import NETWORKS
from dlc.evaluation.report import NAMES
from dlc.sampling.flags import sampling_parser

FORMAT_VERSION = 1
ROOT = Path(__file__).parents[2]
SCRIPTS = ("sample_ddp_computed_dlc.py", "sample_ddp.py")
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
        flags: of the sampling script and of evaluate.py, by those words, that all settings share.

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
    add("--reference", help="compare with this, as evaluate.py does [none: only --agreement is measured]")
    add("--agreement", action="store_true", help="measure code agreement too, as evaluate.py agreement does")
    add("--out", default="sweep", help="write samples, results, table and plot here")
    add("--script", choices=SCRIPTS, default=SCRIPTS[0], help="draw with this script")
    add("--processes", type=number(int, 1), default=1, help="start so many processes per launch, such as one per GPU")
    add("--discard", action="store_true", help="remove the samples of a setting once it is evaluated")


def parse_args(argv: list[str]):
    """The parser, all flags before --, and, as lists of texts, the flags of evaluate.py and of the sampling script.

    Those of the others are parsed here too, so that a mistake is not found after hours of sampling.
    """
    own, sampling = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = ArgumentParser(__doc__, usage="%(prog)s FLAGS -- FLAGS OF THE SAMPLING SCRIPT")
    add_sweep_flags(parser.add_argument)
    add_comparison_flags(parser.add_argument_group("handed on to evaluate.py").add_argument)
    args = parser.parse_args(own)
    with parser.one_line_errors():
        check_comparison_flags(args)
    sampling_parser("", args.script, "DiT-XL/2").parse_args(sampling)
    splitter = ArgumentParser("", add_help=False)
    add_sweep_flags(splitter.add_argument)
    return parser, args, splitter.parse_known_args(own)[1], sampling


def check_flags(args, evaluation: list[str], sampling: list[str]) -> dict[str, list]:
    """The values of the swept flags. Raises ValueError for flags that clash, and where there is nothing to do."""
    values = {flag: getattr(args, flag.replace("-", "_")) for flag in SWEPT}
    values = {flag: given for flag, given in values.items() if given is not None}
    if not values:
        raise ValueError(f"nothing to sweep: give values of one or more of --{', --'.join(SWEPT)}")
    given = {text.split("=")[0] for text in sampling}
    for flag in values:
        if f"--{flag}" in given:
            raise ValueError(f"--{flag} after -- is a flag that is swept: give its values before --")
    if "--sample-dir" in given:
        raise ValueError("--sample-dir after -- is for sweep to choose: give --out")
    if args.reference is None and not args.agreement:
        raise ValueError("nothing to measure: give --reference, --agreement or both")
    if args.reference is None and evaluation:
        raise ValueError(f"{evaluation[0]} goes with --reference: without one only --agreement is measured")
    if args.features not in NETWORKS:
        raise ValueError(f"--features {args.features}: stored features are not of samples that a sweep draws")
    if args.reference and not Path(args.reference).exists():
        raise ValueError(f"--reference {args.reference} does not exist")
    if (args.crop or args.resize) and not Path(args.reference).is_dir():
        raise ValueError(f"--crop and --resize are for folders, and --reference {args.reference} is none")
    if args.agreement and args.script != SCRIPTS[0]:
        raise ValueError(f"--agreement is of samples for codes, which {args.script} does not draw")
    for setting in all_settings(values):
        if setting.get("t-min", 0) > setting.get("t-max", 999):
            raise ValueError(f"t-min {setting['t-min']} is above t-max {setting['t-max']}: leave one of them out")
        if setting.get("sampler", "ddpm") not in SAMPLERS:
            raise ValueError(f"--sampler {setting['sampler']}: wanted one of {', '.join(SAMPLERS)}")
    return values


def flags_of(setting: dict) -> list[str]:
    return [text for flag, value in setting.items() for text in (f"--{flag}", str(value))]


def launch(processes: int, script: Path, flags: list[str], what: str) -> None:
    """Run a script of ours by so many processes. Raises ValueError where it fails, which it explains itself."""
    prefix = [sys.executable]
    if processes > 1:
        prefix += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    status = subprocess.run([*prefix, str(script), *flags]).returncode
    if status:
        raise ValueError(f"{what} ended with exit status {status} (see above)")


def draw_and_evaluate(args, evaluation: list[str], sampling: list[str], setting: dict, folder: Path) -> dict:
    """Draw the samples of a setting into a folder and evaluate them. Returns the metrics by name."""
    what = words_of(setting)
    launch(
        args.processes,
        ROOT / args.script,
        [*sampling, *flags_of(setting), "--sample-dir", str(folder)],
        f"sampling with {what}",
    )
    sets = sorted(folder.glob("*.npz"))
    if len(sets) != 1:
        raise ValueError(f"{folder} holds {len(sets)} .npz, wanted the one just drawn: remove the others")
    evaluate, metrics = ROOT / "evaluate.py", sets[0].with_suffix(".metrics.json")
    if args.reference:
        flags = [str(sets[0]), "--reference", args.reference, *evaluation]
        launch(args.processes, evaluate, flags, f"evaluation with {what}")
    if args.agreement:
        launch(args.processes, evaluate, ["agreement", str(sets[0])], f"agreement with {what}")
    found = read_json(metrics)
    values = dict(found.get("metrics", {}))
    if args.agreement:
        values["code_agreement"] = found["code_agreement"]["share"]
    if args.discard:
        shutil.rmtree(sets[0].with_suffix(""))
        sets[0].unlink()
    return values


def main():
    parser, args, evaluation, sampling = parse_args(sys.argv[1:])
    with parser.one_line_errors():
        settings = all_settings(check_flags(args, evaluation, sampling))
        measured = [*(["--reference", args.reference] if args.reference else []), *evaluation]
        measured += ["--agreement"] * args.agreement
        sweep = Sweep(args.out, dict(sampling=sampling, evaluation=measured))
        lock = DirectoryLock(args.out)
        lock.acquire()
    with parser.kept_on_error("finished settings are kept", "--processes", (ValueError, OSError)):
        results = sweep.run(settings, lambda *setting: draw_and_evaluate(args, evaluation, sampling, *setting))
        report(results, sweep.out)
    lock.release()


if __name__ == "__main__":
    main()
