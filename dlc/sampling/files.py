"""Samples on disk: PNGs named by index, the .npz that ADM's evaluation reads, and a check of such a file.

python -m dlc.sampling check FILE.npz [--grid]
"""

import hashlib
import itertools
import math
import os
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from dlc.data.images import image_grid, is_whole, read_png, save_png
from dlc.data.rows import read_npy_header
from dlc.machine.cli import one_line
from dlc.machine.cli import progress as progress_bar
from dlc.machine.files import write_whole

GRID_IMAGES, GRID_COLUMNS = 64, 8
LARGEST_IMAGE = 2**24  # bytes of an image in an .npz: 2,364 x 2,364 pixels
ROWS_AT_ONCE = 256  # images in memory while an .npz is written or read
THREADS = 16  # that look for missing images
FEWEST_FOR_FID = 2048  # dimensions of the Inception features: the covariance of fewer images is singular


def png_path(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.png"


def missing_indices(folder: Path, count: int) -> list[int]:
    """The indices of 0..count-1 that have no whole PNG in folder, ascending."""
    there = {entry.name for entry in os.scandir(folder)}

    def missing(indices):
        paths = ((index, png_path(folder, index)) for index in indices)
        return [index for index, path in paths if path.name not in there or not is_whole(path)]

    with ThreadPoolExecutor(THREADS) as pool:  # a network disk takes a while to answer each
        return sorted(itertools.chain(*pool.map(missing, (range(i, count, THREADS) for i in range(THREADS)))))


def save_grid(path: Path, folder: Path, count: int) -> None:
    """Write a contact sheet of those of the first images of 0..count-1 that exist, as a PNG."""
    paths = [png_path(folder, index) for index in range(min(GRID_IMAGES, count))]
    images = [read_png(one) for one in paths if one.is_file()]
    if images:
        save_png(path, image_grid(np.stack(images), GRID_COLUMNS))


def write_npz(path: Path, folder: Path, count: int, progress: bool = False) -> None:
    """Stream PNGs 0..count-1 into path as arr_0 (count, S, S, 3) uint8, in index order.

    A few hundred images are in memory at a time. Raises ValueError, naming the image, where one is missing, broken or
    of another size; path is then not written.
    """

    def write(file):
        with (
            ThreadPoolExecutor() as pool,
            zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
            archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as array,
            progress_bar(total=count, desc="writing .npz", unit="img", disable=not progress) as bar,
        ):
            shape = (count, *read_png(png_path(folder, 0)).shape)
            header = np.lib.format.header_data_from_array_1_0(np.empty(0, np.uint8))
            np.lib.format.write_array_header_1_0(array, {**header, "shape": shape})
            for start in range(0, count, ROWS_AT_ONCE):
                paths = [png_path(folder, index) for index in range(start, min(start + ROWS_AT_ONCE, count))]
                for name, image in zip(paths, pool.map(read_png, paths)):
                    if image.shape != shape[1:]:
                        raise ValueError(f"{name} has shape {image.shape}, wanted {shape[1:]}")
                    array.write(image.tobytes())
                    bar.update()

    write_whole(path, write)


def open_array(archive, name="arr_0.npy"):
    """An array in an open .npz as a stream of the bytes after its header: (stream, shape, dtype).

    No more of the stream is inflated than is read, and an image has at most LARGEST_IMAGE bytes.

    Raises ValueError for what is no such array, or has fewer bytes than its shape says.
    """
    entry = archive.getinfo(name)
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others inflate without limit
        raise ValueError(f"{name} is compressed in another way than NumPy's")
    stream = archive.open(entry)
    shape, fortran_order, dtype = read_npy_header(stream)
    if fortran_order or dtype.hasobject:
        raise ValueError(
            f"{name} is {'in Fortran order' if fortran_order else 'of pickled objects'}, not a stream of images"
        )
    image, there = math.prod(shape[1:]) * dtype.itemsize, entry.file_size - stream.tell()
    if image > LARGEST_IMAGE or math.prod(shape) * dtype.itemsize > there:
        raise ValueError(f"{name} claims shape {one_line(shape, 60)}, more than it has or than images are")
    return stream, shape, dtype


def npz_rows(path: Path) -> int:
    """How many images an .npz holds, by its header alone; 0 where the file is missing or broken."""
    try:
        with zipfile.ZipFile(path) as archive:
            return open_array(archive)[1][0]
    except Exception:  # whatever a zip's reader makes of a broken file
        return 0


def check_npz(path, grid: bool = False, progress: bool = False) -> tuple[list[str], list[str]]:
    """What an .npz of samples holds, and what is wrong with it: two lists of lines. One image is in memory at a time.

    Args:
        grid: write a contact sheet of the first images beside it, as FILE.grid.png.

    Raises ValueError where path is no such file, and OSError where the contact sheet cannot be written.
    """
    path, wrong = Path(path), []
    if not path.is_file():  # a pipe would be waited at for ever, /dev/zero fill the memory
        raise ValueError(
            f"{path} is not a whole .npz of samples (it {'is no file' if path.exists() else 'does not exist'})"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            names = [Path(name).stem for name in archive.namelist()]
            if "arr_0" not in names:
                raise ValueError(f"its keys are {one_line(', '.join(names), 100)}, wanted arr_0")
            stream, shape, dtype = open_array(archive)
            lines = [f"{path}: keys {one_line(', '.join(names), 100)}; arr_0 of {dtype}, shape {shape}"]
            if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
                return lines, [f"arr_0 is {dtype} of shape {shape}, wanted uint8 (N, H, W, 3)"]
            low, high, total, blank, seen, duplicates = 255, 0, 0.0, [], {}, []
            size, first = int(np.prod(shape[1:])), []
            for index in progress_bar(range(shape[0]), desc="checking", unit="img", disable=not progress):
                data = stream.read(size)
                if len(data) < size:
                    raise ValueError(f"it ends within image {index} of {shape[0]}")
                image = np.frombuffer(data, np.uint8).reshape(shape[1:])
                if grid and index < GRID_IMAGES:
                    first.append(image)
                low, high, total = min(low, image.min()), max(high, image.max()), total + image.mean()
                if (image == image[0, 0]).all():
                    blank.append(index)
                twin = seen.setdefault(hashlib.blake2b(data, digest_size=16).digest(), index)
                if twin != index:
                    duplicates.append((twin, index))
            if stream.read(1):
                raise ValueError(f"there is more in it than its {shape[0]} images")
    except (OSError, EOFError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a whole .npz of samples ({error})") from None
    lines.append(f"values {low} to {high}, mean {total / shape[0]:.1f}")
    if blank:
        wrong.append(
            f"{len(blank)} images of one colour: {', '.join(map(str, blank[:5]))}{', …' if len(blank) > 5 else ''}"
        )
    if duplicates:
        pairs = ", ".join(f"{one} = {other}" for one, other in duplicates[:5])
        wrong.append(f"{len(duplicates)} images twice: {pairs}{', …' if len(duplicates) > 5 else ''}")
    if shape[0] < FEWEST_FOR_FID:
        lines.append(
            f"warning: FID of {shape[0]:,} images says little: it wants {FEWEST_FOR_FID:,} or more (papers: 50,000)"
        )
    if grid:
        sheet = path.with_suffix(".grid.png")
        save_png(sheet, image_grid(np.stack(first), GRID_COLUMNS))
        lines.append(f"look at {sheet}")
    return lines, wrong
