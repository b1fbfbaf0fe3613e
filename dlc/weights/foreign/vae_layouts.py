"""The layouts in which weights of VAEs come: from a name to a configuration and tensors of diffusers' AutoencoderKL.

    found = read_vae("stabilityai/sd-vae-ft-ema")      # found.config, found.said; found.weights()

diffusers' own loaders are not used: they open other files that a config or an index names, and ask the hub for the
config of a single file. Of a single file, the shapes tell all but the scale.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dlc.machine.cli import one_line
from dlc.machine.files import read_json
from dlc.machine.records import SWITCH, check_values, list_of, one_of, or_null, real_number, whole_number
from dlc.weights.foreign.safe import (
    WEIGHTS_SUFFIXES,
    check_tensors,
    hub_patterns,
    load_tensors,
    read_file,
    shown,
    weights_in,
)
from dlc.weights.hub import fetch, is_id

STATISTICS = "latents_stats.pt"  # of latents, which VA-VAE has beside its weights
STEM = "diffusion_pytorch_model"
# The keys that a VAE's config.json may have, with their bounds: the arguments of diffusers' AutoencoderKL.
CHANNELS, NUMBER, SCALE = whole_number(1, 8192), real_number(-1e30, 1e30), real_number(1e-30, 1e30)
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
    scaling_factor=SCALE,
    shift_factor=or_null(NUMBER),
    latents_mean=or_null(list_of(NUMBER)),
    latents_std=or_null(list_of(SCALE)),
    force_upcast=SWITCH,
    use_quant_conv=SWITCH,
    use_post_quant_conv=SWITCH,
    mid_block_add_attention=SWITCH,
)
PARTS = ("encoder", "decoder", "quant_conv", "post_quant_conv")
STABLE_DIFFUSION = (4, [128, 256, 512, 512])  # channels and widths, of SDXL, too
# Scale and shift of VAEs inside whole models, by a tensor of the model around them; and of Stable Diffusion's alone.
WHOLE_MODELS = {
    "conditioner.embedders.1.": ("SDXL", dict(scaling_factor=0.13025)),
    "cond_stage_model.": ("Stable Diffusion", dict(scaling_factor=0.18215)),
    "model.diffusion_model.joint_blocks.": ("Stable Diffusion 3", dict(scaling_factor=1.5305, shift_factor=0.0609)),
}


@dataclass
class Found:
    """What a name stands for: the checked arguments of AutoencoderKL, its weights once they are asked for, and words.

    path: the file of weights.
    """

    path: Path
    config: dict
    said: str
    weights: Callable[[], dict] = field(repr=False)


def read_vae(name, flag="--vae", ask=True) -> Found:
    """Recognise the VAE that a name stands for, without building it.

    Args:
        name: a folder of an AutoencoderKL or of a pipeline with vae/, a single file, or a hub id of either.
        ask: whether to ask the hub; see `dlc.weights.hub.fetch`.

    Raises ValueError, naming file and key, for what is missing and for what is not implemented here.
    """
    path, said = locate(name, flag, ask), f"{flag} {name}"
    words = ["from the hub"] if is_id(name) else []
    if path.is_dir():
        file = file_in(path, said)
        if file.parent != path:
            words.append("of a pipeline")
        path = file
    elif not path.is_file():
        raise ValueError(f"{said} does not exist")
    config = path.parent / "config.json"
    if path.name.startswith(STEM) or (config.is_file() and "block_out_channels" in read_json(config)):
        return with_config(path, config, said, words)
    return single_file(path, said, words)


def locate(name, flag="--vae", ask=True) -> Path:
    """The local path of a name; of a hub id, the folder of its weights in the hub's cache. See `hub.fetch`."""
    weights = (*hub_patterns("", [STEM]), *hub_patterns("vae/", [STEM]), *(f"*{suffix}" for suffix in WEIGHTS_SUFFIXES))
    return fetch(name, [weights], ["config.json", "model_index.json", "vae/*.json"], flag, ask=ask)


def file_in(folder, said):
    """The file of weights in a folder, or in its vae/. Raises ValueError if there is none."""
    for inner in (folder, folder / "vae"):
        names = {entry.name for entry in inner.iterdir()} - {STATISTICS} if inner.is_dir() else set()
        file = weights_in(names)
        if file and (inner == folder / "vae" or "model_index.json" not in names):
            return inner / file
        if "config.json" in names and "model_index.json" not in names:
            checked_config(inner / "config.json", said)  # what it is not matters more than what it lacks
            break
    where = "has" if inner == folder else "is a pipeline whose vae/ has" if inner.is_dir() else "has no vae/ and"
    raise ValueError(
        f"{said} is not a directory of a diffusers AutoencoderKL: it {where} no {STEM}.safetensors or {STEM}.bin"
    )


#################################################################################
#                                   Configured                                  #
#################################################################################


