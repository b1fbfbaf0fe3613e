"""Sets of codes (n, L), integers in 0..V-1: open them in any form, compare them with a model's L, V and encoder, count.

codes = open_codes("prior_codes")    # of dlc.sampling.code_folder: a features directory, a folder of .npy, a file
notes = compare(codes, CodeSpec("the model", L=512, V=256, encoder_sha256=None))      # ValueError where they differ
codes.gather(rows)                                                    # (n, L) int64
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dlc.data.rows import NpyRows, StoredArray, array_files, open_rows
from dlc.data.store import Features
from dlc.machine.records import TEXT, Record, key, or_null, whole_number

SHARD = 256  # codes per file of a folder that a prior fills
ENDINGS = (".npy", ".pt")


@dataclass(frozen=True, kw_only=True)
class CodeSpec:
    """What the codes of something are: L tokens of V each, that an encoder reads off an image; None: not known.

    owner: a model, a set or an encoder, in words, for errors.
    """

    owner: str
    L: int
    V: int | None = None
    encoder_sha256: str | None = None


def compare(one: CodeSpec, other: CodeSpec) -> list[str]:
    """Raise ValueError where two things do not have the same kind of codes. Returns notes on what is not known."""
    for name in ("L", "V"):
        values = getattr(one, name), getattr(other, name)
        if None not in values and values[0] != values[1]:
            said = "codes of {} have {}={}, but those of {} have {}={}"
            raise ValueError(said.format(one.owner, name, values[0], other.owner, name, values[1]))
    for spec in (one, other):
        if spec.encoder_sha256 is None:
            return [f"the codes of {spec.owner} do not say which encoder made them: it was not compared"]
    if one.encoder_sha256 != other.encoder_sha256:
        raise ValueError(f"codes of {one.owner} come from another encoder than those of {other.owner}")
    return []


@dataclass(frozen=True, kw_only=True)
class DrawnSet(Record):
    """Those keys of codes.json, which lies in a folder of codes that a prior draws, that say what the codes are."""

    L: int = key(whole_number(1))
    V: int = key(whole_number(1))
    encoder_sha256: str | None = key(or_null(TEXT))  # whose codes the prior was trained on
    num: int = key(whole_number(1), decides=False)
    codes_sha256: str | None = key(or_null(TEXT), None, decides=False)  # null: not all are drawn

    @classmethod
    def finished(cls, folder: str | Path) -> "DrawnSet | None":
        """The record of a folder of drawn codes; None for a folder without codes.json.

        Raises ValueError if it cannot be read, or if codes are missing.
        """
        path = Path(folder) / "codes.json"
        if not path.is_file():
            return None
        record = cls.read(path)
        if record.codes_sha256 is None:
            raise ValueError(
                f"{folder} does not have all of its {record.num:,} codes yet: run the command that draws them"
            )
        there, wanted = len(array_files(Path(folder))), -(-record.num // SHARD)
        if there != wanted:
            raise ValueError(
                f"{folder} has {there} shards of codes, but codes.json says {wanted}: draw the codes again"
            )
        return record


def as_codes(array: np.ndarray | StoredArray) -> np.ndarray | StoredArray:
    """The codes of a file: several per image, (n, k, L), become n * k rows; others stay as they are."""
    return array.reshape(array.shape[0] * array.shape[1], array.shape[2]) if array.ndim == 3 else array


@dataclass(frozen=True, kw_only=True)
class CodeSet(CodeSpec):
    """Codes on disk: `rows`, and the `Features` that they belong to, if any."""

    rows: NpyRows
    features: Features | None = None

    @classmethod
    def open(cls, source: str | Path, load: Callable[..., np.ndarray | StoredArray]) -> "CodeSet":
        """The codes at source: a features directory, a folder of files, or one file, which load(path, whole) reads.

        Raises ValueError where there are none, or where a prior has not drawn all of them yet.
        """
        drawn, path = DrawnSet.finished(source), Path(source)
        if path.is_dir() and not array_files(path, ENDINGS):
            return cls.of_features(Features(path))
        rows = open_rows("code source", source, 1, "ui", ENDINGS, load)
        known = dict(V=drawn.V, encoder_sha256=drawn.encoder_sha256) if drawn else {}
        return cls(owner=str(source), L=rows.array(0).shape[1], rows=rows, **known)

    @classmethod
    def of_features(cls, features: Features) -> "CodeSet":
        """The codes of features. Raises ValueError if they hold none."""
        if features.codes is None:
            raise ValueError(f"features {features.root} hold no codes")
        known = dict(L=features.L, V=features.V, encoder_sha256=features.source()["encoder_sha256"])
        return cls(owner=str(features.root), rows=features.codes, features=features, **known)

    def __len__(self) -> int:
        return len(self.rows)

    def gather(self, rows: np.ndarray, V: int | None = None) -> np.ndarray:
        """The codes (n, L) int64 of rows (n,); V where the set does not say it. Raises ValueError, naming file and row,
        for a value outside 0..V-1."""
        self.rows.limit = V or self.V
        return self.rows.gather(rows).astype(np.int64)


def token_counts(codes: np.ndarray, V: int) -> np.ndarray:
    """How often each token occurs at each position of codes (n, L): (L, V) int64. Counts of parts of a set add up."""
    L = codes.shape[1]
    places = codes.astype(np.int64) + V * np.arange(L)
    return np.bincount(places.ravel(), minlength=L * V).reshape(L, V)


def perplexity(counts: np.ndarray) -> np.ndarray:
    """exp of the entropy of the tokens at each position, (L,): how many tokens are in use there, 1 to V.

    It grows with the number of codes that were counted (L, V), so compare equal numbers.
    """
    p = counts / counts.sum(axis=1, keepdims=True)
    return np.exp(-(p * np.log(np.maximum(p, 1e-300))).sum(axis=1))
