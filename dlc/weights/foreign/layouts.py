"""Where foreign weights lie: from a local path to the tensors of one file, and what lies around them.

    file = open_weights("DiT-XL-2-256x256.pt", path, "model")      # file.tensors, file.config, file.words

A folder may be a pipeline of diffusers, the DLC project's checkpoint or run, or have one file of weights. A file may be
a training script's, with tensors, EMA and arguments in it.
"""

import argparse
import contextlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch

from dlc.machine.files import is_plain_name, read_json
from dlc.weights.foreign.safe import WEIGHTS_SUFFIXES, load_tensors, weights_in
from dlc.weights.hub import DLC_EMA, DLC_STATE, IN_PIPELINES

KINDS = {  # of networks
    "model": "a diffusion transformer (DiT, DiTSEM or DiTCONT)",
    "prior": "a prior over codes (SEDD)",
    "encoder": "an encoder of images",
    "vae": "a VAE",
}
FLAGS = dict(model="--ckpt", prior="--prior", encoder="--encoder", vae="--vae")  # that take them
# Folders that are often met in the place of weights, by a file in them.
OTHER_FOLDERS = {
    "adapter_config.json": "is a LoRA adapter: merge it into the model that it changes, and save that",
    "*lora*.safetensors": "is a LoRA adapter: merge it into the model that it changes, and save that",
    "zero_to_fp32.py": "is a DeepSpeed checkpoint: `python zero_to_fp32.py . OUT` in it writes whole weights",
    "*/*_model_states.pt": "is a DeepSpeed checkpoint: its zero_to_fp32.py, or DeepSpeed's, writes whole weights",
    ".metadata": "is a sharded checkpoint of torch (DCP): `python -m torch.distributed.checkpoint.format_utils "
    "dcp_to_torch FOLDER FILE` writes whole weights",
    "*/.metadata": "has sharded checkpoints of torch (DCP) in it: `accelerate merge-weights`, or `python -m "
    "torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE`, writes whole weights",
}
# Words in the names under which training scripts keep averaged weights, and the parts of a file that are not weights.
AVERAGED = {"ema", "average", "averaged", "averaging", "avg", "shadow", "swa", "polyak", "teacher", "moving", "ewma"}
# The names under which of several modules the meant one is.
USUAL = {"", "model.", "state_dict.", "state_dict.model.", "ema.", "ema.ema_model.", "model_ema.", "ema_model."}
NO_WEIGHTS = re.compile(r"args|config|hyper_parameters|opt|\w*(optim|scheduler|scaler|rng)\w*|loops")
TRAINING = "training checkpoint"  # the word for {"model", "ema", …}
OF_SEDD, SHADOW = f"{TRAINING} of SEDD", "ema.shadow_params"  # with a list of EMA weights
WRAPPERS = re.compile(r"(^|(?<=\.))(module|_orig_mod)\.")  # of DDP and of torch.compile
COUNTERS = {"n_averaged", "num_updates", "decay", "initted", "step", "updates"}  # beside averaged weights
DEEPEST, MOST = 6, 2**16  # dicts in dicts, and values in all of them


class OtherKind(ValueError):
    """The weights belong to another kind of network than the wanted one: `kind`."""

    def __init__(self, text: str, kind: str):
        super().__init__(text)
        self.kind = kind


