"""The sets of images that are compared: an .npz or what holds image files, in batches of 8-bit RGB.

    images = open_images("samples/FILE.npz", "SAMPLES")
    for batch in images.batches(0, images.count, 64): ...          # (n, H, W, 3) uint8

One set is a few batches in memory, whatever its size.
"""

import contextlib
import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dlc.data.images import WHITE, Source, center_crop, is_transparent, load_rgb, open_source
from dlc.data.listing import is_image
from dlc.data.npz import array_names, image_shape, read_images
from dlc.data.rows import file_order
from dlc.machine.cli import one_line
from dlc.machine.exact import side_by_side
from dlc.machine.files import read_json, reading_whole
from dlc.machine.processes import default_num_workers

JPEG = (".jpg", ".jpeg")
AT_ONCE = 64  # images in memory while some are chosen
CHECKED_FIRST = 32  # images of a folder whose size is looked at before the work


class ImageSet(ABC):
    """So many images of one size. `batches` gives them in order.

    path: where they are. count, size: how many, and (H, W). record: samples.json as a dict, None without one.
    notes: what was left out or changed. jpeg: how many are stored as JPEG at the size at which they are compared.
    """

    path: Path
    count: int
    size: tuple[int, int]
    notes: list[str]
    record: dict | None = None
    jpeg: int = 0

    @abstractmethod
    def batches(self, start: int, stop: int, size: int) -> Iterator[np.ndarray]:
        """Images start to stop - 1 as arrays (n, H, W, 3) uint8 of `size` images, the last one of fewer."""

    @abstractmethod
    def chosen(self, indices: list[int]) -> Iterator[np.ndarray]:
        """The images of ascending indices, (H, W, 3) each."""


#################################################################################
#                                     .npz                                      #
#################################################################################


class NpzImages(ImageSet):
    """arr_0 of an .npz, read as a stream. Raises ValueError, naming file and fault, where there is none."""

    def __init__(self, path: Path):
        self.path, (self.count, *size, _) = path, image_shape(path)
        self.size, self.record = tuple(size), read_record(path, self.count)
        others = one_line(", ".join(name for name in array_names(path) if name != "arr_0"), 100)
        self.notes = [f"{path}: not used: {others}; the numbers are those of arr_0"] if others else []

    def batches(self, start: int, stop: int, size: int) -> Iterator[np.ndarray]:
        return read_images(self.path, start, stop, size)

    def chosen(self, indices: Iterable[int]) -> Iterator[np.ndarray]:
        """All images before the last one are read, once."""
        wanted = set(indices)
        images = itertools.chain.from_iterable(self.batches(0, max(indices, default=-1) + 1, AT_ONCE))
        return (image for index, image in enumerate(images) if index in wanted)


def read_record(npz: Path, count: int) -> dict | None:
    """The record of an .npz of ours, from beside it or from among its PNGs; None if that describes another set."""
    for path in (npz.with_suffix(".json"), npz.with_suffix("") / "samples.json"):
        with contextlib.suppress(ValueError):  # others' .npz may have any such file beside it
            record = read_json(path) if path.is_file() else {}
            if record.get("num_fid_samples") == count:
                return record
    return None


#################################################################################
#                                  Image files                                  #
#################################################################################


