"""The losses that a trainer logs: their sums, by name and by quarter of the time, and the means of these."""

import math
from dataclasses import dataclass

import torch

QUARTERS = 4  # of the time t; losses differ much between them


@dataclass(frozen=True)
class Losses:
    """Which losses a trainer logs: means over the samples since the last line, summed up without a device sync.

    Attributes:
        names: keys of the dict that the loss function returns, "loss" first.
        by_quarter: the one that is also logged by quarter of t.
        unit: what a sample is, in the plural, for rates.
    """

    names: tuple[str, ...]
    by_quarter: str
    unit: str = "images"

    def zeros(self, device: torch.device) -> torch.Tensor:
        return torch.zeros(len(self.names) + 2 * QUARTERS, device=device)

    def sums(self, terms: dict[str, torch.Tensor], t: torch.Tensor, num_timesteps: int) -> torch.Tensor:
        """What a batch adds to the sums, (len(names) + 2 * QUARTERS,).

        Args:
            terms: (n,) values by name.
            t: (n,) times in 0..num_timesteps, without the end.
        """
        quarters = t * QUARTERS // num_timesteps == torch.arange(QUARTERS, device=t.device).unsqueeze(1)  # (4, n)
        return torch.cat(
            [
                torch.stack([terms[name].detach().sum() for name in self.names]),
                (quarters * terms[self.by_quarter].detach()).sum(dim=1),
                quarters.sum(dim=1),
            ]
        )

    def means(self, sums: torch.Tensor) -> dict:
        """The means by name, and a list of those by quarter; NaN for a quarter without samples."""
        totals, quarters = sums.tolist()[: len(self.names)], sums.tolist()[len(self.names) :]
        counts = quarters[QUARTERS:]
        n = sum(counts) or math.nan
        return {
            **{name: total / n for name, total in zip(self.names, totals)},
            f"{self.by_quarter}_by_quarter_of_t": [
                total / (count or math.nan) for total, count in zip(quarters, counts)
            ],
        }

    def scalars(self, line: dict) -> dict[str, float]:
        """The numbers of a line of metrics.jsonl, as a tracker takes them: one by one."""
        quarters = {
            f"{self.by_quarter}_quarter_{number}": mean
            for number, mean in enumerate(line[f"{self.by_quarter}_by_quarter_of_t"], 1)
        }
        return {key: value for key, value in {**line, **quarters}.items() if isinstance(value, (int, float))}

    def words(self, means: dict) -> str:
        parts = ", ".join(f"{name} {means[name]:.5f}" for name in self.names[1:])
        return f"loss {means['loss']:.4f}" + (f" ({parts})" if parts else "")
