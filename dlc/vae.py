"""Images <-> latents: the only place that knows a VAE's channels, factor and scale, and how one is loaded."""
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
# What a VAE's config.json may hold, and within which bounds: the arguments of diffusers' AutoencoderKL.
CHANNELS, NUMBER = whole_number(1, 8192), real_number(-1e30, 1e30)
VAE_CONFIG = dict(
    in_channels=CHANNELS, out_channels=CHANNELS, latent_channels=CHANNELS, block_out_channels=list_of(CHANNELS, 1, 6),
    down_block_types=list_of(one_of("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), 1, 6),
    up_block_types=list_of(one_of("UpDecoderBlock2D", "AttnUpDecoderBlock2D"), 1, 6),
    layers_per_block=whole_number(1, 16), norm_num_groups=whole_number(1, 1024),
    act_fn=one_of("silu", "swish", "mish", "gelu", "relu"), sample_size=whole_number(1, 65536),
    scaling_factor=real_number(1e-30, 1e30), shift_factor=or_null(NUMBER),
    latents_mean=or_null(list_of(NUMBER)), latents_std=or_null(list_of(NUMBER)), force_upcast=SWITCH,
    use_quant_conv=SWITCH, use_post_quant_conv=SWITCH, mid_block_add_attention=SWITCH)


def vae_id(name):
    """The directory or hub id that --vae names."""
    return VAE_ALIASES.get(name, name)


def vae_label(name):
    """The short form of --vae in a folder's name: its alias, or the last part of its path or id."""
    aliases = {full: alias for alias, full in VAE_ALIASES.items()}
    return aliases.get(vae_id(name)) or Path(name).name


def vae_config(name):
    """The VAE's configuration, checked, without its weights: a dict of AutoencoderKL's arguments.

    Raises ValueError, naming file and key, for one that this program would compute something else with.
    """
    path = vae_file(name, ("config.json",))
    config = read_json(path)
    if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL" or "block_out_channels" not in config:
        raise ValueError(f"--vae {name}: its config.json is not an AutoencoderKL's")
    # keys with a leading underscore say where it came from; one that is null says nothing
    config = {key: value for key, value in config.items() if not key.startswith("_") and (
        key in VAE_CONFIG or value is not None)}
    unknown = sorted(config.keys() - VAE_CONFIG.keys())
    if unknown:
        raise ValueError(f"--vae {name}: its config.json has the key {one_line(unknown[0][:1000], 80)}, which an "
                         "AutoencoderKL does not have")
    check_values(path, config, VAE_CONFIG)
    for key in ("down_block_types", "up_block_types"):
        if len(config.get(key, [None])) != len(config["block_out_channels"]):
            raise ValueError(f"{path}: {key} has not as many entries as block_out_channels")
    for key, wanted in (("latent_channels", 4), ("in_channels", 3), ("out_channels", 3)):
        if config.get(key, wanted) != wanted:
            raise ValueError(f"--vae {name} has {config[key]} {key.replace('_', ' ')}, wanted {wanted}")
    for key in ("shift_factor", "latents_mean", "latents_std"):
        if config.get(key):
            raise ValueError(f"--vae {name} shifts its latents ({key} in config.json), which nothing here does: wanted "
                             "one with a scaling factor alone")
    return config


def downsampling_factor(name):
    """Pixels a latent cell, along each axis."""
    if vae_id(name) in VAE_ALIASES.values():
        return 8                                    # known without asking the hub
    return 2 ** (len(vae_config(name)["block_out_channels"]) - 1)


def load_vae(name, device="cpu"):
    """The AutoencoderKL that --vae names, in eval mode, float32.

    It is built here rather than by diffusers' own loader, which opens what else a config or an index names.

    Args:
        name: "ema" or "mse" (Stability AI's fine-tuned decoders), a hub id, or a local directory.

    Raises ValueError, naming what is missing or wrong, where it cannot be had.
    """
    from diffusers import AutoencoderKL             # here: it takes longer to import than torch
    config = vae_config(name)
    path = vae_file(name, VAE_WEIGHTS)
    weights = {current_vae_name(key): value for key, value in check_tensors(load_tensors(path), path).items()}
    try:
        with torch.device("meta"):                  # no memory is taken before the shapes agree
            vae = AutoencoderKL(**config)
    except Exception as error:                      # such as of channels that the groups do not divide
        raise ValueError(f"--vae {name}: diffusers cannot build an AutoencoderKL from its config.json "
                         f"({one_line(error, 100)})") from None
    different = differences_from(vae.state_dict(), weights)
    if different:
        raise ValueError(f"--vae {name}: {path} {different}")
    vae.load_state_dict({key: value.float() for key, value in weights.items()}, assign=True)
    return vae.to(device).eval().requires_grad_(False)


def current_vae_name(key):
    """The name of a VAE's tensor as diffusers has it since 0.17; Stability AI's files are older."""
    old = re.fullmatch(r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)", key)
    new = dict(query="to_q", key="to_k", value="to_v", proj_attn="to_out.0")
    return f"{old[1]}.{new[old[2]]}.{old[3]}" if old else key


def vae_file(name, files):
    """The path of the first of `files` that --vae's directory, the hub's local cache, or else the hub has.

    Raises ValueError where none has any.
    """
    folder = Path(vae_id(name))
    if folder.exists():
        for file in files:
            if (folder / file).is_file():
                return folder / file
        raise ValueError(f"--vae {name} is not a directory of a diffusers AutoencoderKL: it has no "
                         f"{' or '.join(files)}")
    import huggingface_hub
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for file in files:
            with contextlib.suppress(Exception):    # not there, or no name that a hub could have
                return Path(huggingface_hub.hf_hub_download(vae_id(name), file, local_files_only=True))
        try:
            there = {one.rfilename for one in huggingface_hub.model_info(vae_id(name), timeout=10).siblings}
            for file in files:
                if file in there:
                    return Path(huggingface_hub.hf_hub_download(vae_id(name), file))
            error = f"has no {' or '.join(files)}"
        except Exception as raised:                 # whatever the hub's client or its transport raises
            error = f"is out of reach or does not have it ({type(raised).__name__})"
    raise ValueError(f"cannot load the VAE {one_line(repr(vae_id(name)), 100)}: {files[0]} is not in the local cache, "
                     f"and the hub {error}; --vae takes a local directory too")


def posterior(vae, images):
    """Images (N, 3, S, S) in [-1, 1] to the mean and standard deviation of their scaled latents.

    Each (N, 4, S/8, S/8) float32, whatever the precision of the VAE's weights.
    """
    there = vae.encode(images.to(vae.encoder.conv_in.weight.dtype)).latent_dist
    return there.mean.float() * vae.config.scaling_factor, there.std.float() * vae.config.scaling_factor


def encode(vae, images):
    """Images (N, 3, S, S) in [-1, 1] to latents (N, 4, S/8, S/8), the posterior's mean, of about unit variance."""
    return posterior(vae, images)[0]


def decode(vae, latents):
    """Scaled latents (N, 4, h, w) to images (N, 3, S, S), about in [-1, 1]."""
    return vae.decode(latents / vae.config.scaling_factor).sample
