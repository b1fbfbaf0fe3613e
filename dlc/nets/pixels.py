"""8-bit pixels to the moments of VAE latents and to codes, for extraction and for training on images.

vae, sem_encoder = open_networks(256, "ema", "lavoies/SEM_dinov2_L512")
encoder = PixelEncoder(vae, sem_encoder, device)
moments, codes = encoder.moments(crops, 32), encoder.codes(views, 32)            # (n, 2C, S/f, S/f), (n, L)
"""

import math

import torch
import torch.nn as nn
from torch.utils._pytree import tree_map

from dlc.data.images import normalize
from dlc.machine.exact import in_batches
from dlc.machine.processes import PRECISIONS, same_kernels
from dlc.nets.encoder import SEMEncoder, tokens
from dlc.nets.vae import posterior

ENCODED_AT_ONCE = 32  # images; the VAE's activations of more would take as much memory as training itself


class PixelEncoder:
    """8-bit pixels to the moments of VAE latents and to discrete latent codes, on a device, without gradients.

    Args:
        vae, encoder: as loaded, float32 and on the CPU; both are moved and cast in place.
        precision: a key of PRECISIONS, for the VAE's encoder and the SEM encoder's backbone.
        compile: whether to torch.compile both.
    """

    def __init__(
        self,
        vae: nn.Module,
        encoder: SEMEncoder | None,
        device: torch.device,
        precision: str = "fp32",
        compile: bool = False,
    ):
        self.vae, self.device = vae.to(device), device
        self.encoder = encoder.to(device).requires_grad_(False) if encoder else None
        dtype = PRECISIONS[precision]
        for part in filter(None, (vae.encoder, getattr(vae, "quant_conv", None))):
            part.to(dtype=dtype, memory_format=torch.channels_last)
        if encoder:
            encoder.backbone.to(dtype)
        if compile:
            for part in (vae.encoder, *(encoder.backbone.blocks if encoder else ())):
                part.compile(options=same_kernels())

    @torch.no_grad()
    def moments(self, crops: torch.Tensor, batch_size: int) -> torch.Tensor:
        """Crops (n, …, S, S, 3) uint8 to the posterior's mean, then std (n, …, 2C, S/f, S/f) float32, `in_batches`."""

        def network(pixels):
            images = normalize(pixels.flatten(0, -4)).contiguous(memory_format=torch.channels_last)
            return torch.cat(posterior(self.vae, images), dim=1).unflatten(0, pixels.shape[:-3])

        return in_batches(network, crops.to(self.device, non_blocking=True), batch_size)

    @torch.no_grad()
    def codes(self, views: torch.Tensor, batch_size: int) -> torch.Tensor:
        """Views (n, s, s, 3) uint8 to codes (n, L) int64, see `tokens`, `in_batches`."""
        pixels = views.to(self.device, non_blocking=True)
        return in_batches(lambda some: tokens(self.encoder.encode_pixels(some)), pixels, batch_size)

    @torch.no_grad()
    def patch_tokens(self, views: torch.Tensor, batch_size: int | None = None) -> torch.Tensor:
        """Views (n, …, s, s, 3) uint8 to the encoder's patch tokens (n, …, T, width) float32, `in_batches`."""

        def network(pixels):
            return self.encoder.patch_tokens(pixels.flatten(0, -4)).unflatten(0, pixels.shape[:-3])

        return in_batches(network, views.to(self.device, non_blocking=True), batch_size or even_size(len(views)))

    def __call__(
        self, crops: torch.Tensor, condition: torch.Tensor | dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor | dict[str, torch.Tensor]]:
        """Turn a batch of images into the (moments, conditions) that a batch of features with moments would hold.

        Crops (n, S, S, 3) become moments (n, 2C, S/f, S/f). In a condition, or a dict of several, views (n, s, s, 3)
        become codes (n, L); all else is returned as it is. Where the encoder's logits are not finite, the moments are
        NaN.
        """
        size = even_size(len(crops))
        moments = self.moments(crops, size)

        def coded(values):
            nonlocal moments
            if values.ndim != 4:
                return values
            codes = self.codes(values, size)
            # there is no code: NaN latents make the loss NaN, whose check ends the run
            moments = moments.masked_fill((codes < 0).any(dim=1).view(-1, 1, 1, 1), math.nan)
            return codes.clamp(min=0)

        condition = tree_map(coded, condition)
        return moments, condition


def even_size(count: int) -> int:
    """The batch size for this many images: below ENCODED_AT_ONCE, and such that little of the last one is padding."""
    return -(-count // -(-count // ENCODED_AT_ONCE))
