"""What each training option buys in speed and memory: the variants of train_options/ in turn, over the same data.

    python -m benchmarks.train_options

The images are photograph-like JPEGs and the VAE and encoder have random weights (a rate does not depend on them) unless
they are given. The features are extracted from these images, unflipped, as float32 moments of the posterior, so every
row trains on the same data. `loss differs by` is the largest relative difference of a logged loss from the first row's.

The rate is that of the second of two lines of metrics.jsonl: it includes data, optimizer, EMA and logging, but not
compiling. MFU: the model's FLOPs, from its shapes and without recomputation, relative to what a large matrix product
reaches on the same device in that precision.
"""

import argparse
import importlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from benchmarks.extraction import SD_VAE, write_photographs
from benchmarks.record import ON_GPU, ROOT, flags, forward_flops, peak_flops, record, run_script
from dlc.machine.processes import default_num_workers
from dlc.nets.encoder import SEMEncoder, save_encoder
from dlc.weights.networks import load_encoder
from models import DiT_models
from train_diffusion import argument_parser

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
# runs a command with its output in a file, and prints its exit status and peak memory in KiB: a process starts with the
# peak of its parent, and this parent is small
OBSERVER = """import os, subprocess, sys
process = subprocess.Popen(sys.argv[2:], stdout=open(sys.argv[1], "w"), stderr=subprocess.STDOUT)
_, status, usage = os.wait4(process.pid, 0)
print(status, usage.ru_maxrss)"""
OUT_OF_MEMORY = "OutOfMemoryError|out of memory|_STATUS_ALLOC_FAILED|MemoryError|allocate memory|SIGKILL"
LAUNCH = "-m accelerate.commands.launch --num_processes 1 --num_machines 1 --dynamo_backend no --mixed_precision no"


def options(row: str) -> argparse.Namespace:
    """All options of a row: the variant's, and the flags after its name."""
    variant, *given = row.split()
    found = argument_parser(**importlib.import_module(f"train_options.{variant}").OPTIONS).parse_args(given)
    found.precision = "bf16" if found.precision == "amp" else found.precision
    return found


