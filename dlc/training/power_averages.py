"""Power-function EMAs of the weights in training: tracked, resumed, and stored in 16 bits now and then.

Their clock is the images that were trained on: a step that fp16 skips does not move it, and a larger batch moves it
further. What they are for is in `dlc.weights.power_ema`.
"""

from collections.abc import Iterable
from pathlib import Path

import safetensors.torch
import torch

from dlc.machine.files import write_whole
from dlc.training.sharding import local_shards
from dlc.training.update import move_towards
from dlc.weights.power_ema import decay, exponent, snapshot_path, snapshots_of


class PowerAverages:
    """Averages of parameters, by length.

    Args:
        lengths: sigma_rel of each.
        weights: the parameters by name, which may be sharded.
        images: trained on so far.

    Attributes:
        averages: {length: tensors in the order of the weights}.
        images: () float64 on the device.
    """

    def __init__(self, lengths: Iterable[float], weights: dict[str, torch.Tensor], images: int = 0):
        self.names = list(weights)
        self.averages = {one: [value.detach().clone() for value in weights.values()] for one in lengths}
        device = next(iter(weights.values())).device
        self.gammas = {one: exponent(one) for one in self.averages}
        self.images = torch.tensor(float(images), dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, weights: list[torch.Tensor], images: int, skipped: torch.Tensor | None = None) -> None:
        """Update the averages after a step on this many images. Nothing moves if `skipped`, a bool (), is set."""
        if not self.averages:
            return
        step = torch.full_like(self.images, images)
        step = step if skipped is None else step.masked_fill(skipped, 0)
        self.images += step
        for length, averages in self.averages.items():
            share = 1 - decay(step, self.images.clamp(min=1), self.gammas[length])
            move_towards(local_shards(averages), weights, share.to(weights[0].dtype))

    def named(self, length: float) -> dict[str, torch.Tensor]:
        return dict(zip(self.names, self.averages[length]))

    def files(self) -> dict[str, dict[str, torch.Tensor]]:
        """The averages by the name of their file in a checkpoint, without its ending."""
        return {f"ema-{length:g}": self.named(length) for length in self.averages}


def write_snapshot(run: Path, images: int, length: float, step: int, weights: dict[str, torch.Tensor]) -> None:
    """Write a snapshot, in float16, whole or not at all. Raises OSError if the disk does not take it."""
    halves = {
        name: (value.half() if value.is_floating_point() else value).cpu().contiguous()
        for name, value in weights.items()
    }
    path = snapshot_path(run, images, length)
    path.parent.mkdir(exist_ok=True)
    content = safetensors.torch.save(halves, dict(step=str(step)))  # one key: they have no order
    write_whole(path, lambda file: file.write(content))


def trim_snapshots(run: Path, images: int) -> None:
    """Remove those of after the time from which a run resumes."""
    for snapshot in snapshots_of(run):
        if snapshot.images > images:
            snapshot.path.unlink()
