"""The loss of a diffusion model on held-out features, always with the same times and noise."""

from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from diffusion.process_table import Process
from dlc.data import Features
from dlc.data.inputs import Inputs
from dlc.machine.records import differences
from dlc.training.batches import gather
from dlc.training.heldout import SEED, HeldOut
from dlc.training.split import Split
from dlc.weights.meta import SAME_LATENTS

if TYPE_CHECKING:
    from dlc.training.run import Run

TIMES = 8  # of each held-out row


def open_heldout(args: Namespace, features: Features) -> Features:
    """The features of --heldout-path. Raises ValueError if they do not fit those to train on."""
    other = Features(args.heldout_path, args.V, args.num_classes)
    here, there = (
        {name: one.source().get(name) for name in SAME_LATENTS}
        | dict(latents=list(one.latent_shape), L=one.L, V=one.V, num_classes=one.num_classes, kind=one.latent_kind)
        for one in (features, other)
    )
    different = differences(there, here)
    if different:
        raise ValueError(f"--heldout-path {args.heldout_path} does not fit --features-path: {different}")
    return other


class HeldOutLatents(HeldOut):
    """The loss on held-out rows, each at TIMES times.

    inputs: what the model is conditioned on there.
    process: what the model is trained on.
    losses: train_diffusion.losses_of, but for what it is given here.
    """

    unit = what = "loss"

    def __init__(self, run: "Run", split: Split, inputs: Inputs, process: Process, losses: Callable):
        super().__init__(run, len(split.heldout))
        self.inputs, self.process, self.losses = inputs, process, losses
        self.features, self.rows = split.other, split.heldout[self.places.numpy()]

    def evaluate(self, ema: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """See `HeldOut`. Time and noise of a row belong to its place, and not to the process that has it."""
        run, means, arrays = self.run, [], dict(self.inputs.arrays, latents=self.features.latents)
        for start in range(0, len(self.rows), run.micro_batch_size):
            part = slice(start, start + run.micro_batch_size)
            batch = {name: one.to(run.device) for name, one in gather(arrays, self.rows[part]).items()}
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
