"""What a `Run` logs: the lines at its start, and one per --log-every steps, with the means of the losses until then."""

import math
import time
from typing import TYPE_CHECKING, Any

import torch

from dlc.machine.cli import one_line, progress
from dlc.weights.checkpoint import gather_full

if TYPE_CHECKING:
    from tqdm import tqdm

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


def announce(run: Any) -> "tqdm":
    """Log what the run is about to do, and with what. Returns the bar of its progress."""
    args, first, last = run.args, run.first_step, run.last_step
    first_saved, every = run.checkpoints
    often = f"every {args.sample_every} steps and at the end" if args.sample_every else "none"
    for line in (
        f"batch: {run.micro_batch_size} x {run.state.num_processes} processes on {run.device.type} x "
        f"{args.grad_accum} micro-batches = {args.global_batch_size}",
        f"precision: {run.precision}" + (", sharded (FSDP)" if run.sharded else ""),
        f"run: steps {first:,} to {last:,} ({run.batches.first_of(last) / run.batches.rows_per_epoch:,.1f} epochs) in "
        f"{run.folder}",
        f"checkpoints: at step {first_saved:,}, every {every:,} steps and at the end; previews: "
        f"{'with each' if args.sample_every is None else often}; log: every {args.log_every:,} steps",
        run.pretrained and f"weights: {one_line(run.pretrained, 1000)}",
        run.resumed and args.pretrained_path and "weights: those of the checkpoint, not of --pretrained-path",
        run.resumed and f"continued from {run.resumed}",
        run.changed and f"warning: changed since: {run.changed}",
        first >= last and "nothing to do: raise --max-steps or --epochs to train on",
    ):
        if line:
            run.logger.info(line)
    return progress(total=last, initial=first, unit="step", desc="training")


def write_line(run: Any, step: int, means: dict, log_due: bool, failure: str | None) -> None:
    """Write a line to log.txt and, if it is due or the run fails, to metrics.jsonl and the tracker."""
    scaler, rate = run.accelerator.scaler, (step - run.last_line[1]) / (time.time() - run.last_line[0])
    samples_per_second, unit = rate * run.args.global_batch_size, run.losses.unit
    line = dict(
        step=step,
        epoch=run.batches.first_of(step) / run.batches.rows_per_epoch,
        **means,
        grad_norm=gather_full(run.grad_norm).item(),
        skipped_steps=run.skipped,
        scaler_scale=scaler.get_scale() if scaler else None,
        peak_memory_gib=torch.cuda.max_memory_allocated() / 2**30 if run.device.type == "cuda" else None,
        lr=run.optimizers[0].param_groups[0]["lr"],
        steps_per_second=rate,
        **{f"{unit}_per_second": samples_per_second},
    )
    words = (
        f"{run.losses.words(means)}, grad norm {line['grad_norm']:.3f}, {rate:.2f} steps/s, {samples_per_second:.0f} "
        f"{unit}/s" + (f", {run.skipped} steps skipped" if run.skipped else "")
    )
    run.note(line, words, run.losses.scalars(line) if log_due else None, kept=bool(log_due or failure))
    run.bar.set_postfix({"loss": f"{means['loss']:.4f}", f"{unit}_per_s": f"{samples_per_second:.0f}"}, refresh=False)
