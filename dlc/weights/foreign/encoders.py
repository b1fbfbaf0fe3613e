"""SEM encoders of others: the names of transformers, timm and DINOv2 to those of `SEMEncoder`, and its arguments.

The tensors' shapes tell width, depth, patch and registers. A config.json or a flag gives the rest.
"""

import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch

from dlc.data.images import IMAGENET_MEAN, IMAGENET_STD
from dlc.machine.cli import one_line
from dlc.machine.files import read_json
from dlc.weights.foreign.layouts import File, blocks_in
from dlc.weights.foreign.safe import check_tensors, shown
from dlc.weights.hub import is_id, parts_of

SIZES = {384: ("small", 12, 6), 768: ("base", 12, 12), 1024: ("large", 24, 16), 1536: ("giant", 40, 24)}
DEFAULT_L, DEFAULT_V = 512, 256  # of the published encoder, where neither file nor flag says them
IMAGE_SIZE = 224  # pixels, at which DINOv2's encoders are read
HEAD = re.compile(r"(?:.*\.)?(sem_(?:embed|norm)\.\w+)")
TEMPERATURE = re.compile(r"(?:.*\.)?(?:temp|temperature|tau)")
# Parts of a self-supervised checkpoint that only its losses need.
TRAINING_ONLY = "mask_token head sem_out sem_cls_norm dino_head ibot_head classifier".split()
# Names that configurations give to what shapes do not tell, in order. They may be nested.
L_NAMES, V_NAMES = ("L", "dlc_l", "sem_l", "sem_L"), ("V", "dlc_v", "sem_v", "sem_V")
TEMPERATURE_NAMES = ("temp", "temperature", "tau", "sem_temp")
SAME_FUNCTION = dict(hidden_act="gelu", layer_norm_eps=1e-6, num_channels=3)  # what a config may not say otherwise
# To timm's names. A number is the place of a part: query, key and value are one layer, as are the two halves of a gated
# MLP. DINOv2's blocks that are saved in chunks (blocks.2.13.…) have their index in second place.
NAMES = [
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
    # transformers', of version 5's modules and of all files
    (r"^embeddings\.position_embeddings", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^embeddings\.", ""),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.(attention\.query|q_proj)\.", ".attn.qkv.0."),
    (r"\.attention\.(attention\.key|k_proj)\.", ".attn.qkv.1."),
    (r"\.attention\.(attention\.value|v_proj)\.", ".attn.qkv.2."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.gate_proj\.", ".mlp.fc1.0."),
    (r"\.mlp\.up_proj\.", ".mlp.fc1.1."),
    (r"\.mlp\.(weights_out|down_proj)\.", ".mlp.fc2."),
    (r"^register_tokens$", "reg_token"),
    (r"^layernorm\.", "norm."),
]


def under_our_names(file: File, tensors: dict) -> dict:
    """A ViT's tensors under timm's names, and those of the SEM head, which may lie elsewhere in the file.

    Raises ValueError where one of the two is missing, and for tensors that belong to neither.
    """
    head = file.under("sem_embed.weight") or {}
    head = {HEAD.fullmatch(key)[1]: value for key, value in head.items() if HEAD.fullmatch(key)}
    if not any(key.endswith("cls_token") or key == "reg_token" for key in tensors):
        file.refuse("has no ViT backbone (cls_token): wanted the weights of a SEM encoder")
    if not head:
        file.refuse("has a backbone, but no SEM head (sem_embed, sem_norm), which DINOv2 alone does not have")
    backbone, parts = {}, {}
    for key, value in tensors.items():
        for pattern, name in NAMES:
            key = re.sub(pattern, name, key)
        part = re.fullmatch(r"(.*\.(?:qkv|fc1))\.(\d)(\.\w+)", key)
        if part:
            parts.setdefault(part[1] + part[3], {})[int(part[2])] = value
        else:
            backbone["temperature" if TEMPERATURE.fullmatch(key) else key] = value
    for key, found in parts.items():
        whole = 3 if ".qkv." in key else 2
        if len(found) == whole and all(value.ndim for value in found.values()):  # else the layer is missed by its name
            backbone[key] = torch.cat([found[place] for place in range(whole)])
    return backbone | check_tensors(head, file.path)


def is_wanted(key: str) -> bool:
    """Whether a tensor belongs to the backbone, rather than to the head or the losses."""
    part = re.sub(r"^(backbone|embeddings)\.", "", key).split(".")[0]
    return part not in TRAINING_ONLY and not HEAD.fullmatch(key)


def config_of(file: File, tensors: dict, given: dict) -> dict:
    """The arguments of SEMEncoder for tensors under timm's names. given: those of backbone, L and V that flags say.

    Raises ValueError for sizes that neither tensors nor config nor flags tell, and where two of them disagree.
    """
    config, where = file.config, file.path.with_name("config.json")
    shape, depth = partial(file.shape, tensors), blocks_in(tensors)
    width, patch = shape("cls_token", 3)[2], shape("patch_embed.proj.weight", 4)[3]
    registers = shape("reg_token", 3)[1] if "reg_token" in tensors else 0
    hidden = shape("blocks.0.mlp.fc1.weight", 2)[0]
    gated = hidden != shape("blocks.0.mlp.fc2.weight", 2)[1]
    for name in ("norm.weight", "norm.bias"):  # of the final norm, which a file may leave out: codes do without it
        if name in tensors and shape(name, 1) != (width,):
            file.refuse(f"has {name} of {len(tensors[name])} numbers, wanted {width}")
    fitting = dict(hidden_size=width, num_hidden_layers=depth, patch_size=patch, **SAME_FUNCTION)
    for key, wanted in fitting.items():
        said = lookup(config, [key])
        if said not in (None, wanted) and (key, said) != ("patch_size", [patch, patch]):
            raise ValueError(f"{where}: {key} is {shown(repr(said))}, wanted {wanted}")
    arguments, source = code_size(file, given, shape("sem_embed.weight", 2)[0])
    own, temperature = tensors.pop("temperature", None), lookup(config, TEMPERATURE_NAMES)
    if temperature is None and own is not None and own.numel() == 1:
        temperature = float(own)
    if temperature is not None:
        arguments["temperature"] = temperature
    if "backbone" in given:
        arguments["backbone"] = given["backbone"]
    else:
        found = dict(embed_dim=width, depth=depth, num_heads=lookup(config, ["num_attention_heads"]), patch_size=patch)
        arguments |= backbone_of(file, dict(found, reg_tokens=registers, mlp_ratio=hidden / max(width, 1)), gated)
    arguments["image_size"] = image_size(file.path.with_name("preprocessor_config.json"))
    file.words.append(
        f"ViT of width {width} with {depth} blocks and {registers} registers, L={arguments['L']}, "
        f"V={arguments['V']} ({source}), {arguments['image_size']}x{arguments['image_size']} pixels"
    )
    return arguments


def lookup(config: dict, names: Iterable[str]) -> object:
    """The first value of a name in a configuration: at its top, else in one of the configurations within it."""
    levels = (config, *(value for value in config.values() if isinstance(value, dict)))
    return next((level[name] for level in levels for name in names if level.get(name) is not None), None)


def code_size(file: File, given: dict, numbers: int) -> tuple[dict, str]:
    """L and V, whose product is the head's number of outputs; and words for where they are from."""
    said = dict(L=lookup(file.config, L_NAMES), V=lookup(file.config, V_NAMES))
    source = "by the flags" if said["L"] is said["V"] is None else "by its config.json"
    said = {key: given.get(key) if value is None else value for key, value in said.items()}
    for key, value in said.items():
        if value is not None and (type(value) is not int or value < 1):
            file.refuse(f"says {key} {shown(repr(value))} in its config.json, wanted a whole number from 1 on")
    if said["L"] is said["V"] is None:
        in_name = re.search(r"[-_]L(\d{1,5})$", parts_of(file.named)[0]) if is_id(file.named) else None
        if in_name:
            said["L"], source = int(in_name[1]), "by its name"
        elif numbers == DEFAULT_L * DEFAULT_V:
            said["L"], source = DEFAULT_L, "the published size, as it does not say L"
        else:
            file.refuse(f"does not say how its head's {numbers:,} numbers are L times V: give --L")
    for one, other in (("L", "V"), ("V", "L")):
        if said[one] is None:
            if not said[other] or numbers % said[other]:
                file.refuse(f"has a head of {numbers:,} numbers, no multiple of {other} {said[other]}")
            said[one] = numbers // said[other]
    return said, source


def backbone_of(file: File, found: dict, gated: bool) -> dict:
    """timm's name of a DINOv2 ViT, and those arguments of the found ones that differ from its own."""
    width, registers = found["embed_dim"], found["reg_tokens"]
    size, depth, heads = SIZES.get(width, ("small", None, None))
    if found["num_heads"] is None and heads is None:
        file.refuse(
            f"has width {width}, none of DINOv2's, and no config.json that says its number of heads: name its timm "
            "model with --encoder-backbone"
        )
    if gated != (size == "giant"):
        file.refuse(
            f"has width {width} and {'a' if gated else 'no'} gated MLP, other than DINOv2's: name its timm model with "
            "--encoder-backbone"
        )
    usual = dict(embed_dim=width if heads else None, depth=depth, num_heads=heads, patch_size=14)
    usual |= dict(reg_tokens=4 if registers else 0, mlp_ratio=found["mlp_ratio"] if gated else 4)
    found["num_heads"] = found["num_heads"] or heads
    other = {key: value for key, value in found.items() if value != usual[key]}
    return dict(backbone=f"vit_{size}_patch14_{'reg4_' if registers else ''}dinov2", backbone_args=other)


def image_size(file: Path) -> int:
    """The pixels that a preprocessor_config.json crops images to, else DINOv2's 224.

    Raises ValueError if it normalises images otherwise than by ImageNet's mean and standard deviation.
    """
    values = read_json(file) if file.is_file() else {}
    for key, wanted in (("image_mean", IMAGENET_MEAN), ("image_std", IMAGENET_STD)):
        if key in values and list(map(float, wanted)) != values[key]:
            raise ValueError(
                f"{file}: {key} is {one_line(values[key], 60)}, wanted ImageNet's {list(wanted)}, which are used here"
            )
    sizes = [values.get(key) for key in ("crop_size", "size")]
    heights = [size.get("height") if isinstance(size, dict) else size for size in sizes]
    return next((height for height in heights if type(height) is int and height > 0), IMAGE_SIZE)


def state_dict_of(tensors: dict, backbone: torch.nn.Module) -> dict:
    """Tensors under timm's names and the head's as SEMEncoder's state dict, for its timm backbone.

    DINOv2 adds a position embedding to the class token; timm's register models have it folded into the token. DINOv2 is
    also built for larger images, so the positions of its patches are resized (bicubic, antialiased) to the backbone's
    grid. Positions whose number fits neither are left as they are, for the comparison of shapes.
    """
    from timm.layers import resample_abs_pos_embed

    tensors = dict(tensors)
    positions, token = tensors.get("pos_embed"), tensors.get("cls_token")
    grid = getattr(getattr(backbone, "patch_embed", None), "grid_size", None)
    if grid and positions is not None and positions.ndim == 3 and len(positions) == 1 and positions.numel():
        wanted = backbone.pos_embed.shape[1] - grid[0] * grid[1]  # of tokens that are no patches
        sides = {prefix: max(0, positions.shape[1] - prefix) ** 0.5 for prefix in (wanted, 1, 0)}
        prefix = next((prefix for prefix, side in sides.items() if side and side.is_integer()), None)
        if prefix == 1 and wanted == 0 and token is not None and token.shape == positions[:, :1].shape:
            tensors["cls_token"] = token + positions[:, :1]
            positions, prefix = positions[:, 1:], 0
        if prefix == wanted:
            tensors["pos_embed"] = resample_abs_pos_embed(positions, grid, num_prefix_tokens=prefix)
    tensors = {key: value for key, value in tensors.items() if not key.startswith("norm.")}  # no part of it
    return {key if key.startswith("sem_") else f"backbone.{key}": value for key, value in tensors.items()}
