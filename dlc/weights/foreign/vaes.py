"""VAEs of others: diffusers' and LDM's names to diffusers', and what to build by a config.json or the tensors' shapes.

Of a single file, the shapes tell all but the scale of the latents, which its surroundings say. diffusers' own loader is
not used: it takes tensors of any type, and asks the hub for the config of a single file.
"""

import re

import torch

from dlc.machine.cli import one_line
from dlc.machine.records import check_values, list_of, or_null, real_number, whole_number
from dlc.nets.vae import pixels_per_cell
from dlc.weights.foreign.layouts import File
from dlc.weights.foreign.safe import check_tensors, fill, load_tensors, shown

CLASSES = ("AutoencoderKL", "AutoencoderDC")  # of diffusers, that are read from a folder
WIDTHS = {"block_out_channels", "encoder_block_out_channels"}  # a key by which a config is a VAE's
STATISTICS = "latents_stats.pt"  # of latents, which VA-VAE has beside its weights
NUMBER, SCALE = real_number(-1e30, 1e30), real_number(1e-30, 1e30)
READ = dict(  # of a config, besides the arguments of its class
    scaling_factor=SCALE,
    shift_factor=or_null(NUMBER),
    latents_mean=or_null(list_of(NUMBER)),
    latents_std=or_null(list_of(SCALE)),
    **dict.fromkeys(WIDTHS, list_of(whole_number(1), 1, 64)),
)
LARGEST = 8192  # of any whole number in a config, such as channels; of layers, 64
PARTS = ("encoder", "decoder", "quant_conv", "post_quant_conv")
STABLE_DIFFUSION = (4, [128, 256, 512, 512])  # channels and widths, of SDXL, too
# Scale and shift of VAEs inside whole models, by a tensor of the model around them.
WHOLE_MODELS = {
    "conditioner.embedders.1.": ("SDXL", dict(scaling_factor=0.13025)),
    "cond_stage_model.": ("Stable Diffusion", dict(scaling_factor=0.18215)),
    "model.diffusion_model.joint_blocks.": ("Stable Diffusion 3", dict(scaling_factor=1.5305, shift_factor=0.0609)),
}


def config_of(file: File, tensors: dict) -> dict:
    """What to build for tensors, {"family", "arguments"}, by the config.json beside them or their shapes.

    Raises ValueError for a class that is not read, for values that no VAE has, and where nothing says one scale of the
    latents of an RGB image.
    """
    path, config, whose, name = file.path, file.config, "", file.config.get("_class_name", "AutoencoderKL")
    if WIDTHS & config.keys() or "_class_name" in config:
        path = path.with_name("config.json")
        if name not in CLASSES or not WIDTHS & config.keys():
            file.refuse(f"has the config.json of no {' or '.join(CLASSES)}")
    else:
        config = config_of_shapes(file, tensors)
        scale, whose = scale_of(file, config)
        config |= scale
    check_values(path, config, READ)
    for key in ("in_channels", "out_channels"):
        if config.get(key, 3) != 3:
            file.refuse(f"has {shown(config[key])} {key.replace('_', ' ')}, wanted 3")
    # keys with a leading underscore say where the file came from; null is the default
    config = {key: value for key, value in config.items() if not key.startswith("_") and value is not None}
    for key, value in config.items():
        most = 64 if "layers" in key else LARGEST
        numbers = value if isinstance(value, list) else [value]
        if len(numbers) > most or any(type(one) is int and one > most for one in numbers):
            raise ValueError(f"{path}: {key} is {one_line(value, 60)}, wanted at most {most}")
    channels = config.get("latent_channels", 4)
    given = [key for key in ("latents_mean", "latents_std") if key in config]
    for key in given:
        if len(config[key]) != channels:
            raise ValueError(f"{path}: {key} has {len(config[key])} numbers, wanted one per latent channel")
    if len(given) == 1:
        raise ValueError(f"{path} has {given[0]} alone, wanted latents_mean and latents_std")
    if given and config.get("shift_factor"):
        raise ValueError(f"{path} has both latents_mean and shift_factor, which say the same in two ways")
    file.words += [
        f"{name} of {channels} channels",
        f"{pixels_per_cell(config)} pixels per latent cell",
        f"scaling factor {config.get('scaling_factor', 0.18215)}{whose and f' ({whose})'}",
        config.get("shift_factor") and f"shift {config['shift_factor']}",
        "mean and standard deviation per channel" if given else "",
    ]
    return dict(family=name, arguments=config)


