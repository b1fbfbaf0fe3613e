"""Image files and 8-bit arrays: read, crop, normalise, write, lay out in a grid; and where images lie."""

import argparse
import contextlib
import os
import textwrap
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from dlc.data.archives import Archive
from dlc.data.listing import LeftOut, Source, list_images, paths_below
from dlc.data.tables import Table
from dlc.machine.cli import printable
from dlc.machine.files import SHEET, is_pointer, reading_whole, write_whole

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
WHITE = (255, 255, 255)
PNG_END = b"IEND\xaeB`\x82"
# of grids: black and white images stand out from the grey, and the grey from dark and light pages
GRID_GREY, GAP, LINE, FONT_SIZE = (96, 96, 96), 2, 14, 10  # the lengths in pixels
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

    font = ImageFont.truetype(Path(get_data_path()) / "fonts/ttf/DejaVuSansMono.ttf", FONT_SIZE)
    rows, captions = (list(map(printable, words)) for words in (rows, captions))
    height, width = next(image.shape[:2] for image in images if image is not None)
    factor = -(-LEAST_SHOWN // width)
    height, width = factor * height, factor * width
    left = GAP + max((int(font.getlength(row)) + 2 * GAP for row in rows), default=0)
    fit = dict(width=int(width / font.getlength("0")), max_lines=MOST_LINES, placeholder="…")
    lines = [textwrap.wrap(words, **fit) or [""] for words in captions]
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
    """The image (H, W, 3) uint8 in a PNG. Raises ValueError, naming the file, if it is not whole, and OSError if it is
    missing or cannot be read."""
    remedy = "is not a whole PNG: delete it and run the same command again to draw it"
    with reading_whole(path, remedy):
        return np.array(load_rgb(path))


def is_whole(path: str | os.PathLike) -> bool:
    """Whether a PNG ends as a whole one does."""
    with open(path, "rb", buffering=0) as file:  # unbuffered: there may be a million to look at
        file.seek(max(0, os.fstat(file.fileno()).st_size - len(PNG_END)))
        return file.read() == PNG_END


#################################################################################
#                                Where images lie                               #
#################################################################################


class Folder(Source):
    """Files in class folders, or in one folder."""

    takes = staticmethod(os.path.isdir)

    def __init__(self, path: str, flag: str, labels: str | None = None, names: Sequence[str] | None = None):
        left_out = LeftOut()
        listed = (
            (names,) if names is not None else list_images(path, paths_below(path, left_out), left_out, flag, labels)
        )
        super().__init__(path, *listed)

    def open(self, index: int) -> str:
        return self.path(index)


SOURCES = (Table, Archive, Folder)  # the first that takes a path


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
    return load_rgb(open_source(holder, names=[os.path.relpath(path, holder)]).open(0), background)
