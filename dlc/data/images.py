"""Image files and 8-bit arrays: read, crop, normalise, write, lay out in a grid; and where images lie."""

import argparse
import contextlib
import errno
import functools
import io
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from dlc.data.archives import Members
from dlc.data.listing import (
    Tree,
    classes_of,
    empty_classes,
    is_hidden,
    is_image,
    list_images,
    listing_sha256,
    read_labels,
)
from dlc.data.tables import ImageTable, is_dataset
from dlc.machine.files import SHEET, errno_of, is_pointer, reading, write_whole

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
WHITE = (255, 255, 255)
ARCHIVES = (".zip", ".tar")
COMPRESSED = (".tgz", ".gz", ".bz2", ".xz", ".zst")  # what is said to be no archive of ours
PNG_END = b"IEND\xaeB`\x82"
# of grids: black and white images stand out from the grey, and the grey from dark and light pages
GRID_GREY, GAP, LINE, FONT_SIZE = (96, 96, 96), 2, 14, 11  # the lengths in pixels
LEAST_SHOWN, MOST_LINES = 64, 3  # pixels to which smaller images are enlarged; lines of a caption


#################################################################################
#                                     Pixels                                    #
#################################################################################


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The crop of ADM (Dhariwal & Nichol 2021): resize the shorter side to `size`, then cut out the central square.

    The image is halved with a box filter while its shorter side is at least twice the size, then resized bicubically.
    An image more than 64 times as long as wide is first cut to its middle, because a line of 1 x 50,000 pixels would
    fill the memory when resized.
    """
    longest = 64 * min(image.size)
    if max(image.size) > longest:
        left, top = max(0, image.width - longest) // 2, max(0, image.height - longest) // 2
        image = image.crop((left, top, image.width - left, image.height - top))
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), resample=Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def load_rgb(path: str | os.PathLike | BinaryIO, background: Sequence[int] = WHITE) -> Image.Image:
    """The image at path, or in an open file, in RGB, upright by its EXIF orientation; the one place that reads images.

    What is transparent is blended on the background; then is_transparent(image). Of 16-bit grey the high byte is kept;
    Pillow would clip it at 255.

    Raises ValueError for an image with more pixels than Pillow's limit, for grey without a known range, and for a
    pointer of git-lfs. Errors of Pillow for broken files, and of the system for files out of reach, are passed on.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # at twice the limit Pillow raises
        try:
            image = Image.open(path)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise ValueError(f"more pixels than Pillow's limit of {Image.MAX_IMAGE_PIXELS:,}") from None
        except OSError as error:
            if error.errno is None and is_pointer(path):
                raise ValueError("a git-lfs pointer, not the file: run git lfs pull") from None
            raise
    with image:
        image.load()
        with contextlib.suppress(Exception):  # an EXIF block that is broken says nothing of the pixels
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PNG", "PPM"):
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        if image.mode in ("I", "F"):
            raise ValueError(f"{image.format} of mode {image.mode}: its white level is not known")
        if "transparency" in image.info or image.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
            image = image.convert("RGBA")
            if image.getextrema()[3][0] < 255:
                blended = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image).convert("RGB")
                blended.info["transparency blended"] = True
                return blended
        return image.convert("RGB")


def is_transparent(image: Image.Image) -> bool:
    """Whether an image that `load_rgb` gave was transparent somewhere."""
    return "transparency blended" in image.info


def add_background_flag(add: Callable, default: tuple[int, int, int] | None = WHITE, when: str = "") -> None:
    """Add the flag --background. when: words on when it applies, for its help."""
    text = f"{when}blend transparent images on this colour, a name or #rrggbb [white]"
    add("--background", type=_colour, default=default, help=text)


def _colour(text):
    try:
        return ImageColor.getrgb(text)[:3]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: not a colour, such as white or #ff8000") from None


def normalize(pixels: torch.Tensor, mean: Sequence[float] = HALF, std: Sequence[float] = HALF) -> torch.Tensor:
    """Pixels (N, H, W, 3) uint8 to (N, 3, H, W) float32 on the same device: scaled to [0, 1], minus mean, over std."""
    # filled on the device: a copy from the CPU would make the CPU wait for the GPU
    mean, std = (torch.stack([torch.full((1, 1), one, device=pixels.device) for one in value]) for value in (mean, std))
    return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Images (N, 3, H, W) in [-1, 1] to (N, H, W, 3) uint8, by 127.5 x + 128, clamped, as in DiT's sampler."""
    return (127.5 * images + 128).clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8)


