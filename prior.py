"""A prior over discrete latent codes: DLCPrior, a bidirectional transformer that predicts masked tokens.

Architecture and parameter names are those of SEDD (Lou et al. 2024, arXiv 2310.16834) as the DLC project trains it
(Lavoie et al. 2025, arXiv 2507.12318), whose checkpoints load strictly. What the numbers mean, the loss and the
samplers are in diffusion/masked.py and diffusion/masked_samplers.py.

    model = DLCPrior_models["DLCPrior-M"](L=512, V=256)
    log_score = model(codes, sigma)                               # (N, L, V+1); token V is the mask

Nothing here knows a file, a rank or a flag. Shapes: N samples, L code positions, V tokens per position, D width,
H heads, C width of the condition.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from models import LabelEmbedder, ModelSpec, Recorded, TimestepEmbedder, modulate

SMALLEST_SIGMA = 1e-9       # sigma = 0 means "not told"; log(e^sigma - 1) of it would be infinite

Rotation = tuple[torch.Tensor, torch.Tensor]        # cos and sin of the positions' angles


#################################################################################
#                                     Parts                                     #
#################################################################################

class Rotary(nn.Module):
    """Rotary positions (Su et al. 2021, arXiv 2104.09864), base 10,000, of the two halves of each head's channels."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.register_buffer("inv_freq", 1 / 10000 ** (torch.arange(0, head_dim, 2).float() / head_dim))

    def forward(self, L: int) -> Rotation:
        """cos and sin, (L, head_dim / 2) float32 each."""
        angles = torch.outer(torch.arange(L, device=self.inv_freq.device).float(), self.inv_freq.float())
        return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Turn q or k, (N, H, L, D / H), by its positions' angles."""
    cos, sin = (part.to(x.dtype) for part in rotation)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class TokenEmbedding(nn.Module):
    """Tokens (N, L) in 0..V to vectors (N, L, D), from one table for all positions or one for each."""

    def __init__(self, L: int, V: int, hidden_size: int, shared: bool):
        super().__init__()
        self.shared, self.rows = shared, V + 1
        self.embedding = nn.Parameter(torch.empty(*(() if shared else (L,)), V + 1, hidden_size))

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        if self.shared:
            return F.embedding(codes, self.embedding)
        offset = torch.arange(codes.shape[1], device=codes.device) * self.rows
        return F.embedding(codes + offset, self.embedding.flatten(0, 1))


