"""SiT's and REPA's models: DiT's network and names, which predict a velocity; read as models of `diffusion.flow`.

REPA's are that already. SiT's (Ma et al. 2024, arXiv 2401.08740) count time the other way: its t is 1 - t, and its
velocity -v. Both are undone in the weights, once, so that nothing else need know: the time's first layer is linear in
cosines and sines of t, which are linear in those of 1 - t, and the last layer is negated. The half of SiT's channels
that its loss leaves out goes.
"""

import math
import re

import torch

from dlc.weights.foreign.layouts import File
from models import TimestepEmbedder

PROCESS = "flow"  # in diffusion.process_table, with the arguments' defaults
TIME, LAST = "t_embedder.mlp.0.weight", "final_layer.linear"
PATHS, PREDICTIONS = ("linear",), ("velocity", "v")  # of SiT and REPA in training, in small letters
EITHER = "SiT or REPA"


def recognised(file: File, tensors: dict) -> str | None:
    """Whose a model is where the file's arguments, tensors or name say so: "SiT", "REPA" or EITHER; else None.

    Raises ValueError for one that was trained on another path, or to predict something else.
    """
    arguments, whose = file.arguments, None
    names = " ".join(map(str, [file.path.name, str(file.named).rpartition("/")[2], file.config.get("_class_name")]))
    of_repa = {"enc_type", "proj_coeff"} & arguments.keys() or arguments.get("prediction") == "v"
    if of_repa or any(str(name).startswith("projectors.") for name in tensors):
        whose = "REPA"
    elif {"path_type", "prediction"} & arguments.keys():
        whose = "SiT"
    elif re.search(r"\bREPA\b|\bSiT(?![a-z])", names):
        whose = EITHER
    for key, known in (("path_type", PATHS), ("prediction", PREDICTIONS)) if whose else ():
        if str(arguments.get(key, known[0])).lower() not in known:
            file.refuse(f"is a {whose} model of {key} {str(arguments[key])[:40]!r}: only a {known[0]} one is read")
    return whose


def as_flow(file: File, tensors: dict, whose: str | None) -> str:
    """Change tensors under our names, in place, to those of a model of our process, which is noted in the file.

    whose: as by `recognised`; where that does not tell, a model of twice the latents' channels is SiT's. Returns words.
    """
    _, channels, *patch = file.shape(tensors, "x_embedder.proj.weight", 4)
    outputs = {file.shape(tensors, f"{LAST}.{kind}", ndim)[0] for kind, ndim in (("weight", 2), ("bias", 1))}
    _, columns = file.shape(tensors, TIME, 2)
    if columns % 2:
        file.refuse(f"is no model of SiT's or REPA's: {TIME} has {columns} columns, wanted cosines and sines")
    weight, bias, time, cells = tensors[f"{LAST}.weight"], tensors[f"{LAST}.bias"], tensors[TIME], math.prod(patch)
    doubled = channels * cells > 0 and outputs == {2 * channels * cells}
    file.process = PROCESS
    if whose == "REPA" or whose != "SiT" and not doubled:
        return "velocity, in REPA's time"
    if doubled:
        weight, bias = (
            value.unflatten(0, (cells, 2 * channels))[:, :channels].flatten(0, 1) for value in (weight, bias)
        )
    tensors[f"{LAST}.weight"], tensors[f"{LAST}.bias"] = -weight, -bias
    cosine, sine = TimestepEmbedder.timestep_embedding(torch.ones(1), columns)[0].double().chunk(2)
    of_cosines, of_sines = time.double().chunk(2, dim=1)  # weights; cos(w - wt) = cos w cos wt + sin w sin wt
    turned = torch.cat([of_cosines * cosine + of_sines * sine, of_cosines * sine - of_sines * cosine], dim=1)
    tensors[TIME] = turned.float()
    return "SiT's velocity, its time and sign turned round" + (" and its unused channels left out" if doubled else "")
