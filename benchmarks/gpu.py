"""Everything on a GPU in one command: what must be equal first, then the rates, each beside the ancestors' way.

    python -m benchmarks.gpu --minutes 9 --only training sampling       # without --only: all of it

Each row is written to results/gpu-gpu.json as soon as it is measured. A row that would not end within the minutes is
put off: the same command goes on with it, as long as commit, card and sizes are the same. At the end the pages are
written, as by `python -m benchmarks.readme`. The rows are those of the other benchmarks; networks and data are random,
on which a rate does not depend.

`share of peak` is relative to a large matrix product on the same card in the same precision, `of the data sheet` to the
16-bit FLOPs without sparsity on the card's data sheet, as published shares are. `differs by` is the mean relative
difference of what should be equal. On a CPU the sizes are tiny.
"""

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks import extraction, loading, prior, readme, sampling, train_options
from benchmarks.checks import CHECKS, Unavailable
from benchmarks.record import DEVICE, ON_GPU, flags, forward_flops, machine, peak_flops, result_path, show, write
from dlc.machine.cli import number, one_line
from dlc.machine.processes import default_num_workers, set_numerics
from models import DiT_models

# dense bf16 and fp16, by a part of the card's name: of SXM cards, but for those that are named before
DATA_SHEET = {"H100 PCIe": 756.5e12, "NVL": 835.5e12, "H100": 989.4e12, "H200": 989.4e12, "A100": 312e12}
ANCESTORS = "the ancestors' way"
COLUMNS = ("part", "", "images/s", "codes/s", "share of peak", "of the data sheet", "memory GiB", "differs by")
COLUMNS += ("bar", "said")
L, V = 512, 256  # of every row
PRIOR = [] if ON_GPU else ["--model", "DLCPrior-Ti"]


@dataclass
class Bench:
    """What the rows share: flags, a folder, and what some of them prepare for the others."""

    args: argparse.Namespace
    root: Path
    rows: list = field(default_factory=list)
    prepared: dict = field(default_factory=dict)

    def once(self, name: str, make: Callable, *inputs) -> object:
        """make(*inputs) at the first call with this name; what it returned at the others."""
        if name not in self.prepared:
            self.prepared[name] = make(*inputs)
        return self.prepared[name]

    def flops(self) -> int:
        """FLOPs of a forward pass on one latent."""
        with torch.device("meta"):
            model = DiT_models[self.args.model](L=L, V=V)
        return forward_flops(model, 32)

    def shares(self, flops_per_second: float, precision: str) -> dict:
        """Relative to the card's peak, as measured and as on its data sheet."""
        peak = self.once(f"peak in {precision}", peak_flops, precision, 8192 if ON_GPU else 256)
        card = torch.cuda.get_device_name() if ON_GPU else ""
        sheet = next((peak for name, peak in DATA_SHEET.items() if name in card), None)
        return {
            "share of peak": flops_per_second / peak,
            "of the data sheet": flops_per_second / sheet if sheet and precision != "fp32" else None,
        }


def check(name: str, bench: Bench) -> dict:
    try:
        differs, bound, *waits = CHECKS[name](DEVICE)
    except Unavailable as reason:
        return {"said": str(reason)}
    said = f"waits for the GPU: {one_line(waits[0], 200)}" if waits else "ok" if differs <= bound else "differs"
    return {"differs by": differs, "bar": f"at most {bound:g}", "said": said}


def training(given: str, bench: Bench) -> dict:
    """Images per second of train_fast with these flags, on features, with all that a run does."""
    args = bench.args
    bench.once("features", loading.both_layouts, bench.root / "training", args.rows)
    data = dict(features=flags(features_path=bench.root / "training/shards"))
    # eager, 256 images of DiTSEM-XL/2 take over 80 GB; compiled they fit (benchmarks/memory.py)
    small = ON_GPU and torch.cuda.get_device_properties(0).total_memory < 120e9
    parts = 2 if "--no-compile" in given and "checkpoint" not in given and small else 1
    row = f"train_fast {given} --grad-accum {parts}"
    rate, _, memory = train_options.train(row, args.model, args.batch, data, bench.root, args)
    if rate is None:
        return {"said": memory}
    shares = bench.shares(3 * bench.flops() * rate * args.batch, train_options.options(row).precision)
    said = f"in {parts} micro-batches" if parts > 1 else None
    return {"images/s": rate * args.batch, "memory GiB": memory, **shares, "said": said}


def drawing(precision: str, given: str, bench: Bench) -> dict:
    """Images per second of the sampling script, or if `given` is None of the ancestors' loop."""
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
    return {"images/s": rate, **bench.shares(rate * (len(sampler.times) + guided) * bench.flops(), precision)}


def extracting(way: str, bench: Bench) -> dict:
    """Images per second of one of extraction's parts, or of the script."""
    args, root = bench.args, bench.root / "extraction"
    how = dict(precision="bf16", compile=ON_GPU, batch_size=min(32, args.images))
    sizes = argparse.Namespace(**{**vars(args), **how})
    root.mkdir(exist_ok=True)
    bench.once("extraction", extraction.prepare, root, sizes)
    if way == ANCESTORS:  # one image after the other, in float32
        few = dict(precision="fp32", compile=False, batch_size=1, images=min(32, args.images))
        rates = extraction.rates_of_the_parts(root, argparse.Namespace(**{**vars(args), **few}), tf32=True)
        return {"images/s": rates["both networks"]}
    rates = bench.once("parts", extraction.rates_of_the_parts, root, sizes)
    return {"images/s": extraction.rate_of_the_whole(root, sizes) if way == "the whole" else rates[way]}


