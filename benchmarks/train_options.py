"""What each training option buys in speed and memory: the variants of train_options/ in turn, over the same data.

    python -m benchmarks.train_options

The images are photograph-like JPEGs and the VAE and encoder have random weights (a rate does not depend on them), or
all are given; the features are extracted from these images, unflipped, as float32 moments of the posterior, so that
every row trains on the same. `loss differs by` is the largest relative difference of a logged loss from that of the
first row.

The rate is that of the second of two lines of metrics.jsonl, so data, optimizer, EMA and logging are in it, and
compiling is not; `outside` is what a step takes beyond the model's forward and backward pass on a batch that lies
ready, on images VAE and encoder as well.

MFU: the model's FLOPs, from its shapes and without recomputation, over what a large matrix product reaches on the same
device in that precision.
"""

import argparse
import importlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from benchmarks.bars import draw_bars
from benchmarks.extraction import SD_VAE, write_photographs
from benchmarks.flops import forward_flops, peak_flops, synchronize
from benchmarks.record import record
from diffusion import create_diffusion
from dlc.machine.processes import autocast, compile_options, default_num_workers
from dlc.nets.encoder import SEMEncoder, load_encoder, save_encoder
from models import DiT_models
from train_diffusion import argument_parser

ROOT = Path(__file__).parents[1]
ON_GPU = torch.cuda.is_available()
ROWS = [
    "train_original",
    "train_baseline",
    "train_amp",
    "train_features",
    "train_tf32_disabled",
    "train_fast --checkpoint-activations --no-compile",
    "train_fast --no-compile",
    "train_fast --compile",
]
# runs a command into a file and says its status and peak memory, kiB: a process begins with the peak of the one that
# starts it, and this one is small
OBSERVER = """import os, subprocess, sys
process = subprocess.Popen(sys.argv[2:], stdout=open(sys.argv[1], "w"), stderr=subprocess.STDOUT)
_, status, usage = os.wait4(process.pid, 0)
print(status, usage.ru_maxrss)"""


OUT_OF_MEMORY = (
    "OutOfMemoryError",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "MemoryError",
    "can't allocate memory",
    "SIGKILL",
)


def options(row):
    """All options of a row: the variant's, and the flags after its name."""
    variant, *flags = row.split()
    found = argument_parser(**importlib.import_module(f"train_options.{variant}").OPTIONS).parse_args(flags)
    found.precision = "bf16" if found.precision == "amp" else found.precision
    return found


def described(row, on_gpu=ON_GPU):
    """What a row's options are, by the columns of the table."""
    chosen = options(row)
    return {
        "": row,
        "data": "images" if chosen.features_path is None else "features",
        "checkpointing": chosen.checkpoint_activations,
        "precision": chosen.precision,
        "TF32": on_gpu and chosen.tf32,
        "compiled": on_gpu if chosen.compile is None else chosen.compile,
    }


