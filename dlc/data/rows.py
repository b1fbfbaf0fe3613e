"""Many `.npy` files read as one array of rows, with checks of what each file claims to hold."""

import contextlib
import functools
import io
import math
import os
import resource
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np

from dlc.machine.cli import one_line, progress
from dlc.machine.files import failed, reading_whole

LONGEST_HEADER = 10_000  # bytes of a .npy's header, of which NumPy writes 118; NumPy's own limit
MAX_OPEN = 8192  # files that NpyRows keep open, where the system lets them
BLOCK = 4096  # rows looked at together, so that a file need not fit in memory
TYPES = {"f": "floats of 16, 32 or 64 bits", "ui": "integers", "U": "text"}  # by NumPy's letters
NOT_FINITE = "values that are not finite numbers in float32"


class StoredArray:
    """The array (n, ...) in a `.npy` that stays open: `[i]` or `[start:stop]` reads those rows.

    A memory map would end this process, without a word, where the disk fails or the file was cut.
    """

    def __init__(self, path: str | Path, file: BinaryIO, shape: tuple[int, ...], dtype: np.dtype, offset: int):
        self.path, self.file, self.number, self.offset = str(path), file, file.fileno(), offset
        self.shape, self.dtype, self.ndim = shape, dtype, len(shape)
        self.row = math.prod(shape[1:]) * dtype.itemsize  # bytes

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: int | slice) -> np.ndarray:
        if not isinstance(rows, slice):
            if rows >= len(self):  # which ends an iteration
                raise IndexError(rows)
            return self.fill(np.empty(self.shape[1:], self.dtype), rows)
        start, stop, _ = rows.indices(len(self))
        out, most = np.empty((max(stop - start, 0), *self.shape[1:]), self.dtype), max(1, 2**30 // max(self.row, 1))
        for first in range(0, len(out), most):  # the system reads no more than 2 GiB at once
            self.fill(out[first : first + most], start + first)
        return out

    def reshape(self, *shape: int) -> "StoredArray":
        """The same numbers as another shape, all of whose sides are given."""
        return StoredArray(self.path, self.file, shape, self.dtype, self.offset)

    def fill(self, out: np.ndarray, row: int) -> np.ndarray:
        """Read into an array of this type, from the row on. Raises OSError as `reading`, ValueError for a cut file."""
        try:
            count = os.preadv(self.number, [out], self.offset + row * self.row)
        except OSError as error:
            raise failed(f"cannot read {self.path}", error) from error
        if count < out.nbytes:
            raise ValueError(f"{self.path} was cut after it was opened: it ends before row {row + max(len(out), 1)}")
        return out


def load_array(path: str | Path, whole: bool = False) -> np.ndarray | StoredArray:
    """The array in a `.npy` file, as a `StoredArray` of its rows or, if wanted `whole`, in memory.

    Pickled objects are refused, and so is a header that claims more bytes than the file holds, before memory is
    allocated for them. An array in Fortran order, whose rows lie apart, is read whole either way.

    Raises ValueError, naming the file, and OSError as `reading`.
    """
    with reading_whole(path, "is not a readable .npy"):
        if not os.path.isfile(path):  # opening a pipe would block forever
            raise ValueError("it is no file" if os.path.exists(path) else "it does not exist")
        with contextlib.ExitStack() as closing:
            file = closing.enter_context(open(path, "rb", buffering=0))
            shape, fortran_order, dtype = read_npy_header(file)
            count, offset = math.prod(shape), file.tell()
            there = os.fstat(file.fileno()).st_size - offset
            if count * dtype.itemsize > there:
                raise ValueError(f"its header claims {count * dtype.itemsize:,} bytes, {there:,} follow")
            array = StoredArray(path, file, (count,), dtype, offset)
            if whole or fortran_order or not shape:
                return array[:].reshape(shape, order="F" if fortran_order else "C")
            closing.pop_all()
            return array.reshape(*shape)


def read_npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read the header of a `.npy`: shape, whether in Fortran order, and dtype. The stream then stands at the data.

    Raises ValueError for any header but one of plain numbers or text. No more than LONGEST_HEADER bytes are read.
    """
    try:
        version = np.lib.format.read_magic(stream)
        length = stream.read(2 if version == (1, 0) else 4)
        if version not in ((1, 0), (2, 0)) or int.from_bytes(length, "little") > LONGEST_HEADER:
            raise ValueError(f"version {version}, a header of {int.from_bytes(length, 'little'):,} bytes")
        return _parsed_header(version, length + stream.read(int.from_bytes(length, "little")))
    except (ValueError, OSError):
        raise
    except Exception:  # NumPy calls Python's parser, which raises many types
        raise ValueError("a header that cannot be read") from None


@functools.lru_cache(64)  # a million files of one row have one header, and to parse it takes as long as to read a file
def _parsed_header(version, header):
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read(io.BytesIO(header))
    if not all(type(side) is int and side >= 0 for side in shape) or len(shape) > 32:
        raise ValueError(f"shape {one_line(shape, 60)}")
    if dtype.kind not in "biufcU" or not dtype.itemsize:
        raise ValueError(f"values of type {one_line(dtype, 60)}")
    return shape, fortran_order, dtype


def file_order(name: str) -> tuple[int, str]:
    """The sorting key of numbered files' names: 2.npy comes before 10.npy."""
    return len(name), name


def array_files(folder: Path, endings: tuple[str, ...] = (".npy",)) -> list[str]:
    """The names of the files with these endings in a folder, in the order of their rows; none where it is no folder.

    Hidden ones are left out, such as the ._0.npy that a Mac puts beside 0.npy: this is the one place that lists them.
    """
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted((name for name in names if name.endswith(endings) and name[0] != "."), key=file_order)


@functools.cache
def most_open() -> int:
    """How many files each `NpyRows` may keep open: an eighth of what this process may, which is asked for first."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 8 * MAX_OPEN if hard == resource.RLIM_INFINITY else min(8 * MAX_OPEN, hard)
    with contextlib.suppress(ValueError, OSError):  # the limit that launchers and shells set is low, 1024 on Linux
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
        soft = max(soft, wanted)
    return max(1, min(soft // 8, MAX_OPEN))


class NpyRows:
    """The rows of many `.npy` files as one array.

    Args:
        folder, names: the files, each of shape (n, ...).
        ndim: number of dimensions of one row.
        dtype: NumPy's letters for the types that the values may have, a key of TYPES.
        ends: (len(names),) cumulative row counts; None reads them from the files.
        lone: whether each file holds one sample, with or without a leading dimension of 1.
        limit: values must lie in 0..limit-1; None: anywhere.
        load: a function load(path, whole) as `load_array`.
    """

    def __init__(
        self,
        folder: str | Path,
        names: Sequence[str],
        ndim: int,
        dtype: str = "ui",
        *,
        ends: Sequence[int] | None = None,
        lone: bool = False,
        limit: int | None = None,
        load: Callable[..., np.ndarray | StoredArray] = load_array,
    ):
        # names as one array, of which a million take 0.25 GB
        self.folder, self.names = Path(folder), np.array([os.fsencode(name) for name in names])
        self.ndim, self.dtype, self.lone, self.limit, self.load = ndim, dtype, lone, limit, load
        self.ends, self._open, self._first_opened = None, {}, None
        if lone:
            ends = np.arange(1, len(names) + 1)
        elif ends is None:
            ends = np.cumsum([len(self.array(index)) for index in range(len(names))])
        self.ends = np.asarray(ends)
        self._starts = np.concatenate([[0], self.ends[:-1]]).astype(np.int64)  # the first row of each file

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def path(self, index: int) -> Path:
        """File number `index`."""
        return self.folder / os.fsdecode(self.names[index])

    def array(self, index: int) -> np.ndarray | StoredArray:
        """File number `index` as an array (n, ...): kept open, or, if it holds one sample, read.

        Raises ValueError or OSError, naming the file, if it is not what it should be.
        """
        if index in self._open:
            return self._open[index]
        path = self.path(index)
        array = self.load(path, whole=self.lone)
        if array.ndim == self.ndim:
            array = array.reshape(1, *array.shape)
        rows = "" if self.ends is None else self.rows(index)
        if array.ndim != self.ndim + 1 or rows not in ("", len(array)):
            raise ValueError(f"{path} has shape {array.shape}, wanted {rows} row(s) of {self.ndim} dimension(s)")
        if array.dtype.kind not in self.dtype or array.dtype.char == "g":  # torch knows no floats of 128 bits
            raise ValueError(f"{path} has values of type {array.dtype}, wanted {TYPES[self.dtype]}")
        first, shape = self._first_opened = self._first_opened or (path, array.shape[1:])
        if array.shape[1:] != shape:
            raise ValueError(f"{path} has rows of shape {array.shape[1:]}, {first} of {shape}")
        if not self.lone:
            if len(self._open) >= most_open():
                self._open.clear()
            self._open[index] = array
        return array

    def rows(self, index: int) -> int:
        """The number of rows in file number `index`."""
        return int(self.ends[index] - self._starts[index])

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Rows (n,) as one array (n, ...), read in ascending order. Raises ValueError for values beyond the limit."""
        rows = np.asarray(rows)
        order = np.argsort(rows, kind="stable")
        files = np.searchsorted(self.ends, rows[order], side="right")
        out, current = None, None
        # random rows are in different files: one copy per row is fastest
        for i, file, row in zip(order.tolist(), files.tolist(), (rows[order] - self._starts[files]).tolist()):
            if file != current:
                array, current = self.array(file), file
                if out is None:
                    out = np.empty((len(rows), *array.shape[1:]), array.dtype)
                out = out.astype(np.result_type(out.dtype, array.dtype), copy=False)
            if isinstance(array, StoredArray) and array.dtype == out.dtype:
                array.fill(out[i : i + 1], row)
            else:
                out[i] = array[row]
        if self.limit is not None:
            self.check_values(out, rows)
        return out

    def check(self) -> None:
        """Raise ValueError, naming file and row, for the first value beyond the limit or, without a limit, the first
        row that is not finite in float32."""
        for index in progress(range(len(self.names)), desc="checking", unit="file", delay=2):
            self.check_values(self.array(index), range(self._starts[index], self.ends[index]))

    def check_values(self, array: np.ndarray | StoredArray, rows: Sequence[int]) -> None:
        """The same for values of these rows."""

        def name(i):
            index = int(np.searchsorted(self.ends, rows[i], side="right"))
            return f"{self.path(index)}, row {rows[i] - self._starts[index]}"

        check_rows(array, self.limit, name)


def check_rows(array: np.ndarray | StoredArray, limit: int | None, name: Callable[[int], str]) -> None:
    """Raise ValueError for the first row with values outside 0..limit-1 or, without a limit, values that are not finite
    in float32. name(i) is row i in words."""
    if limit is not None and array.dtype.kind == "u" and np.iinfo(array.dtype).max < limit:
        return  # no value of this type is out of range
    said, count = "", 0
    for start in range(0, len(array), BLOCK):
        part = array[start : start + BLOCK]
        with np.errstate(over="ignore"):  # of float64, becoming infinite
            bad = ~np.isfinite(part.astype(np.float32)) if limit is None else (part < 0) | (part >= limit)
        if bad.any() and not said:
            i = int(bad.reshape(len(part), -1).any(axis=1).argmax())
            value = f"value {part[i][bad[i]].flat[0]} outside 0..{limit - 1}" if limit is not None else NOT_FINITE
            said = f"{name(start + i)}: {value}"
        count += int(bad.sum())
    if said:
        raise ValueError(said + (f", the first of {count:,} such values" if count > 1 else ""))


def open_rows(
    what: str,
    source: str | Path,
    ndim: int,
    dtype: str,
    endings: tuple[str, ...] = (".npy",),
    load: Callable[..., np.ndarray | StoredArray] = load_array,
) -> NpyRows:
    """The rows at source, a folder of files of one kind or one such file. Raises ValueError where there are none.

    Args:
        what: what errors say before the source.
        endings: of the files in a folder, of which it has to have one kind.
        ndim, dtype, load: see `NpyRows`.
    """
    path = Path(source)
    if not path.exists():
        raise ValueError(f"{what} {source} does not exist")
    folder, names = (path.parent, [path.name]) if path.is_file() else (path, array_files(path, endings))
    if len({Path(name).suffix for name in names}) > 1:
        raise ValueError(f"{what} {source} holds both {' and '.join(endings)} files: keep one kind, or name one file")
    # there may be a million files of one row each: opening three tells
    lone = len(names) > 1 and all(
        load(folder / name).shape[:-ndim] in ((), (1,)) for name in (names[0], names[len(names) // 2], names[-1])
    )
    rows = NpyRows(folder, names, ndim, dtype, lone=lone, load=load)
    if not len(rows) or 0 in rows.array(0).shape:
        raise ValueError(f"{what} {source} has no {'rows' if names else f'{endings[0]} files'}")
    return rows
