"""FID, sFID, Inception Score, precision and recall of samples, with ADM's definitions; KID, density and coverage.

    python evaluate.py samples/FILE.npz --reference VIRTUAL_imagenet256_labeled.npz
    torchrun --nproc_per_node=N evaluate.py samples/FOLDER --reference /path/to/imagenet/val --crop 256
    python evaluate.py make-reference /path/to/imagenet/train OUT.npz --image-size 256

In: samples and a reference, each an .npz or a folder of images. Out: a table, SAMPLES.metrics.json, and a line for a
paper. docs/evaluation.md says what the numbers compare with. Commands beside the comparison, each with --help:
make-reference, reconstruction, agreement, sweep.
"""

import importlib
import sys
from argparse import Namespace
from pathlib import Path

from dlc.machine.cli import ArgumentParser
from dlc.machine.files import check_output
from dlc.machine.processes import create_logger, start_processes, wait_for_all
from evaluation.comparison import (
    Comparison,
    add_comparison_flags,
    check_comparison_flags,
    check_reference,
    needs_reference,
    networks_of,
    wanted_metrics,
)
from evaluation.feature_networks import feature_networks
from evaluation.reference import Reference, open_reference
from evaluation.report import METRICS_FILE, metrics_json, metrics_path, paper_line, table, write_metrics
from evaluation.sets import is_npz, open_images

# the commands beside the comparison, and the modules whose main(argv) they are
COMMANDS = {
    "make-reference": "evaluation.make_reference",
    "reconstruction": "evaluation.reconstruction",
    "agreement": "evaluation.agreement",
    "sweep": "evaluation.sweep",
}


def parse_args(argv: list[str] | None) -> tuple[ArgumentParser, Namespace]:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("samples", metavar="SAMPLES", help="evaluate these samples: an .npz with arr_0, or a folder of images")
    add("--reference", help="compare with this: an .npz from ADM or make-reference, or a folder of images")
    add_comparison_flags(add)
    add("--output", help="write the numbers to this JSON file [SAMPLES.metrics.json, beside SAMPLES]")
    return parser, parser.parse_args(argv)


def check_flags(args: Namespace) -> None:
    """Raise ValueError for flags that contradict each other."""
    check_comparison_flags(args)
    if args.reference is None and needs_reference(wanted_metrics(args)):
        raise ValueError("--reference is missing: name an .npz or a folder of images to compare with")
    if (args.crop or args.resize) and all(one is None or is_npz(one) for one in (args.samples, args.reference)):
        raise ValueError("--crop and --resize do not apply to .npz, which SAMPLES and --reference are")


def main(argv: list[str] | None = None) -> None:
    """Run the command that argv names [sys.argv's], or the comparison."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        return importlib.import_module(COMMANDS[argv[0]]).main(argv[1:])
    parser, args = parse_args(argv)
    unwritten = "nothing was written"
    with parser.one_line_errors(unwritten, "--batch-size", ()), parser.one_line_errors(unwritten):
        run(args)


def run(args: Namespace) -> None:
    """Compare the samples with the reference."""
    # ---------------------------------------------------------------------- checks
    check_flags(args)
    samples, metrics = open_images(args.samples, "SAMPLES", args.crop, args.resize), wanted_metrics(args)
    reference, notes = Reference(None), list(samples.notes)
    if needs_reference(metrics):
        reference = open_reference(args.reference, args.crop, args.resize)
        check_reference(reference, metrics, args.features)
        if not is_npz(args.reference):
            notes += reference.images.notes
    elif args.reference:
        notes.append("--reference is not used: no metric compares with it")
    output = Path(args.output or metrics_path(args.samples))
    inputs = (args.samples, args.reference, *dict(args.weights).values())
    check_output(output, "--output", inputs, own=METRICS_FILE)

    # ---------------------------------------------------------------------- networks
    state = start_processes()
    logger = create_logger(state)
    networks = feature_networks(args, networks_of(metrics, args.features), state)
    compare = Comparison(
        reference, networks, metrics, args.features, state, args.pr_precision, args.global_seed, args.batch_size
    )
    warnings = notes + compare.warnings_of(samples)
    logger.info(f"{samples.count:,} samples of {samples.size[1]} x {samples.size[0]} in {samples.path}")
    for line in warnings:
        logger.warning(f"warning: {line}")

    # ---------------------------------------------------------------------- features and metrics
    result = compare(samples)
    if state.is_main_process:
        for line in result.warnings:
            logger.warning(f"warning: {line}")
        for line in table(result.values):
            logger.info(line)
        try:
            content = metrics_json(result, compare, warnings + result.warnings)
            logger.info(write_metrics(output, samples, result.samples, content))
        finally:  # print the numbers even if the disk is full
            logger.info(f"to paste: {paper_line(result, compare, samples)}")
    wait_for_all()
    state.destroy_process_group()


if __name__ == "__main__":
    main()
