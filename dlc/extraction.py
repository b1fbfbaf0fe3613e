"""The parts of extraction: images and their views, the two networks, and work done in threads but kept in order."""
import errno
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import ImageOps
from torch.utils.data import Dataset

from dlc.cli import number
from dlc.encoder import DEFAULT_BACKBONE, load_encoder
from dlc.latents import IMAGENET_MEAN, IMAGENET_STD, center_crop, in_batches, load_rgb, normalize, posterior
from dlc.noise import Stream, integers
from dlc.runtime import PRECISIONS, cores_per_process

DEFAULT_ENCODER = "pretrained/dlc_encoder.pth"


#################################################################################
#                                    Images                                     #
#################################################################################

def flips_of(policy, count, seed):
    """Whether each row of each image is flipped: (count, 1) bool, or (count, 2) for the policy "both"."""
    if policy == "both":
        return np.tile([False, True], (count, 1))
    if policy == "none":
        return np.zeros((count, 1), bool)
    return integers(seed, Stream.FLIP, torch.arange(count), 2).bool().unsqueeze(1).numpy()


class Views(Dataset):
    """Both views of each image, 8-bit: the VAE's crop, one for each of `flips`, and the encoder's, never flipped."""

    def __init__(self, root, paths, flips, image_size, code_size):
        # one array: of a list, each reader would come to hold a copy of a million strings, for counting references
        self.root, self.paths = root, np.array([os.fsencode(path) for path in paths])
        self.flips, self.image_size, self.code_size = flips, image_size, code_size

    def path(self, index):
        return os.path.join(self.root, os.fsdecode(self.paths[index]))

    def crops(self, image, index):
        crop = center_crop(image, self.image_size)
        return np.stack([np.array(ImageOps.mirror(crop) if flip else crop) for flip in self.flips[index]])

    def __getitem__(self, index):
        """The index, crops (k, S, S, 3), the encoder's view (s, s, 3) or None, None; or the index, error, is broken."""
        try:
            image = load_rgb(self.path(index))
            code_view = np.array(center_crop(image, self.code_size)) if self.code_size else None
            return index, self.crops(image, index), code_view, None
        except Exception as error:                          # Pillow's readers raise all kinds
            reason = f"{type(error).__name__}: {error}".replace(f" {self.path(index)!r}", "")
            return index, None, None, (reason, is_broken(self.path(index), error))


def is_broken(path, error):
    """Whether an error is the image's own, to be skipped, rather than the disk's or the memory's, which may pass."""
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):      # a seek to where a file says
        return error.errno in (errno.ENOENT, errno.ELOOP) and os.path.islink(path)        # a link to nowhere
    return not isinstance(error, MemoryError)


def collate(items):
    """Indices (n,), crops (n, k, S, S, 3) and encoder views (n, s, s, 3) or None of the readable; what of the others.

    The last: a list of (index, error, is broken).
    """
    good = [item[:3] for item in items if item[3] is None]
    unreadable = [(item[0], *item[3]) for item in items if item[3] is not None]
    if not good:
        return None, None, None, unreadable
    indices, crops, code_views = zip(*good)
    return (torch.tensor(indices), torch.from_numpy(np.stack(crops)),
            torch.from_numpy(np.stack(code_views)) if code_views[0] is not None else None, unreadable)


#################################################################################
#                                   Encoders                                    #
#################################################################################

def add_encoder_flags(add, default=DEFAULT_ENCODER, more=""):
    """The flags by which a script's user names a SEM encoder. more: words on what else it is or takes."""
    add("--encoder", default=default, help=f"SEM encoder: directory or reference checkpoint{more} [%(default)s]")
    add("--encoder-backbone", help=f"timm model of a reference checkpoint [{DEFAULT_BACKBONE}]")
    add("--L", type=number(int, 1), help="code positions of a reference checkpoint [512]")
    add("--V", type=number(int, 2, 65536), help="tokens a position, of a reference checkpoint [256] or of features "
                                                "without a manifest")


def open_encoder(args):
    """The encoder that those flags name, as `load_encoder` gives it. Raises ValueError as it does."""
    if args.encoder == DEFAULT_ENCODER and not Path(args.encoder).exists():
        raise ValueError(f"no SEM encoder at {args.encoder}: put the DLC authors' teacher checkpoint there, or name "
                         "one with --encoder")
    return load_encoder(args.encoder, backbone=args.encoder_backbone, L=args.L, V=args.V)


#################################################################################
#                                   Networks                                    #
#################################################################################

class Networks:
    """Crops to latents and views to codes on a device, in the given precision, by batches of one size.

    On the CPU every operation runs on one thread, and batches side by side (`threads`): the sums that a convolution
    takes depend on how many threads share it, and cores each at a batch of its own get more done.

    Args:
        vae, encoder (or None): float32, on the CPU; are changed in place.
        batch_size: images that every batch is filled up to.
        precision: a key of PRECISIONS, for the VAE's encoder and the SEM encoder's backbone.
    """

    def __init__(self, vae, encoder, device, batch_size, precision="fp32", compile=False):
        self.vae, self.encoder, self.device, self.batch_size = vae.to(device), encoder, device, batch_size
        self.threads = 2 if device.type == "cuda" else cores_per_process()    # 2: the GPU always has work waiting
        torch.set_num_threads(1)        # on GPUs, too: pinning's thread sets it, and compiled code would be made anew
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True
        dtype = PRECISIONS[precision]
        for part in filter(None, (vae.encoder, vae.quant_conv)):
            part.to(dtype=dtype, memory_format=torch.channels_last)
        if encoder:
            encoder.to(device).backbone.to(dtype)
        if compile:
            vae.encoder.compile()
            for block in encoder.backbone.blocks if encoder else ():
                block.compile()

    def pool(self):
        """The threads that work on batches side by side."""
        on_gpu = self.device.type == "cuda"             # a thread's own device would be the first one
        return ThreadPoolExecutor(self.threads, initializer=torch.cuda.set_device if on_gpu else None,
                                  initargs=(self.device,) if on_gpu else ())

    def _run(self, network, pixels, places):
        with torch.inference_mode():
            return in_batches(network, pixels.to(self.device, non_blocking=True), self.batch_size, places)

    def moments(self, crops, places=None):
        """Crops (n, k, S, S, 3) uint8 to the scaled posterior's mean and std (n, k, 2, 4, S/8, S/8), float32.

        places: see `in_batches`.
        """
        def network(pixels):
            images = normalize(pixels.flatten(0, 1)).contiguous(memory_format=torch.channels_last)
            return torch.stack(posterior(self.vae, images), dim=1).unflatten(0, pixels.shape[:2])
        return self._run(network, crops, places)

    def codes(self, views, places=None):
        """Views (n, s, s, 3) uint8 to codes (n, L) int64. places: see `in_batches`."""
        return self._run(lambda pixels: self.encoder.codes(normalize(pixels, IMAGENET_MEAN, IMAGENET_STD)), views,
                         places)


def in_order(pool, function, items, ahead):
    """function(item) of each item in turn, computed by the pool's threads for up to `ahead` items ahead."""
    futures = deque()
    for item in items:
        futures.append(pool.submit(function, item))
        if len(futures) > ahead:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()