class FileImages(ImageSet):
    """Image files, wherever they lie, read by threads ahead of their use.

    Args:
        source: where they lie.
        crop: ADM's crop to this many pixels, as extraction does; or None.
        resize: resize to this many pixels squared, bicubic and antialiased, whatever the aspect; or None.
        background: what transparent images are blended on.

    Raises ValueError where images have different sizes that neither changes.
    """

    def __init__(
        self, source: Source, crop: int | None = None, resize: int | None = None, background: Sequence[int] = WHITE
    ):
        self.source, self.path, self.count, self.background = source, Path(source.root), len(source), background
        self.crop, self.resize, self.notes = crop, resize, []
        side = crop or resize
        first = np.unique(np.linspace(0, self.count - 1, CHECKED_FIRST).astype(int)).tolist()
        images = {index: self._load(index) for index in reversed(first)}
        blended = sum(map(is_transparent, images.values()))
        if blended:
            what = f"{blended} of {len(images)} images of {source.root} that were looked at"
            self.notes = [f"{what} are transparent: blended"]
        if side:
            self.size = side, side
            return
        self.jpeg = sum(source.name(index).lower().endswith(JPEG) for index in range(self.count))
        (size, one), *others = {image.size: index for index, image in images.items()}.items()
        if others:
            raise self._mixed(one, others[0][1])
        self.size = size[::-1]

    def _load(self, index):
        with reading_whole(self.source.path(index), "cannot be read"):
            return load_rgb(self.source.open(index), self.background)

    def _mixed(self, *indices):
        sizes = (f"{self.source.name(index)} {' x '.join(map(str, self._load(index).size))}" for index in indices)
        there = ", ".join(sizes)
        return ValueError(
            f"the images of {self.path} have different sizes ({there}): give --crop SIZE or --resize SIZE"
        )

    def _read(self, index):
        image = self._load(index)
        if self.crop:
            image = center_crop(image, self.crop)
        elif self.resize and image.size != (self.resize, self.resize):
            image = image.resize((self.resize, self.resize), Image.Resampling.BICUBIC)
        if (image.height, image.width) != self.size:
            raise self._mixed(0, index)
        return np.asarray(image)

    def batches(self, start: int, stop: int, size: int) -> Iterator[np.ndarray]:
        images = self.chosen(range(start, stop))
        while batch := list(itertools.islice(images, size)):
            yield np.stack(batch)

    def chosen(self, indices: Iterable[int]) -> Iterator[np.ndarray]:
        return side_by_side(self._read, indices, torch.device("cpu"), default_num_workers())


def is_npz(path: str | Path) -> bool:
    """Whether a path is that of an .npz, rather than what `open_source` takes."""
    return Path(path).suffix == ".npz" and not Path(path).is_dir()


def open_images(path: str | Path, flag: str, crop: int | None = None, resize: int | None = None) -> ImageSet:
    """The images at path: an .npz; those in a folder, sorted by name; where it has only folders of them, and of all
    else, see `open_source`.

    Args:
        flag: by which errors call the path.

    Raises ValueError where there are no images, or fewer than its samples.json says, and for a folder of --sample-dir.
    """
    path = Path(path)
    if is_npz(path):
        return NpzImages(path)
    names, folders, seen = [], 0, []
    if path.is_dir():
        with os.scandir(path) as entries:
            seen = [(entry.name, entry.is_dir()) for entry in entries if entry.name[0] != "."]
        names = sorted(name for name, is_folder in seen if is_image(name) and not is_folder)
        folders = sum(is_folder for _, is_folder in seen)
    sets = [name for name, is_folder in seen if is_folder and (path / name / "samples.json").is_file()]
    if sets:
        raise ValueError(f"{flag} {path} is a folder of sets of samples: name one of them, such as {path / min(sets)}")
    source = open_source(path, names=names or None, flag=flag)
    notes = list(source.remarks)
    if names and folders:
        notes = [f"{flag} {path}: its own {len(names):,} images are compared, not those of its {folders:,} folders"]
    record = read_json(path / "samples.json") if (path / "samples.json").is_file() else {}
    if record and record.get("num_fid_samples") != len(source):
        raise ValueError(
            f"{path} has {len(source):,} images, and its samples.json says {record.get('num_fid_samples')}: run the "
            "sampling command again, which draws what is missing"
        )
    if record:  # ours by index, which may have more than six digits
        source = open_source(path, names=sorted(names, key=file_order))
    images = FileImages(source, crop, resize)
    images.path, images.record, images.notes = path, record or None, notes + images.notes
    return images
