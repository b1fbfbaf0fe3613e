"""SEDD's layouts, in which priors over codes come: names of tensors, and training files whose EMA is a list."""

import re

import torch

from dlc.weights.foreign.folders import finished, with_kind
from dlc.weights.foreign.safe import check_tensors, differences_from, plain_name
from dlc.weights.foreign.source import Source
from prior import DLCPrior, DLCPrior_models

TOKENS = "vocab_embed.embedding"
FREQUENCIES = "rotary_emb.inv_freq"
LARGEST = 2**20  # of a size that is read off a shape
DEEPEST = 256  # blocks


def prior_arguments(values: dict, refuse, heads: int | None = None) -> dict:
    """DLCPrior's arguments, read off tensors' shapes; only the number of heads may be in nothing but the config.

    Args:
        refuse: called with what is wrong; raises ValueError.
    """

    def shape(name, *dims):
        if not isinstance(values.get(name), torch.Tensor) or values[name].ndim not in dims:
            refuse(f"is not a prior over codes: it has no {name} of {' or '.join(map(str, dims))} dimensions")
        return tuple(values[name].shape)

    tokens, (L, hidden_size) = shape(TOKENS, 2, 3), shape("pos_embed", 2)
    cond_dim = shape("sigma_map.mlp.2.bias", 1)[0]
    # not by the highest number, which may be any
    depth = len({name.split(".")[1] for name in values if re.match(r"blocks\.\d", str(name))})
    found = dict(L=L, V=tokens[-2] - 1, hidden_size=hidden_size, depth=depth, cond_dim=cond_dim)
    if FREQUENCIES in values:
        pairs = shape(FREQUENCIES, 1)[0]
        by_shape = hidden_size // (2 * pairs) if pairs else 0
        if 2 * pairs * by_shape != hidden_size:
            refuse(f"is not a prior over codes: {FREQUENCIES} of {pairs} values does not fit width {hidden_size}")
        if heads not in (None, by_shape):
            refuse(f"says {heads} heads in its config, while {FREQUENCIES} is of {by_shape}")
        heads = by_shape
    if heads is None:
        named = [spec for spec in DLCPrior_models.values() if (spec.hidden_size, spec.depth) == (hidden_size, depth)]
        heads = named[0].num_heads if named else None
    if heads is None:
        refuse(f"does not tell its number of heads: it has neither {FREQUENCIES} nor a config.json with model.n_heads")
    found["num_heads"] = heads
    if "y_embedder.embedding_table.weight" in values:
        found["num_classes"] = shape("y_embedder.embedding_table.weight", 2)[0] - 1
    if not all(1 <= size <= LARGEST for size in found.values()) or depth > DEEPEST or hidden_size % (2 * heads):
        refuse("is not a prior over codes: by its shapes, " + ", ".join(f"{key} is {found[key]}" for key in found))
    return dict(found, shared_embedding=len(tokens) == 2)


def outline(values: dict, refuse, heads: int | None = None) -> tuple[dict, DLCPrior]:
    """The arguments of the prior that values are of, and a prior of that size without memory for its tensors.

    Calls refuse, naming a tensor, if one is missing, unknown or of another shape.
    """
    arguments = prior_arguments(values, refuse, heads)
    with torch.device("meta"):
        model = DLCPrior(**arguments)
    different = differences_from(
        {name: tensor for name, tensor in model.state_dict().items() if name != FREQUENCIES},
        {name: tensor for name, tensor in values.items() if name != FREQUENCIES},  # a constant, which may be left out
    )
    if different:
        refuse(f"does not fit a prior over codes of its shapes: it {different}")
    return arguments, model


def read_sedd(source: Source) -> Source:
    """Tensors under SEDD's names, which are ours, perhaps as an attribute of another module."""
    (token_table, *others) = [str(name) for name in source.values if str(name).endswith(TOKENS)]
    prefix = token_table[: -len(TOKENS)]
    if others:
        source.refuse(f"holds two priors over codes, {token_table[:40]} and {others[0][:40]}")
    values = {str(name)[len(prefix) :]: value for name, value in source.values.items() if str(name).startswith(prefix)}
    said = [] if source.said else ["SEDD's names"]
    if not source.config:
        said.append("taken to be told the noise level, as SEDD's priors are")
    return finished(source.saying(*said), check_tensors(values, source.at))


def read_sedd_training(source: Source) -> Source:
    """{"model", "ema", "optimizer", "step"} of SEDD's training script: the EMA is a list in the parameters' order."""
    raw, ema = source.values.get("model"), source.values["ema"].get("shadow_params")
    if not isinstance(raw, dict) or not all(isinstance(name, str) for name in raw):
        source.refuse("has no dict of named tensors under 'model', which also tells the names of its EMA weights")
    values = raw = check_tensors({plain_name(name): value for name, value in raw.items()}, source.at)
    step = source.values.get("step")
    meta = with_kind(source, "ema" if source.ema else "raw")
    if type(step) is int and step >= 0:
        meta = type(meta)(**{**vars(meta), "step": step})
    if source.ema:
        _, model = outline(raw, source.refuse)
        wanted = dict(model.named_parameters())
        if not isinstance(ema, list) or not all(isinstance(tensor, torch.Tensor) for tensor in ema):
            source.refuse("has EMA weights that are no list of tensors: give --no-ema to read the raw ones")
        if len(ema) != len(wanted):
            source.refuse(
                f"has {len(ema)} EMA tensors for {len(wanted)} parameters: give --no-ema to read the raw ones"
            )
        values = {**raw, **check_tensors(dict(zip(wanted, ema)), source.at)}
        different = differences_from(wanted, {name: values[name] for name in wanted})
        if different:
            source.refuse(f"has EMA weights in another order than its parameters: by that order, it {different}")
    return finished(source.saying("training checkpoint of SEDD"), values, meta=meta)