def training_a_prior(name: str, bench: Bench) -> dict:
    """Codes per second of a row of training of benchmarks/prior.py."""
    sizes = prior.argument_parser().parse_args(PRIOR)
    return {"codes/s": sizes.train_batch / bench.once("a prior's steps", prior.seconds_of_steps, sizes)[name]}


def drawing_codes(name: str, steps: int, bench: Bench) -> dict:
    """Codes per second of a row of sampling of benchmarks/prior.py."""
    sizes, rows = prior.argument_parser().parse_args(PRIOR), {(row[0], row[2]): row for row in prior.sampling_rows(L)}
    wanted, row = [rows[one] for one in DRAWN_CODES.values()], rows[name, steps]
    seconds = bench.once("a prior's calls", prior.seconds_of_calls, wanted, sizes)[prior.work_of(row, L)]
    return {"codes/s": sizes.batch / (prior.calls_per_code(row, sizes) * seconds)}


PARTS = ("decoding", "both networks", "the whole")
DRAWN_CODES = {  # of a prior, by name: a row of benchmarks/prior.py and its steps
    "sampling, first hitting, a call per token": ("first-hitting", L),
    f"{ANCESTORS}: sampling, 1,024 analytic steps": (f"{prior.PUBLISHED}, analytic", 1024),
}
# fmt: off
ROWS = [  # part, name, minutes on an H100 with what it prepares, its function and that function's arguments
    *(("correctness", name, 0.4, check, (name,)) for name in CHECKS),
    ("training", "bf16, compiled", 2.5, training, ("--compile",)),
    ("training", f"{ANCESTORS}: fp16, eager, recomputed", 2.5, training,
     ("--precision fp16 --no-compile --checkpoint-activations",)),
    ("sampling", "250 steps, guided, bf16", 2.5, drawing, ("bf16", [])),
    ("sampling", f"{ANCESTORS}: the same, fp32, eager", 2.5, drawing, ("fp32", None)),
    *(("extraction", name, 3.0, extracting, (name,)) for name in PARTS),
    ("extraction", f"{ANCESTORS}: an image at a time, fp32", 1.0, extracting, (ANCESTORS,)),
    ("prior", "training, bf16, compiled", 2.0, training_a_prior, ("ours, compiled",)),
    ("prior", f"{ANCESTORS}: training, bf16, eager", 2.0, training_a_prior, (prior.PUBLISHED,)),
    *(("prior", name, 1.0, drawing_codes, row) for name, row in DRAWN_CODES.items()),
    ("training", "fp16, compiled", 2.5, training, ("--precision fp16 --compile",)),
    ("training", "bf16, eager", 2.5, training, ("--no-compile",)),
    ("sampling", "guided in half the steps, bf16", 1.5, drawing, ("bf16", sampling.HALVED)),
    ("sampling", "250 steps, guided, bf16, CUDA graphs", 1.5, drawing, ("bf16", ["--cuda-graphs"])),
    ("sampling", "DPM-Solver++, 25 steps, bf16", 1.0, drawing, ("bf16", ["--sampler", "dpmsolver++"])),
]
BARS = {  # what a row should reach on an H100
    ("training", "bf16, compiled"): "50% of the data sheet",
    ("sampling", "250 steps, guided, bf16"): "4.5 images/s",
    ("extraction", "the whole"): "90% of the slower of decoding and both networks",
}
# fmt: on
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


def measure(bench: Bench, part: str, name: str, function: Callable, inputs: tuple) -> dict:
    """A row of the table. It says if it failed; the others go on."""
    row, threads = dict.fromkeys(COLUMNS), torch.get_num_threads()
    row.update({"part": part, "": name, "bar": BARS.get((part, name))})
    set_numerics(tf32=True)  # as training and sampling do; extraction sets its own, and the number of threads
    try:
        row.update(function(*inputs, bench))
    except Exception as error:  # whatever a script, a library or the card makes of it
        row["said"] = "failed: " + one_line(str(error)[-300:], 300)
    torch.set_num_threads(threads)
    free_memory()
    return row


def free_memory() -> None:
    """Leave the card to the scripts. A compiled module refers to itself: without the collector it would stay there."""
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=number(float, 0), default=9.0, help="start no row that would end after them [%(default)s]")
    add("--only", nargs="+", choices=PARTS_OF_ALL, default=PARTS_OF_ALL, help="parts to measure [all]")
    add("--model", default="DiTSEM-XL/2" if ON_GPU else "DiTSEM-Ti/8", help="a DiTSEM [%(default)s here]")
    add("--batch", type=int, default=256 if ON_GPU else 8, help="images of a training step [%(default)s here]")
    add("--steps", type=int, default=20 if ON_GPU else 2, help="measured steps, after as many [%(default)s here]")
    add("--rows", type=int, default=2048 if ON_GPU else 64, help="rows of the features [%(default)s here]")
    add("--sampling-batch", type=int, default=32 if ON_GPU else 2, help="images drawn at once [%(default)s here]")
    add("--images", type=int, default=2048 if ON_GPU else 4, help="images to extract [%(default)s here]")
    add("--num-workers", type=int, default=default_num_workers(), help="data readers [%(default)s here]")
    add("--dir", help="folder for temporary files, 40 GB for DiTSEM-XL/2 [the system's]")
    return parser


def main() -> None:
    args, start = argument_parser().parse_args(), time.monotonic()
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
