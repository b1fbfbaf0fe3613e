"""The pipeline of extraction: batches of images to the arrays of their rows, joined to shards and written in order.

batches = batches_of(range(num_shards), count, shard_size, batch_size)
extract(BatchEncoder(encoder, views, labels, manifest, batch_size), zip(batches, loader), writer, count)
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from dlc.data.manifest import Manifest
from dlc.data.store import FeatureWriter, NotFinite, as_stored
from dlc.data.views import Views
from dlc.machine.exact import side_by_side
from dlc.machine.noise import Stream, normal

if TYPE_CHECKING:
    from dlc.nets.pixels import PixelEncoder

HELP = "try --precision bf16 or fp32"  # what to do about latents or logits that are NaN or infinite


def batches_of(shards: Iterable[int], count: int, shard_size: int, batch_size: int) -> list[list[int]]:
    """The indices of the images of some shards, of `count` images in all, in batches that never cross a shard."""
    batches = []
    for shard in shards:
        indices = range(shard * shard_size, min((shard + 1) * shard_size, count))
        batches += [list(indices[i : i + batch_size]) for i in range(0, len(indices), batch_size)]
    return batches


@dataclass
class BatchEncoder:
    """Turns a batch of loaded images into the arrays of its rows, as shards hold them."""

    encoder: "PixelEncoder"
    views: Views  # what the batches are loaded from, with k crops per image
    labels: np.ndarray  # (images,) int64
    manifest: Manifest  # says what is stored, and the seed of the posterior's draws
    batch_size: int  # images that each batch is filled up to
    strict: bool = False  # raise for an image that is broken, rather than skip it

    def warm_up(self) -> None:
        """Compile. Called before there are threads, of which only one may compile."""
        S, s = self.views.image_size, self.views.code_size
        self.encoder.moments(torch.zeros(1, self.views.flips.shape[1], S, S, 3, dtype=torch.uint8), self.batch_size)
        if self.manifest.V:
            self.encoder.codes(torch.zeros(1, s, s, 3, dtype=torch.uint8), self.batch_size)
        if self.manifest.tokens:
            self._tokens([0], torch.zeros(1, s, s, 3, dtype=torch.uint8))

    def __call__(self, item: tuple) -> tuple[list[int], dict[str, np.ndarray], list[list[str]], int]:
        """Encode (consecutive indices of images, what `collate` made of the images).

        Images that cannot be read are encoded as well, as the black ones that they are by then, and dropped afterwards:
        so the others keep their places in the batch, on which rounding may depend.

        Returns the indices, the arrays by kind, of k rows per image, the skipped images, [path, reason] each, and how
        many are transparent.

        Raises OSError for an image that cannot be read and is not to be skipped, NotFinite for latents or logits that
        are NaN or infinite.
        """
        batch, (crops, code_views, transparent, unreadable) = item
        for index, error, broken in unreadable:
            if self.strict or not broken:
                advice = "fix the file, or leave out --strict" if broken else "fix the file"
                raise OSError(f"cannot read {self.views.source.path(index)!r} ({error}): {advice}")
        copies, skipped = crops.shape[1], {index for index, _, _ in unreadable}
        good = np.array([index not in skipped for index in batch])
        names = np.array([self.views.source.name(index) for index in batch])[good]
        latents = self._latents(batch, crops)[torch.from_numpy(good)].flatten(0, 1)  # (n * k, C or 2C, S/f, S/f)

        def stored(what, values, dtype):
            return as_stored(values, dtype, lambda row: f"{what} of {str(names[row // copies])!r}", HELP)

        rows = dict(
            features=stored("latents", latents.numpy(), self.manifest.dtype),
            labels=self.labels[batch][good].repeat(copies),
            path=names.repeat(copies),
        )
        if self.manifest.V:
            codes = self.encoder.codes(code_views, self.batch_size).cpu().numpy()[good]  # (n, L)
            if (codes < 0).any():
                name = str(names[(codes < 0).any(axis=1).argmax()])
                raise NotFinite(f"the encoder's logits of {name!r} are not finite numbers: {HELP}")
            rows["sem"] = codes.astype(self.manifest.dtypes["sem"]).repeat(copies, axis=0)
        if self.manifest.tokens:
            tokens = self._tokens(batch, code_views)[good]  # (n, k, T, width)
            rows["tokens"] = stored("the encoder's patch tokens", tokens.reshape(-1, *tokens.shape[2:]), np.float16)
        return batch, rows, [[self.views.source.name(index), error] for index, error, _ in unreadable], transparent

    def _tokens(self, batch: list[int], code_views: torch.Tensor) -> np.ndarray:
        """Views (n, s, s, 3) to the patch tokens of each copy, flipped as its crop is, (n, k, T, width) float16."""
        flips = torch.from_numpy(self.views.flips[batch])[..., None, None, None]  # (n, k, 1, 1, 1)
        views = torch.where(flips, code_views.flip(2).unsqueeze(1), code_views.unsqueeze(1))  # (n, k, s, s, 3)
        return self.encoder.patch_tokens(views, self.batch_size).half().cpu().numpy()

    def _latents(self, batch: list[int], crops: torch.Tensor) -> torch.Tensor:
        """Crops (n, k, S, S, 3) to what is stored of their latents (n, k, C or 2C, S/f, S/f), on the CPU."""
        latents = self.encoder.moments(crops, self.batch_size)  # (n, k, 2C, S/f, S/f)
        if self.manifest.latents != "moments":
            latents, std = latents.chunk(2, dim=2)  # (n, k, C, S/f, S/f) each
        if self.manifest.latents == "sample":
            indices = torch.arange(batch[0], batch[-1] + 1, device=latents.device)
            seed, shape = self.manifest.seed, tuple(latents.shape[2:])
            draws = [normal(seed, Stream.POSTERIOR, indices, shape, copy) for copy in range(crops.shape[1])]
            latents = latents + std * torch.stack(draws, dim=1)
        return latents.cpu()


def whole_shards(
    encoded: Iterable, count: int, shard_size: int, on_batch: Callable[[int], None] = lambda images: None
) -> Iterator[tuple[int, dict[str, np.ndarray], list[list[str]], int]]:
    """Join what a BatchEncoder returns, batch after batch in order, into what `FeatureWriter.write` takes of a shard.

    Args:
        count: number of images in all, by which the last shard ends.
        on_batch: called with the number of images of each batch, for a progress bar.
    """
    parts, skipped, transparent = [], [], 0
    for batch, rows, unreadable, blended in encoded:
        parts.append(rows)
        skipped += unreadable
        transparent += blended
        on_batch(len(batch))
        shard = batch[0] // shard_size
        if batch[-1] + 1 == min((shard + 1) * shard_size, count):  # the last batch of its shard
            yield shard, {kind: np.concatenate([part[kind] for part in parts]) for kind in rows}, skipped, transparent
            parts, skipped, transparent = [], [], 0


def extract(
    encode: BatchEncoder,
    batches: Iterable,
    writer: FeatureWriter,
    count: int,
    on_batch: Callable[[int], None] = lambda images: None,
) -> None:
    """Encode batches side by side, and write each shard while the next one is encoded.

    Args:
        batches: (indices, what `collate` made of their images) of each batch, in order.
        count, on_batch: see `whole_shards`.
    """
    device = encode.encoder.device
    shards = whole_shards(side_by_side(encode, batches, device), count, writer.manifest.shard_size, on_batch)
    for _ in side_by_side(lambda shard: writer.write(*shard), shards, device, threads=1):
        pass
