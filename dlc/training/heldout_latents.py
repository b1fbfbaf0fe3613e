"""The loss of a diffusion model on held-out features, always with the same times and noise."""

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from diffusion.process_table import Process
from dlc.data import Features
from dlc.data.inputs import INPUTS, Inputs
from dlc.machine.records import differences
from dlc.training.batches import TrainingBatches
from dlc.training.code_batches import copies_of, split_rows
from dlc.training.heldout import SEED, HeldOut, settle_heldout
from dlc.weights.meta import SAME_LATENTS
from models import DiT_models

if TYPE_CHECKING:
    from dlc.training.image_batches import Images
    from dlc.training.run import Run

TIMES = 8  # of each held-out row


@dataclass(frozen=True)
class Split:
    """only: the rows to train on, None for all; rows of features, with their inputs, that are held out."""

    only: np.ndarray | None
    features: "Features | Images"
    inputs: Inputs
    rows: np.ndarray


def split_features(args: Namespace, features: "Features | Images", inputs: Inputs) -> Split:
    """What --holdout and --heldout-path hold out. Raises ValueError for other features that do not fit these."""
    settle_heldout(args, 0.0)
    if args.eval_samples == 1:
        raise ValueError("--eval-samples 1: a Frechet distance needs at least 2 samples")
    for flag in ("holdout", "heldout_path", "eval_samples"):
        if args.data_path and getattr(args, flag):
            raise ValueError(f"--{flag.replace('_', '-')} is for features: it does not go with --data-path")
    if not args.heldout_path:
        copies = 1 if args.data_path else copies_of(features)
        train, heldout = split_rows(features.count, args.holdout, copies)
        return Split(train if args.holdout else None, features, inputs, heldout)
    if args.condition_path:
        raise ValueError("--heldout-path has no vectors, which --condition-path gives --features-path: give --holdout")
    other = Features(args.heldout_path, args.V, args.num_classes)
    here, there = (
        {name: one.source().get(name) for name in SAME_LATENTS}
        | dict(latents=list(one.latent_shape), L=one.L, V=one.V, num_classes=one.num_classes, kind=one.latent_kind)
        for one in (features, other)
    )
    different = differences(there, here)
    if different:
        raise ValueError(f"--heldout-path {args.heldout_path} does not fit --features-path: {different}")
    other.validate()
    found = INPUTS[DiT_models[args.model].conditioning](other, args)
    return Split(None, other, found, np.arange(0, other.count, copies_of(other)))


class HeldOutLatents(HeldOut):
    """The loss on held-out rows, each at TIMES times.

    process: what the model is trained on.
    losses: train_diffusion.losses_of, but for what it is given here.
    """

    unit = what = "loss"

    def __init__(self, run: "Run", split: Split, process: Process, losses: Callable):
        super().__init__(run, len(split.rows))
        self.inputs, self.rows = split.inputs, split.rows[self.places.numpy()]
        self.process, self.losses = process, losses
        share = dict(seed=SEED, global_batch=1)
        self.batches = TrainingBatches(split.features, self.inputs.arrays, self.inputs.limits, **share)

    def evaluate(self, ema: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """See `HeldOut`. Time and noise of a row belong to its place, and not to the process that has it."""
        run, means = self.run, []
        for start in range(0, len(self.rows), run.micro_batch_size):
            part = slice(start, start + run.micro_batch_size)
            batch: Mapping = {name: one.to(run.device) for name, one in self.batches.gather(self.rows[part]).items()}
            places, y, total = self.places[part].to(run.device), self.inputs.of(batch), 0
            for time in range(TIMES):
                run.go_on()
                with run.accelerator.autocast():
                    indices = places * TIMES + time
                    terms, _ = self.losses(ema, self.process, indices, batch["latents"], y, seed=SEED, dropout=0.0)
                total = total + terms["loss"].double()
            means.append(total / TIMES)
        yield "heldout", torch.cat(means)

    def words(self, found: dict) -> str:
        """See `HeldOut`."""
        return f"held-out loss {found['heldout_loss']:.5f} +- {found['heldout_error']:.5f}"