class PositionLinear(nn.Module):
    """A linear layer of its own for each position: (N, L, D) to (N, L, out)."""

    def __init__(self, L: int, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(L, in_features, out_features))
        self.bias = nn.Parameter(torch.empty(L, out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(x.transpose(0, 1), self.weight).transpose(0, 1) + self.bias


class PriorBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition (adaLN-Zero), with dropout before the gate."""

    def __init__(self, hidden_size: int, num_heads: int, cond_dim: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(hidden_size, bias=False)
        self.attn_qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.attn_out = nn.Linear(hidden_size, hidden_size, bias=False)
        self.dropout1 = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(hidden_size, bias=False)
        self.mlp = nn.Sequential(nn.Linear(hidden_size, 4 * hidden_size), nn.GELU(approximate="tanh"),
                                 nn.Linear(4 * hidden_size, hidden_size))
        self.dropout2 = nn.Dropout(dropout)
        self.adaLN_modulation = nn.Linear(cond_dim, 6 * hidden_size)

    def attention(self, x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        q, k, v = self.attn_qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)     # (N, H, L, D/H)
        x = F.scaled_dot_product_attention(rotate(q, rotation), rotate(k, rotation), v)
        return self.attn_out(x.transpose(1, 2).flatten(2))                                          # (N, L, D)

    def forward(self, x: torch.Tensor, c: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)     # (N, D) each
        update = self.attention(modulate(self.norm1(x), shift1, scale1), rotation)
        x = x + gate1.unsqueeze(1) * self.dropout1(update)                                          # (N, L, D)
        update = self.mlp(modulate(self.norm2(x), shift2, scale2))
        return x + gate2.unsqueeze(1) * self.dropout2(update)                                       # (N, L, D)


class PriorHead(nn.Module):
    """Vectors (N, L, D) to log scores (N, L, V+1), in float32 under any autocast.

    In bfloat16 a log probability of -8 would be off by up to 0.03.
    """

    def __init__(self, L: int, V: int, hidden_size: int, cond_dim: int, shared: bool):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, bias=False)
        self.linear = nn.Linear(hidden_size, V + 1) if shared else PositionLinear(L, hidden_size, V + 1)
        self.adaLN_modulation = nn.Linear(cond_dim, 2 * hidden_size)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            shift, scale = self.adaLN_modulation(c.float()).chunk(2, dim=1)
            return self.linear(modulate(self.norm_final(x.float()), shift, scale))


#################################################################################
#                                     Model                                     #
#################################################################################

class DLCPrior(Recorded):
    """Transformer over the L tokens of a code, of which some are masked, conditioned on the noise level sigma.

    Args:
        L, V: code positions, and tokens per position; token V is the mask.
        cond_dim: width of the condition that shifts, scales and gates.
        dropout: share of the blocks' updates that is dropped in training.
        scale_by_sigma: subtract log(e^sigma - 1) + log V from the output, as SEDD's score has it. The softmax over the
            clean tokens does not change.
        shared_embedding: one token table and one output layer for all positions, as published. False: one of each per
            position, since token 7 of one position has nothing to do with token 7 of another.
        num_classes: how many classes the prior can be conditioned on; None: it cannot.
    """

    def __init__(self, L: int, V: int, hidden_size: int, depth: int, num_heads: int, cond_dim: int = 128,
                 dropout: float = 0.1, scale_by_sigma: bool = True, shared_embedding: bool = True,
                 num_classes: int | None = None):
        super().__init__()
        if hidden_size % (2 * num_heads):
            raise ValueError(f"width {hidden_size} is not a multiple of twice the {num_heads} heads")
        self.L, self.V, self.num_classes = L, V, num_classes
        self.scale_by_sigma, self.shared_embedding = scale_by_sigma, shared_embedding
        self.vocab_embed = TokenEmbedding(L, V, hidden_size, shared_embedding)
        self.pos_embed = nn.Parameter(torch.empty(L, hidden_size))
        self.sigma_map = TimestepEmbedder(cond_dim)
        if num_classes is not None:
            self.y_embedder = LabelEmbedder(num_classes, cond_dim)
        self.rotary_emb = Rotary(hidden_size // num_heads)
        self.blocks = nn.ModuleList([PriorBlock(hidden_size, num_heads, cond_dim, dropout) for _ in range(depth)])
        self.output_layer = PriorHead(L, V, hidden_size, cond_dim, shared_embedding)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """PyTorch's linear layers, small tables, and zeros where adaLN-Zero wants them: the output starts uniform."""
        for table in (self.vocab_embed.embedding, self.pos_embed):
            nn.init.normal_(table, std=0.02)
        if self.num_classes is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=1.0)
        for layer in (*(block.adaLN_modulation for block in self.blocks), self.output_layer.adaLN_modulation,
                      self.output_layer.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def null_condition(self, n: int) -> torch.Tensor:
        """n times the class that means "none"."""
        return self.y_embedder.null(n)

    def condition(self, sigma: torch.Tensor, y: torch.Tensor | None = None,
                  drop: torch.Tensor | None = None) -> torch.Tensor:
        """Noise level, and class if the prior has classes, as the vectors (N, C) that all layers are conditioned on."""
        c = self.sigma_map(sigma)
        if self.num_classes is not None:
            c = c + self.y_embedder(self.null_condition(len(sigma)) if y is None else y, drop)
        elif y is not None:
            raise ValueError("this prior has no classes")
        return F.silu(c)

    def forward(self, codes: torch.Tensor, sigma: torch.Tensor, y: torch.Tensor | None = None,
                drop: torch.Tensor | None = None) -> torch.Tensor:
        """Log scores: up to a constant per place, log p(token | the tokens that are not masked).

        Args:
            codes: (N, L) int64 in 0..V; V is the mask.
            sigma: (N,) float32 noise levels; 0 where the network is not told (see MaskedDiffusion).
            y: (N,) classes [none], for a prior that has some.
            drop: (N,) bool, samples that get the null class.

        Returns (N, L, V+1) float32, 0 for the token that is there, as SEDD has it.
        """
        c, rotation = self.condition(sigma, y, drop), self.rotary_emb(codes.shape[1])
        x = self.vocab_embed(codes) + self.pos_embed                                                # (N, L, D)
        for block in self.blocks:
            x = self.through(block, x, c, rotation)                                                 # (N, L, D)
        out = self.output_layer(x, c)                                                               # (N, L, V+1)
        if self.scale_by_sigma:
            shift = sigma.float().clamp(min=SMALLEST_SIGMA).expm1().log() + math.log(self.V)        # (N,)
            out = out - shift.view(-1, 1, 1)
        return out.scatter(-1, codes.unsqueeze(-1), 0)


# Depth, hidden_size, num_heads. M: the published prior. S: the DLC project's small one. Ti: for laptops.
DLCPrior_models = {"DLCPrior-M": ModelSpec(DLCPrior, 24, 1024, 16), "DLCPrior-S": ModelSpec(DLCPrior, 12, 768, 12),
                   "DLCPrior-Ti": ModelSpec(DLCPrior, 2, 64, 4)}
