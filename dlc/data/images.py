"""Image files and 8-bit arrays: read, crop, normalise, write, lay out in a grid; and the views that networks see."""

import argparse
import contextlib
import errno
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps
from torch.utils.data import Dataset

from dlc.machine.files import errno_of, is_pointer, reading, write_whole
from dlc.machine.noise import Stream, integers

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
WHITE = (255, 255, 255)
PNG_END = b"IEND\xaeB`\x82"


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


def load_rgb(path: str | os.PathLike, background: Sequence[int] = WHITE) -> Image.Image:
    """The image at path in RGB, upright by its EXIF orientation; the one place where an image file is read.

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
        raise argparse.ArgumentTypeError(f"{text}: no colour, such as white or #ff8000") from None


def normalize(pixels: torch.Tensor, mean: Sequence[float] = HALF, std: Sequence[float] = HALF) -> torch.Tensor:
    """Pixels (N, H, W, 3) uint8 to (N, 3, H, W) float32 on the same device: scaled to [0, 1], minus mean, over std."""
    # filled on the device: a copy from the CPU would make the CPU wait for the GPU
    mean, std = (torch.stack([torch.full((1, 1), one, device=pixels.device) for one in value]) for value in (mean, std))
    return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Images (N, 3, H, W) in [-1, 1] to (N, H, W, 3) uint8, by 127.5 x + 128, clamped, as in DiT's sampler."""
    return (127.5 * images + 128).clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8)


def image_grid(images: np.ndarray, columns: int) -> Image.Image:
    """Lay out images (n, H, W, 3) uint8 NumPy in rows of so many columns, as a PIL image; empty places are black."""
    n, height, width, _ = images.shape
    rows = -(-n // columns)
    grid = np.zeros((rows * columns, height, width, 3), np.uint8)
    grid[:n] = images
    grid = grid.reshape(rows, columns, height, width, 3).transpose(0, 2, 1, 3, 4)
    return Image.fromarray(grid.reshape(rows * height, columns * width, 3))


#################################################################################
#                                   PNG files                                   #
#################################################################################


def save_png(path: Path, image: Image.Image | np.ndarray) -> None:
    """Write an image, PIL or (H, W, 3) uint8 NumPy, whole or not at all. Raises OSError naming the file."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    write_whole(path, lambda file: image.save(file, "png"))


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
            f"{path} is missing or no whole PNG ({error}): delete it and run the same command again to draw it"
        ) from None


def is_whole(path: str | os.PathLike) -> bool:
    """Whether a PNG ends as a whole one does."""
    with open(path, "rb", buffering=0) as file:  # unbuffered: there may be a million to look at
        file.seek(max(0, os.fstat(file.fileno()).st_size - len(PNG_END)))
        return file.read() == PNG_END


#################################################################################
#                          Views of a folder of images                          #
#################################################################################


def flips_of(policy: str, count: int, seed: int) -> np.ndarray:
    """Whether each row of each image is flipped: (count, 1) bool, or (count, 2) for the policy "both".

    The flips of "random" are a function of the seed and the image's index.
    """
    if policy == "random":
        return integers(seed, Stream.FLIP, torch.arange(count), 2).bool().unsqueeze(1).numpy()
    return np.tile([False, True] if policy == "both" else [False], (count, 1))


class Views(Dataset):
    """The 8-bit views of each image of a folder: crops for the VAE and, never flipped, one for the SEM encoder.

    Args:
        root, paths: the folder, and the images' paths in it.
        flips: (images, k) bool, whether each of the k crops is flipped.
        image_size, code_size: sides of the crops and of the encoder's view, pixels; code_size None: no such view.
        background: what transparent images are blended on, (r, g, b).
    """

    def __init__(
        self,
        root: str | Path,
        paths: list[str],
        flips: np.ndarray,
        image_size: int,
        code_size: int | None,
        background: Sequence[int] = WHITE,
    ):
        # one array, because reference counts would make each worker copy a list of a million strings
        self.root, self.paths = root, np.array([os.fsencode(path) for path in paths])
        self.flips, self.image_size, self.code_size, self.background = flips, image_size, code_size, background

    def name(self, index: int) -> str:
        """The path of an image relative to the root."""
        return os.fsdecode(self.paths[index])

    def path(self, index: int) -> str:
        return os.path.join(self.root, self.name(index))

    def load(self, index: int) -> Image.Image:
        return load_rgb(self.path(index), self.background)

    def crops(self, image: Image.Image, index: int) -> np.ndarray:
        crop = center_crop(image, self.image_size)
        return np.stack([np.array(ImageOps.mirror(crop) if flip else crop) for flip in self.flips[index]])

    def __getitem__(self, index: int):
        """Crops (k, S, S, 3), the encoder's view (s, s, 3) or None, whether the image is transparent, and None.

        Where the image cannot be read they are black, and the last is (index, reason, whether the image is broken).
        """
        try:
            image = self.load(index)
            code_view = np.array(center_crop(image, self.code_size)) if self.code_size else None
            return self.crops(image, index), code_view, is_transparent(image), None
        except Exception as error:  # Pillow's readers raise many types
            reason = f"{type(error).__name__}: {error}".replace(f" {self.path(index)!r}", "")
            crops = np.zeros((len(self.flips[index]), self.image_size, self.image_size, 3), np.uint8)
            code_view = np.zeros((self.code_size, self.code_size, 3), np.uint8) if self.code_size else None
            return crops, code_view, False, (index, reason, is_broken(self.path(index), error))


def is_broken(path: str, error: Exception) -> bool:
    """Whether the image itself is at fault, and is to be skipped, not the disk or the memory, whose faults may pass."""
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # EINVAL: a seek to a wrong offset
        return error.errno in (errno.ENOENT, errno.ELOOP) and os.path.islink(path)  # a dangling link
    return not isinstance(error, MemoryError)


def collate(items: list) -> tuple[torch.Tensor, torch.Tensor | None, int, list]:
    """A batch of items of `Views`: crops (n, k, S, S, 3), views (n, s, s, 3) or None, how many images are transparent,
    and what is said of those that cannot be read."""
    crops, code_views, transparent, unreadable = zip(*items)
    return (
        torch.from_numpy(np.stack(crops)),
        torch.from_numpy(np.stack(code_views)) if code_views[0] is not None else None,
        sum(transparent),
        [one for one in unreadable if one],
    )