def tensors_in(path) -> dict:
    """The tensors in a file, also where a training script put them under "state_dict"."""
    values = read_file(path)[0]
    return values["state_dict"] if isinstance(values.get("state_dict"), dict) else values


def with_config(path, config_file, said, words):
    """The VAE of a file of weights whose folder says in config.json what it is."""
    if not config_file.is_file():
        raise ValueError(f"{said} is not a directory of a diffusers AutoencoderKL: it has no config.json")
    config = checked_config(config_file, said)

    def weights():
        tensors = tensors_in(path)
        prefix = ldm_prefix(tensors)
        if prefix is not None:
            return check_tensors(from_ldm(tensors, prefix), path)
        return {current_name(key): value for key, value in check_tensors(tensors, path).items()}

    return Found(path, config, "".join(f"{word}, " for word in words) + describe(config), weights)


def checked_config(path, said):
    """The arguments in an AutoencoderKL's config.json. Raises ValueError for what is not implemented here."""
    config = read_json(path)
    if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL" or "block_out_channels" not in config:
        raise ValueError(f"{said}: its config.json is not an AutoencoderKL's")
    # keys with a leading underscore say where the file came from; null is the default
    config = {
        key: value
        for key, value in config.items()
        if not key.startswith("_") and (key in VAE_CONFIG or value is not None)
    }
    unknown = sorted(config.keys() - VAE_CONFIG.keys())
    if unknown:
        raise ValueError(
            f"{said}: its config.json has the key {one_line(unknown[0][:1000], 80)}, which an "
            "AutoencoderKL does not have"
        )
    check_values(path, config, VAE_CONFIG)
    for key in ("down_block_types", "up_block_types"):
        if len(config.get(key, [None])) != len(config["block_out_channels"]):
            raise ValueError(f"{path}: {key} has not as many entries as block_out_channels")
    for key in ("in_channels", "out_channels"):
        if config.get(key, 3) != 3:
            raise ValueError(f"{said} has {config[key]} {key.replace('_', ' ')}, wanted 3")
    given = [key for key in ("latents_mean", "latents_std") if config.get(key) is not None]
    for key in given:
        if len(config[key]) != config.get("latent_channels", 4):
            raise ValueError(f"{path}: {key} has {len(config[key])} numbers, wanted one per latent channel")
    if len(given) == 1:
        raise ValueError(f"{path} has {given[0]} alone, wanted latents_mean and latents_std")
    if given and config.get("shift_factor"):
        raise ValueError(f"{path} has both latents_mean and shift_factor, which say the same in two ways")
    return config


def describe(config):
    """What a configuration says of the latents, in words."""
    parts = [
        f"AutoencoderKL of {config.get('latent_channels', 4)} channels",
        f"{2 ** (len(config['block_out_channels']) - 1)} pixels a cell",
        f"scaling factor {config.get('scaling_factor', 0.18215)}",
    ]
    if config.get("shift_factor"):
        parts.append(f"shift {config['shift_factor']}")
    if config.get("latents_mean") is not None:
        parts.append("mean and standard deviation per channel")
    return ", ".join(parts)


#################################################################################
#                                  Single files                                 #
#################################################################################


def single_file(path, said, words):
    """The VAE of a file with no config.json beside it: its shapes say what it is, and its surroundings its scale."""
    tensors = tensors_in(path)
    prefix = ldm_prefix(tensors)
    if prefix is not None:
        weights, layout = from_ldm(tensors, prefix), "a file of LDM's names"
    elif "encoder.conv_in.weight" in tensors:
        weights, layout = {current_name(key): value for key, value in tensors.items()}, "a file of diffusers' names"
    else:
        raise ValueError(
            f"{said} holds no AutoencoderKL: neither LDM's names (encoder.down.0.block.0…) nor diffusers' "
            "(encoder.down_blocks.0…), and no config.json is beside it"
        )
    weights = check_tensors(weights, path)
    config = config_of_shapes(weights, said)
    scale, whose = scale_of(path, tensors, config)
    if scale is None:
        raise ValueError(
            f"{said}: a file of a VAE of {config['latent_channels']} channels does not say its scaling factor: put a "
            "config.json of an AutoencoderKL beside it, or name a folder or hub id that has one"
        )
    config |= scale
    words = [*words, layout, *([f"inside a whole model ({prefix}*)"] if prefix else [])]
    return Found(path, config, f"{', '.join(words)}: {describe(config)} ({whose})", lambda: weights)


