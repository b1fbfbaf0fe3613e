"""Codes from anywhere, also from `.pt` files; and a folder of codes that a prior drew.

Such a folder has {shard:06d}.npy, of SHARD samples each, and codes.json, which says what made them. It is a source of
codes for --dlc-dir once codes.json has the digest of all of them.
"""

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from dlc.data import code_dtype
from dlc.data.codes import SHARD, CodeSet, DrawnSet, as_codes
from dlc.data.rows import NpyRows, StoredArray, load_array
from dlc.machine.files import write_bytes
from dlc.machine.folder import ResumableFolder
from dlc.machine.part import WHOLE, Part
from dlc.machine.records import OBJECT, SWITCH, TEXT, key, list_of, or_null, whole_number
from dlc.weights.foreign.safe import read_torch, storage_fault

COUNT, SIZE = whole_number(0), whole_number(1)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64)


def load_codes(path: Path, whole: bool = False) -> np.ndarray | StoredArray:
    """The codes in a `.npy`, as `load_array`, or the tensor in a `.pt`, as `as_codes` gives them.

    Raises ValueError naming the file.
    """
    if path.suffix != ".pt":
        return as_codes(load_array(path, whole))
    tensor = read_torch(path, "a tensor")
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{path} holds a {type(tensor).__name__}, wanted a tensor (n, L) or (n, k, L)")
    fault = storage_fault(tensor)
    if fault or tensor.dtype not in INTEGERS:
        raise ValueError(f"{path} has values of type {tensor.dtype}, {fault or 'wanted integers'}")
    return as_codes(tensor.resolve_neg().numpy())  # a file may keep a minus sign apart


def open_codes(source: str | Path) -> CodeSet:
    """The codes at source: a features directory, a folder of `.npy` or of `.pt` files, or one such file.

    Raises ValueError where there are none, or where a prior has not drawn all of them yet or drew others.
    """
    codes, drawn = CodeSet.open(source, load_codes), DrawnSet.finished(source)
    if drawn and drawn.codes_sha256 != digest_of(codes.gather, np.arange(len(codes))):
        raise ValueError(
            f"the codes of {source} are not those that were drawn, by the digest in its codes.json: run the command "
            "that draws them again"
        )
    return codes


def digest_of(gather: Callable[[np.ndarray], np.ndarray], rows: np.ndarray) -> str:
    """A digest of the codes gather(rows) (n, L), some of which are read at once."""
    digest = hashlib.sha256()
    for start in range(0, len(rows), SHARD):
        digest.update(gather(rows[start : start + SHARD]).astype("<u2"))
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class CodesRecord(DrawnSet):
    """Every key of codes.json but format_version."""

    # the prior
    model: str = key(TEXT)
    checkpoint: str = key(TEXT, decides=False)
    weights_sha256: str = key(TEXT)
    step: int | None = key(or_null(COUNT))  # null: a file of weights, which does not say
    weights: str = key(TEXT, decides=False)  # "ema", "raw", "as in the file"
    # how codes are drawn from it: `PriorOptions`, with digests for `given` (the rows in use) and `guide_ckpt`
    options: dict = key(OBJECT)
    given: str | None = key(or_null(TEXT), decides=False)  # the codes that are kept in part
    guide: str | None = key(or_null(TEXT), None, decides=False)  # the weaker prior
    precision: str = key(TEXT)
    tf32: bool = key(SWITCH)
    global_seed: int = key(COUNT)
    # the set
    labels: list[int] | None = key(or_null(list_of(COUNT)), None, decides=False)  # the class of each sample
    usage: dict | None = key(or_null(OBJECT), None, decides=False)
    runs: list[dict] = key(list_of(OBJECT), decides=False)


class CodeFolder(ResumableFolder):
    """OUT/ for writing `num` codes. Shard k holds those of samples k * SHARD to (k + 1) * SHARD - 1.

    Args:
        part, block: what this launch draws of all, in blocks of this many shards.
    """

    record_type, record_name, holds, files = CodesRecord, "codes.json", "codes", ("*.npy", "*.pt")
    count, makes = "num", "shards"

    def __init__(self, path: str | Path, num: int, part: Part = WHOLE, block: int = 1):
        super().__init__(path, part)
        self.num, self.block, self.shards = num, block, range(-(-num // SHARD))

    def shard_path(self, shard: int) -> Path:
        return self.path / f"{shard:06d}.npy"

    def places(self, shard: int) -> np.ndarray:
        """The indices of the samples in a shard."""
        return np.arange(shard * SHARD, min((shard + 1) * SHARD, self.num))

    def rows(self) -> NpyRows:
        """All codes; each shard is opened when it is needed."""
        ends = [min((shard + 1) * SHARD, self.num) for shard in self.shards]
        return NpyRows(self.path, [self.shard_path(shard).name for shard in self.shards], 1, ends=ends)

    def missing(self, record: CodesRecord, part: Part = WHOLE) -> list[int]:
        """The shards that are not whole: the last one grows with num. All of them if they are not what was drawn."""

        def is_whole(shard):
            try:
                array = load_array(self.shard_path(shard), whole=True)
            except ValueError:  # none, or cut off by a crash of the machine
                return False
            return array.shape == (len(self.places(shard)), record.L) and int(array.max()) < record.V

        missing = [shard for shard in self.shards if not is_whole(shard)]  # of other parts, too: the digest covers all
        there = CodesRecord.read(self.record_path) if self.record_path.is_file() else record
        if (
            missing
            or there.num != self.num
            or there.codes_sha256 in (None, digest_of(self.rows().gather, np.arange(self.num)))
        ):
            return part.share(missing, self.block)
        return part.share(self.shards, self.block)  # some were zeroed, or changed places: nothing says which

    def write(self, shard: int, codes: np.ndarray, V: int) -> None:
        """Write a shard, codes (n, L), whole or not at all. Raises OSError, naming the file, if the disk fails."""
        content = io.BytesIO()  # np.save to a file would not say why a disk fails
        np.save(content, codes.astype(code_dtype(V)), allow_pickle=False)
        write_bytes(self.shard_path(shard), content.getbuffer())

    def finish(self, find: Callable[[], dict] = dict) -> None:
        """Complete codes.json, if all codes are there, and release the lock: one process, after all writing.

        find: gives values of more keys of codes.json.
        """
        with self.leaving() as whole:
            if whole:
                found, record = find(), CodesRecord.read(self.record_path)
                self.write_record(
                    replace(record, codes_sha256=digest_of(self.rows().gather, np.arange(self.num)), **found)
                )
