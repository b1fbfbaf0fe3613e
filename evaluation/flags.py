"""The flags of a comparison, which evaluate.py takes, and evaluate.py sweep hands on to it."""

import contextlib
from pathlib import Path

from dlc.machine.cli import SEED, number
from evaluation.comparison import DEFAULTS, METRICS, Comparison, networks_of
from evaluation.feature_file import NAME as FEATURE_FILE
from evaluation.networks import NETWORKS, add_network_flags, check_weights_flags


def add_comparison_flags(add) -> None:
    """Add all but the samples, the reference and the output."""
    add("--metrics", nargs="+", choices=METRICS, metavar="METRIC", help=f"{', '.join(METRICS)} [those of the features]")
    add_network_flags(add, "; or an .npz of features that somebody else computed")
    add("--crop", type=number(int, 1), help="crop the images of folders to this size as ADM does, pixels")
    add("--resize", type=number(int, 1), help="resize the images of folders to this size squared, bicubic, pixels")
    add(
        "--pr-precision",
        choices=["adm", "float32"],
        default="adm",
        help="round the distances of precision and recall; adm: to float16, as in published numbers [%(default)s]",
    )
    add("--global-seed", type=SEED, default=0, help="seed of KID's subsets [%(default)s]")


def wanted_metrics(args) -> tuple[str, ...]:
    """The metrics that the flags ask for; of stored features, those that are computed where they hold enough."""
    return args.metrics or DEFAULTS[args.features if args.features in NETWORKS else FEATURE_FILE]


def check_comparison_flags(args) -> None:
    """Raise ValueError for such flags that contradict each other, or that nothing would read."""
    is_file = args.features not in NETWORKS
    if is_file and not args.features.endswith(".npz"):
        raise ValueError(f"--features {args.features} is none of {', '.join(NETWORKS)}, and no .npz of features")
    if args.crop and args.resize:
        raise ValueError("--crop and --resize exclude each other: give one")
    if is_file and not Path(args.features).exists():
        raise ValueError(f"--features {args.features} does not exist")
    metrics = wanted_metrics(args)
    check_weights_flags(args, [] if is_file else networks_of(args.features, metrics))
    if is_file and args.batch_size:
        raise ValueError(f"--batch-size is of networks, and --features {args.features} runs none: leave it out")
    if args.pr_precision != "adm" and not {"precision", "recall"} & set(metrics):
        raise ValueError(f"--pr-precision {args.pr_precision} is of precision and recall: add them to --metrics")


def comparison_of(args, reference, networks, state) -> Comparison:
    """The Comparison by networks that the flags ask for."""
    return Comparison(
        reference, networks, wanted_metrics(args), state, args.pr_precision, args.global_seed, args.batch_size
    )


@contextlib.contextmanager
def nothing_written(parser):
    """Report what ends a command that writes once, at its end, in one line."""
    kept = "nothing was written"
    with parser.kept_on_error(kept, "--batch-size", ()), parser.one_line_errors(kept):
        yield
