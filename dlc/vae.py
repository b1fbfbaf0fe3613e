"""Images <-> latents: loads a VAE, and alone knows its channels, its downsampling factor, its scale and its shift.

latents = (z - shift_factor) * scaling_factor       # z: a draw or the mean of the encoder's posterior
"""

import contextlib
import re
import warnings
from pathlib import Path

import torch

from dlc.checkpoints.tensor_files import check_tensors, differences_from, load_tensors
from dlc.cli import one_line
from dlc.disk import SWITCH, check_values, list_of, one_of, or_null, read_json, real_number, whole_number

VAE_ALIASES = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}
VAE_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
# The keys that a VAE's config.json may have, with their bounds: the arguments of diffusers' AutoencoderKL.
CHANNELS, NUMBER = whole_number(1, 8192), real_number(-1e30, 1e30)
VAE_CONFIG = dict(
    in_channels=CHANNELS,
    out_channels=CHANNELS,
    latent_channels=CHANNELS,
    block_out_channels=list_of(CHANNELS, 1, 6),
    down_block_types=list_of(one_of("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), 1, 6),
    up_block_types=list_of(one_of("UpDecoderBlock2D", "AttnUpDecoderBlock2D"), 1, 6),
    layers_per_block=whole_number(1, 16),
    norm_num_groups=whole_number(1, 1024),
    act_fn=one_of("silu", "swish", "mish", "gelu", "relu"),
    sample_size=whole_number(1, 65536),
    scaling_factor=real_number(1e-30, 1e30),
    shift_factor=or_null(NUMBER),
    latents_mean=or_null(list_of(NUMBER)),
    latents_std=or_null(list_of(NUMBER)),
    force_upcast=SWITCH,
    use_quant_conv=SWITCH,
    use_post_quant_conv=SWITCH,
    mid_block_add_attention=SWITCH,
)


def vae_id(name):
    """The directory or hub id that a value of --vae stands for."""
    return VAE_ALIASES.get(name, name)


def vae_label(name):
    """The short form of --vae for the name of a folder: its alias, or the last part of its path or id."""
    aliases = {full: alias for alias, full in VAE_ALIASES.items()}
    return aliases.get(vae_id(name)) or Path(name).name


def vae_config(name):
    """The checked configuration of a VAE, without its weights: a dict of AutoencoderKL's arguments.

    Raises ValueError, naming file and key, for a configuration that asks for what is not implemented here.
    """
    path = vae_file(name, ("config.json",))
    config = read_json(path)
    if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL" or "block_out_channels" not in config:
        raise ValueError(f"--vae {name}: its config.json is not an AutoencoderKL's")
    # keys with a leading underscore say where the file came from; null is the default
    config = {
        key: value
        for key, value in config.items()
        if not key.startswith("_") and (key in VAE_CONFIG or value is not None)
    }
    unknown = sorted(config.keys() - VAE_CONFIG.keys())
    if unknown:
        raise ValueError(
            f"--vae {name}: its config.json has the key {one_line(unknown[0][:1000], 80)}, which an "
            "AutoencoderKL does not have"
        )
    check_values(path, config, VAE_CONFIG)
    for key in ("down_block_types", "up_block_types"):
        if len(config.get(key, [None])) != len(config["block_out_channels"]):
            raise ValueError(f"{path}: {key} has not as many entries as block_out_channels")
    for key in ("in_channels", "out_channels"):
        if config.get(key, 3) != 3:
            raise ValueError(f"--vae {name} has {config[key]} {key.replace('_', ' ')}, wanted 3")
    for key in ("latents_mean", "latents_std"):
        if config.get(key):
            raise ValueError(
                f"--vae {name} normalises each latent channel ({key} in config.json), which is not "
                "supported: wanted a VAE with a scaling_factor and perhaps a shift_factor"
            )
    return config


def downsampling_factor(name: str) -> int:
    """Pixels per latent cell along each axis of the VAE that --vae names, read from its configuration alone."""
    if vae_id(name) in VAE_ALIASES.values():
        return 8  # known without asking the hub
    return 2 ** (len(vae_config(name)["block_out_channels"]) - 1)


def load_vae(name, device="cpu"):
    """The AutoencoderKL that --vae names, in eval mode, float32.

    diffusers' own loader is not used, because it opens other files that a config or an index names.

    Args:
        name: "ema" or "mse" (Stability AI's fine-tuned decoders), a hub id, or a local directory.

    Raises ValueError, naming what is missing or wrong, if it cannot be loaded.
    """
    from diffusers import AutoencoderKL  # imported here: slower to import than torch

    config = vae_config(name)
    path = vae_file(name, VAE_WEIGHTS)
    weights = {current_vae_name(key): value for key, value in check_tensors(load_tensors(path), path).items()}
    try:
        with torch.device("meta"):  # no memory is allocated before the shapes agree
            vae = AutoencoderKL(**config)
    except Exception as error:  # such as channels that are no multiple of the groups
        raise ValueError(
            f"--vae {name}: diffusers cannot build an AutoencoderKL from its config.json ({one_line(error, 100)})"
        ) from None
    different = differences_from(vae.state_dict(), weights)
    if different:
        raise ValueError(f"--vae {name}: {path} {different}")
    vae.load_state_dict({key: value.float() for key, value in weights.items()}, assign=True)
    return vae.to(device).eval().requires_grad_(False)


def current_vae_name(key):
    """The name of a VAE's tensor in diffusers since 0.17. Stability AI's files have the older names."""
    old = re.fullmatch(r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)", key)
    new = dict(query="to_q", key="to_k", value="to_v", proj_attn="to_out.0")
    return f"{old[1]}.{new[old[2]]}.{old[3]}" if old else key


def vae_file(name, files):
    """The path of the first of `files` that is in --vae's directory, in the hub's local cache, or on the hub.

    Raises ValueError if there is none.
    """
    folder = Path(vae_id(name))
    if folder.exists():
        for file in files:
            if (folder / file).is_file():
                return folder / file
        raise ValueError(
            f"--vae {name} is not a directory of a diffusers AutoencoderKL: it has no {' or '.join(files)}"
        )
    import huggingface_hub

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for file in files:
            with contextlib.suppress(Exception):  # not cached, or not a valid hub id
                return Path(huggingface_hub.hf_hub_download(vae_id(name), file, local_files_only=True))
        try:
            on_hub = {entry.rfilename for entry in huggingface_hub.model_info(vae_id(name), timeout=10).siblings}
            for file in files:
                if file in on_hub:
                    return Path(huggingface_hub.hf_hub_download(vae_id(name), file))
            error = f"has no {' or '.join(files)}"
        except Exception as raised:  # the hub's client and its transport raise many types
            error = f"is out of reach or does not have it ({type(raised).__name__})"
    raise ValueError(
        f"cannot load the VAE {one_line(repr(vae_id(name)), 100)}: {files[0]} is not in the local cache, "
        f"and the hub {error}; --vae takes a local directory too"
    )


#################################################################################
#                                    Latents                                    #
#################################################################################


def latent_settings(vae) -> dict:
    """How a VAE's latents are scaled, and how many channels they have, as the manifest records it."""
    return dict(
        latent_channels=vae.config.latent_channels,
        scaling_factor=vae.config.scaling_factor,
        shift_factor=vae.config.shift_factor or 0.0,
    )


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
        source: dict with their scaling_factor (None: scale and shift are not known) and shift_factor (default 0).
        whose: words for these latents in the error, such as "the checkpoint's latents".
    """
    settings = latent_settings(vae)
    if settings["latent_channels"] != channels:
        raise ValueError(f"--vae {name} has {settings['latent_channels']} latent channels, {whose} {channels}")
    if source.get("scaling_factor") is None:
        return
    for key, words in (("scaling_factor", "scaling factor"), ("shift_factor", "shift factor")):
        if source.get(key, 0.0) != settings[key]:
            raise ValueError(f"--vae {name} has {words} {settings[key]}, {whose} {source.get(key, 0.0)}")


def posterior(vae, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 3, S, S) in [-1, 1] to the mean and the standard deviation of their latents, shifted and scaled.

    Each is (N, C, S/f, S/f) float32, whatever the precision of the VAE's weights.
    """
    moments, settings = vae.encode(images.to(vae.encoder.conv_in.weight.dtype)).latent_dist, latent_settings(vae)
    scale, shift = settings["scaling_factor"], settings["shift_factor"]
    return (moments.mean.float() - shift) * scale, moments.std.float() * scale


def encode(vae, images: torch.Tensor) -> torch.Tensor:
    """Images (N, 3, S, S) in [-1, 1] to latents (N, C, S/f, S/f), the posterior's mean, of about unit variance."""
    return posterior(vae, images)[0]


def decode(vae, latents: torch.Tensor) -> torch.Tensor:
    """Latents (N, C, h, w) to images (N, 3, S, S), about in [-1, 1]."""
    settings = latent_settings(vae)
    return vae.decode(latents / settings["scaling_factor"] + settings["shift_factor"]).sample