@dataclass
class File:
    """Weights as they lie, and what was recognised so far."""

    named: object  # the path or hub id that the user gave, for errors
    path: Path  # the file of weights
    kind: str  # of network that is wanted, a key of KINDS
    ema: bool = True  # whether the EMA weights are wanted rather than the raw ones
    # by name, of dicts in dicts with dots, without wrappers of DDP and torch.compile: what the file holds
    tensors: dict = field(default_factory=dict, repr=False)
    config: dict = field(default_factory=dict)  # the JSON beside it
    arguments: dict = field(default_factory=dict)  # of the training script, where it keeps them
    words: list[str] = field(default_factory=list)  # what was recognised
    weights: str = "as in the file"  # or "ema" or "raw"
    step: int | None = None  # of the training
    vae: str | None = None  # of a pipeline
    process: str | None = None  # what the model was trained on, in diffusion.process_table, where it is known
    noted: dict = field(default_factory=dict)  # what else is known of the weights, for their meta

    @property
    def said(self) -> str:
        """What was recognised, in one line."""
        return ", ".join(filter(None, self.words))

    def refuse(self, fault: str, error: type = ValueError, *more) -> NoReturn:
        """Raise an error, a ValueError, with the name and a fault."""
        raise error(f"{self.named} {fault}", *more)

    def shape(self, tensors: dict, name: str, *ndims: int) -> tuple[int, ...]:
        """The shape of a tensor, which is refused if it is missing or has another number of dimensions."""
        if name not in tensors or tensors[name].ndim not in ndims:
            self.refuse(f"is not {KINDS[self.kind]}: it has no {name} of {' or '.join(map(str, ndims))} dimensions")
        return tuple(tensors[name].shape)

    def under(self, anchor: str) -> dict | None:
        """The tensors of the module that has a tensor of this name, without the names of what it is an attribute of.

        Of several, the EMA's or a teacher's is taken if EMA weights are wanted, else the raw one; of more of these the
        one under a name of USUAL. None if there is none. Raises ValueError where the file says that it has the wanted
        one, in a form that is not read; and where several models or priors may be meant.
        """
        found = sorted(name[: -len(anchor)] for name in self.tensors if f".{name}".endswith(f".{anchor}"))
        if not found:
            return None
        averaged = [prefix for prefix in found if is_averaged(prefix)]
        raw = [prefix for prefix in found if prefix not in averaged]
        if self.kind in ("model", "prior") and not (averaged if self.ema else raw):
            self.refuse_the_other(found[0])
        prefixes = (averaged or raw) if self.ema else (raw or averaged)
        usual = [prefix for prefix in prefixes if prefix in USUAL]
        if self.kind in ("model", "prior") and len(prefixes) > 1 and len(usual) != 1:
            names = ", ".join(f"{prefix[:40]}*" for prefix in prefixes[:4])
            self.refuse(f"holds several models, {names}: save the state dict of the one that is meant alone")
        prefix = (usual or prefixes)[0]
        if self.weights == "as in the file" and (averaged or TRAINING in self.words):
            self.weights = "ema" if prefix in averaged else "raw"
        if prefix not in ("", "model.", "ema.") and self.kind != "encoder":  # whose backbone is a part of something
            self.words.append(f"its {prefix[:40]}*")
        return {
            name[len(prefix) :]: value
            for name, value in self.tensors.items()
            if name.startswith(prefix) and not (prefix in averaged and name[len(prefix) :] in COUNTERS)
        }

    def refuse_the_other(self, prefix: str) -> None:
        """Refuse a file that has EMA weights alone, or raw ones beside EMA weights that are not read, or raw ones alone
        where a training script of DiT's saves both. Other files do not say what they have, and are not refused."""
        if not self.ema:
            self.refuse(f"has no raw weights, only {prefix}*: leave out --no-ema to sample from those")
        kept = [name for name, value in self.tensors.items() if is_averaged(name) and holds_tensors(value)]
        if kept and not (self.kind == "prior" and SHADOW in kept):
            self.refuse(
                f"keeps EMA weights as {kept[0][:60]!r}, in a form that is not read: save them as a dict of named "
                "tensors, or give --no-ema to sample from the raw ones"
            )
        if self.kind == "model" and TRAINING in self.words:
            if "ema" not in self.tensors:
                self.refuse("has no ema weights, only 'model': give --no-ema to sample from those")
            self.words.append("whose 'ema' is empty")


def blocks_in(tensors: dict) -> int:
    """The number of blocks: not the highest in a name, which may be any."""
    return len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})


def is_averaged(name: str) -> bool:
    """Whether a word of a name says that weights are averaged; words are told apart by dots, _ and capitals."""
    words = {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}
    return bool(words & AVERAGED) and not words & {"no", "non", "without"}  # as in diffusers' variant non_ema


def holds_tensors(value: object) -> bool:
    """Whether a value is a tensor with dimensions, or a list of such."""
    if isinstance(value, (list, tuple)):
        return any(map(holds_tensors, value[:3]))
    return isinstance(value, torch.Tensor) and value.ndim > 0


def open_weights(named: object, path: Path, kind: str, ema: bool = True) -> File:
    """The file of weights at a path. Raises ValueError, with the user's name of it, if none can be read."""
    file = File(named, path, kind, ema, words=[] if str(named) == str(path) else ["from the hub"])
    if file.path.is_dir():
        enter(file)
    beside = file.path.with_name("config.json")
    # a file that is alone may lie beside a config.json of anything
    file.config = read_json(beside) if beside.is_file() else {}
    shards = [file.path.name]
    if file.path.suffix == ".json":
        places = read_json(file.path).get("weight_map")
        if not isinstance(places, dict) or not places or not all(map(is_plain_name, places.values())):
            raise ValueError(f"{file.path} is no index of shards: its weight_map is not of names of files beside it")
        shards = sorted(set(places.values()))
        file.words.append(f"{len(shards)} shards")
    file.words.append(".fp16." in file.path.name and "fp16 variant")
    for name in shards:
        file.tensors |= load_tensors(file.path.with_name(name))
    unpack(file)
    return file


