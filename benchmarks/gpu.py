"""Every bar for GPUs in one command: what must be equal first, then the rates, each beside the ancestors' way.

    python -m benchmarks.gpu --minutes 9
    python -m benchmarks.gpu --minutes 9 --only training sampling

Each row is written to results/gpu-gpu.json as soon as it is measured. A row that would take longer than what is left of
the minutes is put off: the same command goes on with it, as long as commit, card and sizes are the same. In the end the
pages are made anew, as by `python -m benchmarks.readme`. The rows are those of the other benchmarks, with their own
functions; networks and data are random, on which a rate does not depend.

`share of peak` is relative to a large matrix product on the same card in the same precision, `of the data sheet` to the
16-bit FLOPs without sparsity on the card's data sheet, as published shares are. `differs by` is the mean relative
difference of what should be equal. On a CPU the sizes are tiny and nothing is compared with a bar.
"""

import argparse
import gc
import json
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks import embedding, extraction, loading, prior, readme, sampling, train_options
from benchmarks.checks import CHECKS, Unavailable
from benchmarks.flops import forward_flops, peak_flops
from benchmarks.record import machine, result_path, show, write
from dlc.machine.cli import number, one_line
from dlc.machine.processes import default_num_workers, set_numerics
from models import DiT_models

ON_GPU = torch.cuda.is_available()
# dense bf16 and fp16, by a part of the card's name: of SXM cards, but for those that are named before
DATA_SHEET = {"H100 PCIe": 756.5e12, "NVL": 835.5e12, "H100": 989.4e12, "H200": 989.4e12, "A100": 312e12}
ANCESTORS = "the ancestors' way"
COLUMNS = ("part", "", "images/s", "codes/s", "ms", "share of peak", "of the data sheet", "memory GiB", "differs by")
COLUMNS += ("bar", "reached", "said")
L, V = 512, 256  # of every row


@dataclass
class Bench:
    """What the rows share: flags, a folder, and what some of them prepare for the others."""

    args: argparse.Namespace
    root: Path
    rows: list = field(default_factory=list)
    prepared: dict = field(default_factory=dict)

    def once(self, name, make, *inputs):
        """make(*inputs), at the first call with this name; what it returned, at the others."""
        if name not in self.prepared:
            self.prepared[name] = make(*inputs)
        return self.prepared[name]

    def flops(self):
        """FLOPs of a forward pass on one latent."""
        with torch.device("meta"):
            model = DiT_models[self.args.model](L=L, V=V)
        return forward_flops(model, 32)

    def shares(self, flops_per_second, precision):
        """What that is of the card's peak, as measured and as printed."""
        peak = self.once(f"peak in {precision}", peak_flops, precision, 8192 if ON_GPU else 256)
        sheet = next(
            (peak for card, peak in DATA_SHEET.items() if ON_GPU and card in torch.cuda.get_device_name()), None
        )
        return {
            "share of peak": flops_per_second / peak,
            "of the data sheet": flops_per_second / sheet if sheet and precision != "fp32" else None,
        }

    def value(self, part, name, column):
        """What a row that is measured says in a column; None if there is none."""
        return next((row[column] for row in self.rows if (row["part"], row[""]) == (part, name)), None)


#################################################################################
#                                     Rows                                      #
#################################################################################


def check(name, bench):
    try:
        differs, bound, *waits = CHECKS[name](torch.device("cuda" if ON_GPU else "cpu"))
    except Unavailable as reason:
        return {"said": str(reason)}
    said = f"waits for the GPU: {one_line(waits[0], 200)}" if waits else None
    return {"differs by": differs, "bar": f"at most {bound:g}", "reached": differs <= bound, "said": said}


def training(flags, bench):
    """Images a second of train_fast with these flags, on features, with all that a run does."""
    args = bench.args

    def features():
        loading.both_layouts(bench.root / "training", args.rows)
        return bench.root / "training/shards"

    data = dict(features=["--features-path", bench.once("features", features)])
    parts = parts_of_a_batch() if "--checkpoint-activations" not in flags else 1
    row = f"train_fast {flags} --grad-accum {parts}"
    rate, _, memory = train_options.train(row, args.model, args.batch, data, bench.root, args)
    if rate is None:
        return {"said": memory}
    precision = train_options.options(row).precision
    shares = bench.shares(3 * bench.flops() * rate * args.batch, precision)
    said = f"in {parts} micro-batches" if parts > 1 else None
    return {"images/s": rate * args.batch, "memory GiB": memory, **shares, "said": said}