def image_grid(
    images: Sequence[np.ndarray | None], columns: int, rows: Sequence[str] = (), captions: Sequence[str] = ()
) -> Image.Image:
    """Lay out images (H, W, 3) uint8 NumPy of one size in this many columns, as a PIL image.

    Args:
        images: None leaves a place empty. Those narrower than LEAST_SHOWN are enlarged by a whole factor.
        rows: words to the left of each row.
        captions: words under each image, in up to MOST_LINES lines; what is left over is cut off, with an ellipsis.
    """
    from matplotlib import get_data_path  # slow to import

    # names may hold bytes that are no UTF-8, and ends of lines
    rows, captions = (
        ["".join(c if c.isprintable() else "?" for c in one) for one in words] for words in (rows, captions)
    )
    font = ImageFont.truetype(Path(get_data_path()) / "fonts/ttf/DejaVuSans.ttf", FONT_SIZE)
    height, width = next(image.shape[:2] for image in images if image is not None)
    factor = -(-LEAST_SHOWN // width)
    height, width = factor * height, factor * width
    left = GAP + max((int(font.getlength(row)) + 2 * GAP for row in rows), default=0)
    lines = [_in_lines(words, font, width) for words in captions]
    starts = range(0, len(images), columns)
    deep = [LINE * max(map(len, lines[start : start + columns]), default=0) for start in starts]
    tops = np.cumsum([GAP, *(height + GAP + one for one in deep)]).tolist()
    grid = Image.new("RGB", (left + columns * (width + GAP), tops[-1]), GRID_GREY)
    draw = ImageDraw.Draw(grid)
    for words, top in zip(rows, tops):
        draw.text((2 * GAP, top + height // 2), words, anchor="lm", font=font)
    for place, image in enumerate(images):
        x, y = left + place % columns * (width + GAP), tops[place // columns]
        if image is not None:
            grid.paste(Image.fromarray(image.repeat(factor, axis=0).repeat(factor, axis=1)), (x, y))
        for number, words in enumerate(lines[place] if place < len(lines) else ()):
            draw.text((x + width // 2, y + height + LINE * number + LINE // 2), words, anchor="mm", font=font)
    return grid


def _in_lines(words, font, width):
    """Words as lines that are not wider, broken after what parts names where that is not too early."""
    lines = [""]
    while words:
        fits = next((n for n in range(len(words), 1, -1) if font.getlength(words[:n]) <= width), 1)
        if len(lines) == MOST_LINES and fits < len(words):
            return [*lines[1:], words[: fits - 1] + "…"]
        parted = fits < len(words) and max(words.rfind(sign, 0, fits) for sign in " -_.") + 1
        fits = parted if parted > fits // 3 else fits
        lines, words = [*lines, words[:fits].strip()], words[fits:]
    return lines[1:] or [""]


#################################################################################
#                                   PNG files                                   #
#################################################################################


def save_png(path: Path, image: Image.Image | np.ndarray) -> None:
    """Write an image, PIL or (H, W, 3) uint8 NumPy, whole or not at all. Raises OSError naming the file."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    write_whole(path, lambda file: image.save(file, "png"))


def save_sheet(path: Path, image: Image.Image) -> None:
    """Write a picture to look at, marked as one that a later one may replace: see `files.check_output`."""
    mark = PngInfo()
    mark.add_text(SHEET, "")
    write_whole(path, lambda file: image.save(file, "png", pnginfo=mark))


def read_png(path: str | os.PathLike) -> np.ndarray:
    """The image (H, W, 3) uint8 in a PNG. Raises ValueError, naming the file, if it is missing or not whole,
    and OSError if it cannot be read."""
    try:
        with reading(path):
            return np.array(load_rgb(path))
    except (OSError, SyntaxError, ValueError) as error:
        if errno_of(error) not in (None, errno.ENOENT):
            raise
        raise ValueError(
            f"{path} is missing or not a whole PNG ({error}): delete it and run the same command again to draw it"
        ) from None


def is_whole(path: str | os.PathLike) -> bool:
    """Whether a PNG ends as a whole one does."""
    with open(path, "rb", buffering=0) as file:  # unbuffered: there may be a million to look at
        file.seek(max(0, os.fstat(file.fileno()).st_size - len(PNG_END)))
        return file.read() == PNG_END


#################################################################################
#                                Where images lie                               #
#################################################################################


class Source(ABC):
    """Images in an order that stays, wherever they lie. Another way is another class, and its place in SOURCES.

    Args:
        root: by what errors call them.
        names: of all images: paths relative to the root.
        classes, labels: names, and the class of each image, (n,) int64; None where nobody asks for them.
        remarks: a line each, for the user.
        marks: what else tells each image from another set's, for `sha256`.

    A subclass has `takes(path)` and a constructor of (path, flag, labels, names), see `open_source`.
    """

    def __init__(
        self,
        root: str,
        names: Sequence[str],
        classes: Sequence[str] = (),
        labels: np.ndarray | None = None,
        remarks: Sequence[str] = (),
        marks: Sequence[str] | None = None,
    ):
        self.root, self.classes, self.labels, self.remarks, self.marks = root, list(classes), labels, remarks, marks
        # one array, because reference counts would make each worker copy a list of a million strings
        self.names = np.array([os.fsencode(name) for name in names])

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return os.fsdecode(self.names[index])

    def path(self, index: int) -> str:
        """Where an image lies, for errors."""
        return os.path.join(self.root, self.name(index))

    @functools.cached_property
    def indices(self) -> dict[str, int]:
        """The images' places by their names."""
        return {self.name(index): index for index in range(len(self))}

    @abstractmethod
    def open(self, index: int) -> str | BinaryIO:
        """The path of an image file, or one that is open. Called by forked processes and by threads."""

    def load(self, index: int, background: Sequence[int] = WHITE) -> Image.Image:
        """An image, and errors, as of `load_rgb`."""
        return load_rgb(self.open(index), background)

    def sha256(self) -> str:
        """A digest of the set, which changes when images are added, removed or renamed."""
        names = map(os.fsdecode, self.names)
        return listing_sha256(map("{}\t{}".format, names, self.marks) if self.marks else names)


class Folder(Source):
    """Files in class folders, or in one folder."""

    @staticmethod
    def takes(path: str) -> bool:
        return os.path.isdir(path)

    def __init__(self, path: str, flag: str, labels: str | None = None, names: Sequence[str] | None = None):
        if names is not None:
            return super().__init__(path, names)
        super().__init__(path, *_listing(path, None, flag, labels))

    def open(self, index: int) -> str:
        return self.path(index)


class Archive(Source):
    """Members of a .zip, or of a .tar or a folder of them, such as WebDataset's shards."""

    @staticmethod
    def takes(path: str) -> bool:
        return bool(Archive.files_of(path)[0])

    @staticmethod
    def files_of(path: str) -> tuple[list[str], str]:
        """The archives at a path, and the folder in the archive that the path goes on to, or ""."""
        if os.path.isdir(path):
            with contextlib.suppress(OSError), os.scandir(path) as entries:
                shown = [entry for entry in entries if not is_hidden(entry.name)]
                if not any(entry.is_dir() or is_image(entry.name) for entry in shown):
                    files = sorted(entry.path for entry in shown)
                    ours = [one for one in files if one.lower().endswith(ARCHIVES)]
                    return ours or [one for one in files if one.lower().endswith(COMPRESSED)], ""
            return [], ""
        file = next((one for one in (Path(path), *Path(path).parents) if one.is_file()), None)
        if not file or not file.name.lower().endswith((*ARCHIVES, *COMPRESSED)):
            return [], ""
        inner = os.path.relpath(path, file)
        return [str(file)], "" if inner == "." else inner

    def __init__(self, path: str, flag: str, labels: str | None = None, names: Sequence[str] | None = None):
        files, inner = self.files_of(path)
        self.members = Members(files)
        tree = Tree(files[0] if inner else path.rstrip("/"), self.members.names, inner)
        if names is None:
            own = tree.labels(self.members.read)
            super().__init__(tree.root, *_listing(tree.root, tree.paths, flag, labels, own, self.members.left_out))
        else:
            super().__init__(tree.root, names)
        self.places = np.array([tree.index(self.name(index)) for index in range(len(self))])

    def open(self, index: int) -> BinaryIO:
        return io.BytesIO(self.members.read(self.places[index]))


class Table(Source):
    """Rows of a dataset with a column of images, saved to disk, in .parquet files, or on the hub."""

    takes = staticmethod(is_dataset)

    def __init__(self, path: str, flag: str, labels: str | None = None, names: Sequence[str] | None = None):
        self.table = table = ImageTable(path, needs_labels=labels is None and names is None)
        classes, numbers = classes_of(read_labels(labels, table.names)) if labels else (table.classes, table.labels)
        marks = [f"{label} {size}" for label, size in zip(numbers.tolist(), table.sizes)]
        remarks, empty = [] if labels else table.remarks, empty_classes(classes, numbers)
        remarks = [*remarks, *([f"{path}: {empty}"] if empty else [])]
        super().__init__(path, table.names, classes, numbers, remarks, marks)
        self.rows = np.arange(len(self))
        if names is not None:
            missing = next((name for name in names if name not in self.indices), None)
            if missing is not None:
                raise ValueError(f"{path} has no {missing}")
            self.rows = np.array([self.indices[name] for name in names])
            super().__init__(path, names)

    def open(self, index: int) -> BinaryIO:
        return io.BytesIO(self.table.read(int(self.rows[index])))


SOURCES = (Table, Archive, Folder)  # the first that takes a path


def _listing(root, paths, flag, labels, own=(), left_out=None):
    """What a Source takes: names, classes, labels, remarks, marks.

    labels: a .csv, or None. own: labels by name, of files beside the images.
    """
    labels_of = functools.partial(read_labels, labels) if labels else None
    if own and not labels:
        labels_of = functools.partial(map, own.get)
    classes, names, numbers, remarks = list_images(root, paths, flag, labels_of, left_out)
    return names, classes, numbers, remarks, list(map(str, numbers)) if labels_of else None


def open_source(
    path: str | os.PathLike, labels: str | None = None, names: Sequence[str] | None = None, flag: str = "--data-path"
) -> Source:
    """The images at a path, or the hub id of a dataset of images; all that read sets of images call this.

    Args:
        labels: .csv file with the columns name and label; None: classes are those of the folders or of the dataset.
        names: the only images to open, without classes; None: all.
        flag: by which errors and remarks call the path.

    Raises ValueError, naming flag, path and fault, where there are no images or labels, and OSError for what the system
    refuses.
    """
    path = os.fspath(path)
    for kind in SOURCES:
        if kind.takes(path):
            return kind(path, flag, labels, names)
    raise ValueError(
        f"{flag} {path} is not a folder, an archive (.zip, .tar), a .parquet file or a dataset's hub id owner/name"
    )


def add_source_flags(add: Callable, add_path: Callable | None = None, when: str = "", required: bool = False) -> None:
    """Add the flags --data-path, by another parser's add where it is given, and --labels."""
    text = (
        f"{when}a folder with a subfolder of images per class, or of images alone; a .zip, .tar or folder of .tar "
        "(WebDataset); a dataset with a column of images, as .parquet, saved to disk, or owner/name[@revision][:split]"
    )
    (add_path or add)("--data-path", required=required, help=text + " [none]" * (not required))
    goes = "with --data-path: " if add_path else ""
    add(
        "--labels", help=f"{goes}take classes from the columns name and label of this .csv [the folders or the dataset]"
    )


def load_image(path: str, background: Sequence[int] = WHITE) -> Image.Image:
    """An image, and errors, as of `load_rgb`, from a file or from inside of what holds images: `images.zip/cat/0.png`.

    Raises as `open_source`, too.
    """
    holder = next((one for one in Path(path).parents if one.exists()), None)
    if os.path.lexists(path) or holder is None or not (Table.takes(str(holder)) or holder.is_file()):
        return load_rgb(path, background)
    return open_source(holder, names=[os.path.relpath(path, holder)]).load(0, background)
