"""Everything on a GPU in one command: what must be equal first, then what kernels, steps and scripts reach.

    python -m benchmarks.gpu --minutes 9 --only training sampling       # without --only: all of it

Each row is written to results/gpu-gpu.json as soon as it is measured. A row that would not end within the minutes is
put off: the same command goes on with it, as long as commit, card and sizes are the same. benchmarks/README.md explains
the columns. Networks and data are random, on which a rate does not depend; on a CPU the sizes are tiny.
"""

import argparse
import gc
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from benchmarks import extraction, kernels, loading, readme, sampling, steps, train_options
from benchmarks.checks import CHECKS, Unavailable
from benchmarks.record import DEVICE, ON_GPU, flags, flags_of, machine, result_path, run_script, show, write
from benchmarks.roofline import CARDS, Card, L, Roofline, V, card_of
from dlc.machine.cli import number, one_line
from dlc.machine.processes import default_num_workers, set_numerics

ALONE = "DDP, each process sees one GPU"
ANCESTORS = "the ancestors' way"
COLUMNS = ("part", "", "value", "unit", "expected", "of the data sheet", "memory GiB", "differs by", "bar", "said")
GPUS = torch.cuda.device_count() if ON_GPU else 2  # processes of the rows of several


@dataclass
class Bench:
    """What the rows share: flags, a folder, the card, and what some of them prepare for the others."""

    args: argparse.Namespace
    root: Path
    rows: list = field(default_factory=list)
    prepared: dict = field(default_factory=dict)

    @cached_property
    def card(self) -> Card | None:
        return card_of(torch.cuda.get_device_name()) if ON_GPU else None

    @cached_property
    def roofline(self) -> Roofline:
        """Of the card, or without one of another, for the model's sizes alone."""
        return Roofline(self.args.model, self.card or CARDS["H100"])

    def once(self, name: str, make: Callable, *inputs) -> object:
        """make(*inputs) at the first call with this name; what it returned at the others."""
        if name not in self.prepared:
            self.prepared[name] = make(*inputs)
        return self.prepared[name]

    def shares(self, passes_per_second: float, precision: str) -> dict:
        """The share of the data sheet's FLOPs that so many forward passes are."""
        known = self.card and precision != "fp32"
        return {"of the data sheet": self.roofline.share(passes_per_second) if known else None}


def check(name: str, bench: Bench) -> dict:
    differs, bound, *waits = CHECKS[name](DEVICE)
    said = f"waits for the GPU: {one_line(waits[0], 200)}" if waits else "ok" if differs <= bound else "differs"
    return {"differs by": differs, "bar": f"at most {bound:g}", "said": said}


def training(given: str, bench: Bench, launch: list = train_options.LAUNCH, gpus: int = 1, fsdp: bool = False) -> dict:
    """Images per second of a GPU in train_fast with these flags, on features, with all that a run does."""
    args = bench.args
    bench.once("features", loading.both_layouts, bench.root / "training", args.rows)
    data = dict(features=flags(features_path=bench.root / "training/shards"))
    row = f"train_fast {given}"
    steps_per_second, _, memory = train_options.train(row, args.model, args.batch, data, bench.root, args, launch)
    if steps_per_second is None:
        return {"said": memory}
    rate, n = steps_per_second * args.batch / gpus, args.batch // gpus
    parts, shares = Roofline(args.model, bench.roofline.card, gpus, fsdp).training(n), bench.shares(3 * rate, "bf16")
    expected = n / sum(parts.values()) if bench.card and given == "--compile" else None
    return kernels.row(rate, "images/s", expected, **{"memory GiB": memory}, **shares)


