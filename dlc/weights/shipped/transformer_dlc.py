"""A diffusion transformer conditioned on discrete latent codes (Lavoie et al. 2025, arXiv 2507.12318), for diffusers.

This file lies beside weights that `python -m dlc.checkpoints export` wrote; the pipeline above it loads it.
"""

import math
import shutil
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config


def norm(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """LayerNorm without parameters of tokens (N, T, D), scaled and shifted by vectors (N, D)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (N, heads, T, D/heads)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.attn, self.mlp = Attention(width, heads), Mlp(width, round(width * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(norm(x, scale1, shift1))
        return x + gate2[:, None] * self.mlp(norm(x, scale2, shift2))


class Patches(nn.Module):
    def __init__(self, channels: int, patch: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # (N, T, D)


class Time(nn.Module):
    """Cosines and sines of the time at 128 frequencies from 1 down to almost 1/10000, then two linear layers."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        steps = torch.arange(128, dtype=torch.float32, device=t.device)
        angles = t.float()[:, None] * torch.exp(-math.log(10000) / 128 * steps)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1).to(self.mlp[0].weight.dtype))


class Codes(nn.Module):
    """The mean over positions of the rows that a code's tokens name in a table (L, V+1, D); row V is the null token."""

    def __init__(self, L: int, V: int, width: int):
        super().__init__()
        self.embedding_table = nn.Parameter(torch.zeros(L, V + 1, width))

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return self.embedding_table[torch.arange(y.shape[1], device=y.device), y].mean(dim=1)  # (N, D)


class Final(nn.Module):
    def __init__(self, width: int, out: int):
        super().__init__()
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(norm(x, scale, shift))


class DLCDiTTransformer(ModelMixin, ConfigMixin):
    """Predicts the noise in x (N, C, h, w), and with learn_sigma the variance, at times t (N,) for codes y (N, L)."""

    @register_to_config
    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        learn_sigma: bool = True,
        L: int = 512,
        V: int = 256,
    ):
        super().__init__()
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.x_embedder = Patches(in_channels, patch_size, hidden_size)
        self.t_embedder = Time(hidden_size)
        self.sem_embedder = Codes(L, V, hidden_size)
        self.register_buffer("pos_embed", torch.zeros(1, (input_size // patch_size) ** 2, hidden_size))
        self.blocks = nn.ModuleList([Block(hidden_size, num_heads, mlp_ratio) for _ in range(depth)])
        self.final_layer = Final(hidden_size, patch_size**2 * self.out_channels)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        c = self.t_embedder(t) + self.sem_embedder(y)
        x = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            x = block(x, c)
        x, patch, side = self.final_layer(x, c), self.config.patch_size, math.isqrt(x.shape[1])
        x = x.view(len(x), side, side, patch, patch, self.out_channels).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(len(x), self.out_channels, side * patch, side * patch)

    def save_pretrained(self, save_directory: str, *args, **kwargs) -> None:
        """As of ModelMixin, with this file beside the weights."""
        super().save_pretrained(save_directory, *args, **kwargs)
        shutil.copy(__file__, Path(save_directory) / "transformer_dlc.py")


DLCDiTTransformer.__module__ = "transformer_dlc"  # the name by which a pipeline that is saved again finds this file
