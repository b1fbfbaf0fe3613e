"""Diffusion transformers on VAE latents: DiT (class labels), DiTSEM (discrete latent codes), DiTCONT (vectors).

DiT and adaLN-Zero: Peebles & Xie 2023, arXiv 2212.09748. Codes in place of the label: Lavoie et al. 2025,
arXiv 2507.12318. Parameter names are those of the published DiT checkpoints, which load strictly.

    model = DiT_models["DiTSEM-XL/2"](input_size=32, L=512, V=256)
    out = model(x, t, y)                                           # (N, 8, 32, 32): eps and variance

Nothing here knows a file, a rank or a flag. Shapes: N samples, T tokens, D width, C latent channels, P patch size,
L code positions, V tokens per position.
"""
import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

Condition = torch.Tensor | dict[str, torch.Tensor]      # what y is; the families here take a tensor


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Shift and scale tokens x (N, T, D) by per-sample vectors (N, D), in x's precision: 1 + scale keeps its bits."""
    return x * (1 + scale.unsqueeze(1).to(x.dtype)) + shift.unsqueeze(1)


def sincos_position_embedding(dim: int, grid_size: int) -> torch.Tensor:
    """Fixed 2-D sine-cosine position embedding, (grid_size**2, dim) float32, rows in raster order.

    A quarter of the channels each for sin(column), cos(column), sin(row), cos(row), at wavelengths from 2 pi to
    20,000 pi in geometric steps (Vaswani et al. 2017, section 3.5, once per axis).
    """
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.outer(torch.arange(grid_size, dtype=torch.float64), frequencies)      # (grid, dim/4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)                                # (grid, dim/2)
    columns, rows = axis.repeat(grid_size, 1), axis.repeat_interleave(grid_size, 0)      # (grid^2, dim/2) each
    return torch.cat([columns, rows], dim=1).float()


#################################################################################
#                             A model and its record                            #
#################################################################################

class Recorded(nn.Module):
    """The base of all models. It keeps its constructor's arguments, by which `build_model` makes it again.

    model.config is {"family": the class's name, "arguments": every argument by name, with the defaults}. The
    constructor takes its arguments by name; one that passes **kwargs on to its base has those of the base as well,
    and one that fixes them has only its own.
    """
    families = {}
    grad_checkpointing = False

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        Recorded.families[cls.__name__] = cls
        if "__init__" in vars(cls):
            cls.__init__ = recording(cls.__init__)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass: less memory, about a third more work."""
        self.grad_checkpointing = enable

    def through(self, block: nn.Module, *inputs: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
        """A block's output, whose activations are kept or recomputed."""
        if self.grad_checkpointing and self.training:
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


def recording(init: Callable) -> Callable:
    """A constructor that also notes its arguments in self.config, after those of its base have noted theirs."""
    signature = inspect.signature(init)
    passes_on = next((name for name, one in signature.parameters.items() if one.kind is one.VAR_KEYWORD), None)

    @functools.wraps(init)
    def wrapped(self, *args, **kwargs):
        bound = signature.bind(self, *args, **kwargs)
        given = set(bound.arguments)
        init(self, *args, **kwargs)
        bound.apply_defaults()
        _, *own = bound.arguments.items()                       # without self
        own = dict(own)
        left = getattr(self, "left_to_defaults", {}) if passes_on else {}       # of the bases' arguments
        self.config = dict(family=type(self).__name__, arguments=left | own.pop(passes_on, {}) | own)
        self.left_to_defaults = {name: value for name, value in (left | own).items() if name not in given}

    return wrapped


def build_model(config: dict) -> nn.Module:
    """The model that a `Recorded.config` describes, with new weights.

    Raises ValueError for a family that does not exist, or arguments that it does not take.
    """
    if config["family"] not in Recorded.families:
        raise ValueError(f"there is no family of models called {config['family']!r}: models.py must import its file")
    try:
        return Recorded.families[config["family"]](**config["arguments"])
    except TypeError as error:
        raise ValueError(f"{config['family']} cannot be built from its recorded arguments ({error})") from None


