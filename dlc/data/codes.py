"""Sets of codes (n, L), integers in 0..V-1: open them in any form, compare them with a model's L, V and encoder, count.

codes = open_codes("prior_codes")    # of dlc.sampling.code_folder: a features directory, a folder of .npy, a file
notes = compare(codes, CodeSpec("the model", L=512, V=256, encoder_sha256=None))      # ValueError where they differ
codes.gather(rows)                                                    # (n, L) int64
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dlc.data.rows import Files, NpyRows, StoredArray, array_files
from dlc.data.store import Features
from dlc.machine.records import TEXT, Record, key, or_null, whole_number

SHARD = 256  # codes per file of a folder that a prior fills

#################################################################################
#                                   Comparison                                  #
#################################################################################


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
        ours, theirs = getattr(one, name), getattr(other, name)
        if None not in (ours, theirs) and ours != theirs:
            raise ValueError(
                f"codes of {one.owner} have {name}={ours}, but those of {other.owner} have {name}={theirs}"
            )
    for spec in (one, other):
        if spec.encoder_sha256 is None:
            return [f"the codes of {spec.owner} do not say which encoder made them: it was not compared"]
    if one.encoder_sha256 != other.encoder_sha256:
        raise ValueError(f"codes of {one.owner} come from another encoder than those of {other.owner}")
    return []


#################################################################################
#                                      Sets                                     #
#################################################################################


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


def as_codes(array: np.ndarray | StoredArray, path: Path) -> np.ndarray | StoredArray:
    """The codes of a file: (n, L), or (L,) as it is. Several codes per image, (n, k, L), become n * k rows.

    Raises ValueError, naming the path, for another shape.
    """
    if array.ndim not in (1, 2, 3) or not array.shape[-1]:
        raise ValueError(f"{path} has shape {array.shape}, wanted (n, L) or (n, k, L)")
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
        path = Path(source)
        if path.is_file():
            return cls._of_rows(source, NpyRows([path], sample_ndim=1, load=load))
        if not path.is_dir():
            raise ValueError(f"code source {source} does not exist")
        drawn = DrawnSet.finished(path)
        names = array_files(path, (".npy", ".pt"))
        if not names:
            return cls.of_features(Features(path))
        if len({name.endswith(".pt") for name in names}) > 1:
            raise ValueError(f"code source {source} holds both .npy and .pt files: keep one kind, or name one file")
        files = Files(path, names)
        # there may be a million files of one code each: opening the first and the last tells
        lone = all(load(file).shape[:-1] in ((), (1,)) for file in (files[0], files[-1]))
        rows = NpyRows(files, sample_ndim=1, lone=lone, load=load)
        return cls._of_rows(source, rows, drawn and drawn.V, drawn and drawn.encoder_sha256)

    @classmethod
    def of_features(cls, features: Features) -> "CodeSet":
        """The codes of features. Raises ValueError if they hold none."""
        if features.codes is None:
            raise ValueError(f"features {features.root} hold no codes")
        encoder = features.source()["encoder_sha256"]
        return cls._of_rows(features.root, features.codes, features.V, encoder, features)

    @classmethod
    def _of_rows(cls, source, rows, V=None, encoder_sha256=None, features=None):
        if not len(rows):
            raise ValueError(f"code source {source} has no rows")
        L = rows.array(0).shape[1]
        return cls(owner=str(source), L=L, V=V, encoder_sha256=encoder_sha256, rows=rows, features=features)

    def __len__(self) -> int:
        return len(self.rows)

    def gather(self, rows: np.ndarray, V: int | None = None) -> np.ndarray:
        """The codes (n, L) int64 of rows (n,); V where the set does not say it. Raises ValueError, naming file and row,
        for a value outside 0..V-1."""
        return self.rows.gather(rows, limit=V or self.V).astype(np.int64)


#################################################################################
#                                     Counts                                    #
#################################################################################


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