def parts_of_a_batch():
    """Into how many micro-batches a batch of DiTSEM-XL/2 is cut: 256 images take over 80 GB (benchmarks/memory.py)."""
    return 2 if ON_GPU and torch.cuda.get_device_properties(0).total_memory < 120e9 else 1


def drawing(precision, flags, bench):
    """Images a second of the sampling script, or if flags is None of the ancestors' loop."""
    args, root = bench.args, bench.root / "sampling"
    sizes = argparse.Namespace(
        **{**vars(args), "batch": args.sampling_batch, "batches": 3 if ON_GPU else 2, "L": L, "V": V}
    )
    root.mkdir(exist_ok=True)
    bench.once("sampling", sampling.prepare, root, sizes)
    free_memory()
    folder = root / f"images {len(bench.rows)}"
    if flags is None:
        rate = sampling.draw_baseline(root, folder, sizes)
    else:
        rate, _ = sampling.script(root, folder, precision, flags, sizes)
    sampler, guided = sampling.sampler_of(flags or [])
    return {"images/s": rate, **bench.shares(rate * (len(sampler.times) + guided) * bench.flops(), precision)}


def extracting(way, bench):
    """Images a second of one of extraction's parts, or of the script."""
    args, root = bench.args, bench.root / "extraction"
    sizes = argparse.Namespace(
        **{**vars(args), "precision": "bf16", "compile": ON_GPU, "batch_size": min(32, args.images)}
    )
    root.mkdir(exist_ok=True)
    bench.once("extraction", extraction.prepare, root, sizes)
    if way == ANCESTORS:  # one image after the other, in float32
        few = argparse.Namespace(
            **{**vars(sizes), "precision": "fp32", "compile": False, "batch_size": 1, "images": min(32, args.images)}
        )
        return {"images/s": extraction.rates_of_the_parts(root, few, tf32=True)["both networks"]}
    rates = bench.once("parts", extraction.rates_of_the_parts, root, sizes)
    return {"images/s": extraction.rate_of_the_whole(root, sizes) if way == "the whole" else rates[way]}


def embedding_codes(way, bench):
    args, width = bench.args, DiT_models[bench.args.model].hidden_size
    device = torch.device("cuda" if ON_GPU else "cpu")
    return {"ms": embedding.milliseconds(way, device, args.batch, L, V, width)}


def training_a_prior(name, bench):
    """Codes a second of a row of training of benchmarks/prior.py."""
    sizes = sizes_of_a_prior()
    return {"codes/s": sizes.train_batch / bench.once("a prior's steps", prior.seconds_of_steps, sizes)[name]}


def drawing_codes(name, steps, bench):
    """Codes a second of a row of sampling of benchmarks/prior.py."""
    sizes, rows = sizes_of_a_prior(), {(row[0], row[2]): row for row in prior.sampling_rows(L)}
    wanted, row = [rows[one] for one in DRAWN_CODES.values()], rows[name, steps]
    seconds = bench.once("a prior's calls", prior.seconds_of_calls, wanted, sizes)[prior.work_of(row, L)]
    return {"codes/s": sizes.batch / (prior.calls_per_code(row, sizes) * seconds)}


def sizes_of_a_prior():
    return prior.argument_parser().parse_args([] if ON_GPU else ["--model", "DLCPrior-Ti"])