def config_of_shapes(file: File, tensors: dict) -> dict:
    """The arguments of AutoencoderKL, but for the scale, of tensors under diffusers' names."""

    def width(name, dimension=0):
        return file.shape(tensors, name, 4)[dimension]

    def count(pattern):
        return len({match[1] for key in tensors if (match := re.match(pattern, key))})

    levels, layers = count(r"encoder\.down_blocks\.(\d+)\."), count(r"encoder\.down_blocks\.0\.resnets\.(\d+)\.")
    widths = [width(f"encoder.down_blocks.{level}.resnets.0.conv1.weight") for level in range(min(levels, 7))]
    attention = [f"encoder.down_blocks.{level}.attentions.0.to_q.weight" in tensors for level in range(len(widths))]
    return dict(
        in_channels=width("encoder.conv_in.weight", 1),
        out_channels=width("decoder.conv_out.weight"),
        latent_channels=width("decoder.conv_in.weight", 1),
        block_out_channels=widths,
        down_block_types=[f"{'Attn' if one else ''}DownEncoderBlock2D" for one in attention],
        up_block_types=[f"{'Attn' if one else ''}UpDecoderBlock2D" for one in reversed(attention)],
        layers_per_block=layers,
        norm_num_groups=32,
        use_quant_conv="quant_conv.weight" in tensors,
        use_post_quant_conv="post_quant_conv.weight" in tensors,
        mid_block_add_attention="encoder.mid_block.attentions.0.to_q.weight" in tensors,
    )


def scale_of(file: File, config: dict) -> tuple[dict, str]:
    """Scale, and shift or mean, of a single file's latents, and words for the source of them. Raises ValueError where
    nothing says them."""
    stats, channels = file.path.with_name(STATISTICS), config["latent_channels"]
    if stats.is_file():
        values = check_tensors(load_tensors(stats), stats)
        if any(key not in values or values[key].numel() != channels for key in ("mean", "std")):
            raise ValueError(f"{stats} does not hold mean and std of {channels} channels")
        mean, std = (values[key].flatten().tolist() for key in ("mean", "std"))
        return dict(scaling_factor=1.0, latents_mean=mean, latents_std=std), "by latents_stats.pt beside it"
    for start, (model, scale) in WHOLE_MODELS.items():
        if any(f".{start}" in f".{key}" for key in file.tensors):
            return scale, f"{model}'s, by the model around it"
    if (channels, config["block_out_channels"]) == STABLE_DIFFUSION:
        if "xl" in file.path.name.lower():
            return dict(scaling_factor=0.13025), "SDXL's, by the file's name"
        return dict(scaling_factor=0.18215), "Stable Diffusion's, as the file does not say it; SDXL's is 0.13025"
    file.refuse(
        f"is a file of a VAE of {channels} channels, which does not say its scaling factor: put a config.json of an "
        "AutoencoderKL beside it, or name a folder or hub id that has one"
    )


def build(config: dict, tensors: dict, said: str) -> torch.nn.Module:
    """The VAE of a config and its tensors. Raises ValueError if it cannot be built, or they do not fit."""
    import diffusers

    try:
        with torch.device("meta"):  # no memory is allocated before the shapes agree
            vae = getattr(diffusers, config["family"])(**config["arguments"])
    except Exception as error:  # such as channels that are no multiple of the groups
        raise ValueError(f"{said}: diffusers cannot build it from its config ({one_line(error, 100)})") from None
    return fill(vae, tensors, said)


def from_diffusers(file: File, tensors: dict) -> dict:
    """Names of diffusers since 0.17 for those and for older ones, which Stability AI's files have."""
    new = dict(query="to_q", key="to_k", value="to_v", proj_attn="to_out.0")
    old = re.compile(r"(?<=\.)(query|key|value|proj_attn)(?=\.(weight|bias)$)")
    return {old.sub(lambda found: new[found[1]], key): value for key, value in tensors.items()}


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


def is_part(key: str) -> bool:
    """Whether a tensor belongs to the autoencoder, rather than to the model around it."""
    return key.split(".")[0] in PARTS


def from_ldm(file: File, tensors: dict) -> dict:
    """An autoencoder's tensors under diffusers' names. Attention layers are 1x1 convolutions in LDM, linear there."""
    levels = len({match[1] for key in tensors if (match := re.match(r"decoder\.up\.(\d+)\.", key))})
    renamed = {}
    for key, value in tensors.items():
        for pattern, name in FROM_LDM:
            key = re.sub(pattern, name, key)
        key = re.sub(r"\.up_blocks\.(\d+)\.", lambda match: f".up_blocks.{levels - 1 - int(match[1])}.", key)
        if re.search(r"\.attentions\.\d+\.to_", key) and value.ndim == 4:
            value = value.flatten(1)
        renamed[key] = value
    if len(renamed) < len(tensors):
        file.refuse(f"has tensors of one name twice, such as {shown(next(iter(renamed)))}")
    return renamed
