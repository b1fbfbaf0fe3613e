"""Where foreign weights lie: from a path or hub id to the tensors of one file, and what lies around them.

    file = open_weights("DiT-XL-2-256x256.pt", "model")            # file.tensors, file.config, file.words

A folder may be a pipeline of diffusers, the DLC project's checkpoint or run, or have one file of weights. A file may be
a training script's, with tensors, EMA and arguments in it.
"""

import argparse
import contextlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from dlc.machine.files import read_json
from dlc.weights.foreign.safe import WEIGHTS_SUFFIXES, hub_patterns, plain_name, read_file, weights_in
from dlc.weights.hub import fetch, is_id

KINDS = {  # of networks
    "model": "a diffusion transformer (DiT, DiTSEM or DiTCONT)",
    "prior": "a prior over codes (SEDD)",
    "encoder": "an encoder of images",
    "vae": "a VAE",
    "other": "another kind of diffusion model",
}
FLAGS = dict(model="--ckpt", prior="--prior", encoder="--encoder", vae="--vae")  # that take them
DLC_EMA, DLC_STATE = "custom_checkpoint_0.pkl", "random_states_0.pkl"  # of accelerate's folders
IN_PIPELINES = dict(model="transformer", vae="vae", prior="", encoder="")  # the folder of such weights
# What is fetched beside weights: small files, and the EMA of our checkpoints and of the DLC project's.
BESIDE = ("*.json", "*/*.json", "ema.safetensors", DLC_EMA, DLC_STATE)


class OtherKind(ValueError):
    """The weights belong to another kind of network than the wanted one: `kind`."""

    def __init__(self, text: str, kind: str):
        super().__init__(text)
        self.kind = kind


class NoRawWeights(ValueError):
    """A checkpoint has EMA weights alone."""


@dataclass
class File:
    """Weights as they lie.

    named: the path or hub id that the user gave, for errors.
    path: the file of weights.
    kind: of network that is wanted, a key of KINDS.
    ema: whether the EMA weights are wanted rather than the raw ones.
    tensors: what the file holds, tensors by name, without the wrappers of DDP and torch.compile.
    config: the JSON beside it, or {}.
    arguments: those of the training script, where it keeps them.
    words: what was recognised so far.
    weights: "ema", "raw" or "as in the file".
    step: of the training, if it is known.
    shadow: EMA weights as a list in the order of the parameters, as SEDD's training keeps them.
    vae: the VAE of a pipeline.
    noted: what else is known of the weights, for their meta.
    """

    named: object
    path: Path
    kind: str
    ema: bool = True
    tensors: dict = field(default_factory=dict, repr=False)
    config: dict = field(default_factory=dict)
    arguments: dict = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    weights: str = "as in the file"
    step: int | None = None
    shadow: list | None = field(default=None, repr=False)
    vae: str | None = None
    noted: dict = field(default_factory=dict)

    def refuse(self, fault: str, error: type = ValueError, *more) -> NoReturn:
        """Raise an error, a ValueError, with the name and a fault."""
        raise error(f"{self.named} {fault}", *more)

    def refuse_other(self, kind: str) -> NoReturn:
        """Raise OtherKind: the weights are of that kind."""
        takes = f", which {FLAGS[kind]} takes" if kind in FLAGS else ""
        self.refuse(f"is {KINDS[kind]}{takes}: wanted {KINDS[self.kind]}", OtherKind, kind)

    def under(self, anchor: str) -> dict | None:
        """The tensors of the module that has a tensor of this name, without the names of what it is an attribute of.

        Of several, the EMA's or a teacher's is taken if EMA weights are wanted. None if there is none.
        """
        found = [str(name)[: -len(anchor)] for name in self.tensors if f".{name}".endswith(f".{anchor}")]
        if not found:
            return None
        averaged = [prefix for prefix in found if "ema" in prefix or "teacher" in prefix]
        raw = [prefix for prefix in found if prefix not in averaged]
        prefix = min((averaged or raw) if self.ema else (raw or averaged))
        if prefix and self.weights == "as in the file" and (len(found) > 1 or "ema" in prefix):
            self.weights = "ema" if prefix in averaged else "raw"
        if prefix and self.kind != "encoder":  # whose backbone is a part of something
            self.words.append(f"its {prefix[:40]}*")
        return {name[len(prefix) :]: value for name, value in self.tensors.items() if str(name).startswith(prefix)}


def locate(named, kind: str, flag: str = "checkpoint", ask: bool = True) -> Path:
    """The local path of a name; of a hub id, the folder of its weights in the hub's cache. See `hub.fetch`."""
    inside = [f"{folder}/" for folder in (IN_PIPELINES[kind],) if folder]
    wanted = (*(pattern for folder in inside for pattern in hub_patterns(folder)), *hub_patterns())
    wanted += tuple(f"*{suffix}" for suffix in WEIGHTS_SUFFIXES)
    try:
        return fetch(named, [wanted], BESIDE, flag, ask=ask)
    except ValueError as error:  # which may name all alternatives
        raise ValueError(str(error).replace(" or ".join(wanted), "file of weights")) from None


