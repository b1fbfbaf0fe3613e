"""Priors over codes of others: SEDD's names, which are ours, and its training files, whose EMA is a list."""

from functools import partial

import torch

from diffusion.process_table import create_process
from dlc.machine.records import differences
from dlc.weights.foreign.dits import check_classes, check_sizes
from dlc.weights.foreign.layouts import OF_SEDD, SHADOW, File, blocks_in
from dlc.weights.foreign.safe import check_tensors, differences_from
from prior import DLCPrior, DLCPrior_models, Rotary

TOKENS = "vocab_embed.embedding"
FREQUENCIES = "rotary_emb.inv_freq"
# What a published config.json has to say where it says anything; the sizes follow from the tensors' shapes.
PROCESS = {("graph", "type"): "absorb", ("noise", "type"): "loglinear"}


def under_our_names(file: File, tensors: dict) -> dict:
    """Tensors of SEDD's names; of its training files, the parameters that the list of EMA weights is of."""
    ema = file.tensors.get(SHADOW)
    if OF_SEDD in file.words:
        file.weights = "ema" if file.ema else "raw"
    if OF_SEDD not in file.words or not file.ema:
        return tensors
    with torch.device("meta"):
        wanted = dict(DLCPrior(**arguments_of(file, tensors)).named_parameters())
    if not isinstance(ema, list) or len(ema) != len(wanted):
        file.refuse(f"has no list of {len(wanted)} EMA tensors: give --no-ema to read the raw ones")
    ema = check_tensors(dict(zip(wanted, ema)), file.path)
    different = differences_from(wanted, ema)
    if different:
        file.refuse(f"has EMA weights in another order than its parameters: by that order, it {different}")
    return {**tensors, **ema}


def config_of(file: File, tensors: dict) -> dict:
    """What to build for a prior's tensors, {"family", "arguments", "process"}. Adds constant frequencies.

    Raises ValueError for tensors of no such prior, and for a config that says another size or process.
    """
    for (outer, key), wanted in PROCESS.items():
        said = file.config.get(outer)
        if isinstance(said, dict) and said.get(key, wanted) != wanted:
            file.refuse(f"says {outer}.{key} {str(said[key])[:40]!r}: only priors of the process {wanted!r} are read")
    arguments = arguments_of(file, tensors)
    tensors.setdefault(FREQUENCIES, Rotary(arguments["hidden_size"] // arguments["num_heads"]).inv_freq)
    if not file.config:
        file.words.append("taken to be told the noise level, as SEDD's priors are")
    process = create_process("masked", V=arguments["V"]).config
    return dict(family="DLCPrior", arguments=arguments, process=process)


def arguments_of(file: File, tensors: dict) -> dict:
    """DLCPrior's arguments, read off tensors' shapes; the number of heads may be in nothing but the config."""
    shape = partial(file.shape, tensors)
    said = file.config.get("model") if isinstance(file.config.get("model"), dict) else {}
    tokens, (L, hidden_size), depth = shape(TOKENS, 2, 3), shape("pos_embed", 2), blocks_in(tensors)
    found = dict(L=L, V=tokens[-2] - 1, hidden_size=hidden_size, depth=depth)
    found["cond_dim"] = shape("sigma_map.mlp.2.bias", 1)[0]
    if FREQUENCIES in tensors:  # one per pair of a head's channels
        pairs = shape(FREQUENCIES, 1)[0]
        found["num_heads"], rest = divmod(hidden_size, 2 * pairs) if pairs else (0, 1)
        if rest:
            file.refuse(f"is not a prior over codes: {FREQUENCIES} of {pairs} values does not fit width {hidden_size}")
    else:
        known = {(spec.hidden_size, spec.depth): spec.num_heads for spec in DLCPrior_models.values()}
        found["num_heads"] = said.get("n_heads") or known.get((hidden_size, depth))
        if found["num_heads"] is None:
            file.refuse(f"does not tell its number of heads: it has no {FREQUENCIES}, nor a config.json with n_heads")
    if "y_embedder.embedding_table.weight" in tensors:
        found["num_classes"] = shape("y_embedder.embedding_table.weight", 2)[0] - 1
        check_classes(file, found["num_classes"])
    check_sizes(file, "prior over codes", found)
    found.update(shared_embedding=len(tokens) == 2, scale_by_sigma=said.get("scale_by_sigma", True) is not False)
    names = dict(L="length", hidden_size="hidden_size", depth="n_blocks", num_heads="n_heads")
    names["shared_embedding"] = "shared_embedding"
    told = {ours: said.get(theirs) for ours, theirs in names.items()} | dict(V=file.config.get("tokens"))
    different = differences(told, {key: found[key] for key, value in told.items() if value is not None})
    if different:
        file.refuse(f"has a config.json that its tensors contradict: {different}")
    return found
