"""What is known of weights while `dlc.checkpoints.layouts` reads them: a path, then a file, then its tensors."""

import argparse
import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

from dlc.checkpoints.meta import RunMeta, json_keys
from dlc.checkpoints.tensor_files import LARGEST_INDEX, load_tensors
from dlc.disk import is_plain_name, read_json

# Of a folder the first of these is read: weights whole before shards, full precision before half.
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
ENDS = {  # of a file, and of what is fetched of the hub for it
    ".safetensors": ".safetensors",
    ".safetensors.index.json": "-*-of-*.safetensors",
    ".bin": ".bin",
    ".bin.index.json": "-*-of-*.bin",
    ".fp16.safetensors": ".fp16.safetensors",
    ".safetensors.index.fp16.json": ".fp16-*-of-*.safetensors",
    ".fp16.bin": ".fp16.bin",
    ".bin.index.fp16.json": ".fp16-*-of-*.bin",
}
WEIGHTS_FILES = tuple(stem + end for end in ENDS for stem in STEMS)
WEIGHTS_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
# The first alternative that a repository on the hub has, and small files.
ON_HUB = tuple(
    f"{folder}{stem}{end}" for folder in ("transformer/", "") for end in ENDS.values() for stem in STEMS
) + tuple(f"*{suffix}" for suffix in WEIGHTS_SUFFIXES)
SMALL_FILES = ("*.json", "transformer/*.json")


class AnEncoder(ValueError):
    """The weights are of an encoder of images; see `dlc.encoder_layouts`."""


class APrior(ValueError):
    """The weights are of a prior over codes; see `dlc.checkpoints.prior_weights`."""


class AVAE(ValueError):
    """The weights are of a VAE; see `dlc.vae_layouts`."""


@dataclass(frozen=True)
class Source:
    """Weights on their way from a path to tensors under our names. Each layout takes one and gives the next.

    named: the path or hub id that the user gave, for errors.
    at: the folder or file that is looked at.
    ema: whether the EMA weights are wanted rather than the raw ones.
    values: what the file holds, once it is read: tensors by name, or a training script's dict around them.
    config: of a folder, its config.json.
    meta: what is recorded of the run.
    said: what was recognised so far, in words.
    is_eps: whether it is known that the weights predict eps, rather than, as SiT's do, a velocity.
    prior: whether a prior over codes is wanted, rather than a diffusion transformer.
    in_diffusers: whether they came in diffusers' layout, which leaves their function open.
    done: whether values are a model's tensors under our names.
    """

    named: object
    at: Path
    ema: bool = True
    values: dict | None = None
    config: dict = field(default_factory=dict)
    meta: RunMeta = field(default_factory=RunMeta)
    said: tuple[str, ...] = ()
    is_eps: bool = False
    prior: bool = False
    in_diffusers: bool = False
    done: bool = False

    @cached_property
    def files(self) -> frozenset[str]:
        """The names of the entries of a folder; of anything else there are none."""
        if self.values is not None or not self.at.is_dir():
            return frozenset()
        return frozenset(entry.name for entry in self.at.iterdir())

    @cached_property
    def arguments(self) -> dict:
        """The arguments of the training script that a file keeps beside its weights."""
        values = self.values or {}
        for key in ("args", "config", "hyper_parameters"):
            if isinstance(values.get(key), argparse.Namespace):
                return vars(values[key])
            if isinstance(values.get(key), dict):
                return values[key]
        return {}

    def has(self, *names) -> bool:
        """Whether values have tensors of all these names."""
        return self.values is not None and all(isinstance(self.values.get(name), torch.Tensor) for name in names)

    def any_name(self, pattern: str) -> bool:
        """Whether values have a name that the pattern is found in."""
        return self.values is not None and any(
            isinstance(name, str) and re.search(pattern, name) for name in self.values
        )

    def saying(self, *words: str, **changes) -> "Source":
        """The next source: with these changes, and words for what was recognised."""
        return replace(self, said=(*self.said, *words), **changes)

    def refuse(self, fault: str, error: type = ValueError):
        """Raise an error, a ValueError, with the path and a fault."""
        raise error(f"{self.named} {fault}")


def weights_in(files) -> str | None:
    """The name of the file of weights to read of a folder: one of WEIGHTS_FILES, or the only one there; or None."""
    others = [name for name in files if name.endswith(WEIGHTS_SUFFIXES)]
    return next((name for name in WEIGHTS_FILES if name in files), others[0] if len(others) == 1 else None)


def read_file(path: Path) -> tuple[dict, str]:
    """What a file of weights, or an index of shards, holds; and words for shards and variants, or ""."""
    if is_index(path):
        values = read_shards(path)
        words = f"{len(set(read_json(path)['weight_map'].values()))} shards"
    else:
        values, words = load_tensors(path), ""
    return values, ", ".join(filter(None, [words, "fp16 variant" if ".fp16." in path.name else ""]))


def is_index(path: Path) -> bool:
    """Whether a file is the JSON index of shards, by its first bytes."""
    if not path.is_file() or path.stat().st_size > LARGEST_INDEX:
        return False
    with open(path, "rb") as file:
        start = file.read(64)
    # a .safetensors begins with the length of its header, whose first bytes are no text
    return start.lstrip()[:1] == b"{" and b"\0" not in start


def read_shards(path: Path) -> dict:
    """The tensors that an index names, out of the files beside it. Raises ValueError naming index and tensor."""
    names = read_json(path).get("weight_map")
    if not isinstance(names, dict) or not names or not all(map(is_plain_name, names.values())):
        raise ValueError(f"{path} is no index of shards: its weight_map is not of names of files beside it")
    shards = {name: load_tensors(path.with_name(name)) for name in sorted(set(names.values()))}
    lacking = next((key for key, name in names.items() if key not in shards[name]), None)
    if lacking is not None:
        raise ValueError(f"{path} says that {names[lacking]} has {lacking[:80]!r}, which it does not")
    return {key: shards[name][key] for key, name in names.items()}


def run_meta(arguments: dict, step: int | None, weights: str | None) -> RunMeta:
    """What the arguments of DiT's and fast-DiT's training scripts say of a run; values of another kind are left out."""
    said = {
        key: arguments.get(key) for key in ("model", "image_size", "num_classes", "global_batch_size", "global_seed")
    }
    # their VAEs are Stability AI's two, by these names; a file must not name another to load
    said["vae"] = next((name for name in ("ema", "mse") if name == arguments.get("vae")), None)
    kinds = json_keys()
    said = {key: value for key, value in said.items() if value is not None and kinds[key]["kind"][0](value)}
    return RunMeta(**said, step=step, weights=weights)
