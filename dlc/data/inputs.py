"""What a model is conditioned on in training: which arrays of the features, by the model's `conditioning`.

    inputs = INPUTS[model.conditioning](features, args)
    y = inputs.of(batch)                        # as the model takes it

To add a condition, write a function here and give it a row in INPUTS. `dlc.sampling.conditions` says what samples are
drawn for.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dlc.data.rows import open_rows
from dlc.data.store import Features


@dataclass(frozen=True)
class Inputs:
    """What a model is conditioned on.

    arrays: rows by name, aligned with the latents, as a batch has them; None for codes that are made from images as
        training goes.
    sizes: arguments of the model's constructor that the data decide.
    """

    arrays: Mapping[str, object]
    sizes: dict

    def of(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor | dict[str, torch.Tensor]:
        """The condition y in a batch, as the model takes it: one array is a tensor, several are a dict of them."""
        y = {name: batch[name].float() if batch[name].is_floating_point() else batch[name] for name in self.arrays}
        return y if len(y) > 1 else next(iter(y.values()))


def labels(features: Features, args: argparse.Namespace) -> Inputs:
    """Class labels (n,)."""
    return Inputs(dict(labels=features.labels), dict(num_classes=features.num_classes))


def check_codes(features: Features, model: str) -> None:
    """Raise ValueError, naming the model, if features to train it on hold no codes, or do not say V."""
    if features.codes is None:
        raise ValueError(f"features path {features.root} holds no codes, which {model} is trained on")
    if features.V is None:
        raise ValueError(f"{features.root} has no manifest.json to say V: give --V")


def codes(features: Features, args: argparse.Namespace) -> Inputs:
    """Codes (n, L). Raises ValueError if the features hold none, or do not say V."""
    if not args.data_path:
        check_codes(features, args.model)
    return Inputs(dict(codes=features.codes), dict(L=features.L, V=features.V))


def vectors(features: Features, args: argparse.Namespace) -> Inputs:
    """Vectors (n, in_dim), of --condition-path. Raises ValueError if there is none, or it does not fit the features."""
    if not args.condition_path:
        raise ValueError(f"{args.model} is trained on vectors: give --condition-path")
    rows = open_rows("--condition-path", args.condition_path, 1, "f")
    if len(rows) != features.count:
        raise ValueError(f"--condition-path {args.condition_path} has {len(rows)} rows, the data {features.count}")
    return Inputs(dict(vectors=rows), dict(in_dim=rows.array(0).shape[1]))


INPUTS = {"labels": labels, "codes": codes, "vectors": vectors}
