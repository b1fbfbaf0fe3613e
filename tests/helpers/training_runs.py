"""The commands of tests that train, and what their runs leave."""

import json

import safetensors.torch
import torch


def train_flags(features, results, *flags):
    """Of a DiTSEM-Ti/4 on features, or if None on what the flags say, with a line of the log at each step."""
    return (
        *("--model", "DiTSEM-Ti/4", *(("--features-path", features) if features else ()), "--results-dir", results),
        *("--global-batch-size", 8, "--lr", 1e-3, "--ema-decay", 0.9, "--log-every", 1, "--num-workers", 0),
        *("--no-ema-warmup", "--sample-every", 0, *flags),
    )


def train_command(processes, features, results, *flags, launcher="forked"):
    """For conftest.launch."""
    return (launcher, processes, "train_diffusion.py", *train_flags(features, results, *flags))


def metrics(results):
    return [json.loads(line) for line in (results / "metrics.jsonl").read_text().splitlines()]


def tensors(checkpoint):
    """Every tensor of a checkpoint: weights, EMA, optimizer."""
    found = {
        f"{name}/{key}": value
        for name in ("model", "ema")
        for key, value in safetensors.torch.load_file(checkpoint / f"{name}.safetensors").items()
    }
    states = torch.load(checkpoint / "optimizer.pt", weights_only=True)["optimizers"]
    for number, state in enumerate(states):
        for index, values in state["state"].items():
            found.update({f"optimizer {number}/{index}/{key}": value for key, value in values.items()})
    return found


def alike(one, two):
    """Whether tensors of two runs, whose batches round differently, are the same on the whole.

    AdamW makes full steps even of gradients that are mere rounding.
    """
    return all((one[key] - two[key]).norm() <= 1e-3 * two[key].norm() for key in two)


def same_run(one, two, step):
    """Whether two runs are the same to the bit: weights, EMA, optimizer state and metrics, but for the rates, and for
    the order of a step's lines, in which a measurement that was cut off comes last."""
    first, second = (tensors(root / f"checkpoints/{step:07d}") for root in (one, two))
    lines = [
        [
            {key: value for key, value in line.items() if "per_second" not in key}
            for line in sorted(metrics(root), key=lambda line: (line["step"], sorted(line)))
        ]
        for root in (one, two)
    ]
    return (
        first.keys() == second.keys()
        and all(torch.equal(first[key], second[key]) for key in first)
        and lines[0] == lines[1]
    )