#################################################################################
#                            Timestep and condition                             #
#################################################################################

class TimestepEmbedder(nn.Module):
    """Diffusion time (N,), possibly fractional, to a vector (N, D)."""

    def __init__(self, hidden_size: int, frequency_embedding_size: int = 256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequency_embedding_size, hidden_size), nn.SiLU(),
                                 nn.Linear(hidden_size, hidden_size))

    @staticmethod
    def timestep_embedding(t: torch.Tensor, dim: int, max_period: float = 10000) -> torch.Tensor:
        """Cosines then sines of t (N,) at dim/2 geometric frequencies from 1 down to 1/max_period, (N, dim) float32."""
        half = dim // 2
        steps = torch.arange(half, dtype=torch.float32, device=t.device)
        angles = t.float().unsqueeze(1) * torch.exp(-math.log(max_period) / half * steps)
        embedding = torch.cat([angles.cos(), angles.sin()], dim=1)
        return F.pad(embedding, (0, dim % 2))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        with torch.autocast(t.device.type, enabled=False):
            return self.mlp(self.timestep_embedding(t, self.mlp[0].in_features))   # (N, D)


class LabelEmbedder(nn.Module):
    """Class labels (N,) to vectors (N, D); the row after the last class is the null label."""
    init_std = 0.02

    def __init__(self, num_classes: int, hidden_size: int):
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def null(self, n: int) -> torch.Tensor:
        return torch.full((n,), self.num_classes, device=self.embedding_table.weight.device)

    def forward(self, labels: torch.Tensor, drop: torch.Tensor | None = None) -> torch.Tensor:
        if drop is not None:
            labels = torch.where(drop, self.num_classes, labels)
        return self.embedding_table(labels)                                # (N, D)


class SEMEmbedder(nn.Module):
    """Codes (N, L), or soft codes (N, L, V), to the mean over positions of the table's rows, (N, D) float32.

    Row V of each position is its null token; soft codes may give it a weight, too: (N, L, V+1). The rows are
    gathered and averaged in one pass: neither a one-hot product nor an (N, L, D) intermediate is made.
    """
    # The mean over L shrinks the rows' scale by sqrt(L). From N(0, 1) it is 0.044 at L=512, beside 0.08 of the timestep
    # embedding; from the labels' N(0, 0.02) it would be 0.0009, and codes are followed only much later.
    init_std = 1.0

    def __init__(self, L: int, V: int, hidden_size: int):
        super().__init__()
        self.L, self.V = L, V
        self.embedding_table = nn.Parameter(torch.empty(L, V + 1, hidden_size))
        self.register_buffer("row_offset", torch.arange(L) * (V + 1), persistent=False)

    def null(self, n: int) -> torch.Tensor:
        return torch.full((n, self.L), self.V, device=self.embedding_table.device)

    def forward(self, codes: torch.Tensor, drop: torch.Tensor | None = None) -> torch.Tensor:
        with torch.autocast(codes.device.type, enabled=False):
            table = self.embedding_table.float()
            if codes.ndim == 3:
                rows = table[:, :codes.shape[2]].flatten(0, 1)             # (L*V, D)
                embedding = codes.flatten(1).float() @ rows / self.L       # (N, D)
                return embedding if drop is None else torch.where(
                    drop.unsqueeze(1), table[:, self.V].mean(0, keepdim=True), embedding)
            codes = codes.long()
            if drop is not None:
                codes = torch.where(drop.unsqueeze(1), self.V, codes)
            return F.embedding_bag(codes + self.row_offset, table.flatten(0, 1), mode="mean")   # (N, D)


