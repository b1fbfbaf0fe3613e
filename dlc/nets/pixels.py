"""Pixels to latents and codes, and the pipeline that makes shards of them.

encoder = PixelEncoder(vae, sem_encoder, device)                  # also encodes for training on images
moments, codes = encoder.moments(crops, 32), encoder.codes(views, 32)

batches = batches_of(range(num_shards), count, shard_size, batch_size)
extract(BatchEncoder(encoder, views, labels, manifest, batch_size), zip(batches, loader), writer, count)
"""

import math
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from dlc.data import NotFinite, as_stored
from dlc.data.images import normalize
from dlc.machine.noise import Stream, normal
from dlc.machine.processes import PRECISIONS, cores_per_process, in_batches, set_numerics
from dlc.nets.encoder import tokens
from dlc.nets.vae import latent_shape, posterior

NOT_FINITE = "try --precision bf16 or fp32"  # what to do about latents or logits that are NaN or infinite
ENCODED_AT_ONCE = 32  # images; the VAE's activations of more would take as much memory as training itself


#################################################################################
#                                    Networks                                   #
#################################################################################


def set_exact_numerics():
    """For the whole process: one CPU thread per operation, no TF32, deterministic cuDNN.

    The sums in a convolution depend on how many threads share it. One thread per operation makes them reproducible,
    and batches side by side, a thread each, are faster than threads that share one batch.
    """
    torch.set_num_threads(1)  # also on GPUs: the pinning thread does so, and a change would recompile
    set_numerics(tf32=False, deterministic=True)


