"""Priors over codes out of SEDD's published folders and its training files, for `dlc.weights.load.load_prior`."""

import dataclasses

import torch

from diffusion.processes import create_process
from dlc.machine.records import SWITCH, TEXT, check_values, whole_number
from dlc.weights.foreign.layouts import read_layout
from dlc.weights.foreign.sedd import FREQUENCIES, outline
from dlc.weights.foreign.source import Source
from dlc.weights.meta import RunMeta
from prior import DLCPrior, DLCPrior_models, Rotary

# The keys of a published config.json that are read, and their kinds. All else follows from the tensors' shapes.
CONFIG = {
    "tokens": whole_number(1, 2**20),
    "graph.type": TEXT,
    "noise.type": TEXT,
    "model.length": whole_number(1, 2**20),
    "model.hidden_size": whole_number(1, 2**20),
    "model.n_blocks": whole_number(1, 2**10),
    "model.n_heads": whole_number(1, 2**10),
    "model.scale_by_sigma": SWITCH,
    "model.shared_embedding": SWITCH,
}
IN_SHAPES = {  # of those keys, the argument of DLCPrior that must agree
    "tokens": "V",
    "model.length": "L",
    "model.hidden_size": "hidden_size",
    "model.n_blocks": "depth",
    "model.shared_embedding": "shared_embedding",
}


def foreign_prior(named, ema: bool = True, flag: str = "checkpoint", ask: bool = True) -> tuple[DLCPrior, RunMeta]:
    """The prior that a path or hub id holds, in eval mode, and what is known of it.

    Args:
        named: a folder or hub id with SEDD's config.json and weights; a file of SEDD's training or of its weights.
        ema: the EMA weights rather than the raw ones, where there are both.
        flag: what the user gave the name to, for errors.
        ask: whether to ask the hub; see `dlc.weights.hub.fetch`.

    In the meta, model, process, weights and layout are always set. Raises ValueError, naming path and tensor or key,
    for what is no such prior, or is damaged.
    """
    source = read_layout(named, ema, flag, ask, prior=True)
    if not source.done:
        source.refuse("is not a prior over codes: it has no vocab_embed.embedding")
    config = published_config(source)
    arguments, model = outline(source.values, source.refuse, config.get("model.n_heads"))
    for key, argument in IN_SHAPES.items():
        if key in config and config[key] != arguments[argument]:
            source.refuse(
                f"says {key} {config[key]} in its config.json, while its tensors are of {arguments[argument]}"
            )
    model.scale_by_sigma = config.get("model.scale_by_sigma", True)  # True in all published configurations
    frequencies = Rotary(arguments["hidden_size"] // arguments["num_heads"]).inv_freq
    weights = {FREQUENCIES: frequencies, **source.values}
    # copied: a mapped file that another program overwrites would end this process
    model.load_state_dict({name: value.to(torch.float32, copy=True) for name, value in weights.items()}, assign=True)
    said = source.said if set(source.said) - {"from the hub"} else (*source.said, "state dict")
    process = create_process("masked", V=model.V)
    meta = dataclasses.replace(source.meta, model=size_name(arguments), process=process.config, layout=", ".join(said))
    return model.eval(), meta


def size_name(arguments: dict) -> str:
    """The name in DLCPrior_models, or for another size one such as DLCPrior-24x1024: depth and width."""
    size = arguments["hidden_size"], arguments["depth"], arguments["num_heads"]
    names = {(spec.hidden_size, spec.depth, spec.num_heads): name for name, spec in DLCPrior_models.items()}
    return names.get(size, f"DLCPrior-{size[1]}x{size[0]}")


def published_config(source: Source) -> dict:
    """Those values of a config.json that are read, nested keys with a dot: model.n_heads. {} for anything else.

    Raises ValueError, naming file and key, for one of another kind, and for another process than ours.
    """
    flat = {}
    for key, value in source.config.items():
        flat.update(
            {f"{key}.{inner}": one for inner, one in value.items()} if isinstance(value, dict) else {key: value}
        )
    config = {key: value for key, value in flat.items() if key in CONFIG and value is not None}
    where = source.config_path
    check_values(where, config, CONFIG)
    for key, wanted in (("graph.type", "absorb"), ("noise.type", "loglinear")):
        if config.get(key, wanted) != wanted:
            raise ValueError(f"{where}: {key} is {config[key][:40]!r}: only priors of the process {wanted!r} are read")
    return config