class LinearEmbedder(nn.Module):
    """Vectors (N, in_dim) to (N, D) by a linear layer without bias; a learned vector is the null condition."""
    init_std = 0.02

    def __init__(self, in_dim: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Linear(in_dim, hidden_size, bias=False)
        self.fake_latent = nn.Parameter(torch.empty(1, in_dim))

    def null(self, n: int) -> torch.Tensor:
        return self.fake_latent.expand(n, -1)

    def forward(self, vectors: torch.Tensor, drop: torch.Tensor | None = None) -> torch.Tensor:
        if drop is not None:
            vectors = torch.where(drop.unsqueeze(1), self.fake_latent, vectors)
        return self.embedding_table(vectors)                               # (N, D)


#################################################################################
#                                    Blocks                                     #
#################################################################################

layer_norm = partial(nn.LayerNorm, elementwise_affine=False, eps=1e-6)


class DiTBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition (adaLN-Zero)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0):
        # here, because timm takes longer to import than torch, and --help needs neither
        from timm.layers import Mlp
        from timm.models.vision_transformer import Attention
        super().__init__()
        self.norm1 = layer_norm(hidden_size)
        self.attn = Attention(hidden_size, num_heads=num_heads, qkv_bias=True)
        self.norm2 = layer_norm(hidden_size)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), act_layer=partial(nn.GELU, approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)   # (N, D) each
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))           # (N, T, D)
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))         # (N, T, D)


