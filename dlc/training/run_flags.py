"""The flags of a training run, whatever is trained: those that `Run` reads."""

import argparse
import math
from collections.abc import Callable

from torch.utils.data import Dataset

from dlc.machine.cli import SEED, number
from dlc.machine.processes import PRECISIONS, add_speed_flags, default_num_workers
from dlc.weights.power_ema import LENGTH

# Recorded in each checkpoint; a run may continue with other values, and then says so.
OPTIMISATION = ("lr", "warmup_steps", "weight_decay", "grad_clip", "ema_decay", "ema_warmup", "ema_lengths")

LEAST_STEPS = 20_000  # of a run on few samples, unless flags say otherwise: fewer leave a model of noise
FIRST_CHECKPOINT = 250  # the step, unless flags say otherwise


def warmup(args: argparse.Namespace, step: int) -> float:
    """The factor of the learning rates at a step, counted from 1."""
    return min(1.0, step / max(1, args.warmup_steps))


def ema_decay(args: argparse.Namespace, step: int) -> float:
    """The EMA's decay at a step, counted from 1. The warm-up is that of TensorFlow's ExponentialMovingAverage."""
    return min(args.ema_decay, (1 + step) / (10 + step)) if args.ema_warmup else args.ema_decay


def steps_of_run(args: argparse.Namespace, batches: Dataset) -> int:
    """The number of the last step, by --epochs and --max-steps. Small data are seen more often by default."""
    if args.max_steps and not args.epochs:
        return args.max_steps
    least = math.ceil(LEAST_STEPS * args.global_batch_size / batches.rows_per_epoch)
    last = batches.last_step(args.epochs or max(args.default_epochs, least))
    return min(last, args.max_steps or last)


def checkpoint_steps(args: argparse.Namespace, last_step: int) -> tuple[int, int]:
    """The step of the first checkpoint, and the steps between the others: by default about a tenth of the run."""
    if args.ckpt_every:
        return args.ckpt_every, args.ckpt_every
    every = max(FIRST_CHECKPOINT, min(50_000, int(float(f"{last_step / 10:.0e}"))))
    return FIRST_CHECKPOINT, every


def add_run_flags(parser: argparse.ArgumentParser, epochs: int) -> Callable:
    """Add the groups "optimisation", "precision and speed" and "run". Returns the last one. epochs: the default."""
    parser.set_defaults(default_epochs=epochs)
    _add_optimisation(parser, epochs)
    _add_speed(parser)
    add = parser.add_argument_group("run").add_argument
    add("--results-dir", default="results", help="write the run here; if one is here already, resume it")
    add(
        "--allow-change", action="store_true", help="resume even if the global batch size, the data or the seed changed"
    )
    add(
        "--pretrained-path",
        help="start from these weights: a file, folder or hub id in any layout of docs/weights.md [random weights]",
    )
    add(
        "--stop-after",
        type=number(float, 0),
        metavar="HOURS",
        help="stop this launch after this many hours, with a checkpoint and exit status 0; the same command, as in "
        "the next job of a chain, continues [no limit]",
    )
    add("--global-seed", type=SEED, default=0, help="seed everything random")
    add("--log-every", type=number(int, 1), default=100, help="write a log line every this many steps")
    add("--report-to", choices=["tensorboard", "wandb"], help="also write the metrics there [nowhere]")
    add(
        "--ckpt-every",
        type=number(int, 1),
        help="write a checkpoint every this many steps, and at the end [the first at step "
        f"{FIRST_CHECKPOINT}, then one per tenth of the run, rounded, or per 50,000 steps]",
    )
    add("--ckpt-total-limit", type=number(int, 1), help="keep only this many checkpoints, the newest ones [all]")
    add(
        "--sample-every",
        type=number(int, 0),
        help="draw a preview picture every this many steps, and at the end; 0 disables previews [one with each "
        "checkpoint]",
    )
    return add


def _add_optimisation(parser, epochs):
    add = parser.add_argument_group("optimisation").add_argument
    add(
        "--epochs",
        type=number(int, 1),
        help=f"stop after this many passes over the data [{epochs}, or as many as {LEAST_STEPS:,} steps "
        "take; no limit with --max-steps]",
    )
    add(
        "--max-steps", type=number(int, 1), help="stop after this many optimizer steps, even before --epochs [no limit]"
    )
    add(
        "--global-batch-size",
        type=number(int, 1),
        default=256,
        help="train on this many samples per step, over all processes",
    )
    add(
        "--grad-accum",
        type=number(int, 1),
        default=1,
        help="split each process's batch into this many micro-batches, one after the other, to save memory",
    )
    add("--lr", type=number(float, 0), default=1e-4, help="set the learning rate, constant after --warmup-steps")
    add(
        "--warmup-steps",
        type=number(int, 0),
        default=0,
        help="raise the learning rate linearly from 0 over this many steps; 0 disables the warm-up",
    )
    add("--weight-decay", type=number(float, 0), default=0.0, help="set AdamW's weight decay")
    add(
        "--grad-clip",
        type=number(float, 0),
        default=0.0,
        help="clip the gradient norm to this value; 0 disables clipping",
    )
    add(
        "--max-nonfinite",
        type=number(int, 1),
        default=10,
        help="stop after this many fp16 steps in a row without a finite gradient; checked at each log line "
        "and checkpoint",
    )
    add("--ema-decay", type=number(float, 0, 1), default=0.9999, help="set the EMA's decay per step")
    add(
        "--ema-warmup",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="bound the EMA decay by (1 + step) / (10 + step), so that a short run's EMA is not still its random start "
        "[%(default)s]",
    )
    add(
        "--ema-lengths",
        type=LENGTH,
        nargs="+",
        metavar="SHARE",
        help="also track power-function EMAs of these lengths, shares of the training such as 0.05 0.1, from which "
        "`python -m dlc.weights ema` makes an EMA of any length [none]",
    )
    add(
        "--ema-snapshot-every",
        type=number(int, 1),
        metavar="IMAGES",
        help="store a 16-bit snapshot of them every this many images, and at the end [a 32nd of the run]",
    )


def _add_speed(parser):
    add = parser.add_argument_group("precision and speed").add_argument
    add(
        "--precision",
        choices=[*PRECISIONS, "amp"],
        help="set the autocast precision; amp = the launcher's fp16 or bf16, or bf16 if it sets none [the launcher's "
        "--mixed_precision]",
    )
    add_speed_flags(add)
    add(
        "--checkpoint-activations",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="recompute activations in the backward pass: less memory, about a third more work [%(default)s]",
    )
    add(
        "--num-workers",
        type=number(int, 0),
        default=default_num_workers(),
        help="use this many data readers per process [%(default)s on this machine]",
    )