def run(*command, output: Path) -> tuple[str | None, float]:
    """Run python with these arguments. Returns None, or "out of memory"; and the peak of its memory in GiB.

    Raises RuntimeError, with its output, if it fails for another reason.
    """
    observer = [sys.executable, "-c", OBSERVER, output, sys.executable, *map(str, command)]
    observed = subprocess.run(observer, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    status, peak = map(int, observed.split())
    if status and not re.search(OUT_OF_MEMORY, output.read_text()):
        raise RuntimeError(output.read_text())
    return "out of memory" if status else None, peak / 2**20


def make_data(root: Path, args: argparse.Namespace) -> dict[str, list[str]]:
    """The flags by which a row reads images, those of the encoder, and those by which it reads their features."""
    vae, encoder, images = args.vae or root / "vae", args.encoder or root / "sem", args.data_path or root / "images"
    if not args.data_path:
        write_photographs(root / "images", args.images)
    torch.manual_seed(0)
    if not args.vae:
        AutoencoderKL(**SD_VAE).save_pretrained(vae)
    if not args.encoder:
        save_encoder(SEMEncoder(), encoder)
    read = flags(data_path=images, image_size=args.image_size, vae=vae, flip="none")
    with_codes = any(DiT_models[model].conditioning == "codes" for model in args.model)
    features = flags(features_path=root / "features")
    more = flags(encoder=encoder if with_codes else "none", num_workers=args.num_workers)
    run_script("extract_features_withdlc.py", *read, *features, *more, "--posterior", "moments", "--dtype", "float32")
    return dict(images=read, encoder=flags(encoder=encoder), features=features)


def train(row: str, model: str, batch: int, data: dict[str, list[str]], root: Path, args: argparse.Namespace) -> tuple:
    """Steps per second of the variant and its losses, or None for both if it is out of memory; and the peak in GiB."""
    variant, *given = row.split()
    source = data["features"]
    if options(row).features_path is None:
        source = data["images"] + (data["encoder"] if DiT_models[model].conditioning == "codes" else [])
    results = root / "results"
    shutil.rmtree(results, ignore_errors=True)  # of a row that failed
    sizes = flags(model=model, results_dir=results, global_batch_size=batch, max_steps=2 * args.steps)
    rest = flags(log_every=args.steps, sample_every=0, num_workers=args.num_workers)
    command = [*LAUNCH.split(), f"train_options/{variant}.py", *sizes, *rest, *source, *given]
    failed, memory = run(*command, output=root / "output.txt")
    if failed:
        return None, None, failed
    lines = [json.loads(line) for line in (results / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(results)  # its checkpoint may be of 13 GB
    return lines[-1]["steps_per_second"], [line["loss"] for line in lines], lines[-1]["peak_memory_gib"] or memory


def build(model: str, args: argparse.Namespace) -> torch.nn.Module:
    """The model for these images and, for a DiTSEM, the encoder's codes."""
    sizes = dict(input_size=args.image_size // 8)
    if DiT_models[model].conditioning == "codes" and args.encoder:
        encoder = load_encoder(args.encoder)
        sizes.update(L=encoder.L, V=encoder.V)
    return DiT_models[model](**sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    models = ["DiT-XL/2", "DiTSEM-XL/2"] if ON_GPU else ["DiTSEM-S/2"]
    batches = [128, 256] if ON_GPU else [8]
    add("--model", nargs="+", default=models, choices=DiT_models, metavar="DIT", help="a DiT's name [%(default)s here]")
    add("--batch", nargs="+", type=int, default=batches, help="images per step [%(default)s here]")
    add("--rows", nargs="+", default=ROWS, help="variants, each with its flags in quotes [all of them]")
    add("--steps", type=int, default=30 if ON_GPU else 6, help="measured steps, after as many [%(default)s here]")
    add("--images", type=int, default=2048 if ON_GPU else 64, help="synthetic images [%(default)s here]")
    add("--image-size", type=int, default=256, help="pixels [%(default)s]")
    add("--data-path", help="folder of images [synthetic]")
    add("--vae", help="ema, mse, a directory or a hub id [Stable Diffusion's shape, untrained]")
    add("--encoder", help="SEM encoder [ViT-L/14, L=512, V=256, untrained]")
    add("--num-workers", type=int, default=default_num_workers(), help="data readers [%(default)s here]")
    args = parser.parse_args()
    peaks = {}  # FLOPs per second that the device reaches
    for chosen in map(options, args.rows):
        torch.backends.cuda.matmul.allow_tf32 = chosen.tf32
        peaks[chosen.precision, chosen.tf32] = peak_flops(chosen.precision, 8192 if ON_GPU else 4096)
    torch.cuda.empty_cache()  # the rows need the memory; without a GPU, nothing
    table, gflops = [], {}
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        data = make_data(root, args)
        for model in args.model:
            flops = 3 * forward_flops(build(model, args), args.image_size // 8)
            gflops[model] = flops / 1e9
            for batch in args.batch:
                first, first_losses = None, None
                for name in args.rows:
                    chosen = options(name)
                    peak = peaks[chosen.precision, chosen.tf32]
                    steps, losses, memory = train(name, model, batch, data, root, args)
                    rate = steps and steps * batch
                    first, first_losses = first or rate, first_losses or losses
                    ratios = losses and [one / other for one, other in zip(losses, first_losses)]
                    row = {
                        **{"": name, "model": model, "batch": batch},
                        "data": "images" if chosen.features_path is None else "features",
                        "checkpointing": chosen.checkpoint_activations,
                        **{"precision": chosen.precision, "TF32": ON_GPU and chosen.tf32},
                        "compiled": ON_GPU if chosen.compile is None else chosen.compile,
                        **{"steps/s": steps, "images/s": rate, "MFU": rate and rate * flops / peak},
                        **{"memory GiB": memory, "times the first": rate and rate / first},
                        "loss differs by": losses and max(abs(ratio - 1) for ratio in ratios),
                    }
                    table.append(row)
                    print(row, flush=True)
    tflops = {f"{precision}{'' if tf32 else ', no TF32'}": peak / 1e12 for (precision, tf32), peak in peaks.items()}
    more = dict(image_size=args.image_size, steps=args.steps, model_gflops_an_image=gflops, peak_tflops=tflops)
    record("train_options", table, **more)


if __name__ == "__main__":
    main()
