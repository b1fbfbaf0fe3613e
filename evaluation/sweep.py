"""The guidance curve: draw and evaluate samples for each of several settings; one table and one plot of all of them.

    python evaluate.py sweep --cfg-scale 1.0 1.25 1.5 --t-max 600 999 --reference VIRTUAL_imagenet256_labeled.npz \\
        --out sweep -- --model DiTSEM-XL/2 --num-fid-samples 50000

In: the values of each swept flag, of which all combinations are tried; flags of evaluate.py and of its agreement; and,
after --, flags of the sampling script. Out: OUT/{setting}/ with the samples of each, OUT/sweep.json, OUT/sweep.txt (the
table) and OUT/sweep.png (the plot), and OUT/ema-{length}-at-{images}/, the EMAs of --ema-length. The same command run
again continues; no finished setting is repeated, so values may be added. Without guidance (--cfg-scale 1, --guide-scale
1) its interval makes no difference: such settings are drawn once. Settings that would guide by --guide-scale and
another scale are left out. Table and plot have means over --seeds, with their standard errors.
"""

import itertools
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np

from diffusion.process_table import LATENT_SAMPLERS
from dlc.machine.cli import SEED, ArgumentParser, number, one_line
from dlc.machine.files import DirectoryLock, check_apart, check_output, read_json, write_bytes, write_json, write_whole
from dlc.sampling.conditions import ClassLabels, ComputedCodes
from dlc.sampling.opening import find_checkpoint
from dlc.sampling.sampling_flags import STEPS, TIME, sampling_parser, settle_guidance
from dlc.weights.load import newest_in
from dlc.weights.meta import read_meta
from dlc.weights.power_ema import LENGTH, rebuild
from evaluation.agreement import add_agreement_flags, check_agreement_flags
from evaluation.comparison import add_comparison_flags, check_comparison_flags, needs_reference
from evaluation.report import metric_rows

FORMAT_VERSION = 1
ROOT = Path(__file__).parents[1]
SCRIPTS = {ComputedCodes.script: "DiTSEM-XL/2", ClassLabels.script: "DiT-XL/2"}  # and the model of each by default
SEEDS = "seeds"  # --global-seed is KID's here
# flags of the sampling scripts that can be swept: the type of a value
SWEPT = {
    "ema-length": LENGTH,  # of no script: the EMA is rebuilt for --ckpt
    "cfg-scale": number(float, 1),
    "t-min": TIME,
    "t-max": TIME,
    "guide-ckpt": str,
    "guide-scale": number(float, 1),
    "internal-scale": number(float, 1),
    "guide-t-min": TIME,
    "guide-t-max": TIME,
    "num-sampling-steps": STEPS,
    "sampler": str,
    SEEDS: SEED,
}
# the interval of each kind of guidance, by the flag of its scale
OF_GUIDE = ("guide-t-min", "guide-t-max")
INTERVALS = {"cfg-scale": ("t-min", "t-max"), "guide-scale": OF_GUIDE, "internal-scale": OF_GUIDE}
Setting = dict  # a value of each swept flag
AGREEMENT, CHANCE = "code_agreement", "code_agreement_by_chance"  # among the metrics of a sweep.json


def sampling_flag(flag: str) -> str:
    """What the sampling scripts call a swept flag."""
    return "global-seed" if flag == SEEDS else flag


def sampling_flags(setting: Setting) -> list[str]:
    """A setting's words on the sampling script's command line. An EMA is rebuilt, and has no flag there."""
    given = {sampling_flag(flag): value for flag, value in setting.items() if flag != "ema-length"}
    return [text for flag, value in given.items() for text in (f"--{flag}", str(value))]


#################################################################################
#                                   Settings                                    #
#################################################################################


def all_settings(values: dict[str, list]) -> list[Setting]:
    """The combinations of values by flag, in order, each once; none by --guide-scale and another scale, too."""
    settings = []
    for combination in itertools.product(*values.values()):
        setting = dict(zip(values, combination))
        guides = {scale for scale in INTERVALS if setting.get(scale, 1) > 1}
        if setting not in settings and not (len(guides) > 1 and "guide-scale" in guides):
            settings.append(setting)
    return settings


