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
from collections.abc import Callable
from pathlib import Path

from dlc.machine.cli import ArgumentParser
from dlc.machine.files import check_output
from dlc.machine.processes import create_logger, start_processes, wait_for_all
from evaluation.comparison import Comparison, add_comparison_flags
from evaluation.report import METRICS_FILE, metrics_json, metrics_path, paper_line, table, write_metrics

# the commands beside the comparison: a module that has add_flags and run, as this one, or a main(argv); and the flag
# that makes its work need less memory
COMMANDS = {
    "make-reference": ("evaluation.make_reference", "--batch-size"),
    "reconstruction": ("evaluation.reconstruction", "--precision"),
    "agreement": ("evaluation.agreement", "the number of other programs"),
    "sweep": ("evaluation.sweep", ""),
}


def add_flags(add: Callable) -> None:
    add("samples", metavar="SAMPLES", help="evaluate these samples: an .npz with arr_0, or a folder of images")
    add("--reference", help="compare with this: an .npz from ADM or make-reference, or a folder of images")
    add_comparison_flags(add)
    add("--output", help="write the numbers to this JSON file [SAMPLES.metrics.json, beside SAMPLES]")


def main(argv: list[str] | None = None) -> None:
    """Run the command that argv names [sys.argv's], or the comparison."""
    argv = sys.argv[1:] if argv is None else argv
    command, lower, name = sys.modules[__name__], "--batch-size", "evaluate.py"
    if argv and argv[0] in COMMANDS:
        name, (module, lower) = f"evaluate.py {argv[0]}", COMMANDS[argv[0]]
        command, argv = importlib.import_module(module), argv[1:]
        if hasattr(command, "main"):
            return command.main(argv)
    parser, unwritten = ArgumentParser(command.__doc__, prog=name), "nothing was written"
    command.add_flags(parser.add_argument)
    args = parser.parse_args(argv)
    with parser.one_line_errors(unwritten, lower, ()), parser.one_line_errors(unwritten):
        command.run(args)


def run(args: Namespace) -> None:
    """Compare the samples with the reference."""
    # ---------------------------------------------------------------------- checks
    compare, output = Comparison(args), Path(args.output or metrics_path(args.samples))
    inputs = (args.samples, args.reference, *dict(args.weights).values())
    check_output(output, "--output", inputs, own=METRICS_FILE)

    # ---------------------------------------------------------------------- networks, features and metrics
    state, samples = start_processes(), compare.samples
    logger = create_logger(state)
    warnings = compare.open_networks(state)
    logger.info(f"{samples.count:,} samples of {samples.size[1]} x {samples.size[0]} in {samples.path}")
    for line in warnings:
        logger.warning(f"warning: {line}")
    found = compare.measure()
    for line in found:
        logger.warning(f"warning: {line}")
    if state.is_main_process:
        for line in table(compare.values):
            logger.info(line)
        try:
            logger.info(write_metrics(output, samples, compare.found, metrics_json(compare, warnings + found)))
        finally:  # print the numbers even if the disk is full
            logger.info(f"to paste: {paper_line(compare)}")
    wait_for_all()
    state.destroy_process_group()


if __name__ == "__main__":
    main()
