"""The flags of a comparison, which evaluate.py takes, and evaluate.py sweep hands on to it."""

from pathlib import Path

from dlc.cli import SEED, number
from dlc.evaluation.comparison import METRICS
from dlc.evaluation.networks import NETWORKS, add_network_flags


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


def check_comparison_flags(args) -> None:
    """Raise ValueError for such flags that contradict each other."""
    is_file = args.features not in NETWORKS
    if is_file and not args.features.endswith(".npz"):
        raise ValueError(f"--features {args.features} is none of {', '.join(NETWORKS)}, and no .npz of features")
    if args.crop and args.resize:
        raise ValueError("--crop and --resize exclude each other: give one")
    if is_file and not Path(args.features).exists():
        raise ValueError(f"--features {args.features} does not exist")