def drawn_as(setting: Setting) -> Setting:
    """The setting whose samples a setting uses: one without what makes no difference where a scale is 1."""
    off = {scale for scale in INTERVALS if setting.get(scale) == 1}
    unused = {flag for scale in off for flag in INTERVALS[scale]}
    unused -= {flag for scale in INTERVALS if setting.get(scale, 1) > 1 for flag in INTERVALS[scale]}
    if "cfg-scale" in setting:  # else it has another default beside a guide
        unused |= off - {"cfg-scale"} | ({"guide-ckpt"} if "guide-scale" in off else set())
    return {flag: value for flag, value in setting.items() if flag not in unused}


def folder_of(setting: Setting) -> str:
    """A folder's name, such as cfg-scale-1.25_t-max-600."""
    return "_".join(f"{flag}-{str(value).replace('+', 'p').replace('/', '-')}" for flag, value in setting.items())


def words_of(setting: Setting) -> str:
    return ", ".join(f"{flag} {value}" for flag, value in setting.items())


def known_results(path: Path, flags: dict[str, list[str]]) -> list[dict]:
    """The finished settings in a sweep.json, of this launch or not: dicts of `setting` and `metrics`.

    Args:
        flags: "sampling", of that script, and "evaluation", of evaluate.py, that all settings share.

    Raises ValueError where it belongs to a sweep with other flags.
    """
    if not path.exists():
        return []
    values = read_json(path)
    for what, given in flags.items():
        if values.get(what) != given:
            there, here = (one_line(flags, 120) for flags in (values.get(what), given))
            raise ValueError(f"{path} has other flags of {what}: {there} there, {here} here; give another --out")
    results = values.get("results")
    if not isinstance(results, list) or not all(
        isinstance(one, dict) and {"setting", "metrics", "common"} <= {*one} for one in results
    ):
        raise ValueError(f"{path} is damaged: a result lacks its setting, its metrics or what it has in common")
    return results


def common_of(found: dict) -> dict:
    """What all settings of a sweep share, out of a .metrics.json: the model, and what its samples are compared with."""
    drawn = found["samples"]["settings"] or {}
    keys = ("checkpoint", "step", "weights_sha256", "vae_sha256", "conditions")
    return {key: drawn.get(key) for key in keys} | {key: found.get(key) for key in ("reference", "networks")}


#################################################################################
#                               Table and plot                                  #
#################################################################################


def over_seeds(results: list[tuple[Setting, dict]]) -> list[tuple[Setting, dict]]:
    """The results with those that differ in the seed alone in one: (setting, {metric: [mean, standard error]}).

    Without several seeds, a list has the number alone.
    """
    groups = {}
    for setting, metrics in results:
        setting = {flag: value for flag, value in setting.items() if flag != SEEDS}
        groups.setdefault(words_of(setting), (setting, []))[1].append(metrics)
    means = []
    for setting, found in groups.values():
        common = [name for name in found[0] if all(name in metrics for metrics in found)]
        values = {name: np.array([metrics[name] for metrics in found]) for name in common}
        errors = {name: [one.std(ddof=1) / len(one) ** 0.5] if len(one) > 1 else [] for name, one in values.items()}
        means.append((setting, {name: [one.mean(), *errors[name]] for name, one in values.items()}))
    return means


def labels_of(results: list[tuple[Setting, dict]]) -> dict[str, str]:
    """The metrics that some setting has, those of a table of evaluate.py alone: {name: label}."""
    found = {name: None for _, metrics in results for name in metrics}
    labels = {name: row.label for name, row in metric_rows(found).items()}
    return {**labels, AGREEMENT: "code agreement"} if AGREEMENT in found else labels


def table_of(results: list[tuple[Setting, dict]]) -> str:
    """Results of `over_seeds` as lines of aligned columns."""
    names = labels_of(results)
    rows = [[*results[0][0], *names]]
    for setting, metrics in results:
        numbers = [" ± ".join(f"{number:.4g}" for number in metrics.get(name, [])) or "-" for name in names]
        rows.append([*map(str, setting.values()), *numbers])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(row, widths)) for row in rows) + "\n"