def open_weights(named, kind: str, ema: bool = True, flag: str = "checkpoint", ask: bool = True) -> File:
    """The file of weights that a name stands for. Raises ValueError, naming it, if there is none that can be read."""
    file = File(named, locate(named, kind, flag, ask), kind, ema, words=["from the hub"] if is_id(named) else [])
    if file.path.is_dir():
        enter(file)
    beside = file.path.with_name("config.json")
    # a file that is alone may lie beside a config.json of anything
    file.config = read_json(beside) if beside.is_file() else {}
    file.tensors, words = read_file(file.path)
    file.words += filter(None, [words])
    unpack(file)
    return file


def enter(file: File) -> None:
    """Go from a folder to the file of weights in it."""
    runs = dlc_checkpoints(file.path)
    if runs:
        file.path = runs[-1]
        file.words.append(f"newest checkpoint of a DLC run, {file.path.name}")
        with contextlib.suppress(ValueError):  # it only describes the run, and may be missing
            arguments = read_json(file.path.parent.parent / "metadata.json").get("args")
            file.arguments = arguments if isinstance(arguments, dict) else {}
    names, inside = names_in(file.path), IN_PIPELINES[file.kind]
    if "model_index.json" in names:
        index, folder = read_json(file.path / "model_index.json"), file.path / inside
        if not inside or not folder.is_dir():
            file.refuse(f"is a diffusers pipeline without {inside or 'such weights'}/")
        words = index.get("_class_name")
        file.words.append(f"diffusers pipeline ({str(words[-1] if isinstance(words, list) and words else words)[:40]})")
        # the VAE of its latents; of a hub id it is not fetched here
        vae = file.path / "vae"
        file.vae = str(vae) if vae.is_dir() else str(file.named) if "vae" in index else None
        file.path, names = folder, names_in(folder)
    name = weights_in(names)
    if DLC_EMA in names or (DLC_STATE in names and name):  # accelerate's folder of the DLC project
        name = DLC_EMA if file.ema else name
        if name not in names:
            words = "EMA weights (custom_checkpoint_0.pkl): give --no-ema to read the raw ones"
            words = words if file.ema else "raw weights (model.safetensors): leave out --no-ema"
            file.refuse(f"has no {words}", ValueError if file.ema else NoRawWeights)
        file.weights = "ema" if file.ema else "raw"
        file.words.append("accelerate checkpoint of the DLC project")
    if name is None:
        file.refuse("is a folder of no layout that is known: it has no model_index.json and no file of weights")
    file.path = file.path / name


def names_in(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()} - {"latents_stats.pt"}  # which VA-VAE has beside its weights


def dlc_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint_N/ folders of a run of the DLC project, by N."""
    places = ("checkpoints/checkpoints/checkpoint_*", "checkpoints/checkpoint_*", "checkpoint_*")
    found = [path for place in places for path in folder.glob(place)]
    found = [path for path in found if re.fullmatch(r"checkpoint_\d{1,9}", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.rpartition("_")[2]))


def unpack(file: File) -> None:
    """Go from a training script's file to the tensors in it; DDP's and torch.compile's wrappers are left out."""
    values = file.tensors
    for key in ("args", "config", "hyper_parameters"):
        if isinstance(values.get(key), argparse.Namespace | dict):
            file.arguments = values[key] if isinstance(values[key], dict) else vars(values[key])
            break
    ema = values.get("ema")
    if isinstance(ema, dict) and "shadow_params" in ema:  # SEDD's
        if file.kind != "prior":
            file.refuse_other("prior")
        file.tensors, step = values.get("model"), values.get("step")
        file.step = step if type(step) is int and step >= 0 else None
        file.shadow = ema["shadow_params"] if file.ema else None
        file.weights = "ema" if file.ema else "raw"
        file.words.append("training checkpoint of SEDD")
    elif "teacher" in values:
        file.tensors = values["teacher"]
    elif {"model", "ema"} & values.keys():
        unpack_training(file, values)
    elif "state_dict" in values:
        file.tensors = values["state_dict"]
        file.words.append("state_dict of a training checkpoint")
    if not isinstance(file.tensors, dict):
        raise ValueError(f"{file.path} does not hold a dict of named tensors")
    plain = {plain_name(key): value for key, value in file.tensors.items() if isinstance(key, str)}
    if len(plain) < len(file.tensors):
        file.refuse("holds names that are no text, or one name twice, with and without module. or _orig_mod. before it")
    file.tensors = plain


def unpack_training(file: File, values: dict) -> None:
    """{"model": …, "ema": …, "opt": …, "args": …}, as the training scripts of DiT, fast-DiT and SiT save it."""
    wanted, other = ("ema", "model") if file.ema else ("model", "ema")
    words, name = "training checkpoint", wanted
    if values.get(wanted) is None and isinstance(values.get(other), dict):
        if wanted in values:
            words, name = f"training checkpoint whose {wanted!r} is empty", other
        elif file.kind != "model":
            name = other
    if values.get(name) is None:
        file.refuse(
            f"has no {'ema' if file.ema else 'raw'} weights, only {other!r}: "
            f"{'give --no-ema' if file.ema else 'leave out --no-ema'} to sample from those",
            ValueError if file.ema else NoRawWeights,
        )
    file.tensors, file.weights = values[name], "ema" if name == "ema" else "raw"
    file.words.append(words)
    if re.fullmatch(r"\d{7,12}", file.path.stem, re.ASCII):
        file.step = int(file.path.stem)
