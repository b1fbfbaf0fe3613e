"""What every benchmark shares: the machine and its peak, and its rows as a table and as a JSON file."""

import argparse
import datetime
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dlc.machine.cli import ArgumentParser
from dlc.machine.files import write_json
from dlc.machine.processes import PRECISIONS, versions

ROOT = Path(__file__).parents[1]
OWN_RESULTS = Path(__file__).parent / "results"
RESULTS = Path(os.environ.get("BENCHMARK_RESULTS", OWN_RESULTS))
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


def machine() -> dict:
    """Device, cores, memory, versions and commit; the commit ends in "+" where sources differ from it."""
    info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in info if line.startswith("model name")]

    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    written = [f":(top,exclude){path}" for path in ("benchmarks/results", "benchmarks/README.md", "README.md")]
    changed = git("status", "--porcelain", "-uno", ":/", *written)
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(asked, capture_output=True, text=True).stdout.split() if shutil.which("nvidia-smi") else []
    return dict(
        gpu=torch.cuda.get_device_name() if ON_GPU else None,
        **(dict(driver=driver[0], cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version()) if driver else {}),
        cpu=names[0] if names else platform.processor(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        python=platform.python_version(),
        **versions(),
        commit=git("rev-parse", "--short", "HEAD") + ("+" if changed else ""),
    )


def flags_of(doc: str) -> tuple[ArgumentParser, Callable]:
    """A benchmark's parser, and what adds a flag: add(name, help, default, the default on a CPU, if it is another)."""
    parser = ArgumentParser(doc)

    def add(flag, about, default, on_cpu=None, **kwargs):
        if on_cpu is not None:
            default, about = default if ON_GPU else on_cpu, f"{about} [%(default)s here]"
        values = default if isinstance(default, list) else [default]
        kwargs = dict(nargs="+" if values is default else None) | kwargs
        if isinstance(default, bool):
            kwargs = dict(action=argparse.BooleanOptionalAction)
        elif type(values[0]) is int:
            kwargs["type"] = int
        parser.add_argument(flag, default=default, help=about, **kwargs)

    return parser, add


def result_path(name: str) -> Path:
    """Where a benchmark's rows on this machine are written."""
    return RESULTS / f"{name}-{'gpu' if ON_GPU else 'cpu'}.json"


def show(rows: list[dict]) -> None:
    """Print rows (dicts of one set of keys) as a table."""
    cells = [list(rows[0])]
    cells += [[f"{value:,.4g}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


def write(name: str, rows: list[dict], **more) -> Path:
    """Write rows, with what they were measured on, to results/{name}-{cpu or gpu}.json, whole. Returns that path."""
    path, date = result_path(name), datetime.date.today().isoformat()
    command = " ".join(["python -m benchmarks." + Path(sys.argv[0]).stem, *sys.argv[1:]])
    path.parent.mkdir(exist_ok=True)
    write_json(path, dict(benchmark=name, command=command, date=date, machine=machine(), **more, rows=rows))
    return path


def record(name: str, rows: list[dict], **more) -> Path:
    """Print rows as a table and write them; see `show` and `write`. Returns the file's path."""
    show(rows)
    path = write(name, rows, **more)
    print(f"written to {path}")
    return path


def flags(**values) -> list[str]:
    """Words of a command line: flags(max_steps=3) is ["--max-steps", "3"]."""
    return [word for key, value in values.items() for word in ("--" + key.replace("_", "-"), str(value))]


def run_script(*command, **environment) -> str:
    """Run python with these arguments in the repository's root, with these variables more. Returns its output.

    Raises RuntimeError, with the end of its output, if it fails.
    """
    words, variables = [sys.executable, *map(str, command)], {name: str(value) for name, value in environment.items()}
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **variables})
    if ended.returncode:
        raise RuntimeError((ended.stdout + ended.stderr)[-3000:])
    return ended.stdout


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if ON_GPU:
        torch.cuda.synchronize()


def seconds_of(function: Callable[[], object], clock: Callable[[], float] | None = None) -> float:
    """Seconds that function() takes by a clock of time [the wall's on a GPU; on a CPU, CPU seconds of all threads, less
    affected by other work]."""
    clock = clock or (time.perf_counter if ON_GPU else time.process_time)
    synchronize()
    start = clock()
    function()
    synchronize()
    return clock() - start


def median_seconds(function: Callable[[], object], repeats: int) -> float:
    """The median of so many calls, after two others."""
    return statistics.median([seconds_of(function) for _ in range(repeats + 2)][2:])


def in_turns(functions: dict, turns: int) -> dict[object, list[float]]:
    """`seconds_of` each function, by name; the functions take turns."""
    seconds = {name: [] for name in functions}
    for _ in range(turns):
        for name, function in functions.items():
            seconds[name].append(seconds_of(function))
            print(f"{name}: {seconds[name][-1]:.3g} s", flush=True)
    return seconds


def forward_flops(model: torch.nn.Module, side: int) -> int:
    """FLOPs of a forward pass on one latent of side x side: two for each multiply-add of each matrix product."""
    D, P = model.pos_embed.shape[2], model.patch_size
    T = (side // P) ** 2
    block = 2 * T * D * (3 * D + D + 2 * 4 * D) + 4 * T * T * D + 2 * D * 6 * D
    ends = 2 * T * D * P * P * (model.in_channels + model.out_channels) + 2 * D * 2 * D
    return len(model.blocks) * block + ends + 2 * (256 * D + D * D)


def peak_flops(precision: str, size: int) -> float:
    """FLOPs per second of a product of two size x size matrices, the best of five; TF32 as torch is set."""
    a, b = (torch.randn(size, size, device=DEVICE, dtype=PRECISIONS[precision]) for _ in range(2))
    seconds = [seconds_of(lambda: a @ b, time.perf_counter) for _ in range(6)]
    return 2 * size**3 / min(seconds[1:])
