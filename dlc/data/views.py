"""The views that networks get of the images of a source: crops, flipped or not, as arrays and as batches.

views = Views(source, flips_of("random", len(source), seed=0), image_size=256, code_size=224)
crops, code_views, transparent, unreadable = collate([views[0], views[1]])    # (2, k, 256, 256, 3), (2, 224, 224, 3)
"""

import errno
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps

from dlc.data.images import WHITE, Source, center_crop, is_transparent, load_rgb
from dlc.machine.noise import Stream, integers

OPENED = r" <_io\.BytesIO object at 0x\w+>"  # how Pillow calls a file without a name


def flips_of(policy: str, count: int, seed: int) -> np.ndarray:
    """Whether each row of each image is flipped: (count, 1) bool, or (count, 2) for the policy "both".

    The flips of "random" are a function of the seed and the image's index.
    """
    if policy == "random":
        return integers(seed, Stream.FLIP, torch.arange(count), 2).bool().unsqueeze(1).numpy()
    return np.tile([False, True] if policy == "both" else [False], (count, 1))


@dataclass
class Views:
    """The 8-bit views of each image of a source: crops for the VAE and, never flipped, one for the SEM encoder."""

    source: Source
    flips: np.ndarray  # (images, k) bool, whether each of the k crops is flipped
    image_size: int  # side of the crops, pixels
    code_size: int | None  # that of the encoder's view; None: no such view
    background: Sequence[int] = WHITE  # what transparent images are blended on, (r, g, b)

    def load(self, index: int) -> Image.Image:
        return load_rgb(self.source.open(index), self.background)

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
            path = self.source.path(index)
            reason = re.sub(f":? {re.escape(repr(path))}|{OPENED}", "", f"{type(error).__name__}: {error}")
            crops = np.zeros((len(self.flips[index]), self.image_size, self.image_size, 3), np.uint8)
            code_view = np.zeros((self.code_size, self.code_size, 3), np.uint8) if self.code_size else None
            return crops, code_view, False, (index, reason, is_broken(path, error))


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
