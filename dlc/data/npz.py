"""Reading and writing an .npz as a stream: images by the batch, no pickles, and no more memory than the file has bytes.

    count, height, width, _ = image_shape("samples.npz")
    for batch in read_images("samples.npz", 0, count, 64): ...     # (n, H, W, 3) uint8
    sigma = read_array("reference.npz", "sigma")

Each function raises ValueError, naming the file, for one that is missing, damaged or not what it claims to be, and
OSError for one that cannot be read.
"""

import contextlib
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from dlc.data.rows import read_npy_header
from dlc.machine.cli import one_line
from dlc.machine.files import reading_whole, write_whole

# what readers of a damaged zip raise
BROKEN = (OSError, EOFError, KeyError, RuntimeError, UnicodeError, struct.error, zipfile.BadZipFile, zlib.error)
LARGEST_IMAGE = 2**24  # bytes of an image: 2,364 x 2,364 pixels
LARGEST_INFLATED = 2**26  # bytes of an array that may be compressed more than 100-fold, as zeros are


@contextlib.contextmanager
def opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive. What reading it raises becomes one line that names the file."""
    path = Path(path)
    if not path.is_file():  # opening a pipe would block forever
        raise ValueError(f"{path} {'is no file' if path.exists() else 'does not exist'}")
    with reading_whole(path, "is not a whole .npz: cut off or damaged", BROKEN), zipfile.ZipFile(path) as archive:
        yield archive


def array_names(path: Path) -> list[str]:
    """The names of the arrays."""
    with opened(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def open_array(archive: zipfile.ZipFile, name: str = "arr_0") -> tuple[IO[bytes], tuple[int, ...], np.dtype]:
    """An array as a stream of the bytes after its header, its shape and its type.

    No more is inflated than is read. Raises ValueError for an array with rows of more than LARGEST_IMAGE bytes, or with
    fewer bytes than its shape says.
    """
    entry, where = archive.getinfo(f"{name}.npy"), f"{archive.filename}: {name}"
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others inflate without limit
        raise ValueError(f"{where} is compressed in another way than NumPy's")
    stream = archive.open(entry)
    try:
        shape, fortran_order, dtype = read_npy_header(stream)
    except ValueError as error:
        raise ValueError(f"{where} is not a whole .npy ({error})") from None
    if fortran_order:
        raise ValueError(f"{where} is in Fortran order, wanted rows")
    row, there = math.prod(shape[1:]) * dtype.itemsize, entry.file_size - stream.tell()
    if row > LARGEST_IMAGE or math.prod(shape) * dtype.itemsize > there:
        raise ValueError(f"{where} claims shape {one_line(shape, 60)}, more than it has or than images have")
    return stream, shape, dtype


def read_array(path: Path, name: str) -> np.ndarray:
    """An array, whole in memory. Raises ValueError for one that inflates more than 100-fold, too."""
    with opened(path) as archive:
        stream, shape, dtype = open_array(archive, name)
        size, packed = math.prod(shape) * dtype.itemsize, archive.getinfo(f"{name}.npy").compress_size
        if size > max(LARGEST_INFLATED, 100 * packed):
            raise ValueError(f"{path}: {name} inflates from {packed:,} to {size:,} bytes")
        data = stream.read(size)
        if len(data) < size:
            raise ValueError(f"{path}: {name} ends early")
        return np.frombuffer(data, dtype).reshape(shape)


def image_shape(path: Path) -> tuple[int, int, int, int]:
    """The shape (N, H, W, 3) of the images in arr_0. Raises ValueError, saying what to do, if it holds no images."""
    with opened(path) as archive:
        if "arr_0.npy" not in archive.namelist():
            keys = one_line(", ".join(array_names(path)), 100) or "none"
            raise ValueError(f"{path} has no arr_0, which holds the images: its keys are {keys}")
        _, shape, dtype = open_array(archive)
    if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or 0 in shape:
        advice = "channels go last, grey is repeated, and values 0 to 255 are rounded"
        raise ValueError(f"{path}: arr_0 is {dtype} {shape}, wanted uint8 (N, H, W, 3): {advice}")
    return shape


def read_images(path: Path, start: int, stop: int, size: int) -> Iterator[np.ndarray]:
    """Images start to stop - 1 of arr_0 as arrays (n, H, W, 3) uint8, read-only: `size` at once, the last ones fewer.

    With the last image of all, the checksum is compared.
    """
    with opened(path) as archive:
        stream, shape, _ = open_array(archive)
        image = math.prod(shape[1:])  # bytes
        stream.seek(start * image, os.SEEK_CUR)
        for place in range(start, stop, size):
            count = min(size, stop - place)
            data = stream.read(count * image)
            if len(data) < count * image:
                raise ValueError(f"{path} ends within its images {place} to {place + count - 1}")
            yield np.frombuffer(data, np.uint8).reshape(count, *shape[1:])
        if stop == shape[0] and stream.read(1):
            raise ValueError(f"{path}: there is more in arr_0 than its {stop} images")


def write_images(
    path: Path,
    shape: tuple[int, int, int, int],
    images: Iterable[np.ndarray],
    arrays: dict[str, np.ndarray | str | int] | None = None,
) -> None:
    """Write images, of shape (N, H, W, 3) in all, one by one as arr_0 (none: no arr_0), and other arrays; whole or not
    at all. Nothing is compressed, so that other programs can stream it, too.
    """

    def write(file):
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            if shape[0]:
                with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as array:
                    header = np.lib.format.header_data_from_array_1_0(np.empty(0, np.uint8))
                    np.lib.format.write_array_header_1_0(array, {**header, "shape": tuple(shape)})
                    for image in images:
                        array.write(image.tobytes())
            for name, value in (arrays or {}).items():
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as array:
                    np.lib.format.write_array(array, np.asanyarray(value), allow_pickle=False)

    write_whole(path, write)
