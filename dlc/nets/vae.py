"""Images <-> latents: the only file that knows a VAE's channels, its downsampling factor, its scale and its shift.

latents = (z - shift_factor) * scaling_factor                  # z: a draw or the mean of the encoder's posterior
latents = (z - latents_mean) * scaling_factor / latents_std    # of VAEs that say both per channel

A VAE is a module with `encoder`, `encode`, `decode` and a `config`, as diffusers' AutoencoderKL and AutoencoderDC are.
`dlc.weights.networks.load_vae` loads one. One that encodes to a tensor has a posterior of standard deviation 0.
"""

from collections.abc import Mapping

import torch
import torch.nn as nn

from dlc.machine.cli import one_line
from dlc.nets.digest import weights_sha256

Scale = float | torch.Tensor  # a number, or (C, 1, 1) of VAEs that say one per channel


def latent_settings(vae: nn.Module) -> dict:
    """How a VAE's latents are scaled, and how many channels they have, as the manifest records it."""
    mean, std = (vae.config.get(key) for key in ("latents_mean", "latents_std"))
    return dict(
        latent_channels=vae.config["latent_channels"],
        scaling_factor=vae.config["scaling_factor"],
        shift_factor=vae.config.get("shift_factor") or 0.0,
        latents_mean=None if mean is None else list(mean),
        latents_std=None if std is None else list(std),
    )


def scale_and_shift(vae: nn.Module, device: torch.device) -> tuple[Scale, Scale]:
    """The two of latents = (z - shift) * scale."""
    settings = latent_settings(vae)
    if settings["latents_mean"] is None:
        return settings["scaling_factor"], settings["shift_factor"]
    mean, std = (  # filled on the device: a copy from the CPU would make the CPU wait for the GPU
        torch.stack([torch.full((1, 1), one, device=device) for one in settings[key]])
        for key in ("latents_mean", "latents_std")
    )
    return settings["scaling_factor"] / std, mean


def pixels_per_cell(config: Mapping) -> int:
    """The downsampling factor f, by a VAE's config: pixels per latent cell along each axis."""
    key = "block_out_channels" if "block_out_channels" in config else "encoder_block_out_channels"
    return 2 ** (len(config[key]) - 1)


def latent_shape(vae: nn.Module, image_size: int) -> tuple[int, int, int]:
    """The shape (C, S/f, S/f) of the latents of images of S = image_size pixels."""
    side = image_size // pixels_per_cell(vae.config)
    return vae.config["latent_channels"], side, side


def posterior(vae: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 3, S, S) in [-1, 1] to the mean and the standard deviation of their latents, shifted and scaled.

    Each is (N, C, S/f, S/f) float32, whatever the precision of the VAE's weights.
    """
    encoded = vae.encode(images.to(next(vae.encoder.parameters()).dtype))
    scale, shift = scale_and_shift(vae, images.device)
    if not hasattr(encoded, "latent_dist"):
        mean = (encoded.latent.float() - shift) * scale
        return mean, torch.zeros_like(mean)
    moments = encoded.latent_dist
    return (moments.mean.float() - shift) * scale, moments.std.float() * scale


def encode(vae: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Images (N, 3, S, S) in [-1, 1] to latents (N, C, S/f, S/f), the posterior's mean, of about unit variance."""
    return posterior(vae, images)[0]


def decode(vae: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Latents (N, C, h, w) to images (N, 3, S, S), about in [-1, 1]."""
    scale, shift = scale_and_shift(vae, latents.device)
    return vae.decode((latents / scale + shift).to(next(vae.decoder.parameters()).dtype)).sample


#################################################################################
#                        Is this the VAE of these latents?                      #
#################################################################################


def check_decodes(vae: nn.Module, name: str, channels: int, source: dict, whose: str) -> None:
    """Raise ValueError if a VAE cannot decode latents with this number of channels, or with another scale or shift.

    Args:
        name: the value of --vae, for the error.
        channels: channels of the latents.
        source: what is recorded of the latents: scaling_factor (None: not known), and shift_factor, latents_mean and
            latents_std, which it may lack.
        whose: words for these latents in the error, such as "the checkpoint's latents".
    """
    settings = latent_settings(vae)
    if settings["latent_channels"] != channels:
        raise ValueError(f"--vae {name} has {settings['latent_channels']} latent channels, {whose} {channels}")
    if source.get("scaling_factor") is None:
        return
    for key, default in dict(scaling_factor=None, shift_factor=0.0, latents_mean=None, latents_std=None).items():
        theirs = default if source.get(key) is None else source[key]
        if theirs != settings[key]:
            words = key.replace("_", " ")
            raise ValueError(f"--vae {name} has {words} {one_line(settings[key], 60)}, {whose} {one_line(theirs, 60)}")


def same_vae(vae: nn.Module, name: str, given: bool, channels: int, source: dict, whose: str) -> tuple[str, list[str]]:
    """The digest of a VAE that is to decode latents, and notes where it differs or nothing tells whether it does.

    Args:
        given: whether a flag named it. A user's --vae may have other weights, such as a decoder that was tuned further;
            channels, scale and shift have to be those of the latents in any case.
        name, channels, source, whose: see `check_decodes`; source may have vae_sha256, the digest of the latents' VAE.

    Raises ValueError if it is not the VAE that made the latents and no flag named it, or if it cannot decode them.
    """
    digest, recorded, notes = weights_sha256(vae), source.get("vae_sha256"), []
    check_decodes(vae, name, channels, source, whose)
    if recorded is None and not given:
        notes.append(f"nothing says which VAE made {whose}: {name} is used, not compared")
    elif recorded not in (None, digest) and given:
        notes.append(f"--vae {name} is not the VAE that made {whose}")
    elif recorded not in (None, digest):
        raise ValueError(f"the VAE at {name} is not the one that made {whose}: name one with --vae")
    if source.get("scaling_factor") is None:
        scale = latent_settings(vae)["scaling_factor"]
        notes.append(f"nothing says the scaling factor of {whose}: taken to be {name}'s, {scale}")
    return digest, notes