class PixelEncoder:
    """8-bit pixels to the moments of VAE latents and to discrete latent codes, on a device, without gradients.

    Args:
        vae, encoder: as loaded, float32 and on the CPU; both are moved and cast in place. encoder may be None.
        precision: a key of PRECISIONS, for the VAE's encoder and the SEM encoder's backbone.
        compile: whether to torch.compile both.
    """

    def __init__(self, vae, encoder, device: torch.device, precision: str = "fp32", compile: bool = False):
        self.vae, self.device = vae.to(device), device
        self.encoder = encoder.to(device).requires_grad_(False) if encoder else None
        dtype = PRECISIONS[precision]
        for part in filter(None, (vae.encoder, getattr(vae, "quant_conv", None))):
            part.to(dtype=dtype, memory_format=torch.channels_last)
        if encoder:
            encoder.backbone.to(dtype)
        if compile:
            vae.encoder.compile()
            for block in encoder.backbone.blocks if encoder else ():
                block.compile()

    @torch.no_grad()
    def moments(self, crops: torch.Tensor, batch_size: int, places=None) -> torch.Tensor:
        """Crops (n, …, S, S, 3) uint8 to the posterior's mean, then std (n, …, 2C, S/f, S/f) float32.

        batch_size, places: see `in_batches`.
        """

        def network(pixels):
            images = normalize(pixels.flatten(0, -4)).contiguous(memory_format=torch.channels_last)
            return torch.cat(posterior(self.vae, images), dim=1).unflatten(0, pixels.shape[:-3])

        return in_batches(network, crops.to(self.device, non_blocking=True), batch_size, places)

    @torch.no_grad()
    def codes(self, views: torch.Tensor, batch_size: int, places=None) -> torch.Tensor:
        """Views (n, s, s, 3) uint8 to codes (n, L) int64, see `tokens`. batch_size, places: see `in_batches`."""
        return in_batches(
            lambda pixels: tokens(self.encoder.encode_pixels(pixels)),
            views.to(self.device, non_blocking=True),
            batch_size,
            places,
        )

    def __call__(self, crops, condition):
        """Turn a batch of images into the (moments, conditions) that a batch of features with moments would hold.

        Crops (n, S, S, 3) become moments (n, 2C, S/f, S/f). With an encoder, condition is views, which become codes
        (n, L); otherwise it is returned as it is. Where the encoder's logits are not finite, the moments are NaN.
        """
        parts = -(-len(crops) // ENCODED_AT_ONCE)
        size = -(-len(crops) // parts)  # of equal size, so that little of the last one is padding
        moments = self.moments(crops, size)
        if self.encoder:
            condition = self.codes(condition, size)
            # there is no code: NaN latents make the loss NaN, whose check ends the run
            moments = moments.masked_fill((condition < 0).any(dim=1).view(-1, 1, 1, 1), math.nan)
            condition = condition.clamp(min=0)
        return moments, condition


def all_codes(encoder, batches, batch_size):
    """The codes (n, L) of several batches of (views, places)."""
    return torch.cat([encoder.codes(views, batch_size, places) for views, places in batches])


#################################################################################
#                                     Shards                                    #
#################################################################################


def batches_of(shards, count: int, shard_size: int, batch_size: int) -> list[list[int]]:
    """The indices of the images of some shards, of `count` images in all, in batches that never cross a shard."""
    batches = []
    for shard in shards:
        indices = range(shard * shard_size, min((shard + 1) * shard_size, count))
        batches += [list(indices[i : i + batch_size]) for i in range(0, len(indices), batch_size)]
    return batches


class BatchEncoder:
    """Turns a batch of loaded images into the arrays of its rows, as shards hold them.

    Args:
        encoder: the PixelEncoder.
        views: the `Views` that the batches are loaded from, with k crops per image.
        labels: (images,) int64.
        manifest: says what is stored, and the seed of the posterior's draws.
        batch_size: images that each batch is filled up to.
        strict: raise for an image that is broken, rather than skip it.
    """

    def __init__(
        self, encoder: PixelEncoder, views, labels: np.ndarray, manifest, batch_size: int, strict: bool = False
    ):
        self.encoder, self.views, self.labels, self.manifest = encoder, views, labels, manifest
        self.batch_size, self.strict = batch_size, strict

    def warm_up(self):
        """Compile. Called before there are threads, of which only one may compile."""
        S, s = self.views.image_size, self.views.code_size
        self.encoder.moments(torch.zeros(1, self.views.flips.shape[1], S, S, 3, dtype=torch.uint8), self.batch_size)
        if self.manifest.V:
            self.encoder.codes(torch.zeros(1, s, s, 3, dtype=torch.uint8), self.batch_size)

    def __call__(self, item):
        """Encode (indices of a batch, what `collate` made of its images).

        Returns the indices, the arrays by kind, of k rows per image, and the skipped images, [path, reason] each.

        Raises OSError for an image that cannot be read and is not to be skipped, NotFinite for latents or logits that
        are NaN or infinite.
        """
        batch, (indices, crops, code_views, unreadable) = item
        for index, error, broken in unreadable:
            if self.strict or not broken:
                raise OSError(
                    f"cannot read {self.views.path(index)!r} ({error}): mend it"
                    f"{', or leave out --strict' if broken else ''}"
                )
        skipped = [[self.views.name(index), error] for index, error, _ in unreadable]
        if indices is None:
            return batch, self.no_rows(), skipped
        copies = crops.shape[1]
        names = np.array([self.views.name(index) for index in indices.tolist()])
        rows = dict(
            features=self._latents(batch, indices, crops, names),
            labels=self.labels[indices.numpy()].repeat(copies),
            path=names.repeat(copies),
        )
        if self.manifest.V:
            rows["sem"] = self._codes(batch, indices, code_views, names).repeat(copies, axis=0)
        return batch, rows, skipped

    def no_rows(self):
        """The arrays of a batch without a readable image."""
        sides = latent_shape(self.encoder.vae, self.views.image_size)[1:]
        shapes = dict(features=(self.manifest.stored_channels, *sides), sem=(self.manifest.L,), labels=())
        return dict(
            {kind: np.zeros((0, *shapes[kind]), dtype) for kind, dtype in self.manifest.dtypes.items()},
            path=np.zeros(0, "U1"),
        )

    def _latents(self, batch, indices, crops, names):
        """The stored latents (n * k, …) of crops (n, k, S, S, 3)."""
        places, copies = indices - batch[0], crops.shape[1]  # the place of an image that cannot be read stays empty
        latents = self.encoder.moments(crops, self.batch_size, places)  # (n, k, 2C, S/f, S/f)
        if self.manifest.latents != "moments":
            latents, std = latents.chunk(2, dim=2)  # (n, k, C, S/f, S/f) each
        if self.manifest.latents == "sample":
            # drawn for the whole batch, so that shapes do not depend on which images are readable
            there = torch.arange(batch[0], batch[-1] + 1, device=latents.device)
            noise = torch.stack(
                [
                    normal(self.manifest.seed, Stream.POSTERIOR, there, tuple(latents.shape[2:]), copy)
                    for copy in range(copies)
                ],
                dim=1,
            )
            latents = latents + std * torch.stack([noise[place] for place in places])
        return as_stored(
            latents.flatten(0, 1).cpu().numpy(),
            self.manifest.dtype,
            lambda row: repr(str(names[row // copies])),
            NOT_FINITE,
        )

    def _codes(self, batch, indices, code_views, names):
        """The stored codes (n, L) of views (n, s, s, 3)."""
        codes = self.encoder.codes(code_views, self.batch_size, indices - batch[0]).cpu().numpy()
        if (codes < 0).any():
            name = str(names[(codes < 0).any(axis=1).argmax()])
            raise NotFinite(f"the encoder's logits of {name!r} are not finite numbers: {NOT_FINITE}")
        return codes.astype(self.manifest.dtypes["sem"])


def whole_shards(encoded, count: int, shard_size: int, on_batch=lambda images: None):
    """Join what a BatchEncoder returns, batch after batch in order, into (shard, arrays by kind, skipped images).

    Args:
        count: number of images in all, by which the last shard ends.
        on_batch: called with the number of images of each batch, for a progress bar.
    """
    parts, skipped = [], []
    for batch, rows, unreadable in encoded:
        parts.append(rows)
        skipped += unreadable
        on_batch(len(batch))
        shard = batch[0] // shard_size
        if batch[-1] + 1 == min((shard + 1) * shard_size, count):  # the last batch of its shard
            yield shard, {kind: np.concatenate([part[kind] for part in parts]) for kind in rows}, skipped
            parts, skipped = [], []


def extract(encode: BatchEncoder, batches, writer, count: int, on_batch=lambda images: None) -> None:
    """Encode batches side by side, and write each shard while the next one is encoded.

    Args:
        batches: (indices, what `collate` made of their images) of each batch, in order.
        writer: a FeatureWriter.
        count, on_batch: see `whole_shards`.
    """
    device = encode.encoder.device
    with encoding_pool(device) as encoding, ThreadPoolExecutor(1) as writing:
        encoded = in_order(encoding, encode, batches, encoding_threads(device))
        shards = whole_shards(encoded, count, writer.manifest.shard_size, on_batch)
        for _ in in_order(writing, lambda shard: writer.write(*shard), shards, 1):
            pass


#################################################################################
#                                    Threads                                    #
#################################################################################


def encoding_threads(device):
    """How many batches are encoded side by side: one per core, or two on a GPU, so that it always has work queued."""
    return 2 if device.type == "cuda" else cores_per_process()


def encoding_pool(device):
    """The threads for that."""
    on_gpu = device.type == "cuda"  # where new threads default to cuda:0
    return ThreadPoolExecutor(
        encoding_threads(device),
        initializer=torch.cuda.set_device if on_gpu else None,
        initargs=(device,) if on_gpu else (),
    )


def in_order(pool, function, items, ahead):
    """function(item) of each item in turn, computed by the pool's threads for up to `ahead` items ahead."""
    futures = deque()
    for item in items:
        futures.append(pool.submit(function, item))
        if len(futures) > ahead:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()