def draw_curves(results: list[tuple[Setting, dict]], path: Path) -> None:
    """Plot each metric over the flag that has most values, a line per combination of the others."""
    from matplotlib.figure import Figure  # no display, and no state of pyplot

    flags, labels = list(results[0][0]), labels_of(results)
    values = {flag: list(dict.fromkeys(setting[flag] for setting, _ in results)) for flag in flags}
    axis = max(flags, key=lambda flag: (0 if SWEPT[flag] is str else len(values[flag]), -flags.index(flag)))
    columns = min(3, len(labels))
    rows = -(-len(labels) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.4 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    lines = {}
    for setting, metrics in results:
        others = {flag: value for flag, value in setting.items() if flag != axis and len(values[flag]) > 1}
        lines.setdefault(words_of(others), []).append((setting[axis], metrics))
    for (name, label), panel in zip(labels.items(), grid):
        for others, points in lines.items():
            numbers = sorted((x, *metrics[name]) for x, metrics in points if name in metrics)
            x, y, *errors = zip(*numbers) if numbers else ((), ())  # an empty line keeps the others' colours
            panel.errorbar(x, y, *errors, marker="o", markersize=4, capsize=3, label=others)
        chance = [metrics[CHANCE][0] for _, metrics in results if name == AGREEMENT and CHANCE in metrics]
        if chance:
            level = float(np.mean(chance))
            panel.axhline(level, color="grey", linestyle="--")
            panel.annotate("chance", (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom")
        panel.set(xlabel=axis, ylabel=label)
        panel.grid(alpha=0.3)
    if len(lines) > 1:
        grid[0].legend(fontsize="small")
    for panel in grid[len(labels) :]:
        panel.set_axis_off()
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=120))


#################################################################################
#                                    Command                                    #
#################################################################################


def add_sweep_flags(add: Callable) -> None:
    for flag, kind in SWEPT.items():
        about = f"try these values of the sampling script's --{sampling_flag(flag)} [its default]"
        if flag == "ema-length":
            about = "draw from EMAs of these lengths, rebuilt from the run of --ckpt, which has --ema-lengths [its EMA]"
        add(f"--{flag}", type=kind, nargs="+", choices=LATENT_SAMPLERS if flag == "sampler" else None, help=about)
    add("--reference", help="compare with this, as evaluate.py does [none]")
    add("--agreement", action="store_true", help="measure code agreement, too, as evaluate.py agreement does")
    add("--out", default="sweep", help="write samples, results, table and plot here")
    add("--script", choices=SCRIPTS, default=ComputedCodes.script, help="draw with this script")
    add("--processes", type=number(int, 1), default=1, help="start this many processes per launch, such as one per GPU")
    add(
        "--discard",
        action="store_true",
        help="remove the samples of a setting after its evaluation, and the EMAs at the end",
    )


def left_by(argv: list[str], *known) -> list[str]:
    """The flags that none of these functions adds."""
    parser = ArgumentParser("", add_help=False)
    for add_flags in known:
        add_flags(parser.add_argument)
    return parser.parse_known_args(argv)[1]


def parse_args(argv: list[str] | None) -> tuple[ArgumentParser, Namespace, dict[str, list[str]]]:
    """The parser; all flags before --; and, as lists of texts, what sampling, evaluation and agreement get of all."""
    argv = sys.argv[1:] if argv is None else argv
    end = argv.index("--") if "--" in argv else len(argv)
    own, sampling = argv[:end], argv[end + 1 :]
    usage = "%(prog)s FLAGS -- FLAGS OF THE SAMPLING SCRIPT"
    parser = ArgumentParser(__doc__, prog="evaluate.py sweep", usage=usage)
    add_sweep_flags(parser.add_argument)
    add_comparison_flags(parser.add_argument_group("handed on to evaluate.py").add_argument)
    add_agreement_flags(parser.add_argument_group("handed on to evaluate.py agreement").add_argument)
    args = parser.parse_args(own)
    reference = ["--reference", args.reference] if args.reference else []
    handed = dict(
        sampling=sampling,
        evaluation=reference + left_by(own, add_sweep_flags, add_agreement_flags),
        agreement=left_by(own, add_sweep_flags, add_comparison_flags),
    )
    return parser, args, handed


def without(words: list[str], flag: str) -> list[str]:
    """Words of a command line without a flag and its value."""
    kept = [word for before, word in zip(["", *words], words) if flag not in (before, word)]
    return [word for word in kept if not word.startswith(f"{flag}=")]


def is_compared(args: Namespace) -> bool:
    """Whether evaluate.py is to measure something."""
    return bool(args.reference) or bool(args.metrics) and not needs_reference(args.metrics)


def check_flags(args: Namespace, handed: dict[str, list[str]]) -> list[Setting]:
    """All settings. Raises ValueError for flags that clash, and where there is nothing to do."""
    check_comparison_flags(args)
    check_agreement_flags(args)
    values = {flag: getattr(args, flag.replace("-", "_")) for flag in SWEPT}
    values = {flag: given for flag, given in values.items() if given is not None}
    if not values.keys() - {SEEDS}:
        raise ValueError(f"nothing to sweep: give values of one or more of --{', --'.join(SWEPT)}, not of seeds alone")
    taken = {f"--{sampling_flag(flag)}": f"give its values before --, with --{flag}" for flag in values}
    taken |= {"--sample-dir": "give --out", "--part": "it draws all samples of each setting"}
    taken |= {"--no-ema": "--ema-length asks for EMAs"} if args.ema_length else {}
    for flag in (text.split("=")[0] for text in handed["sampling"]):
        if flag in taken:
            raise ValueError(f"{flag} after -- is for sweep to choose: {taken[flag]}")
    for flags, wanted, with_what in (
        (handed["evaluation"], is_compared(args), "--reference: without one only --agreement is measured"),
        (handed["agreement"], args.agreement, "--agreement"),
    ):
        if flags and not wanted:
            raise ValueError(f"{flags[0]} goes with {with_what}")
    if not is_compared(args) and not args.agreement:
        raise ValueError("nothing to measure: give --reference, --agreement or both")
    if args.reference and not Path(args.reference).exists():
        raise ValueError(f"--reference {args.reference} does not exist")
    if args.agreement and args.script != ComputedCodes.script:
        raise ValueError(f"--agreement needs samples for codes, which {args.script} does not draw")
    return all_settings(values)


def launch(processes: int, script: Path, flags: list[str], what: str) -> None:
    """Run a script of this repository in this many processes. Raises ValueError if it fails, after its own message."""
    prefix = [sys.executable]
    if processes > 1:
        prefix += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    status = subprocess.run([*prefix, str(script), *flags]).returncode
    if status:
        raise ValueError(f"{what} ended with exit status {status} (see above)")


def rebuilt(args: Namespace, length: float) -> Path:
    """The EMA of a length as of the sweep's checkpoint, args.ckpt, in OUT/, made unless it is there.

    Raises ValueError where that is no checkpoint of a run that has snapshots of EMAs.
    """
    checkpoint = Path(newest_in(args.ckpt, ("config.json", "meta.json")))
    images = read_meta(checkpoint).ema_images if (checkpoint / "meta.json").is_file() else None
    run, out = checkpoint.absolute().parents[1], Path(args.out) / f"ema-{length:g}-at-{images}"
    if not images or not (run / "ema").is_dir():
        raise ValueError(f"--ema-length: {args.ckpt} is no checkpoint of a run that was trained with --ema-lengths")
    if not out.is_dir():
        print(*rebuild(Namespace(run=run, length=length, at=images, out=out)), sep="\n", flush=True)
    return out


def draw_and_evaluate(args: Namespace, handed: dict[str, list[str]], setting: Setting) -> dict:
    """Draw the samples of a setting into its folder and evaluate them. Returns an entry of a sweep.json's `results`."""
    what, folder, evaluate = words_of(setting), Path(args.out) / folder_of(setting), ROOT / "evaluate.py"
    sampling = handed["sampling"]
    if "ema-length" in setting:
        sampling = [*without(sampling, "--ckpt"), "--ckpt", str(rebuilt(args, setting["ema-length"]))]
    flags = [*sampling, *sampling_flags(setting), "--sample-dir", str(folder), "--part", "0/1"]
    launch(args.processes, ROOT / args.script, flags, f"sampling with {what}")
    sets = sorted(folder.glob("*.npz"))
    if len(sets) != 1:
        raise ValueError(f"{folder} holds {len(sets)} .npz, wanted the one just drawn: remove the others")
    samples = str(sets[0])
    if is_compared(args):
        launch(args.processes, evaluate, [samples, *handed["evaluation"]], f"evaluation with {what}")
    if args.agreement:
        launch(args.processes, evaluate, ["agreement", samples, *handed["agreement"]], f"agreement with {what}")
    found = read_json(sets[0].with_suffix(".metrics.json"))
    values = dict(found.get("metrics", {}))
    if args.agreement:
        values.update({AGREEMENT: found[AGREEMENT]["share"], CHANCE: found[AGREEMENT]["chance"]})
    if args.discard:
        shutil.rmtree(sets[0].with_suffix(""), ignore_errors=True)
        sets[0].unlink()
    common = common_of(found)
    if "ema-length" in setting:  # whose weights are those of its row
        common.update(checkpoint=args.ckpt, weights_sha256=None)
    return dict(setting=setting, metrics=values, samples_sha256=found["samples"]["sha256"], common=common)


def main(argv: list[str] | None = None) -> None:
    parser, args, handed = parse_args(argv)
    drawing = sampling_parser("", args.script, SCRIPTS[args.script])
    drawing.prog = parser.prog
    drawn = drawing.parse_args(handed["sampling"])  # a mistake ends here, before anything is drawn
    measured = handed["evaluation"] + (["--agreement", *handed["agreement"]] if args.agreement else [])
    out, shared = Path(args.out), dict(sampling=handed["sampling"], evaluation=measured)
    with parser.one_line_errors():
        settings = check_flags(args, handed)
        for setting in map(drawn_as, settings):  # one that is refused ends it here, too
            settle_guidance(drawing.parse_args([*handed["sampling"], *sampling_flags(setting)]))
        results = known_results(out / "sweep.json", shared)
        for name in ("sweep.txt", "sweep.png") if out.is_dir() and not results else ():
            check_output(out / name, "--out", own=["results"])
        check_apart(out, "--out", [args.reference])
        args.ckpt = drawn.ckpt and str(newest_in(drawn.ckpt, ("config.json",)))
        if args.ckpt is None or args.ckpt != drawn.ckpt:  # the newest one may be another by the next setting
            drawn.model = drawn.model or SCRIPTS[args.script]
            found = results[0]["common"]["checkpoint"] if results else args.ckpt or find_checkpoint(drawn)
            args.ckpt, named = str(found), without(handed["sampling"], "--results-dir")
            handed["sampling"] = [*without(named, "--ckpt"), "--ckpt", args.ckpt]
        lock = DirectoryLock(out)
        lock.acquire()
    with parser.one_line_errors("finished settings are kept", "--processes", (ValueError, OSError)):
        for place, setting in enumerate(map(drawn_as, settings), 1):
            if setting not in [one["setting"] for one in results]:
                print(f"setting {place} of {len(settings)}: {words_of(setting)}", flush=True)
                results.append(draw_and_evaluate(args, handed, setting))
                for key, value in results[-1]["common"].items():
                    seed = results[-1]["setting"].get(SEEDS)  # by which rows and labels are drawn
                    alike = (one for one in results if key != "conditions" or one["setting"].get(SEEDS) == seed)
                    if value != next(alike)["common"][key]:
                        raise ValueError(f"{words_of(setting)} has another {key} than those before: give another --out")
                write_json(out / "sweep.json", dict(format_version=FORMAT_VERSION, **shared, results=results))
        found = [next(one["metrics"] for one in results if one["setting"] == drawn_as(setting)) for setting in settings]
        rows = over_seeds([*zip(settings, found)])
        common = results[0]["common"]
        table = f"{table_of(rows)}drawn from {common['checkpoint']}, step {common['step']}\n"
        print(table, end="")
        write_bytes(out / "sweep.txt", table.encode())
        draw_curves(rows, out / "sweep.png")
        for folder in out.glob("ema-*-at-*") if args.discard else ():
            shutil.rmtree(folder)
        print(f"written to {out / 'sweep.txt'}; look at {out / 'sweep.png'}")
    lock.release()
