"""DINOv2's class token as FD-DINOv2 takes it (Stein et al. 2023, arXiv 2306.04675; Oquab et al. 2023, 2304.07193).

Images are resized to 224 x 224 by Pillow's bicubic filter, in 8 bits. The position embeddings, a grid of 37 x 37, are
resampled to 16 x 16 as DINOv2's own code does: bicubic without antialiasing, with a scale of 16.1 / 37. timm resamples
them with antialiasing, which gives other features; so the weights are resampled here, before timm's module gets them.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from dlc.data.images import IMAGENET_MEAN, IMAGENET_STD, normalize
from dlc.weights.foreign.safe import check_tensors, differences_from, load_tensors

SIDE, PATCH, HEAD = 224, 14, 64  # pixels of an image and of a patch; channels per attention head
OFFSET = 0.1  # patches, by which DINOv2 enlarges the grid that it scales to


def preprocess(images: torch.Tensor) -> torch.Tensor:
    """Images (N, H, W, 3) uint8 to (N, 3, 224, 224) float32 on the CPU, normalised by ImageNet's mean and std."""
    resized = [
        np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        for image in images.cpu().numpy()
    ]
    return normalize(torch.from_numpy(np.stack(resized)), IMAGENET_MEAN, IMAGENET_STD)


def resample_positions(positions: torch.Tensor, side: int = SIDE // PATCH) -> torch.Tensor:
    """Position embeddings (1, 1 + G*G, D), class token first, to (1, 1 + side*side, D), as DINOv2 resamples them."""
    token, grid = positions[:, :1], positions[:, 1:]
    size = math.isqrt(grid.shape[1])
    if size != side:
        grid = grid.reshape(1, size, size, -1).permute(0, 3, 1, 2)  # (1, D, G, G)
        grid = F.interpolate(grid, scale_factor=(side + OFFSET) / size, mode="bicubic", antialias=False)
        grid = grid.permute(0, 2, 3, 1).flatten(1, 2)
    return torch.cat([token, grid], dim=1)


def load_dinov2(path: str | Path) -> nn.Module:
    """The ViT in a file of weights, DINOv2's own or timm's, which have the same names, in eval mode, on the CPU.

    Width and depth are read off the tensors. Raises ValueError naming the file.
    """
    weights = {key: value.float() for key, value in check_tensors(load_tensors(path), path).items()}
    weights.pop("mask_token", None)  # of training
    positions, token = weights.get("pos_embed"), weights.get("cls_token")
    if positions is None or positions.ndim != 3 or token is None or "register_tokens" in weights:
        raise ValueError(
            f"{path} is not a DINOv2 without registers: it has no pos_embed and cls_token, or has registers"
        )
    if math.isqrt(positions.shape[1] - 1) ** 2 != positions.shape[1] - 1 or positions.shape[1] < 2:
        raise ValueError(f"{path}: pos_embed, {tuple(positions.shape)}, is not a class token and a square grid")
    width, depth = positions.shape[2], len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
    if width % HEAD or not 1 <= depth <= 64 or width > 4096:
        raise ValueError(f"{path} has width {width} and depth {depth}, unlike any DINOv2")
    weights["pos_embed"] = resample_positions(positions)
    from timm.models.vision_transformer import VisionTransformer

    sizes = dict(img_size=SIDE, patch_size=PATCH, embed_dim=width, depth=depth, num_heads=width // HEAD)
    with torch.device("meta"):
        module = VisionTransformer(**sizes, init_values=1e-5, num_classes=0, weight_init="skip")
    different = differences_from(module.state_dict(), weights)
    if different:
        raise ValueError(f"{path} is no DINOv2 of width {width} and depth {depth}: it {different}")
    module.load_state_dict(weights, assign=True)
    return module.eval().requires_grad_(False)
