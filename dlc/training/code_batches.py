"""Codes to train a prior on: which rows are trained on and which are held out, their batches, and their masks.

A code's time and mask are functions of (seed, global sample index), and the held-out rows of the features alone.
"""

import math
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from diffusion.masked import stratified_times
from dlc.data import Features
from dlc.data.codes import CodeSet, compare, token_counts
from dlc.machine.noise import Stream, permutation, uniform, uniforms
from dlc.training.batches import TrainingBatches

STRATA = 64  # consecutive samples that share the range of times evenly
COUNTED = 200_000  # rows whose tokens are counted, at most, for the bound of independent positions


def open_features(path: str | Path, V: int | None = None) -> Features:
    """The `Features` at path. Raises ValueError if they hold no codes, or do not say V."""
    features = Features(path, V)
    if features.codes is None:
        raise ValueError(f"features path {path} holds no codes, which a prior is trained on")
    if features.V is None:
        raise ValueError(f"{path} has no manifest.json to say V: give --V")
    return features


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


def copies_of(features: Features) -> int:
    """Rows of each image, which follow each other: 2 where extraction stored both flips."""
    return 2 if features.manifest is not None and features.manifest.flip == "both" else 1


class Codes:
    """The codes of a features directory: those to train on, with the interface of `Features` that batches use, and
    those held out.

    Args:
        path: the features'.
        V: tokens per position, for features without a manifest.
        holdout: the share of these rows to hold out.
        heldout_path: other features, all of which are held out, instead.

    Attributes: L, V, num_classes, count (rows to train on), rows (which they are).

    Raises ValueError if there are no such codes, or if those of the two paths do not fit each other.
    """

    def __init__(
        self, path: str | Path, V: int | None = None, holdout: float = 0.0, heldout_path: str | Path | None = None
    ):
        self.path, self.features = Path(path), open_features(path, V)
        self.L, self.V, self.num_classes = self.features.L, self.features.V, self.features.num_classes
        self.copies = copies_of(self.features)
        self.rows, self.heldout_rows = split_rows(self.features.count, 0.0 if heldout_path else holdout, self.copies)
        self.count, self.heldout_features = len(self.rows), self.features
        if heldout_path:
            self.heldout_features = other = open_features(heldout_path, V)
            compare(CodeSet.of_features(other), CodeSet.of_features(self.features))
            if other.num_classes != self.num_classes:
                raise ValueError(
                    f"{heldout_path} has {other.num_classes} classes, {path} {self.num_classes}: labels would not agree"
                )
            self.heldout_rows = np.arange(0, other.count, copies_of(other))

    def validate(self) -> None:
        """Raise ValueError, naming file and row, for a label or code that is out of range."""
        for features in {id(one): one for one in (self.features, self.heldout_features)}.values():
            features.labels.check_range(self.num_classes)
            features.codes.check_range(self.V)

    def gather(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes (n, L) and labels (n,), int64, of the features' rows."""
        return _gather(self.features, rows, self.V, self.num_classes)

    @cached_property
    def heldout(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes (n, L) and labels (n,), int64, of all that is held out, in the order of the rows."""
        if not len(self.heldout_rows):
            return torch.empty(0, self.L, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
        return _gather(self.heldout_features, self.heldout_rows, self.V, self.num_classes)

    def independent_nats(self) -> float:
        """Nats per token of the held-out codes under each token's frequency at each position in the training codes.

        Frequencies are those of at most COUNTED rows, plus one of each token.
        """
        rows = self.rows[:: max(1, math.ceil(self.count / COUNTED))]
        counts = 1 + sum(
            token_counts(self.gather(part)[0].numpy(), self.V) for part in np.array_split(rows, 1 + len(rows) // 4096)
        )
        log_p = torch.from_numpy(counts / counts.sum(axis=1, keepdims=True)).log()  # (L, V)
        return -log_p[torch.arange(self.L), self.heldout[0]].mean().item()


def _gather(features, rows, V, num_classes):
    codes, labels = features.codes.gather(rows, limit=V), features.labels.gather(rows, limit=num_classes)
    return torch.from_numpy(codes.astype(np.int64)), torch.from_numpy(labels.astype(np.int64))


class CodeBatches(TrainingBatches):
    """`TrainingBatches` of `Codes`. A batch holds indices (n,), codes (n, L) and labels (n,), all int64."""

    def __init__(self, codes: Codes, **kwargs):
        super().__init__(codes, {}, **kwargs)

    def gather(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """Codes and labels of rows to train on, counted without those held out."""
        codes, labels = self.features.gather(self.features.rows[rows])
        return dict(codes=codes, labels=labels)


def draws(
    seed: int, indices: torch.Tensor, L: int, label_dropout: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The randomness of training samples with these indices (n,).

    In every STRATA consecutive samples the times are spread evenly, so that the mean loss of a batch varies less.

    Returns times t (n,) in (0, 1]; uniform numbers (n, L) in [0, 1), by which tokens are masked; and whether to drop
    the label (n,) bool.
    """
    offset = uniform(seed, Stream.TRAIN_TIMESTEP, indices // STRATA)
    t = stratified_times(offset, indices % STRATA, STRATA)
    u = uniforms(seed, Stream.TRAIN_MASK, indices, L)
    return t, u, uniform(seed, Stream.TRAIN_DROP, indices) < label_dropout
