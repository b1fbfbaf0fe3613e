"""Pictures of how a diffusion model in training draws."""

from pathlib import Path

import numpy as np
import torch

from dlc.images import image_grid, save_png, to_uint8
from dlc.sampling.latents import create_sampler, sample_latents
from dlc.vae import decode

PREVIEW_SAMPLES, PREVIEW_STEPS, PREVIEW_CFG = 8, 50, 1.5


def first_rows(batches, encode, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (n, 4, S/8, S/8), of moments the mean, and conditions (n, ...) of the first rows.

    encode: an `Encode` if batches are of images, else None.
    """
    rows = np.arange(min(PREVIEW_SAMPLES, batches.rows_per_epoch))
    latents, y = (tensor.to(device) for tensor in batches.gather(rows))
    if encode:
        latents, y = encode(latents, y)
    return latents[:, : batches.features.latent_shape[0]].float(), y.float() if y.is_floating_point() else y.long()


def save_preview(path: Path, ema, latents: torch.Tensor, y: torch.Tensor, vae, seed: int):
    """Write a picture: latents decoded, above EMA samples for their conditions y, from the same noise every time.

    If the EMA is sharded, every process calls this; the one with a VAE draws the picture.
    """
    indices = torch.arange(len(latents), device=latents.device)
    samples = sample_latents(
        ema,
        create_sampler("ddpm", PREVIEW_STEPS),
        y=y,
        seed=seed,
        indices=indices,
        latent_shape=latents.shape[1:],
        cfg_scale=PREVIEW_CFG,
    )
    if vae is None:
        return
    with torch.inference_mode():
        images = to_uint8(decode(vae, torch.cat([latents, samples]))).cpu().numpy()
    path.parent.mkdir(exist_ok=True)
    save_png(path, image_grid(images, len(latents)))


class CodePreview:
    pass
