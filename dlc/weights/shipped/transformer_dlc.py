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
from diffusers.models.embeddings import get_timestep_embedding


def norm(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """LayerNorm without parameters of tokens (N, T, D), scaled and shifted by vectors (N, D)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def modulation(width: int, vectors: int) -> nn.Module:
    """From the condition to the vectors that shift, scale and gate tokens."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, vectors * width))


class Block(nn.Module):
    """Attention, then an MLP."""

    def __init__(self, width: int, heads: int, inner: int):
        super().__init__()
        self.heads = heads
        self.attn = nn.ModuleDict(dict(qkv=nn.Linear(width, 3 * width), proj=nn.Linear(width, width)))
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(width, inner), fc2=nn.Linear(inner, width)))
        self.adaLN_modulation = modulation(width, 6)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)  # (N, D) each
        qkv = self.attn["qkv"](norm(x, scale1, shift1)).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (N, heads, T, D/heads)
        x = x + gate1[:, None] * self.attn["proj"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        inner = F.gelu(self.mlp["fc1"](norm(x, scale2, shift2)), approximate="tanh")
        return x + gate2[:, None] * self.mlp["fc2"](inner)


class Codes(nn.Module):
    """The mean over positions of the rows that a code's tokens name in a table (L, V+1, D); row V is the null token.

    A module that is called, since diffusers' offloading brings weights to the GPU when their module is called.
    """

    def __init__(self, L: int, V: int, width: int):
        super().__init__()
        self.embedding_table = nn.Parameter(torch.zeros(L, V + 1, width))

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return self.embedding_table[torch.arange(y.shape[1], device=y.device), y].mean(dim=1)  # (N, D)


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
        self.out_channels, width = in_channels * (2 if learn_sigma else 1), hidden_size
        self.x_embedder = nn.ModuleDict(dict(proj=nn.Conv2d(in_channels, width, patch_size, stride=patch_size)))
        self.t_embedder = nn.ModuleDict(
            dict(mlp=nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width)))
        )
        self.sem_embedder = Codes(L, V, width)
        self.register_buffer("pos_embed", torch.zeros(1, (input_size // patch_size) ** 2, width))
        self.blocks = nn.ModuleList([Block(width, num_heads, round(width * mlp_ratio)) for _ in range(depth)])
        linear = nn.Linear(width, patch_size**2 * self.out_channels)
        self.final_layer = nn.ModuleDict(dict(linear=linear, adaLN_modulation=modulation(width, 2)))

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        times = get_timestep_embedding(t.float(), 256, flip_sin_to_cos=True, downscale_freq_shift=0)
        c = self.t_embedder["mlp"](times.to(self.dtype)) + self.sem_embedder(y)  # (N, D)
        x = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed  # (N, T, D)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.final_layer["adaLN_modulation"](c).chunk(2, dim=1)
        x, patch = self.final_layer["linear"](norm(x, scale, shift)), self.config.patch_size
        side = math.isqrt(x.shape[1])
        x = x.view(len(x), side, side, patch, patch, self.out_channels).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(len(x), self.out_channels, side * patch, side * patch)

    def save_pretrained(self, save_directory: str, *args, **kwargs) -> None:
        """As of ModelMixin, with this file beside the weights."""
        super().save_pretrained(save_directory, *args, **kwargs)
        shutil.copy(__file__, Path(save_directory) / "transformer_dlc.py")


DLCDiTTransformer.__module__ = "transformer_dlc"  # the name by which a pipeline that is saved again finds this file
