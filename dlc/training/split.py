"""Which rows of features a run trains on and which are held out, here or in other features: the flags, and the rows."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dlc.data import Features
from dlc.data.codes import CodeSet, compare
from dlc.data.inputs import check_codes
from dlc.machine.cli import excludes, number
from dlc.machine.noise import Stream, permutation
from dlc.machine.records import differences
from dlc.weights.meta import SAME_LATENTS

if TYPE_CHECKING:
    from dlc.training.image_batches import Images


def add_heldout_flags(add: Callable, what: str, measured: str, default: float) -> None:
    """Add --holdout, --heldout-path and --eval-every.

    Args:
        what, measured: what is held out, in the plural, and what is measured on it, in words.
        default: of --holdout, where nothing else is held out.
    """
    add(
        "--holdout",
        type=number(float, 0, 0.9),
        help=f"hold out this share of the {what}, to measure the {measured} on them; 0 holds none out [{default}]",
    )
    add(
        "--heldout-path",
        help=f"measure on the {what} of these features instead, and train on all of --features-path [none]",
    )
    add(
        "--eval-every",
        type=number(int, 1),
        help=f"measure the {measured} on the held-out {what} every this many steps [those between checkpoints, at most "
        "10,000]",
    )


def settle_heldout(args: Namespace, default: float) -> None:
    """Give --holdout its default. Raises ValueError for flags that do not go together."""
    excludes(args, "heldout_path", "holdout", free=(None, 0))
    if args.holdout is None:
        args.holdout = 0.0 if args.heldout_path else default
    if args.eval_every and not (args.holdout or args.heldout_path or getattr(args, "eval_samples", 0)):
        raise ValueError("--eval-every measures on what is held out, but --holdout is 0")


def split_rows(count: int, share: float, copies: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Which of `count` rows to train on and which to hold out, int64, each ascending; the same in every run.

    Args:
        share: share of the rows to hold out, 0 to 1; above 0, at least one row is held out.
        copies: consecutive rows of one image, 2 with --flip both: they have one code, so they stay together.

    Raises ValueError if nothing is left to train on.
    """
    images = count // copies
    held = max(1, round(share * images)) if share else 0
    if held >= images:
        raise ValueError(
            f"holding out {held:,} of {images:,} images leaves none to train on: lower --holdout; 0 holds none out"
        )
    order = permutation(0, Stream.HOLDOUT, 0, images)  # not by the run's seed: runs compare on the same codes
    train, heldout = (
        (np.sort(part)[:, None] * copies + np.arange(copies)).reshape(-1) for part in (order[held:], order[:held])
    )
    return train, heldout[::copies]


def copies_of(features: "Features | Images") -> int:
    """Rows of each image, which follow each other: 2 where extraction stored both flips."""
    return 2 if getattr(features.manifest, "flip", None) == "both" else 1


@dataclass(frozen=True)
class Split:
    """Rows of features to train on, and those of `other`, the same features or others, that are held out: (n,) int64,
    ascending."""

    features: "Features | Images"
    rows: np.ndarray
    other: "Features | Images"
    heldout: np.ndarray

    @classmethod
    def of(cls, features: "Features | Images", holdout: float, other: Features | None = None) -> "Split":
        """Hold out this share of the features, or instead all of other ones. Raises ValueError as `split_rows`."""
        rows, heldout = split_rows(features.count, 0.0 if other else holdout, copies_of(features))
        if other is not None:
            heldout = np.arange(0, other.count, copies_of(other))
        return cls(features, rows, other or features, heldout)

    def validate(self) -> None:
        """Raise ValueError, naming file and row, for a label or code that is out of range."""
        for features in dict.fromkeys((self.features, self.other)):
            features.validate()


def split_features(args: Namespace, features: "Features | Images") -> Split:
    """What --holdout and --heldout-path hold out. Raises ValueError for other features that do not fit these."""
    settle_heldout(args, 0.0)
    if not args.heldout_path:
        return Split.of(features, args.holdout)
    if args.condition_path:
        raise ValueError("--heldout-path has no vectors, which --condition-path gives --features-path: give --holdout")
    other = Features(args.heldout_path, args.V, args.num_classes)
    here, there = (
        {name: one.source().get(name) for name in SAME_LATENTS}
        | dict(latents=list(one.latent_shape), L=one.L, V=one.V, num_classes=one.num_classes, kind=one.latent_kind)
        for one in (features, other)
    )
    different = differences(there, here)
    if different:
        raise ValueError(f"--heldout-path {args.heldout_path} does not fit --features-path: {different}")
    return Split.of(features, 0.0, other)


def split_codes(path: str | Path, V: int | None, holdout: float, heldout_path: str | Path | None = None) -> Split:
    """The codes of features, split for a prior. V: tokens per position, for features without a manifest.

    Raises ValueError if there are no such codes, or if those of the two paths do not fit each other.
    """
    features, *others = (Features(one, V) for one in (path, heldout_path) if one)
    for one in (features, *others):
        check_codes(one, "a prior")
    for other in others:
        compare(CodeSet.of_features(other), CodeSet.of_features(features))
        if other.num_classes != features.num_classes:
            raise ValueError(
                f"{heldout_path} has {other.num_classes} classes, {path} {features.num_classes}: labels would not agree"
            )
    return Split.of(features, holdout, *others)
