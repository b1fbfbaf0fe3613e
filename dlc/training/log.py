"""What a `Run` logs: the lines at its start, and one per --log-every steps to all its logs."""

import time
from typing import TYPE_CHECKING, Any

import torch

from dlc.machine.cli import one_line, progress
from dlc.training.metrics_file import append_metrics
from dlc.weights.checkpoint import gather_full

if TYPE_CHECKING:
    from tqdm import tqdm


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
    if run.state.is_main_process and (log_due or failure):
        run.record(append_metrics, run.folder / "metrics.jsonl", line)
    if run.args.report_to and log_due:
        run.accelerator.log(run.losses.scalars(line), step)
    run.logger.info(
        f"step {step:,}: {run.losses.words(means)}, grad norm {line['grad_norm']:.3f}, {rate:.2f} "
        f"steps/s, {samples_per_second:.0f} {unit}/s" + (f", {run.skipped} steps skipped" if run.skipped else "")
    )
    run.bar.set_postfix({"loss": f"{means['loss']:.4f}", f"{unit}_per_s": f"{samples_per_second:.0f}"}, refresh=False)