def run(*command, output):
    """Run python with these arguments. Returns None, or "out of memory"; and the peak of its memory in GiB.

    Raises RuntimeError, with what it said, where it ends badly for another reason.
    """
    observer = [sys.executable, "-c", OBSERVER, output, sys.executable, *map(str, command)]
    observed = subprocess.run(observer, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    status, peak = map(int, observed.split())
    said = output.read_text()
    if status and not any(sign in said for sign in OUT_OF_MEMORY):
        raise RuntimeError(said)
    return "out of memory" if status else None, peak / 2**20


def make_data(root, args):
    """The flags by which a row reads images, and those by which it reads features of them."""
    vae, encoder, images = args.vae or root / "vae", args.encoder or root / "sem", args.data_path or root / "images"
    if not args.data_path:
        write_photographs(root / "images", args.images)
    torch.manual_seed(0)
    if not args.vae:
        AutoencoderKL(**SD_VAE).save_pretrained(vae)
    if not args.encoder:
        save_encoder(SEMEncoder(), encoder)
    with_codes = any(DiT_models[model].conditioning == "codes" for model in args.model)
    if not args.features_path:
        failed, _ = run(
            "extract_features_withdlc.py",
            "--data-path",
            images,
            "--features-path",
            root / "features",
            "--image-size",
            args.image_size,
            "--vae",
            vae,
            "--encoder",
            encoder if with_codes else "none",
            "--posterior",
            "moments",
            "--dtype",
            "float32",
            "--flip",
            "none",
            "--num-workers",
            args.num_workers,
            output=root / "output.txt",
        )
        if failed:
            raise RuntimeError((root / "output.txt").read_text())
    return dict(
        images=["--data-path", images, "--image-size", args.image_size, "--vae", vae, "--flip", "none"],
        encoder=["--encoder", encoder],
        features=["--features-path", args.features_path or root / "features"],
    )


def train(row, model, batch, data, root, args):
    """Steps a second of the variant and its losses, or None for both where it is out of memory; and the peak in GiB."""
    variant, *flags = row.split()
    source = data["features"]
    if options(row).features_path is None:
        source = data["images"] + (data["encoder"] if DiT_models[model].conditioning == "codes" else [])
    results = root / "results"
    shutil.rmtree(results, ignore_errors=True)  # of a row that failed
    failed, memory = run(
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        1,
        "--num_machines",
        1,
        "--dynamo_backend",
        "no",
        "--mixed_precision",
        "no",
        f"train_options/{variant}.py",
        "--model",
        model,
        "--results-dir",
        results,
        "--global-batch-size",
        batch,
        "--max-steps",
        2 * args.steps,
        "--log-every",
        args.steps,
        "--num-workers",
        args.num_workers,
        *source,
        *flags,
        output=root / "output.txt",
    )
    if failed:
        return None, None, failed
    lines = [json.loads(line) for line in (results / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(results)  # its checkpoint may be of 13 GB
    return lines[-1]["steps_per_second"], [line["loss"] for line in lines], lines[-1]["peak_memory_gib"] or memory


def build(model, args):
    """The model, and random conditions of a batch (n, ...) for it."""
    if DiT_models[model].conditioning == "codes":
        L, V = code_shape(args)
        return DiT_models[model](input_size=args.image_size // 8, L=L, V=V), lambda n: torch.randint(V, (n, L))
    return DiT_models[model](input_size=args.image_size // 8), lambda n: torch.randint(1000, (n,))


def code_shape(args):
    encoder = load_encoder(args.encoder) if args.encoder else None
    return (encoder.L, encoder.V) if encoder else (512, 256)


def model_alone(row, model, batch, args):
    """Seconds of a forward and backward pass on a batch that lies ready."""
    device, chosen = torch.device("cuda" if ON_GPU else "cpu"), options(row)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = chosen.tf32
    module, conditions = build(model, args)
    module.to(device).train().set_grad_checkpointing(chosen.checkpoint_activations)
    if described(row)["compiled"]:
        for block in module.blocks:
            block.compile(**compile_options(device))
    diffusion = create_diffusion("")
    x, noise = torch.randn(2, batch, 4, args.image_size // 8, args.image_size // 8, device=device)
    t = torch.randint(0, 1000, (batch,), device=device)
    y = conditions(batch).to(device)
    drop = torch.zeros(batch, dtype=torch.bool, device=device)
    seconds = []
    for _ in range(2 * args.steps):
        synchronize()
        start = time.perf_counter()
        with autocast(device, chosen.precision):
            loss = diffusion.training_losses(module, x, t, dict(y=y, drop=drop), noise)["loss"].mean()
        loss.backward()
        synchronize()
        seconds.append(time.perf_counter() - start)
        module.zero_grad()
    return float(np.mean(seconds[args.steps :]))


def measure(row, model, batch, data, root, args, flops, peak):
    """A row of the table, and its losses."""
    rate, losses, memory = train(row, model, batch, data, root, args)
    outside = None
    if rate:
        failed, _ = run(
            "-m",
            "benchmarks.train_options",
            *sys.argv[1:],
            "--model",
            model,
            "--batch",
            batch,
            "--alone",
            row,
            output=root / "output.txt",
        )
        outside = None if failed else 1000 / rate - 1000 * float((root / "output.txt").read_text().split()[-1])
    return {
        "": row,
        "model": model,
        "batch": batch,
        **described(row),
        "steps/s": rate,
        "images/s": rate and rate * batch,
        "MFU": rate and rate * batch * flops / peak,
        "memory GiB": memory,
        "outside ms": outside,
    }, losses


def peak_of(chosen):
    """FLOPs a second that the device reaches in a row's precision."""
    torch.backends.cuda.matmul.allow_tf32 = chosen.tf32
    peak = peak_flops(chosen.precision, 8192 if ON_GPU else 4096)
    torch.cuda.empty_cache()  # the rows need the memory; without a GPU, nothing
    return peak


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--model",
        nargs="+",
        default=["DiT-XL/2", "DiTSEM-XL/2"] if ON_GPU else ["DiTSEM-S/2"],
        choices=DiT_models,
        metavar="MODEL",
        help="names in DiT_models [%(default)s here]",
    )
    add("--batch", nargs="+", type=int, default=[128, 256] if ON_GPU else [8], help="images a step [%(default)s here]")
    add("--rows", nargs="+", default=ROWS, help="variants, each with its flags in quotes [all of them]")
    add(
        "--steps",
        type=int,
        default=30 if ON_GPU else 6,
        help="measured steps, after a warm-up of as many [%(default)s here]",
    )
    add("--images", type=int, default=2048 if ON_GPU else 64, help="synthetic images [%(default)s here]")
    add("--image-size", type=int, default=256, help="pixels [%(default)s]")
    add("--data-path", help="folder of images [synthetic]")
    add("--features-path", help="features of them, by --posterior moments --dtype float32 --flip none [extracted]")
    add("--vae", help="ema, mse, a directory or a hub id [Stable Diffusion's shape, untrained]")
    add("--encoder", help="SEM encoder [ViT-L/14, L=512, V=256, untrained]")
    add("--num-workers", type=int, default=default_num_workers(), help="data readers [%(default)s here]")
    add("--alone", help=argparse.SUPPRESS)  # one row's model, in a process of its own
    args = parser.parse_args()
    if args.alone:
        print(model_alone(args.alone, args.model[0], args.batch[0], args))
        return
    peaks = {(chosen.precision, chosen.tf32): peak_of(chosen) for chosen in map(options, args.rows)}
    table, gflops = [], {}
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        data = make_data(root, args)
        for model in args.model:
            flops = 3 * forward_flops(build(model, args)[0], args.image_size // 8)
            gflops[model] = flops / 1e9
            for batch in args.batch:
                first, first_losses = None, None
                for name in args.rows:
                    chosen = options(name)
                    row, losses = measure(
                        name, model, batch, data, root, args, flops, peaks[chosen.precision, chosen.tf32]
                    )
                    first, first_losses = first or row["images/s"], first_losses or losses
                    row["times the first"] = row["images/s"] and row["images/s"] / first
                    row["loss differs by"] = losses and float(
                        np.abs(np.array(losses) / np.array(first_losses) - 1).max()
                    )
                    table.append(row)
                    print(row, flush=True)
    path = record(
        "train_options",
        table,
        image_size=args.image_size,
        steps=args.steps,
        model_gflops_an_image=gflops,
        peak_tflops={
            f"{precision}{'' if tf32 else ', no TF32'}": peak / 1e12 for (precision, tf32), peak in peaks.items()
        },
    )
    draw_bars(table, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
