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
from dataclasses import replace
from pathlib import Path

from dlc.machine.cli import ArgumentParser
from dlc.machine.files import check_writable
from dlc.machine.processes import create_logger, done_by_rank_0, start_processes
from evaluation.comparison import DEFAULTS, METRICS, Comparison, Result, needs_reference, networks_of
from evaluation.feature_file import NAME as FEATURE_FILE
from evaluation.feature_file import FileNetwork, read_features
from evaluation.flags import (
    add_comparison_flags,
    check_comparison_flags,
    comparison_of,
    nothing_written,
    wanted_metrics,
)
from evaluation.measuring import Measured, measure
from evaluation.networks import NETWORKS, open_networks
from evaluation.reference import Reference, open_reference
from evaluation.report import metrics_json, metrics_path, paper_line, table, write_metrics
from evaluation.self_check import check_arithmetic, check_network
from evaluation.sets import open_images

# name: the module whose main() it is, by sys.argv
COMMANDS = {
    "make-reference": "evaluation.make_reference",
    "reconstruction": "evaluation.reconstruction",
    "agreement": "evaluation.agreement",
    "sweep": "evaluation.sweep",
}


def parse_args():
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("samples", nargs="?", metavar="SAMPLES", help="samples: an .npz with arr_0, or a folder of images")
    add("--reference", help="compare with this: an .npz of ADM's or make-reference's, or a folder of images")
    add_comparison_flags(add)
    add("--output", help="write the numbers to this JSON file [SAMPLES.metrics.json, beside SAMPLES]")
    return parser, parser.parse_args()


def check_flags(args):
    """Raise ValueError for flags that contradict each other."""
    check_comparison_flags(args)
    is_file = args.features not in NETWORKS
    if args.samples is None and not is_file:
        hint = f" (the commands are {', '.join(COMMANDS)})"
        raise ValueError(f"SAMPLES is missing: name an .npz or a folder of images{hint}")
    if args.reference is None and not is_file and needs_reference(wanted_metrics(args)):
        raise ValueError("--reference is missing: name an .npz or a folder of images to compare with")
    if (args.crop or args.resize) and not any(one and Path(one).is_dir() for one in (args.samples, args.reference)):
        raise ValueError("--crop and --resize are for folders, and neither SAMPLES nor --reference is one")
    if args.output is None:
        args.output = str(metrics_path(Path(args.samples or args.features)))


def main():
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        name = sys.argv.pop(1)
        sys.argv[0] += f" {name}"  # which argparse names in errors
        return importlib.import_module(COMMANDS[name]).main()
    parser, args = parse_args()
    with nothing_written(parser):
        run(args)


def run(args):
    """Compare as args ask for."""
    # ---------------------------------------------------------------------- checks
    check_flags(args)
    itself = check_arithmetic()
    samples = open_images(args.samples, "SAMPLES", args.crop, args.resize) if args.samples else None
    compared = bool(args.reference) and needs_reference(wanted_metrics(args))
    reference = open_reference(args.reference, args.crop, args.resize) if compared else None
    check_writable(args.output, "--output")
    state = start_processes()
    logger = create_logger(state)
    if args.features in NETWORKS:
        comparison, checks = open_comparison(args, reference or Reference(None), state)
    else:
        comparison, checks = open_feature_file(args, samples, reference, state), {}
    early = comparison.warnings_of(samples)
    if args.reference and not compared:
        early.append("--reference is not used: no metric compares with it")
    logger.info(f"self-check passed: the distance of a set to itself is {itself:.1e}; {describe(checks)}")
    if samples:
        logger.info(f"{samples.count:,} samples of {samples.size[1]} x {samples.size[0]} in {samples.path}")
    for line in [*(samples.notes if samples else ()), *(folder_notes(reference) if reference else ()), *early]:
        logger.warning(f"warning: {line}")

    # ---------------------------------------------------------------------- features and metrics
    if args.features in NETWORKS:
        result = comparison(samples)
    else:
        result = judge_feature_file(comparison, samples, state)
    if state.is_main_process:
        self_check = dict(distance_to_itself=itself, networks=checks)
        for line in result.warnings:
            if line not in early:
                logger.warning(f"warning: {line}")
        for line in table(result.values):
            logger.info(line)
        try:
            write_metrics(Path(args.output), metrics_json(result, comparison, samples, self_check))
            logger.info(f"written to {args.output}")
        finally:  # a disk that is full takes nothing of the numbers
            logger.info(f"to paste: {paper_line(result, comparison, samples)}")
    state.wait_for_everyone()
    state.destroy_process_group()


def open_comparison(args, reference, state):
    """The Comparison by networks that args ask for, and what the self-check found of each network."""
    networks = open_networks(args, networks_of(args.features, wanted_metrics(args)), state)
    comparison = comparison_of(args, reference, networks, state)
    checks = done_by_rank_0(state, lambda: {name: check_network(one, reference)[1] for name, one in networks.items()})
    return comparison, checks


def open_feature_file(args, images, reference, state):
    """The Comparison of the features in an .npz. Raises ValueError where it lacks what a metric needs."""
    samples, measured, probs = read_features(args.features)
    if images and images.count != samples.count:
        raise ValueError(
            f"--features {args.features} is of {samples.count:,} samples, and SAMPLES are {images.count:,}"
        )
    network = FileNetwork(args.features, samples, probs)
    has = {"statistics"} | ({"features"} if measured else set()) | ({"probabilities"} if probs is not None else set())
    there = measured.statistics if measured else {(FEATURE_FILE, "spatial")}  # of a --reference it is checked later
    has |= {"spatial"} if "spatial" in network.outputs and (FEATURE_FILE, "spatial") in there else set()
    metrics = args.metrics or [name for name in DEFAULTS[FEATURE_FILE] if METRICS[name] in has]
    for name in metrics:
        if METRICS[name] not in has:
            raise ValueError(f"--metrics {name} needs {METRICS[name]}, which --features {args.features} does not hold")
    if not needs_reference(metrics):
        reference = Reference(None)
    elif measured is None and reference is None:
        raise ValueError(f"--features {args.features} has no array reference (M, D): add it, or give --reference")
    elif reference is None:
        reference = Reference(Path(args.features))
    elif not reference.statistics:
        raise ValueError(f"--reference {args.reference} has no mu and sigma, with which features could be compared")
    else:  # its statistics are taken to be of these features, and its images are not run
        reference = replace(reference, network=FEATURE_FILE, images=None, network_sha256=None, probe=None)
    measured = measured or Measured(0)
    return Comparison(
        reference, {FEATURE_FILE: network}, metrics, state, args.pr_precision, args.global_seed, measured=measured
    )


def judge_feature_file(comparison, images, state) -> Result:
    """The numbers of the features in an .npz; with the images that they are of, also digests and warnings of those."""
    found = comparison.networks[FEATURE_FILE].measured
    if images:
        measured = measure(images, [], state)
        found.digest, found.twins, found.blank = measured.digest, measured.twins, measured.blank
    return comparison.judge(found, images) if state.is_main_process else Result()


def folder_notes(reference):
    """What was left out of a folder of reference images; beside the images of an .npz, everything is used."""
    return reference.images.notes if reference.path.is_dir() else ()


def describe(checks) -> str:
    """The self-check of the networks in words."""
    found = [f"{name}'s features differ by {error:.1e} from float64's" for name, error in checks.items()]
    return ", ".join(found) or "no network is run"


if __name__ == "__main__":
    main()
