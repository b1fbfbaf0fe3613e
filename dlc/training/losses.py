"""The losses that a run logs: their sums, by name and by quarter of the time, and the means of these."""

import math

import torch

QUARTERS = 4  # of the time t; losses differ much between them


class Losses:
    """Sums of a loss's terms over the samples since the last line of the log, without a device sync.

    The terms are those of the loss function, "loss" first; the one after it, which is its main part, is also logged by
    quarter of t.

    Attributes:
        unit: what a sample is, in the plural, for rates.
        names: of the terms; () before the first batch.
        values: (len(names) + 2 * QUARTERS,) sums of this process: of the terms, then of the quarters, then counts.
    """

    def __init__(self, unit: str):
        self.unit, self.names, self.values = unit, (), torch.zeros(0)

    @property
    def by_quarter(self) -> str:
        return self.names[:2][-1]

    def resume(self, names: list[str], values: torch.Tensor) -> None:
        """Go on from sums that a checkpoint holds."""
        self.names, self.values = tuple(names), values

    def begin(self, terms: dict[str, torch.Tensor]) -> tuple[str, ...]:
        """Make room for these terms, unless it is there. Returns the names of other terms, whose sums it drops."""
        names = ("loss", *(name for name in terms if name != "loss"))
        if names == self.names and len(self.values) == len(names) + 2 * QUARTERS:
            return ()
        dropped, self.names = self.names, names
        self.values = torch.zeros(len(names) + 2 * QUARTERS, device=terms["loss"].device)
        return dropped

    def of_batch(self, terms: dict[str, torch.Tensor], t: torch.Tensor, num_timesteps: int) -> torch.Tensor:
        """What a batch adds to the values.

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

    def means(self, values: torch.Tensor) -> dict:
        """The means by name, and a list of those by quarter; NaN for a quarter without samples."""
        totals, quarters = values.tolist()[: len(self.names)], values.tolist()[len(self.names) :]
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