def training_on_several(how: str, bench: Bench) -> dict:
    """The same on all GPUs of the node, or in two processes on the CPU."""
    if GPUS == 1:
        raise Unavailable("needs several GPUs")
    one = "CUDA_VISIBLE_DEVICES=$LOCAL_RANK " if ON_GPU else ""
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", GPUS, "--no-python", "bash", "-c"]
    launch = {
        "DDP": [*train_options.LAUNCH, "--multi_gpu", "--num_processes", GPUS],
        "FSDP": [*train_options.ACCELERATE, "--config_file", "train_options/fsdp.yaml", "--num_processes", GPUS],
        ALONE: [*torchrun, f'{one}exec "$0" "$@"', sys.executable],
    }[how]
    return training("--compile", bench, launch, GPUS, how == "FSDP")


def drawing(precision: str, given: str, bench: Bench) -> dict:
    """Images per second of the sampling script, or if `given` is None of the ancestors' loop."""
    if not ON_GPU and "--cuda-graphs" in (given or []):
        raise Unavailable("CUDA graphs need a GPU")
    args, root = bench.args, bench.root / "sampling"
    shape = dict(batch=args.sampling_batch, batches=3 if ON_GPU else 2, L=L, V=V)
    sizes, folder = argparse.Namespace(**{**vars(args), **shape}), root / f"images {len(bench.rows)}"
    root.mkdir(exist_ok=True)
    bench.once("sampling", sampling.prepare, root, sizes)
    free_memory()
    if given is None:
        rate = sampling.draw_baseline(root, folder, sizes)
    else:
        rate, _ = sampling.script(root, folder, precision, given, sizes)
    sampler, guided = sampling.sampler_of(given or [])
    passes = len(sampler.times) + guided
    seconds = sum(bench.roofline.sampling(args.sampling_batch).values())
    expected = 2 / passes * args.sampling_batch / seconds if bench.card and precision == "bf16" else None
    return kernels.row(rate, "images/s", expected, **bench.shares(rate * passes, precision))


