"""What is known of weights while `dlc.weights.foreign.layouts` reads them: a path, then a file, then its tensors."""

import argparse
import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

from dlc.weights.foreign.safe import WEIGHTS_SUFFIXES, hub_patterns
from dlc.weights.meta import RunMeta

# The first alternative that a repository on the hub has.
ON_HUB = (*hub_patterns("transformer/"), *hub_patterns(), *(f"*{suffix}" for suffix in WEIGHTS_SUFFIXES))
# What is fetched as well: small files, and the EMA of our checkpoints and of the DLC project's.
BESIDE = ("*.json", "transformer/*.json", "ema.safetensors", "custom_checkpoint_0.pkl", "random_states_0.pkl")


class AnEncoder(ValueError):
    """The weights are of an encoder of images; see `dlc.weights.foreign.encoder_layouts`."""


class NoRawWeights(ValueError):
    """A checkpoint has EMA weights alone."""


class APrior(ValueError):
    """The weights are of a prior over codes; see `dlc.weights.foreign.prior_weights`."""


class AVAE(ValueError):
    """The weights are of a VAE; see `dlc.weights.foreign.vae_layouts`."""


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
    done: whether values are a model's tensors under our names, which are checked.
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

    @property
    def config_path(self) -> Path:
        """Beside the file that is looked at: where its config.json is, or would be."""
        return self.at.with_name("config.json")

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


def run_meta(arguments: dict, step: int | None, weights: str | None) -> RunMeta:
    """What the arguments of DiT's and fast-DiT's training scripts say of a run; values of another kind are left out."""
    said = {key: arguments.get(key) for key in ("model", "num_classes", "global_batch_size", "global_seed")}
    size = arguments.get("image_size")
    return RunMeta(
        image_size=size if type(size) is int and 0 < size < 2**16 else None,
        # their VAEs are Stability AI's two, by these names; a file must not name another to load
        vae=next((name for name in ("ema", "mse") if name == arguments.get("vae")), None),
        noted={key: value for key, value in said.items() if type(value) in (int, str)},
        step=step,
        weights=weights,
    )
