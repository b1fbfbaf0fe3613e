"""The tensor names of Vision Transformers and SEM heads: transformers', timm's and DINOv2's, to `SEMEncoder`'s."""

import math
import re

import torch

from dlc.weights.foreign.safe import plain_name

# parts of a self-supervised checkpoint that only its losses need
TRAINING_ONLY = "mask_token norm head sem_out sem_cls_norm dino_head ibot_head layernorm classifier".split()


def serves_training_only(key):
    return re.sub(r"^(backbone|embeddings)\.", "", plain_name(key)).split(".")[0] in TRAINING_ONLY


def from_dinov2(weights):
    """Blocks saved in chunks (`blocks.2.13.…`) have their index in second place. A gated MLP is w12 and w3."""
    names = [re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key) for key in weights]
    names = [name.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.") for name in names]
    return dict(zip(names, weights.values()))


def from_timm(weights):
    return {("register_tokens" if key == "reg_token" else key): value for key, value in weights.items()}


# transformers' names, of version 5's modules and of all files, and DINOv2's. A number is the place of a part: query,
# key and value are one layer in DINOv2, as are the two halves of a gated MLP.
FROM_TRANSFORMERS = [
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"embeddings\.", ""),
    (r"encoder\.layer\.", "blocks."),
    (r"attention\.(attention\.query|q_proj)\.", "attn.qkv.0."),
    (r"attention\.(attention\.key|k_proj)\.", "attn.qkv.1."),
    (r"attention\.(attention\.value|v_proj)\.", "attn.qkv.2."),
    (r"attention\.(output\.dense|o_proj)\.", "attn.proj."),
    (r"layer_scale([12])\.lambda1", r"ls\1.gamma"),
    (r"mlp\.weights_in\.", "mlp.fc1."),
    (r"mlp\.gate_proj\.", "mlp.fc1.0."),
    (r"mlp\.up_proj\.", "mlp.fc1.1."),
    (r"mlp\.(weights_out|down_proj)\.", "mlp.fc2."),
]


def from_transformers(weights):
    renamed, parts = {}, {}
    for key, value in weights.items():
        for pattern, name in FROM_TRANSFORMERS:
            key = re.sub(rf"(?:^|(?<=\.)){pattern}", name, key)
        part = re.fullmatch(r"(.*\.(?:qkv|fc1))\.(\d)(\.\w+)", key)
        if part:
            parts.setdefault(part[1] + part[3], {})[int(part[2])] = value
        else:
            renamed[key] = value
    for key, found in parts.items():
        whole = 3 if ".qkv." in key else 2
        if len(found) == whole and all(value.ndim for value in found.values()):  # else the layer is missed by its name
            renamed[key] = torch.cat([found[place] for place in range(whole)])
    return renamed


def to_state_dict(weights, backbone):
    """Tensors under DINOv2's names and the head's as SEMEncoder's state dict, for a timm backbone.

    DINOv2 adds a position embedding to the class token; timm's register models have it folded into the token. DINOv2 is
    also built for larger images, so the positions of its patches are resized (bicubic, antialiased) to the backbone's
    grid. Positions whose number fits neither are left as they are, for the comparison of shapes.
    """
    from timm.layers import resample_abs_pos_embed

    weights = dict(weights)
    if "register_tokens" in weights:
        weights["reg_token"] = weights.pop("register_tokens")
    positions, token = weights.get("pos_embed"), weights.get("cls_token")
    grid = getattr(getattr(backbone, "patch_embed", None), "grid_size", None)
    if grid and positions is not None and positions.ndim == 3 and len(positions) == 1 and positions.numel():
        wanted = backbone.pos_embed.shape[1] - grid[0] * grid[1]  # of tokens that are no patches
        prefix = next(filter(lambda n: is_square(positions.shape[1] - n), (wanted, 1, 0)), None)
        if prefix == 1 and wanted == 0 and token is not None and token.shape == positions[:, :1].shape:
            weights["cls_token"] = token + positions[:, :1]
            positions, prefix = positions[:, 1:], 0
        if prefix == wanted:
            weights["pos_embed"] = resample_abs_pos_embed(positions, grid, num_prefix_tokens=prefix)
    return {key if key.startswith("sem_") else f"backbone.{key}": value for key, value in weights.items()}


def is_square(number):
    return number > 0 and math.isqrt(number) ** 2 == number
