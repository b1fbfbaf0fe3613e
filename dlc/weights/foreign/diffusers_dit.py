"""diffusers' DiTTransformer2DModel and DiT: the names of their tensors, and what differs in their functions.

The two are one network but for two constants. diffusers spaces the 128 frequencies of the time embedding over 127
steps, DiT over 128; and its blocks' second norm has the eps of the configuration, 1e-5 by default, where DiT has 1e-6.
Weights that were trained in DiT and converted are right under DiT's constants, weights that were trained in diffusers
under its own; nothing in a folder tells which.
"""

import math
import re
from pathlib import Path

import torch

from dlc.weights.foreign.safe import shown
from models import TimestepEmbedder

DIFFUSERS_TIMES = ("dit", "diffusers")  # --diffusers-time
DIT_EPS, DIFFUSERS_EPS = 1e-6, 1e-5  # of each block's second norm
# Names of modules, ours and theirs: at the top, and in block N. Theirs has the embedders in every block.
TOP = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
EMBEDDERS = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}
# by which it is recognised
ANCHORS = ("pos_embed.proj.weight", "proj_out_2.weight", "transformer_blocks.0.norm1.linear.weight")
# what config.json may not have otherwise, though the tensors would be the same
FIXED = dict(
    norm_type="ada_norm_zero",
    activation_fn="gelu-approximate",
    norm_elementwise_affine=False,
    only_cross_attention=False,
    double_self_attention=False,
)
THIRDS = ("to_q", "to_k", "to_v")  # of attn.qkv


def from_diffusers(weights: dict, path: Path, num_classes: int | None = None) -> dict:
    """Tensors under diffusers' names, under ours; those with other names stay as they are.

    A code table (L, V+1, D) in the place of the labels' is a DiTSEM's. With num_classes, which our export records, the
    rows of the label table that it added between the last class and the null label are left out.

    Raises ValueError, naming path, where the
    blocks' copies of the embedders differ: such a model was trained in diffusers, and no DiT computes its function.
    """
    named, thirds = {}, {}
    top = {theirs: ours for ours, theirs in TOP.items()}
    block = {theirs: ours for ours, theirs in BLOCK.items()}
    embedders = {theirs: ours for ours, theirs in EMBEDDERS.items()}
    for key, value in weights.items():
        module, _, kind = key.rpartition(".")
        inner = re.fullmatch(r"transformer_blocks\.(0|[1-9]\d{0,3})\.(.+)", key, re.ASCII)
        if module in top:
            named[f"{top[module]}.{kind}"] = value
        elif not inner:
            named[key] = value
        else:
            number, (module, _, kind) = int(inner[1]), inner[2].rpartition(".")
            if kind == "embedding_table":  # a parameter of its own, as of a code table
                module, kind = inner[2], "weight"
            if module in embedders:
                name = f"{embedders[module]}.{kind}"
                first = named.setdefault(name, value)
                if first.dtype != value.dtype or not torch.equal(first, value):
                    raise ValueError(
                        f"{path}: the blocks have different copies of the time and label embedders ({shown(key)}), as "
                        "training in diffusers makes them; DiT has one for all blocks, and cannot compute this model"
                    )
            elif module.removeprefix("attn1.") in THIRDS:
                thirds.setdefault((number, kind), {})[module.removeprefix("attn1.")] = value
            else:
                named[f"blocks.{number}.{block.get(module, module)}.{kind}"] = value
    for (number, kind), parts in thirds.items():
        if parts.keys() != set(THIRDS) or len({part.shape for part in parts.values()}) > 1 or not parts["to_q"].ndim:
            raise ValueError(f"{path}: to_q, to_k and to_v of block {number} are not of one shape")
        named[f"blocks.{number}.attn.qkv.{kind}"] = torch.cat([parts[third] for third in THIRDS])
    table = named.get("y_embedder.embedding_table.weight")
    if table is not None and table.ndim == 3:
        named["sem_embedder.embedding_table"] = named.pop("y_embedder.embedding_table.weight")
    elif table is not None and type(num_classes) is int and 0 < num_classes < len(table):
        named["y_embedder.embedding_table.weight"] = table[: num_classes + 1]
    return named


def to_diffusers(weights: dict) -> dict:
    """A DiT's state dict under diffusers' names: pos_embed left out, the embedders in every block."""
    named, depth = {}, len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
    for key, value in weights.items():
        module, _, kind = key.rpartition(".")
        inner = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
        if module in TOP:
            named[f"{TOP[module]}.{kind}"] = value
        elif module in EMBEDDERS:
            for number in range(depth):
                named[f"transformer_blocks.{number}.{EMBEDDERS[module]}.{kind}"] = value.clone()
        elif inner and inner[2] == "attn.qkv":
            for third, part in zip(THIRDS, value.chunk(3)):
                named[f"transformer_blocks.{inner[1]}.attn1.{third}.{kind}"] = part.contiguous()
        elif inner:
            named[f"transformer_blocks.{inner[1]}.{BLOCK[inner[2]]}.{kind}"] = value
        else:
            assert key == "pos_embed", key
    return named


class DiffusersTimestepEmbedder(TimestepEmbedder):
    """DiT's time embedder with diffusers' frequencies: the last of the dim/2 is 1/max_period, not one step before."""

    @staticmethod
    def timestep_embedding(t, dim, max_period=10000):
        """Cosines then sines of t (N,) at dim/2 geometric frequencies from 1 to 1/max_period, (N, dim) float32."""
        steps = torch.arange(dim // 2, dtype=torch.float32, device=t.device)
        angles = t.float().unsqueeze(1) * torch.exp(-math.log(max_period) * steps / (dim // 2 - 1))
        return torch.cat([angles.cos(), angles.sin()], dim=1)


def use_diffusers_function(model, eps: float = DIFFUSERS_EPS):
    """Have a DiT compute what diffusers computes with the same weights. Returns the model."""
    embedder = model.t_embedder
    model.t_embedder = DiffusersTimestepEmbedder(embedder.mlp[0].out_features, embedder.mlp[0].in_features)
    model.t_embedder.mlp = embedder.mlp
    for block in model.blocks:
        block.norm2.eps = eps
    model.function = f"diffusers, eps {eps}"  # for its digest
    return model


def uses_diffusers_function(model) -> bool:
    return isinstance(getattr(model, "t_embedder", None), DiffusersTimestepEmbedder)
