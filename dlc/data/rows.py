"""Many `.npy` files read as one array of rows, with checks of what each file claims to hold."""

import contextlib
import functools
import io
import math
import os
import resource
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np

from dlc.machine.cli import one_line, progress
from dlc.machine.files import failed, is_pointer, reading

LONGEST_HEADER = 10_000  # bytes of a .npy's header, of which NumPy writes 118; NumPy's own limit
MAX_OPEN = 8192  # files that NpyRows keep open, where the system lets them
BLOCK = 4096  # rows looked at together, so that a file need not fit in memory


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
    try:
        if not os.path.isfile(path):  # opening a pipe would block forever
            raise ValueError("it is no file" if os.path.exists(path) else "it does not exist")
        with reading(path), contextlib.ExitStack() as closing:
            file = closing.enter_context(open(path, "rb", buffering=0))
            shape, fortran_order, dtype = read_npy_header(file)
            if dtype.hasobject:
                raise ValueError("it holds pickled objects")
            count, offset = math.prod(shape), file.tell()
            there = os.fstat(file.fileno()).st_size - offset
            if count * dtype.itemsize > there:
                raise ValueError(f"its header claims {count * dtype.itemsize:,} bytes, {there:,} follow")
            array = StoredArray(path, file, (count,), dtype, offset)
            if whole or fortran_order or not shape:
                return array[:].reshape(shape, order="F" if fortran_order else "C")
            closing.pop_all()
            return array.reshape(*shape)
    except (ValueError, EOFError, RuntimeError) as error:
        is_lfs = os.path.isfile(path) and is_pointer(path)
        why = "a git-lfs pointer, not the file: run git lfs pull" if is_lfs else one_line(error, 120)
        raise ValueError(f"{path} is not a readable .npy ({why})") from None


def load_floats(path: str | Path, whole: bool = False) -> np.ndarray | StoredArray:
    """The same, of floats that torch knows."""
    array = load_array(path, whole)
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise ValueError(f"{path} has values of type {array.dtype}, wanted floats of 16, 32 or 64 bits")
    return array


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
    if dtype.kind not in "biufcUO" or not dtype.itemsize:
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


