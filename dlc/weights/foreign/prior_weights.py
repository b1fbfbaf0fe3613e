"""Priors over codes out of files: our runs' checkpoints, SEDD's published folders, and its training files.

model, meta = load_prior("results_prior/checkpoints/0050000")
model, meta = load_prior("lavoies/DLC_SEDD_L512")
diffusion = diffusion_of(meta)
"""

import dataclasses

import torch

from diffusion.masked import MaskedDiffusion
from dlc.machine.records import SWITCH, TEXT, check_values, whole_number
from dlc.weights.foreign.layouts import read_layout
from dlc.weights.foreign.sedd import FREQUENCIES, outline
from dlc.weights.foreign.source import Source
from dlc.weights.load import with_layout
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


def load_prior(named, ema: bool = True, flag: str = "checkpoint", ask: bool = True) -> tuple[DLCPrior, RunMeta]:
    """The prior that a path or hub id holds, in eval mode, and what is known of it.

    Args:
        named: a checkpoint or a run of train_prior.py; a folder or hub id with SEDD's config.json and weights; a file
            of SEDD's training or of its weights.
        ema: the EMA weights rather than the raw ones, where there are both.
        flag: what the user gave the name to, for errors.
        ask: whether to ask the hub; see `dlc.weights.hub.fetch`.

    In the meta, model, L, V, num_classes, shared_embedding, scale_by_sigma, time_conditioning, weights and layout are
    always set. Raises ValueError, naming path and tensor or key, for what is no such prior, or is damaged.
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
    recorded = source.meta
    model.scale_by_sigma = recorded.scale_by_sigma
    if model.scale_by_sigma is None:
        model.scale_by_sigma = config.get("model.scale_by_sigma", True)  # True in all published configurations
    frequencies = Rotary(arguments["hidden_size"] // arguments["num_heads"]).inv_freq
    weights = {FREQUENCIES: frequencies, **source.values}
    # copied: a mapped file that another program overwrites would end this process
    model.load_state_dict({name: value.to(torch.float32, copy=True) for name, value in weights.items()}, assign=True)
    told = recorded.time_conditioning
    meta = dataclasses.replace(
        with_layout(source),
        model=recorded.model or size_name(arguments),
        **{key: arguments.get(key) for key in ("L", "V", "num_classes", "shared_embedding")},
        scale_by_sigma=model.scale_by_sigma,
        time_conditioning=True if told is None else told,
    )
    return model.eval(), meta


def diffusion_of(meta: RunMeta) -> MaskedDiffusion:
    """The process that a prior was trained on, by the meta of `load_prior`."""
    return MaskedDiffusion(
        meta.V,
        masking=meta.masking or "independent",
        time_conditioning=meta.time_conditioning,
        score_entropy=bool(meta.score_entropy),
    )


def describe_prior(model: DLCPrior, meta: RunMeta) -> str:
    """What a prior is, in words, beside its name."""
    tables = "one table for all positions" if model.shared_embedding else "a table per position"
    classes = f"{model.num_classes} classes" if model.num_classes else "no classes"
    told = "told the noise level" if meta.time_conditioning else "not told the noise level"
    return f"prior over codes of L {model.L}, V {model.V}, {tables}, {classes}, {told}"


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