def config_of_shapes(weights, said):
    """The arguments of AutoencoderKL, but for the scale, of tensors under diffusers' names."""

    def width(name, dimension=0):
        if name not in weights or weights[name].ndim != 4:
            raise ValueError(f"{said} holds no whole AutoencoderKL: it has no convolution {name}")
        return weights[name].shape[dimension]

    def count(pattern):
        return len({match[1] for key in weights if (match := re.match(pattern, key))})

    levels, layers = count(r"encoder\.down_blocks\.(\d+)\."), count(r"encoder\.down_blocks\.0\.resnets\.(\d+)\.")
    widths = [width(f"encoder.down_blocks.{level}.resnets.0.conv1.weight") for level in range(min(levels, 7))]
    attention = [f"encoder.down_blocks.{level}.attentions.0.to_q.weight" in weights for level in range(len(widths))]
    config = dict(
        in_channels=width("encoder.conv_in.weight", 1),
        out_channels=width("decoder.conv_out.weight"),
        latent_channels=width("decoder.conv_in.weight", 1),
        block_out_channels=widths,
        down_block_types=[f"{'Attn' if one else ''}DownEncoderBlock2D" for one in attention],
        up_block_types=[f"{'Attn' if one else ''}UpDecoderBlock2D" for one in reversed(attention)],
        layers_per_block=layers,
        norm_num_groups=32,
        use_quant_conv="quant_conv.weight" in weights,
        use_post_quant_conv="post_quant_conv.weight" in weights,
        mid_block_add_attention="encoder.mid_block.attentions.0.to_q.weight" in weights,
    )
    check_values(said, config, VAE_CONFIG)
    return config


def scale_of(path, tensors, config):
    """Scale, and shift or mean, of a single file's latents, and words for the source of them; (None, "") if unknown."""
    stats = path.parent / STATISTICS
    if stats.is_file():
        values = check_tensors(load_tensors(stats), stats)
        if {"mean", "std"} - values.keys() or any(
            values[key].numel() != config["latent_channels"] for key in ("mean", "std")
        ):
            raise ValueError(f"{stats} does not hold mean and std of {config['latent_channels']} channels")
        mean, std = (values[key].flatten().tolist() for key in ("mean", "std"))
        check_values(stats, dict(latents_std=std), VAE_CONFIG)
        return dict(scaling_factor=1.0, latents_mean=mean, latents_std=std), "by latents_stats.pt beside it"
    for start, (model, scale) in WHOLE_MODELS.items():
        if any(str(key).startswith(start) for key in tensors):
            return scale, f"{model}'s, by the model around it"
    if (config["latent_channels"], config["block_out_channels"]) == STABLE_DIFFUSION:
        if "xl" in path.name.lower():
            return dict(scaling_factor=0.13025), "SDXL's, by the file's name"
        return dict(scaling_factor=0.18215), "Stable Diffusion's, as the file does not say it; SDXL's is 0.13025"
    return None, ""


#################################################################################
#                                     Names                                     #
#################################################################################


def current_name(key):
    """The name of a VAE's tensor in diffusers since 0.17. Stability AI's files have the older names."""
    old = re.fullmatch(r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)", str(key))
    new = dict(query="to_q", key="to_k", value="to_v", proj_attn="to_out.0")
    return f"{old[1]}.{new[old[2]]}.{old[3]}" if old else key


def ldm_prefix(tensors):
    """What stands before the names of a latent diffusion model's autoencoder, such as first_stage_model.; else None."""
    anchor = "encoder.down.0.block.0.conv1.weight"
    found = [str(key)[: -len(anchor)] for key in tensors if str(key).endswith(anchor)]
    return next((prefix for prefix in found if not prefix or prefix.endswith(".")), None)


# LDM's names and diffusers'. In LDM the blocks of the decoder are numbered by resolution, in diffusers by order.
FROM_LDM = [
    (r"\.down\.(\d+)\.block\.(\d+)\.", r".down_blocks.\1.resnets.\2."),
    (r"\.down\.(\d+)\.attn\.(\d+)\.", r".down_blocks.\1.attentions.\2."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.block\.(\d+)\.", r".up_blocks.\1.resnets.\2."),
    (r"\.up\.(\d+)\.attn\.(\d+)\.", r".up_blocks.\1.attentions.\2."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
]


def from_ldm(tensors, prefix):
    """The autoencoder's tensors under diffusers' names. Attention layers are 1x1 convolutions there, linear here."""
    tensors = {str(key)[len(prefix) :]: value for key, value in tensors.items() if str(key).startswith(prefix)}
    tensors = {key: value for key, value in tensors.items() if key.split(".")[0] in PARTS}
    levels = len({match[1] for key in tensors if (match := re.match(r"decoder\.up\.(\d+)\.", key))})
    renamed = {}
    for key, value in tensors.items():
        for pattern, name in FROM_LDM:
            key = re.sub(pattern, name, key)
        key = re.sub(r"\.up_blocks\.(\d+)\.", lambda match: f".up_blocks.{levels - 1 - int(match[1])}.", key)
        if re.search(r"\.attentions\.\d+\.to_", key) and isinstance(value, torch.Tensor) and value.ndim == 4:
            value = value.flatten(1)
        renamed[key] = value
    if len(renamed) < len(tensors):
        raise ValueError(f"tensors of one name twice, such as {shown(next(iter(renamed)))}")
    return renamed
