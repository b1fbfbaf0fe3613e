"""What each training option buys in speed and memory: the variants of train_options/ in turn, over the same data.

    python -m benchmarks.train_options

Images are photograph-like, VAE and encoder have random weights, on which a rate does not depend, and the features are
extracted from these images, so every row trains on the same data. The rate is that of the second of two lines of
metrics.jsonl: it includes data, optimizer, EMA and logging, but not compiling.
"""

import argparse
import importlib
import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.extraction import write_networks, write_photographs
from benchmarks.record import ON_GPU, ROOT, flags, flags_of, forward_flops, peak_flops, record, run_script
from dlc.machine.processes import default_num_workers
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
ACCELERATE = ["-m", "accelerate.commands.launch"]
LAUNCH = [*ACCELERATE, *"--num_processes 1 --num_machines 1 --dynamo_backend no --mixed_precision no".split()]


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
    write_photographs(root / "images", args.images)
    with_codes = any(DiT_models[model].conditioning == "codes" for model in args.model)
    write_networks(root, with_codes)
    read = flags(data_path=root / "images", image_size=args.image_size, vae=root / "vae", flip="none")
    encoder, features = root / "sem", flags(features_path=root / "features")
    more = flags(encoder=encoder if with_codes else "none", num_workers=args.num_workers)
    run_script("extract_features_withdlc.py", *read, *features, *more, "--posterior", "moments", "--dtype", "float32")
    return dict(images=read, encoder=flags(encoder=encoder), features=features)


def train(
    row: str, model: str, batch: int, data: dict, root: Path, args: argparse.Namespace, launch: list = LAUNCH
) -> tuple:
    """Steps per second of the variant and its losses, or None for both if it is out of memory; and the peak in GiB."""
    variant, *given = row.split()
    source = data["features"]
    if options(row).features_path is None:
        source = data["images"] + (data["encoder"] if DiT_models[model].conditioning == "codes" else [])
    results = root / "results"
    shutil.rmtree(results, ignore_errors=True)  # of a row that failed
    sizes = flags(model=model, results_dir=results, global_batch_size=batch, max_steps=2 * args.steps)
    rest = flags(log_every=args.steps, sample_every=0, num_workers=args.num_workers)
    command = [*launch, f"train_options/{variant}.py", *sizes, *rest, *source, *given]
    failed, memory = run(*command, output=root / "output.txt")
    if failed:
        return None, None, failed
    lines = [json.loads(line) for line in (results / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(results)  # its checkpoint may be of 13 GB
    return lines[-1]["steps_per_second"], [line["loss"] for line in lines], lines[-1]["peak_memory_gib"] or memory


def main() -> None:
    parser, add = flags_of(__doc__)
    add("--model", "train these models", ["DiT-XL/2", "DiTSEM-XL/2"], ["DiTSEM-S/2"], choices=DiT_models, metavar="DIT")
    add("--batch", "train on this many images per step", [128, 256], [8])
    add("--rows", "measure these variants, each with its flags in quotes [all]", ROWS)
    add("--steps", "measure this many steps, after as many", 30, 6)
    add("--images", "make this many synthetic images", 2048, 64)
    add("--image-size", "make images of this size, pixels", 256)
    add("--num-workers", "use this many data readers", default_num_workers())
    args = parser.parse_args()
    peaks = {}  # FLOPs per second that the device reaches
    for chosen in map(options, args.rows):
        torch.backends.cuda.matmul.allow_tf32 = chosen.tf32
        peaks[chosen.precision, chosen.tf32] = peak_flops(chosen.precision, 8192 if ON_GPU else 4096)
    torch.cuda.empty_cache()  # the rows need the memory; without a GPU, nothing
    table = []
    with tempfile.TemporaryDirectory() as root:
        data = make_data(Path(root), args)
        for model, batch in itertools.product(args.model, args.batch):
            flops = 3 * forward_flops(DiT_models[model](input_size=args.image_size // 8), args.image_size // 8)
            first, first_losses = None, None
            for name in args.rows:
                chosen = options(name)
                steps, losses, memory = train(name, model, batch, data, Path(root), args)
                rate = steps and steps * batch
                first, first_losses = first or rate, first_losses or losses
                differ = losses and max(abs(one / other - 1) for one, other in zip(losses, first_losses))
                row = {
                    **{"": name, "model": model, "batch": batch},
                    "data": "images" if chosen.features_path is None else "features",
                    "checkpointing": chosen.checkpoint_activations,
                    **{"precision": chosen.precision, "TF32": ON_GPU and chosen.tf32},
                    "compiled": ON_GPU if chosen.compile is None else chosen.compile,
                    **{"steps/s": steps, "images/s": rate},
                    "MFU": rate and rate * flops / peaks[chosen.precision, chosen.tf32],
                    **{"memory GiB": memory, "times the first": rate and rate / first, "loss differs by": differ},
                }
                table.append(row)
                print(row, flush=True)
    tflops = {f"{precision}{'' if tf32 else ', no TF32'}": peak / 1e12 for (precision, tf32), peak in peaks.items()}
    more = dict(image_size=args.image_size, steps=args.steps, peak_tflops=tflops)
    record("train_options", table, **more)


if __name__ == "__main__":
    main()
