"""The sets of images that are compared: an .npz of ours or ADM's, or a folder, in batches of 8-bit RGB.

    images = open_images("samples/FILE.npz", "SAMPLES")
    for batch in images.batches(0, images.count, 64): ...          # (n, H, W, 3) uint8

One set is a few batches in memory, whatever its size.
"""

import os
from abc import ABC, abstractmethod
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from dlc.data.images import center_crop, load_rgb
from dlc.data.listing import is_image, list_images
from dlc.data.npz import array_names, image_shape, read_images
from dlc.machine.cli import one_line
from dlc.machine.files import read_json
from dlc.machine.processes import default_num_workers

JPEG = (".jpg", ".jpeg")
CHOSEN_FROM = 64  # images that are read at once to choose some of them
CHECKED_FIRST = 32  # images of a folder whose size is looked at before the work


class ImageSet(ABC):
    """So many images of one size. `batches` gives them in order.

    path: where they are. count, size: how many, and (H, W). record: samples.json as a dict, None without one.
    notes: what was left out or changed. jpeg: how many are stored as JPEG at the size at which they are compared.
    """

    path: Path
    count: int
    size: tuple[int, int]
    record: dict | None = None
    jpeg: int = 0

    def __init__(self):
        self.notes: list[str] = []

    @abstractmethod
    def batches(self, start: int, stop: int, size: int):
        """Images start to stop - 1 as arrays (n, H, W, 3) uint8 of `size` images, the last one of fewer."""

    def chosen(self, indices: list[int]):
        """The images of ascending indices, (H, W, 3) each. All images before the last one are read, once."""
        wanted, place = iter(indices), 0
        index = next(wanted, None)
        for batch in self.batches(0, indices[-1] + 1 if indices else 0, CHOSEN_FROM):
            while index is not None and index < place + len(batch):
                yield batch[index - place]
                index = next(wanted, None)
            place += len(batch)


#################################################################################
#                                     .npz                                      #
#################################################################################


class NpzImages(ImageSet):
    """arr_0 of an .npz, read as a stream. Raises ValueError, naming file and fault, where there is none."""

    def __init__(self, path: Path):
        super().__init__()
        self.path, (self.count, *size, _) = path, image_shape(path)
        self.size, self.record = tuple(size), read_record(path.with_suffix(""), self.count)
        others = [name for name in array_names(path) if name != "arr_0"]
        if others:
            self.notes.append(f"{path}: not used: {one_line(', '.join(others), 100)}; the numbers are of arr_0")

    def batches(self, start, stop, size):
        return read_images(self.path, start, stop, size)


def read_record(folder: Path, count: int) -> dict | None:
    """The samples.json of a folder of ours, or of the folder beside an .npz; None where it is of other images."""
    path = folder / "samples.json"
    if not path.is_file():
        return None
    record = read_json(path)
    return record if record.get("num_fid_samples") == count else None


#################################################################################
#                                    Folders                                    #
#################################################################################


class FolderImages(ImageSet):
    """The images in a folder, sorted by name, or in an ImageFolder-style folder, class by class.

    Args:
        crop: ADM's crop to so many pixels, as extraction does; or None.
        resize: resize to so many pixels squared, bicubic and antialiased, whatever the aspect; or None.
        flag: by which errors call the folder.

    Raises ValueError where there are no images, or fewer than its samples.json says.
    """

    def __init__(self, path, flag: str, crop: int | None = None, resize: int | None = None):
        super().__init__()
        self.path, self.crop, self.resize = Path(path), crop, resize
        with os.scandir(path) as entries:
            seen = [(entry.name, entry.is_dir()) for entry in entries if entry.name[0] != "."]
        names = sorted(name for name, is_folder in seen if is_image(name) and not is_folder)
        folders = sum(is_folder for _, is_folder in seen)
        if not names:
            try:
                _, names, _, remarks = list_images(path)
            except ValueError as error:
                raise ValueError(f"no images: {error}".replace("--data-path", flag)) from None
            self.notes += [remark.replace("--data-path", flag) for remark in remarks]
        elif folders:
            self.notes.append(
                f"{flag} {path}: its own {len(names):,} images are compared, not those of its {folders:,} folders"
            )
        self.names, self.count = names, len(names)
        if (self.path / "samples.json").is_file():
            wanted = read_json(self.path / "samples.json").get("num_fid_samples")
            if wanted != self.count:
                raise ValueError(
                    f"{path} has {self.count:,} images, and its samples.json says {wanted}: run the sampling command "
                    "again, which draws what is missing"
                )
            self.record = read_record(self.path, self.count)
        if not (crop or resize):
            self.jpeg = sum(name.lower().endswith(JPEG) for name in names)
        self.size = self._size()

    def _size(self):
        side = self.crop or self.resize
        if side:
            return side, side
        first = np.unique(np.linspace(0, self.count - 1, CHECKED_FIRST).astype(int)).tolist()
        sizes = {self._size_of(self.names[index]): self.names[index] for index in reversed(first)}
        if len(sizes) > 1:
            (one, name), (other, second) = list(sizes.items())[:2]
            raise ValueError(self._mixed(name, one, second, other))
        return next(iter(sizes))

    def _size_of(self, name):
        try:
            with Image.open(self.path / name) as image:
                return image.height, image.width
        except Exception as error:  # Pillow's readers raise many types
            raise ValueError(f"{self.path / name} cannot be read ({one_line(error, 100)})") from None

    def _mixed(self, name, size, second, other):
        return (
            f"the images of {self.path} have different sizes ({name} {size[1]} x {size[0]}, {second} {other[1]} x "
            f"{other[0]}): give --crop SIZE or --resize SIZE"
        )

    def _read(self, index):
        name = self.names[index]
        try:
            image = load_rgb(self.path / name)
            if self.crop:
                image = center_crop(image, self.crop)
            elif self.resize and image.size != (self.resize, self.resize):
                image = image.resize((self.resize, self.resize), Image.Resampling.BICUBIC)
        except Exception as error:  # Pillow's readers raise many types
            raise ValueError(f"{self.path / name} cannot be read ({one_line(error, 100)})") from None
        if (image.height, image.width) != self.size:
            raise ValueError(self._mixed(self.names[0], self.size, name, (image.height, image.width)))
        return np.asarray(image)

    def batches(self, start, stop, size):
        return self._batches(range(start, stop), size)

    def chosen(self, indices):
        for batch in self._batches(indices, CHOSEN_FROM):
            yield from batch

    def _batches(self, indices, size):
        threads = default_num_workers()
        with ThreadPoolExecutor(threads) as pool:
            ahead, places = deque(), iter(range(0, len(indices), size))
            try:
                while True:
                    while len(ahead) * size < 2 * threads + size and (place := next(places, None)) is not None:
                        ahead.append([pool.submit(self._read, index) for index in indices[place : place + size]])
                    if not ahead:
                        return
                    yield np.stack([one.result() for one in ahead.popleft()])
            finally:
                pool.shutdown(cancel_futures=True)


def open_images(path, flag: str, crop: int | None = None, resize: int | None = None) -> ImageSet:
    """The images at path, an .npz or a folder. Raises ValueError in one line that names path or flag."""
    path = Path(path)
    if path.is_dir():
        return FolderImages(path, f"{flag} folder", crop, resize)
    if path.exists() and path.suffix != ".npz":
        raise ValueError(f"{flag} {path} is neither an .npz nor a folder of images")
    return NpzImages(path)
