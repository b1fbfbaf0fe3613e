"""Images <-> latents: loads a VAE, and alone knows its channels, its downsampling factor, its scale and its shift.

latents = (z - shift_factor) * scaling_factor                  # z: a draw or the mean of the encoder's posterior
latents = (z - latents_mean) * scaling_factor / latents_std    # of VAEs that say both per channel
"""

from pathlib import Path

import torch

from dlc.machine.cli import one_line
from dlc.weights.foreign.safe import differences_from
from dlc.weights.foreign.vae_layouts import locate, read_vae
from dlc.weights.hub import id_and_revision, is_id

VAE_HELP = "VAE: ema, mse, a folder, a file, or hub id[@revision]"
VAE_ALIASES = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}


def vae_id(name):
    """The directory or hub id that a value of --vae stands for."""
    return VAE_ALIASES.get(name, name)


def vae_label(name):
    """The short form of --vae for the name of a folder: its alias, or the last part of its path, or of its id."""
    aliases = {full: alias for alias, full in VAE_ALIASES.items()}
    return aliases.get(vae_id(name)) or Path(id_and_revision(name)[0] if is_id(name) else name).name


def fetch_vae(name, ask=True):
    """Fetch the VAE that --vae names, if it is a hub's. See `dlc.weights.hub.fetched_by_node`."""
    locate(vae_id(name), ask=ask)


def downsampling_factor(name: str, ask: bool = True) -> int:
    """Pixels per latent cell along each axis of the VAE that --vae names, which is not built for it."""
    if vae_id(name) in VAE_ALIASES.values():
        return 8  # known without asking the hub
    return 2 ** (len(read_vae(vae_id(name), ask=ask).config["block_out_channels"]) - 1)


def load_vae(name, device="cpu"):
    """The AutoencoderKL that --vae names, in eval mode, float32. Its `said` is what was recognised.

    Args:
        name: "ema" or "mse" (Stability AI's fine-tuned decoders), or a path or hub id in any layout of
            `dlc.weights.foreign.vae_layouts`.

    Raises ValueError, naming what is missing or wrong, if it cannot be loaded.
    """
    from diffusers import AutoencoderKL  # imported here: slower to import than torch

    found = read_vae(vae_id(name))
    weights = found.weights()
    try:
        with torch.device("meta"):  # no memory is allocated before the shapes agree
            vae = AutoencoderKL(**found.config)
    except Exception as error:  # such as channels that are no multiple of the groups
        raise ValueError(
            f"--vae {name}: diffusers cannot build an AutoencoderKL from its config ({one_line(error, 100)})"
        ) from None
    different = differences_from(vae.state_dict(), weights)
    if different:
        raise ValueError(f"--vae {name}: {Path(found.path).name} {different}")
    # copied: a mapped file that another program overwrites would end this process
    weights = {key: value.to(torch.float32, copy=True) for key, value in weights.items()}
    vae.load_state_dict(weights, assign=True)
    vae.said = found.said
    return vae.to(device).eval().requires_grad_(False)


#################################################################################
#                                    Latents                                    #
#################################################################################


def latent_settings(vae) -> dict:
    """How a VAE's latents are scaled, and how many channels they have, as the manifest records it."""
    config = vae.config
    return dict(
        latent_channels=config.latent_channels,
        scaling_factor=config.scaling_factor,
        shift_factor=config.shift_factor or 0.0,
        latents_mean=None if config.latents_mean is None else list(config.latents_mean),
        latents_std=None if config.latents_std is None else list(config.latents_std),
    )


def scale_and_shift(vae, device):
    """The two of latents = (z - shift) * scale: numbers, or tensors (C, 1, 1) of VAEs that say them per channel."""
    settings = latent_settings(vae)
    if settings["latents_mean"] is None:
        return settings["scaling_factor"], settings["shift_factor"]
    mean, std = (  # filled on the device: a copy from the CPU would make the CPU wait for the GPU
        torch.stack([torch.full((1, 1), one, device=device) for one in settings[key]])
        for key in ("latents_mean", "latents_std")
    )
    return settings["scaling_factor"] / std, mean


def latent_shape(vae, image_size: int) -> tuple[int, int, int]:
    """The shape (C, S/f, S/f) of the latents of images of S = image_size pixels."""
    side = image_size // pixels_per_cell(vae)
    return vae.config.latent_channels, side, side


def pixels_per_cell(vae) -> int:
    """The downsampling factor f of a loaded VAE."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def check_decodes(vae, name, channels, source, whose) -> None:
    """Raise ValueError if a VAE cannot decode latents of so many channels, or of another scale or shift than its own.

    Args:
        name: the value of --vae, for the error.
        channels: channels of the latents.
        source: dict with their scaling_factor (None: the scale is not known), and shift_factor, latents_mean and
            latents_std, which they may lack.
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


def posterior(vae, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 3, S, S) in [-1, 1] to the mean and the standard deviation of their latents, shifted and scaled.

    Each is (N, C, S/f, S/f) float32, whatever the precision of the VAE's weights.
    """
    moments = vae.encode(images.to(vae.encoder.conv_in.weight.dtype)).latent_dist
    scale, shift = scale_and_shift(vae, images.device)
    return (moments.mean.float() - shift) * scale, moments.std.float() * scale


def encode(vae, images: torch.Tensor) -> torch.Tensor:
    """Images (N, 3, S, S) in [-1, 1] to latents (N, C, S/f, S/f), the posterior's mean, of about unit variance."""
    return posterior(vae, images)[0]


def decode(vae, latents: torch.Tensor) -> torch.Tensor:
    """Latents (N, C, h, w) to images (N, 3, S, S), about in [-1, 1]."""
    scale, shift = scale_and_shift(vae, latents.device)
    return vae.decode((latents / scale + shift).to(latents.dtype)).sample