# part, name, the minutes that it takes on an H100 with what it prepares, its function and that function's argument
OURS, COMPILED_FP16 = "bf16, compiled", "fp16, compiled"
DRAWN, PARTS = "250 steps, guided, bf16", ("decoding", "both networks", "the whole")
DRAWN_CODES = {  # of a prior, by name: a row of benchmarks/prior.py and its steps
    "sampling, first hitting, a call a token": ("first-hitting", L),
    f"{ANCESTORS}: sampling, 1,024 analytic steps": (f"{prior.PUBLISHED}, analytic", 1024),
}
ROWS = [
    *(("correctness", name, 0.4, check, (name,)) for name in CHECKS),
    ("training", OURS, 2.5, training, ("--compile",)),
    (
        "training",
        f"{ANCESTORS}: fp16, eager, recomputed",
        2.5,
        training,
        ("--precision fp16 --no-compile --checkpoint-activations",),
    ),
    ("sampling", DRAWN, 2.5, drawing, ("bf16", [])),
    ("sampling", f"{ANCESTORS}: the same, fp32, eager", 2.5, drawing, ("fp32", None)),
    *(("extraction", name, 3.0, extracting, (name,)) for name in PARTS),
    ("extraction", f"{ANCESTORS}: an image at a time, fp32", 1.0, extracting, (ANCESTORS,)),
    ("embedding", embedding.GATHERED, 0.2, embedding_codes, (embedding.GATHERED,)),
    ("embedding", f"{ANCESTORS}: {embedding.ONE_HOT}", 0.2, embedding_codes, (embedding.ONE_HOT,)),
    ("prior", "training, bf16, compiled", 2.0, training_a_prior, ("ours, compiled",)),
    ("prior", f"{ANCESTORS}: training, bf16, eager", 2.0, training_a_prior, (prior.PUBLISHED,)),
    *(("prior", name, 1.0, drawing_codes, row) for name, row in DRAWN_CODES.items()),
    ("training", COMPILED_FP16, 2.5, training, ("--precision fp16 --compile",)),
    ("training", "bf16, eager", 2.5, training, ("--no-compile",)),
    ("sampling", "guided in half the steps, bf16", 1.5, drawing, ("bf16", sampling.ROWS[5][2])),
    ("sampling", f"{DRAWN}, CUDA graphs", 1.5, drawing, ("bf16", ["--cuda-graphs"])),
    ("sampling", "DPM-Solver++, 25 steps, bf16", 1.0, drawing, ("bf16", ["--sampler", "dpmsolver++"])),
]
PARTS_OF_ALL = tuple(dict.fromkeys(row[0] for row in ROWS))


def judge(bench, row):
    """Add the bar of a row that has one, and whether it is reached; on a CPU, which they are not for, neither."""
    part, name = row["part"], row[""]
    step = bench.value("training", OURS, "images/s")
    slowest = [bench.value("extraction", name, "images/s") for name in PARTS[:2]]
    if not ON_GPU or row["images/s"] is row["ms"] is None:
        return
    if (part, name) == ("training", OURS) and row["of the data sheet"] is not None:
        row.update({"bar": "50% of the data sheet", "reached": row["of the data sheet"] >= 0.5})
    elif (part, name) == ("sampling", DRAWN):
        row.update({"bar": "4.5 images/s", "reached": row["images/s"] >= 4.5})
    elif (part, name) == ("extraction", "the whole") and None not in slowest:
        row.update({"bar": "90% of its slowest part", "reached": row["images/s"] >= 0.9 * min(slowest)})
    elif (part, name) == ("embedding", embedding.GATHERED) and step:
        milliseconds = 1000 * bench.args.batch / step
        row.update({"bar": f"2% of a step of {milliseconds:.0f} ms", "reached": row["ms"] <= 0.02 * milliseconds})


#################################################################################
#                                   The whole                                   #
#################################################################################


def sizes_of(args):
    """The flags on which rows depend: a result with other ones is another result."""
    return {key: value for key, value in vars(args).items() if key not in ("minutes", "only", "dir")}


def measured_before(args):
    """The rows of an earlier call that was cut off, without those that failed."""
    path = result_path("gpu")
    before = json.loads(path.read_text()) if path.is_file() else None
    if before is None or before["sizes"] != sizes_of(args) or before["machine"] != machine():
        return []
    return [row for row in before["rows"] if not (row["said"] or "").startswith("failed")]


def measure(bench, part, name, function, inputs):
    """A row of the table. What fails is told in it, and the others go on."""
    row, threads = dict.fromkeys(COLUMNS), torch.get_num_threads()
    row.update({"part": part, "": name})
    set_numerics(tf32=True)  # as training and sampling do; extraction sets its own, and the number of threads
    try:
        row.update(function(*inputs, bench))
    except Exception as error:  # whatever a script, a library or the card makes of it
        row["said"] = "failed: " + one_line(str(error)[-300:], 300)
    torch.set_num_threads(threads)
    free_memory()
    return row


def free_memory():
    """Leave the card to the scripts. A compiled module refers to itself: without the collector it would stay there."""
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


def argument_parser():
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


def main():
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
            for row in bench.rows:  # a bar may depend on a row that was put off
                judge(bench, row)
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