def enter(file: File) -> None:
    """Go from a folder to the file of weights in it."""
    runs = dlc_checkpoints(file.path)
    if runs:
        file.path = runs[-1]
        file.words.append(f"newest checkpoint of a DLC run, {file.path.name}")
        with contextlib.suppress(ValueError, OSError):  # it only describes the run, and may be missing
            arguments = read_json(file.path.parent.parent / "metadata.json").get("args")
            file.arguments = arguments if isinstance(arguments, dict) else {}
    names, inside = entries_of(file.path), IN_PIPELINES[file.kind]
    if "model_index.json" in names:
        index, folder = read_json(file.path / "model_index.json"), file.path / inside
        if not inside or not folder.is_dir():
            file.refuse(f"is a diffusers pipeline without {inside or 'such weights'}/")
        words = index.get("_class_name")
        file.words.append(f"diffusers pipeline ({str(words[-1] if isinstance(words, list) and words else words)[:40]})")
        # the VAE of its latents; of a hub id it is not fetched here
        vae = file.path / "vae"
        file.vae = str(vae) if vae.is_dir() else str(file.named) if "vae" in index else None
        file.path, names = folder, entries_of(folder)
    averaged = {name for name in names if name.endswith(WEIGHTS_SUFFIXES) and is_averaged(name)}
    if averaged and file.kind in ("model", "prior"):  # beside the raw ones
        raw = weights_in(names - averaged)
        names = averaged if file.ema or not raw else names - averaged
        file.weights = "ema" if names == averaged else "raw"
    name = weights_in(names)
    if DLC_EMA in names or (DLC_STATE in names and name):  # accelerate's folder of the DLC project
        name = DLC_EMA if file.ema else name
        if name not in names:
            words = "EMA weights (custom_checkpoint_0.pkl): give --no-ema to read the raw ones"
            words = words if file.ema else "raw weights (model.safetensors): leave out --no-ema"
            file.refuse(f"has no {words}")
        file.weights = "ema" if file.ema else "raw"
        file.words.append("accelerate checkpoint of the DLC project")
    other = next((words for pattern, words in OTHER_FOLDERS.items() if any(file.path.glob(pattern))), None)
    if name is None or other and name.startswith(("adapter", "pytorch_lora")):
        others = sorted(name for name in names if name.endswith(WEIGHTS_SUFFIXES))
        several = others and f"has several files of weights: name one of {', '.join(others[:4])}"
        file.refuse(other or several or "is a folder of no layout that is known: it has no file of weights")
    file.path = file.path / name


def entries_of(folder: Path) -> set[str]:
    """The names in a folder, but for VA-VAE's statistics of latents."""
    return {entry.name for entry in folder.iterdir()} - {"latents_stats.pt"}


def dlc_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint_N/ folders of a run of the DLC project, by N."""
    places = ("checkpoints/checkpoints/checkpoint_*", "checkpoints/checkpoint_*", "checkpoint_*")
    found = [path for place in places for path in folder.glob(place)]
    found = [path for path in found if re.fullmatch(r"checkpoint_\d{1,9}", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.rpartition("_")[2]))


def unpack(file: File) -> None:
    """Go from a training script's file to the values in it by name; its arguments and step are noted."""
    values = file.tensors
    kept = [values.get(key) for key in ("args", "config", "hyper_parameters")]
    kept = [vars(one) if isinstance(one, argparse.Namespace) else one for one in kept]
    file.arguments = next((one for one in kept if isinstance(one, dict)), file.arguments)
    for key in ("step", "global_step"):
        if type(values.get(key)) is int and values[key] >= 0:
            file.step = values[key]
    if {"model", "ema"} & values.keys():  # as of DiT and fast-DiT
        of_sedd = isinstance(values.get("ema"), dict) and "shadow_params" in values["ema"]
        file.words.append(OF_SEDD if of_sedd else TRAINING)
        if re.fullmatch(r"\d{7,12}", file.path.stem, re.ASCII):
            file.step = int(file.path.stem)
    if "current_model_state" in values:  # of Lightning's WeightAveraging, which saves the averaged ones as the model's
        values = {f"averaged {key}" if key == "state_dict" else key: value for key, value in values.items()}
    named = list(itertools.islice(flattened(values), MOST + 1))
    file.tensors = dict(named)
    if len(named) > MOST:
        file.refuse(f"holds more than {MOST:,} values")
    if len(file.tensors) < len(named):
        file.refuse("holds one name twice, with and without module. or _orig_mod. before it")


def flattened(values: dict, depth: int = 0) -> Iterator[tuple[str, object]]:
    """Names with dots, without wrappers, and values of dicts in dicts, except for optimizers and arguments."""
    for key, value in values.items():
        if not isinstance(value, torch.Tensor) and NO_WEIGHTS.fullmatch(str(key)):
            value = averaged_in(value)
        inner = flattened(value, depth + 1) if isinstance(value, dict) and depth < DEEPEST else [("", value)]
        yield from ((WRAPPERS.sub("", f"{key}.{name}".rstrip(".")), one) for name, one in inner)


def averaged_in(state: object) -> dict:
    """Of an optimizer's state, or a list of such, what its names say to be averaged weights, as NeMo keeps them."""
    if isinstance(state, (list, tuple)):
        return {str(number): averaged_in(one) for number, one in enumerate(state)}
    named = {str(name): value for name, value in state.items()} if isinstance(state, dict) else {}
    return {
        name: value  # a moment of Adam's is no weight
        for name, value in named.items()
        if is_averaged(name) and not name.startswith("exp_avg") and isinstance(value, (dict, list, tuple))
    }