class Files(Sequence):
    """The files of a folder with some names, as Paths that are made when asked for: a million take 0.25 GB."""

    def __init__(self, folder: Path, names: Iterable[str]):
        self.folder, self.names = folder, np.array([os.fsencode(name) for name in names])

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Path:
        return self.folder / os.fsdecode(self.names[index])


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
        paths: the files, each of shape (n, ...).
        ends: (len(paths),) cumulative row counts; None reads them from the files.
        sample_ndim: number of dimensions of one row.
        lone: whether each file holds one sample, with or without a leading dimension of 1.
        load: a function load(path, whole) as `load_array`.

    Attributes: limit, below which values must lie; None: anywhere.
    """

    limit: int | None = None

    def __init__(
        self,
        paths: Sequence[Path],
        ends: Sequence[int] | None = None,
        sample_ndim: int = 0,
        lone: bool = False,
        load: Callable[..., np.ndarray | StoredArray] = load_array,
    ):
        self.paths, self.sample_ndim, self.lone, self.ends, self.load = paths, sample_ndim, lone, None, load
        self._open, self._first_opened = {}, None
        if lone:
            ends = np.arange(1, len(paths) + 1)
        elif ends is None:
            ends = np.cumsum([len(self.array(index)) for index in range(len(paths))])
        self.ends = np.asarray(ends)
        self._starts = np.concatenate([[0], self.ends[:-1]]).astype(np.int64)  # the first row of each file

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def array(self, index: int) -> np.ndarray | StoredArray:
        """File number `index` as an array (n, ...): kept open, or, if it holds one sample, read.

        Raises ValueError or OSError, naming the file, if it is not what it should be.
        """
        if index in self._open:
            return self._open[index]
        array = self.load(self.paths[index], whole=self.lone)
        if array.ndim == self.sample_ndim:
            array = array.reshape(1, *array.shape)
        rows = len(array) if self.ends is None else self.rows(index)
        if array.ndim != self.sample_ndim + 1 or len(array) != rows:
            raise ValueError(
                f"{self.paths[index]} has shape {array.shape}, wanted {rows} row(s) of {self.sample_ndim} dimensions"
            )
        self._first_opened = self._first_opened or (self.paths[index], array.shape[1:])
        first, shape = self._first_opened
        if array.shape[1:] != shape:
            raise ValueError(f"{self.paths[index]} has rows of shape {array.shape[1:]}, {first} of {shape}")
        if not self.lone:
            if len(self._open) >= most_open():
                self._open.clear()
            self._open[index] = array
        return array

    def rows(self, index: int) -> int:
        """The number of rows in file number `index`."""
        return int(self.ends[index] - self._starts[index])

    def locate(self, row: int) -> tuple[Path, int]:
        """The file that holds a row, and the index of the row within the file."""
        index = int(np.searchsorted(self.ends, row, side="right"))
        return self.paths[index], int(row - self._starts[index])

    def gather(self, rows: np.ndarray, limit: int | None = None) -> np.ndarray:
        """Rows (n,) as one array (n, ...), read in ascending order. With a limit, values must lie in 0..limit-1."""
        rows, limit = np.asarray(rows), limit or self.limit
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
        if limit is not None:
            try:
                check_range(out, limit, lambda i: self.locate(rows[i]))
            except ValueError:  # say how many there are in the file, and where the first is
                for index in np.unique(files).tolist():
                    check_range(self.array(index), limit, lambda i, index=index: (self.paths[index], i))
                raise
        return out

    def check_range(self, limit: int) -> None:
        """Raise ValueError, naming file and row, for the first value outside 0..limit-1."""
        for array, locate in self._files():
            check_range(array, limit, locate)

    def check_finite(self) -> None:
        """Raise ValueError, naming file and row, for the first row that is not finite in float32."""
        for array, locate in self._files():
            check_finite(array, locate)

    def _files(self):
        for index, path in enumerate(progress(self.paths, desc="checking", unit="file", delay=2)):
            yield self.array(index), lambda i, path=path: (path, i)


Locate = Callable[[int], tuple[object, int]]  # the file that holds row i of an array, and the row within the file


def check_range(array: np.ndarray, limit: int, locate: Locate) -> None:
    """Raise ValueError for the first value outside 0..limit-1, and their count."""
    if array.dtype.kind not in "ui":
        raise ValueError(f"{locate(0)[0]} has values of type {array.dtype}, wanted integers")
    if array.dtype.kind == "u" and np.iinfo(array.dtype).max < limit:
        return  # no value of this type is out of range
    first, count = None, 0
    for start in range(0, len(array), BLOCK):
        part = array[start : start + BLOCK]
        bad = (part < 0) | (part >= limit)
        if bad.any():
            count += int(bad.sum())
            i = int(np.argmax(bad.reshape(len(part), -1).any(axis=1)))
            first = first or (start + i, int(part[i][bad[i]].flat[0]))
    if first:
        path, row = locate(first[0])
        more = f", the first of {count:,} such values" if count > 1 else ""
        raise ValueError(f"{path}, row {row}: value {first[1]} outside 0..{limit - 1}{more}")


def check_finite(array: np.ndarray, locate: Locate) -> None:
    """Raise ValueError for the first row that is not finite in float32."""
    for start in range(0, len(array), BLOCK):
        with np.errstate(over="ignore"):  # of float64, becoming infinite
            part = array[start : start + BLOCK].astype(np.float32)
        finite = np.isfinite(part).reshape(len(part), -1).all(axis=1)
        if not finite.all():
            path, row = locate(start + int(finite.argmin()))
            raise ValueError(f"{path}, row {row}: values that are not finite numbers in float32")


def open_vectors(source: str | Path, count: int | None = None, ndim: int = 1) -> NpyRows:
    """The rows (n, in_dim) of vectors at source, a folder of `.npy` files of floats or one such file.

    Args:
        count: how many rows there must be; None: any.
        ndim: dimensions of a row: 2 for (n, T, D), for example.

    Raises ValueError where there are none, or another number of them.
    """
    path = Path(source)
    if not path.exists():
        raise ValueError(f"--condition-path {source} does not exist")
    files = [path] if path.is_file() else Files(path, array_files(path))
    vectors = NpyRows(files, sample_ndim=ndim, load=load_floats)
    if not len(vectors):
        raise ValueError(f"--condition-path {source} has no {'rows' if files else '.npy files'}")
    if 0 in vectors.array(0).shape:
        raise ValueError(f"{vectors.paths[0]} has empty vectors, wanted (n, in_dim)")
    if count not in (None, len(vectors)):
        raise ValueError(f"--condition-path {source} has {len(vectors)} rows, the data {count}")
    return vectors