def same_bytes(bench: Bench) -> dict:
    """Shards that differ when extraction is compiled again, with an empty cache of kernels."""
    root, found = bench.root / "compiled twice", []
    root.mkdir()
    how = dict(precision=EXTRACTED, compile=ON_GPU, batch_size=min(32, bench.args.images // 2))
    sizes = argparse.Namespace(**{**vars(bench.args), **how, "images": 2 * how["batch_size"]})
    extraction.prepare(root, sizes)
    for cache in ("A", "B"):
        shutil.rmtree(root / "features", ignore_errors=True)
        extraction.rate_of_the_whole(root, sizes, TORCHINDUCTOR_CACHE_DIR=root / cache)
        found.append([path.read_bytes() for path in sorted((root / "features").rglob("*.npy"))])
    return kernels.row(sum(one != two for one, two in zip(*found)), f"of {len(found[0])} files differ")


def stage(command: str, tiny: str, bench: Bench) -> dict:
    """A benchmark of a stage as a whole, whose rows come into its own file, and on a GPU into its own table."""
    command += "" if ON_GPU else f" {tiny}"
    name, *words = command.split()
    kept = {} if ON_GPU else {"BENCHMARK_RESULTS": bench.root}
    run_script("-m", f"benchmarks.{name}", *words, **kept)
    return {"said": f"measured by python -m benchmarks.{command}: see its own table"}


BF16, TF32 = torch.bfloat16, torch.float32
EXTRACTED = "bf16" if ON_GPU else "fp32"  # without 16-bit products a CPU takes half an hour for both networks
AUTOTUNE = dict(mode="max-autotune-no-cudagraphs") if ON_GPU else {}
TRAINED, DRAWN = ("training", "bf16, compiled"), ("sampling", "250 steps, guided, bf16")
# fmt: off
ROWS = [  # part, name, minutes on an H100 with what it prepares, its function and that function's arguments
    *(("correctness", name, 0.4, check, (name,)) for name in CHECKS),
    ("ceilings", "copy", 0.1, kernels.copying, ()),
    ("ceilings", "qkv, bf16", 0.1, kernels.product, (1, 3, BF16, False)),
    ("ceilings", "fc1, bf16", 0.1, kernels.product, (1, 4, BF16, False)),
    ("ceilings", "fc2, bf16", 0.1, kernels.product, (4, 1, BF16, False)),
    ("ceilings", "gradient of fc1's weight, bf16", 0.1, kernels.product, (1, 4, BF16, True)),
    ("ceilings", "fc1, TF32", 0.1, kernels.product, (1, 4, TF32, False)),
    *(("attention", name, 0.1, kernels.attention, (name,)) for name in kernels.BACKENDS),
    *(("steps", f"{work}, {way}", 0.1 if place else 6.0, kernels.step, (work, way, "bf16"))
      for place, (work, way) in enumerate(steps.ROWS)),  # the first measures all
    ("steps", "training step, fp16, compiled", 1.0, kernels.step, (steps.TRAINING, steps.COMPILED, "fp16")),
    *(("steps", name, 0.3, kernels.part_of_a_step, (name,)) for name in
      ("AdamW", "EMA", "EMA as in fp16", "random numbers", "code table")),
    ("memory", "a step of the whole batch, compiled", 1.0, kernels.whole_step, (False, {})),
    ("memory", "the same, recomputed", 1.0, kernels.whole_step, (True, {})),
    (*TRAINED, 2.5, training, ("--compile",)),
    ("training", f"{ANCESTORS}: fp16, eager, recomputed", 2.5, training,
     ("--precision fp16 --no-compile --checkpoint-activations",)),
    (*DRAWN, 2.5, drawing, ("bf16", [])),
    *(("denoising", f"{images} images, {how}", 1.0, kernels.denoising, (images, how)) for images, how in
      ((kernels.N, "compiled"), (kernels.N, "GELU in the epilogue"), (1, "compiled"), (1, "CUDA graphs"),
       (4, "CUDA graphs"), (16, "CUDA graphs"))),
    *(("several GPUs", how, 2.5, training_on_several, (how,)) for how in
      ("DDP", "FSDP", ALONE)),
    ("extraction", "compiled twice", 2.0, same_bytes, ()),
    *((command.split()[0], f"benchmarks.{command}", minutes, stage, (command, tiny)) for command, minutes, tiny in (
        (f"extraction --precision {EXTRACTED}", 5.0, "--images 4 --batch-size 2"),
        ("extraction --batch-size 1 --images 64", 3.0, "--images 2"),
        ("prior", 4.0, "--model DLCPrior-Ti --L 16 --repeats 1"))),
    ("sampling", f"{ANCESTORS}: the same, fp32, eager", 2.5, drawing, ("fp32", None)),
    ("training", "fp16, compiled", 2.5, training, ("--precision fp16 --compile",)),
    ("sampling", "guided in half the steps, bf16", 1.5, drawing, ("bf16", sampling.HALVED)),
    ("sampling", "250 steps, guided, bf16, CUDA graphs", 1.5, drawing, ("bf16", ["--cuda-graphs"])),
    ("sampling", "DPM-Solver++, 25 steps, bf16", 1.0, drawing, ("bf16", ["--sampler", "dpmsolver++"])),
    ("memory", "the whole batch, max-autotune", 8.0, kernels.whole_step, (False, AUTOTUNE)),
]
# fmt: on
# what a row should reach on an H100, for other cards by their data sheets: its value, and the share of the sheet
BARS = {TRAINED: (550.0, 0.45), DRAWN: (4.0, None)}
SURPRISE = 1.25
ROUNDING = 0.05  # of 16-bit products: the largest mean relative difference from the same work done otherwise
PARTS_OF_ALL = tuple(dict.fromkeys(row[0] for row in ROWS))


def sizes_of(args: argparse.Namespace) -> dict:
    """The flags on which rows depend: a result with other ones is another result."""
    return {key: value for key, value in vars(args).items() if key not in ("minutes", "only", "dir")}


def measured_before(args: argparse.Namespace) -> list[dict]:
    """The rows of an earlier call that was cut off, without those that failed."""
    path = result_path("gpu")
    before = json.loads(path.read_text()) if path.is_file() else None
    if before is None or before["sizes"] != sizes_of(args) or before["machine"] != machine():
        return []
    return [row for row in before["rows"] if not (row["said"] or "").startswith("failed")]


def judge(row: dict, bench: Bench) -> list[str]:
    """What there is to say of a row's value, if it has one, beside its bar, which it gets, and what was expected."""
    said = []
    if row["value"] is None:  # the memory was full, for example
        return said
    if bench.card and (row["part"], row[""]) in BARS:
        least, share = BARS[row["part"], row[""]]
        least *= bench.card.flops / CARDS["H100"].flops
        row["bar"] = f"{least:.3g} {row['unit']}" + (f", {share:.0%} of the data sheet" if share else "")
        reached = row["value"] >= least and row["of the data sheet"] >= (share or 0)
        said.append("bar reached" if reached else "bar missed")
    if row["expected"] and not 1 / SURPRISE <= row["value"] / row["expected"] <= SURPRISE:
        said.append(f"a surprise: {row['value'] / row['expected']:.2f} times what was expected")
    checked = str(row.get("bar")).startswith("at most")  # against a bound of its own
    if (row.get("differs by") or 0) > ROUNDING and not checked:
        said.append("differs by more than rounding: its result is wrong")
    return said


def measure(bench: Bench, part: str, name: str, function: Callable, inputs: tuple) -> dict:
    """A row of the table. It says if it failed; the others go on."""
    row, threads = dict.fromkeys(COLUMNS), torch.get_num_threads()
    row.update({"part": part, "": name})
    set_numerics(tf32=True)  # as training and sampling do; extraction sets its own, and the number of threads
    try:
        row.update(function(*inputs, bench))
        row["said"] = "; ".join(filter(None, [row["said"], *judge(row, bench)])) or None
    except Unavailable as reason:
        row["said"] = str(reason)
    except Exception as error:  # whatever a script, a library or the card makes of it
        row["said"] = "failed: " + one_line(str(error)[-300:], 300)
    torch.set_num_threads(threads)
    torch._dynamo.reset()
    free_memory()
    return row


def free_memory() -> None:
    """Leave the card to the scripts. A compiled module refers to itself: without the collector it would stay there."""
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


def main() -> None:
    parser, add = flags_of(__doc__)
    add("--minutes", "start no row that would end after them", 9.0, type=number(float, 0))
    add("--only", "measure these parts [all]", [*PARTS_OF_ALL], choices=PARTS_OF_ALL)
    add("--model", "measure this DiTSEM", "DiTSEM-XL/2", "DiTSEM-Ti/8")
    add("--batch", "train on this many images per step", 256, 8)
    add("--steps", "measure this many steps, after as many", 20, 2)
    add("--rows", "make features of this many rows", 2048, 64)
    add("--sampling-batch", "draw this many images at once", 32, 2)
    add("--images", "extract this many images", 2048, 4)
    add("--num-workers", "use this many data readers", default_num_workers())
    add("--dir", "write temporary files here, 40 GB for DiTSEM-XL/2 [the system's]", None)
    args, start = parser.parse_args(), time.monotonic()
    rows = measured_before(args)
    done, put_off = {(row["part"], row[""]) for row in rows}, []
    with tempfile.TemporaryDirectory(dir=args.dir) as root:
        bench = Bench(args, Path(root), rows)
        for part, name, minutes, function, inputs in ROWS:
            if part not in args.only or (part, name) in done:
                continue
            spent = (time.monotonic() - start) / 60
            if spent + (minutes if ON_GPU else 0) > args.minutes:
                put_off.append(f"{part}, {name}")
                continue
            bench.rows.append(measure(bench, part, name, function, inputs))
            print({key: value for key, value in bench.rows[-1].items() if value is not None}, flush=True)
            write("gpu", bench.rows, sizes=sizes_of(args))
    if rows:
        show(rows)
    for page in readme.write_pages():
        print(f"{page}: written")
    if put_off:
        print(f"put off, the same command goes on with them: {'; '.join(put_off)}")


if __name__ == "__main__":
    main()
