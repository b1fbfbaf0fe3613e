"""Training's speed and memory: the script itself, run with one option after the other.

    python -m benchmarks.training --model DiTSEM-XL/2 --L 512 --V 256 --batch 256

Rows: plain eager with activation checkpointing (as fast-DiT trains), eager, compiled, and all on (compiled, 16-bit).
Steps are those of metrics.jsonl after the first lines, so data, optimizer, EMA and logging are in them. `outside` is
what a step takes beyond the model's forward and backward pass on a batch that lies ready. MFU: the model's FLOPs, from
its shapes and without recomputation, over what a large matrix product reaches on the same device in that precision.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.record import record
from diffusion import create_diffusion
from dlc.features import FeatureWriter, code_dtype
from dlc.runtime import PRECISIONS, autocast
from models import DiT_models

ROOT = Path(__file__).parents[1]
ON_GPU = torch.cuda.is_available()
ROWS = {                    # name: activation checkpointing, compiled, 16 bits
    "eager, activation checkpointing": (True, False, False),
    "eager": (False, False, False),
    "compiled": (False, True, False),
    "all on": (False, True, True),
}


def forward_flops(model, side):
    """FLOPs of a forward pass on one latent of side x side: two for each multiply-add of each matrix product."""
    D, P = model.pos_embed.shape[2], model.patch_size
    T = (side // P) ** 2
    block = 2 * T * D * (3 * D + D + 2 * 4 * D) + 4 * T * T * D + 2 * D * 6 * D
    ends = 2 * T * D * P * P * (model.in_channels + model.out_channels) + 2 * D * 2 * D
    return len(model.blocks) * block + ends + 2 * (256 * D + D * D)


def peak_flops(precision, size):
    """FLOPs a second of a product of two size x size matrices, the best of five."""
    device = "cuda" if ON_GPU else "cpu"
    a, b = (torch.randn(size, size, device=device, dtype=PRECISIONS[precision]) for _ in range(2))
    seconds = []
    for _ in range(6):
        synchronize()
        start = time.perf_counter()
        a @ b
        synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])


def synchronize():
    if ON_GPU:
        torch.cuda.synchronize()


def write_features(path, args, count):
    writer = FeatureWriter(path, dict(format_version=1, image_size=256, latents="sample", dtype="float16", L=args.L,
                                      V=args.V, classes=["a"], images=count))
    writer.start()
    random = np.random.default_rng(0)
    writer.write(0, dict(features=random.standard_normal((count, 4, 32, 32)).astype(np.float16),
                         sem=random.integers(0, args.V, (count, args.L)).astype(code_dtype(args.V)),
                         labels=np.zeros(count, np.int64), path=np.full(count, "a/0.png")), [])
    writer.finish(1)


def train(features, results, args, checkpointing, compiled, precision):
    """Steps a second and losses of the script, and the peak of its memory in GiB: the GPU's, or all of it on a CPU."""
    steps = args.warmup + args.steps
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1",
               "--dynamo_backend", "no", "--mixed_precision", {"fp32": "no"}.get(precision, precision),
               "train_diffusion.py", "--model", args.model, "--features-path", features, "--results-dir", results,
               "--global-batch-size", args.batch, "--max-steps", steps, "--log-every", 1,
               "--compile" if compiled else "--no-compile", *(["--checkpoint-activations"] if checkpointing else [])]
    with open(features.with_name("output.txt"), "w") as output:
        process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)             # the memory of this run alone
    if status:
        raise RuntimeError(features.with_name("output.txt").read_text())
    lines = [json.loads(line) for line in (results / "metrics.jsonl").read_text().splitlines()]
    seconds = [1 / line["steps_per_second"] for line in lines[args.warmup:]]
    memory = lines[-1]["peak_memory_gib"] or usage.ru_maxrss / 2**20
    return 1 / float(np.median(seconds)), [line["loss"] for line in lines], memory


def model_alone(args, checkpointing, compiled, precision):
    """Seconds of a forward and backward pass on a batch that lies ready."""
    device = torch.device("cuda" if ON_GPU else "cpu")
    model = DiT_models[args.model](L=args.L, V=args.V).to(device).train()
    model.set_grad_checkpointing(checkpointing)
    if compiled:
        for block in model.blocks:
            block.compile()
    diffusion = create_diffusion("")
    x, noise = torch.randn(2, args.batch, 4, 32, 32, device=device)
    t = torch.randint(0, 1000, (args.batch,), device=device)
    y = torch.randint(0, args.V, (args.batch, args.L), device=device)
    drop = torch.zeros(args.batch, dtype=torch.bool, device=device)
    seconds = []
    for _ in range(args.warmup + args.steps):
        synchronize()
        start = time.perf_counter()
        with autocast(device, precision):
            loss = diffusion.training_losses(model, x, t, dict(y=y, drop=drop), noise)["loss"].mean()
        loss.backward()
        synchronize()
        seconds.append(time.perf_counter() - start)
        model.zero_grad()
    return float(np.median(seconds[args.warmup:]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="DiTSEM-XL/2" if ON_GPU else "DiTSEM-S/2", help="a DiTSEM [%(default)s here]")
    add("--L", type=int, default=512, help="code positions [%(default)s]")
    add("--V", type=int, default=256, help="tokens a position [%(default)s]")
    add("--batch", type=int, default=256 if ON_GPU else 8, help="images a step [%(default)s here]")
    add("--warmup", type=int, default=10 if ON_GPU else 3, help="steps not counted [%(default)s here]")
    add("--steps", type=int, default=30 if ON_GPU else 8, help="steps counted [%(default)s here]")
    add("--alone", choices=ROWS, help=argparse.SUPPRESS)         # one row's model, in a process of its own
    args = parser.parse_args()
    if args.alone:
        checkpointing, compiled, half = ROWS[args.alone]
        print(model_alone(args, checkpointing, compiled, "bf16" if half else "fp32"))
        return
    if ON_GPU:
        torch.backends.cuda.matmul.allow_tf32 = True            # as in training
    flops = 3 * forward_flops(DiT_models[args.model](L=args.L, V=args.V), 32)
    peaks = {precision: peak_flops(precision, 8192 if ON_GPU else 4096) for precision in ("fp32", "bf16")}
    table, first_losses = [], None
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        write_features(root / "features", args, max(512, args.batch))
        for number, (name, (checkpointing, compiled, half)) in enumerate(ROWS.items()):
            precision = "bf16" if half else "fp32"
            rate, losses, memory = train(root / "features", root / str(number), args, checkpointing, compiled,
                                         precision)
            alone = float(subprocess.run([sys.executable, "-m", "benchmarks.training", *sys.argv[1:], "--alone", name],
                                         cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()[-1])
            first_losses = first_losses or losses
            table.append({
                "": name, "precision": precision, "images/s": rate * args.batch, "steps/s": rate,
                "times the first": rate * args.batch / (table[0]["images/s"] if table else rate * args.batch),
                "MFU": rate * args.batch * flops / peaks[precision], "memory GiB": memory,
                "outside ms": 1000 * (1 / rate - alone),
                "loss differs by": float(np.abs(np.array(losses) / np.array(first_losses) - 1).max())})
            print(table[-1], flush=True)
    record("training", table, model=args.model, L=args.L, V=args.V, batch=args.batch, steps=args.steps,
           model_gflops_an_image=flops / 1e9, peak_tflops={key: peak / 1e12 for key, peak in peaks.items()})


if __name__ == "__main__":
    main()