class FinalLayer(nn.Module):
    """Tokens (N, T, D) to patches (N, T, P*P*out_channels)."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = layer_norm(hidden_size)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


#################################################################################
#                                    Models                                     #
#################################################################################

class DiT(Recorded):
    """Diffusion transformer conditioned on class labels, and the base of the other families.

    Args:
        input_size: height and width of the latent; a multiple of patch_size.
        class_dropout_prob: share of training samples whose condition is replaced by the null condition.
        learn_sigma: predict, beside eps, where the variance lies between its bounds (twice the output channels).
        intermediate_head: after how many blocks a second output layer predicts eps as well, by which the model guides
            itself (internal guidance, Zhou et al. 2026, arXiv 2512.24176); None: there is none.
    """
    conditioning = "labels"         # what y is
    embedder_name = "y_embedder"    # in the state dict
    build_embedder = None           # in the other families: hidden_size to their embedder
    guided_channels = 3             # guided by classifier-free guidance, as in the published samples; None: all
    table, table_ndim = "y_embedder.embedding_table.weight", 2      # the tensor whose shape tells these arguments
    sizes_of = staticmethod(lambda shape: dict(num_classes=shape[0] - 1))

    def __init__(self, input_size: int = 32, patch_size: int = 2, in_channels: int = 4, hidden_size: int = 1152,
                 depth: int = 28, num_heads: int = 16, mlp_ratio: float = 4.0, class_dropout_prob: float = 0.1,
                 num_classes: int = 1000, learn_sigma: bool = True, intermediate_head: int | None = None):
        from timm.layers import PatchEmbed
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"latent size {input_size} is not a multiple of the patch size {patch_size}")
        if intermediate_head is not None and not 1 <= intermediate_head < depth:
            raise ValueError(f"an intermediate head lies after block 1 to {depth - 1}, not {intermediate_head}")
        self.intermediate_head = intermediate_head
        self.in_channels, self.out_channels = in_channels, 2 * in_channels if learn_sigma else in_channels
        self.patch_size, self.class_dropout_prob = patch_size, class_dropout_prob
        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        build = self.build_embedder or partial(LabelEmbedder, num_classes)
        setattr(self, self.embedder_name, build(hidden_size))
        self.register_buffer("pos_embed", sincos_position_embedding(hidden_size, input_size // patch_size)[None])
        self.blocks = nn.ModuleList([DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth)])
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        if intermediate_head is not None:
            self.intermediate_layer = FinalLayer(hidden_size, patch_size, in_channels)
        self.initialize_weights()

    @property
    def condition_embedder(self) -> nn.Module:
        return getattr(self, self.embedder_name)

    @property
    def output_layers(self) -> list[nn.Module]:
        return [self.final_layer] + ([] if self.intermediate_head is None else [self.intermediate_layer])

    def initialize_weights(self) -> None:
        """Xavier weights, normal embeddings, and zeros where adaLN-Zero wants them: the output starts at exactly 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))      # as the linear layer it is
        nn.init.zeros_(self.x_embedder.proj.bias)
        for parameter in self.condition_embedder.parameters():
            nn.init.normal_(parameter, std=self.condition_embedder.init_std)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        for part in (*(block.adaLN_modulation for block in self.blocks), *self.output_layers):
            for parameter in part.parameters():
                nn.init.zeros_(parameter)

    def drop_head(self) -> None:
        """Remove the intermediate head, if there is one."""
        if self.intermediate_head is not None:
            del self.intermediate_layer
            self.intermediate_head = self.config["arguments"]["intermediate_head"] = None

    def null_condition(self, n: int) -> Condition:
        """n times the condition that means "none"."""
        return self.condition_embedder.null(n)

    def unpatchify(self, x: torch.Tensor) -> torch.Tensor:
        """Patches (N, T, P*P*C) to an image (N, C, H, W)."""
        n, p, side = x.shape[0], self.patch_size, math.isqrt(x.shape[1])
        x = x.view(n, side, side, p, p, -1)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(n, -1, side * p, side * p)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: Condition, drop: torch.Tensor | None = None,
                **asked) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Predict eps, and with learn_sigma the variance, of noisy latents.

        Args:
            x: (N, C, H, W) noisy latents.
            t: (N,) diffusion times from 0 to 999, whole or fractional.
            y: labels (N,) for DiT; codes (N, L) or soft codes (N, L, V) for DiTSEM; vectors (N, in_dim) for DiTCONT.
            drop: (N,) bool, samples that get the null condition [by class_dropout_prob in training, none in eval].
            asked: head and tap, as in `denoise`; a model of one's own may have none.
        """
        if drop is None and self.training and self.class_dropout_prob > 0:
            drop = torch.rand(x.shape[0], device=x.device) < self.class_dropout_prob
        return self.denoise(x, self.t_embedder(t), self.embed_condition(y, drop), **asked)

    def embed_condition(self, y: Condition, drop: torch.Tensor | None = None) -> Condition:
        """y as `denoise` takes it: here (N, D). A model of another condition may give a dict of tensors."""
        return self.condition_embedder(y, drop)

    def denoise(self, x: torch.Tensor, t: torch.Tensor, condition: Condition, head: bool = False,
                tap: int | None = None) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """forward, given the embedded time t, (N, D) or (D,), and condition, which a sampler embeds once for many.

        head: append what the intermediate head predicts, C more channels.
        tap: after how many blocks to look at the tokens: return (output, tokens (N, T, D)).
        """
        c = t + condition                                                                   # (N, D)
        # the convolution's output is channel-first, and would stay so through all blocks, which slows each LayerNorm
        x = (self.x_embedder(x) + self.pos_embed).contiguous()                              # (N, T, D)
        for number, block in enumerate(self.blocks, 1):
            x = self.through(block, x, c)                                                   # (N, T, D)
            if head and number == self.intermediate_head:
                early = self.unpatchify(self.intermediate_layer(x, c))                      # (N, C, H, W)
            if number == tap:
                tapped = x                                                                  # (N, T, D)
        out = self.unpatchify(self.final_layer(x, c))                                       # (N, out_channels, H, W)
        out = torch.cat([out, early], dim=1) if head else out
        return out if tap is None else (out, tapped)

    # The references' interface, for users' own code, tests and benchmarks. The sampling scripts guide in
    # dlc/sampling/latents.py, which computes the null half only where guidance acts.
    def forward_with_cfg(self, x: torch.Tensor, t: torch.Tensor, y: Condition, cfg_scale: float,
                         t_max: float | None = None, channels: int | None = None,
                         t_min: float | None = None) -> torch.Tensor:
        """Classifier-free guidance (Ho & Salimans 2022): null + cfg_scale * (conditional - null), on a doubled batch.

        Args:
            x: (2N, C, H, W); the second half is ignored and taken to equal the first.
            t: (2N,) times.
            y: conditions of the first half, then null conditions.
            t_max, t_min: samples with t > t_max or t < t_min keep the conditional prediction (Kynkäänniemi et al.
                2024, arXiv 2404.07724) [no bounds].
            channels: latent channels to guide [guided_channels]; the rest, and the variance, stay each half's own.

        Returns (2N, out_channels, H, W), eps of both halves guided alike.
        """
        channels = channels or self.guided_channels or self.in_channels
        half = x[:x.shape[0] // 2]
        out = self(torch.cat([half, half]), t, y)
        conditional, null = out[:, :channels].chunk(2)
        guided = null + cfg_scale * (conditional - null)
        t = t.chunk(2)[0].view(-1, 1, 1, 1)
        if t_max is not None:
            guided = torch.where(t > t_max, conditional, guided)
        if t_min is not None:
            guided = torch.where(t < t_min, conditional, guided)
        return torch.cat([torch.cat([guided, guided]), out[:, channels:]], dim=1)


class DiTSEM(DiT):
    """Diffusion transformer conditioned on a discrete latent code: L tokens, each in 0..V-1 (V is the null token).

    code_init says how its table starts: "unit", at N(0, 1); "dlc", as in the DLC project, at N(0, 1/D) with one null
    row for all positions. The other arguments are DiT's; num_classes has no effect: it lets one call build any family.
    """
    conditioning, embedder_name, guided_channels = "codes", "sem_embedder", None
    table, table_ndim = "sem_embedder.embedding_table", 3
    sizes_of = staticmethod(lambda shape: dict(L=shape[0], V=shape[1] - 1))

    def __init__(self, *, L: int = 512, V: int = 256, code_init: str = "unit", **kwargs):
        self.build_embedder, self.code_init = partial(SEMEmbedder, L, V), code_init
        super().__init__(**kwargs)

    def initialize_weights(self) -> None:
        super().initialize_weights()
        if self.code_init == "dlc":
            with torch.no_grad():
                table = self.sem_embedder.embedding_table                  # (L, V+1, D)
                table *= table.shape[2] ** -0.5
                table[:, -1] = table[0, -1].clone()


class DiTCONT(DiT):
    """Diffusion transformer conditioned on a vector of in_dim floats, such as an encoder's embedding."""
    conditioning, table, table_ndim, guided_channels = "vectors", "y_embedder.fake_latent", 2, None
    sizes_of = staticmethod(lambda shape: dict(in_dim=shape[1]))

    def __init__(self, *, in_dim: int = 1024, **kwargs):
        self.build_embedder = partial(LinearEmbedder, in_dim)
        super().__init__(**kwargs)


@dataclass(frozen=True)
class ModelSpec:
    """A family and a size, what a model's name stands for. Called with the data's sizes, it builds the model."""
    family: type
    depth: int
    hidden_size: int
    num_heads: int
    patch_size: int | None = None       # of a DiT

    @property
    def conditioning(self) -> str:
        return self.family.conditioning

    def __call__(self, **sizes) -> Recorded:
        own = {name: value for name, value in vars(self).items() if name != "family" and value is not None}
        return self.family(**own, **sizes)


# Depth, hidden_size, num_heads. XL, L, B, S: table 1 of the DiT paper. Ti, for laptops: DeiT-Ti at half its depth.
SIZES = {"XL": (28, 1152, 16), "L": (24, 1024, 16), "B": (12, 768, 12), "S": (12, 384, 6), "Ti": (6, 192, 3)}
FAMILIES, CODE_INITS = (DiT, DiTSEM, DiTCONT), ("unit", "dlc")

DiT_models = {f"{family.__name__}-{size}/{patch_size}": ModelSpec(family, *widths, patch_size)
              for family in FAMILIES for size, widths in SIZES.items() for patch_size in (2, 4, 8)}
