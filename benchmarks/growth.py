"""How time and memory of each stage grow with its work: 1, 10 and 100 times as many rows, samples, tokens, pixels.

    python -m benchmarks.growth
    python -m benchmarks.growth --only "listing" "one file per image"     # rows whose name holds one of these

Each measurement runs the project's own functions in a process of its own, which does the same work at a tiny size
first. Seconds are the best of up to five; `MiB` is what the process's memory rises by at most, inputs included. An
exponent is the slope of log time, or of log memory, between the last two sizes: 1 where twice the work takes twice as
long. Above STEEP, the last column says why. The files lie in a temporary folder; most are links to a few.
"""

import argparse
import contextlib
import ctypes
import gc
import importlib
import math
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.npz import peak_kilobytes
from benchmarks.record import record

STEEP = 1.15  # an exponent that wants a reason: caches and the first use of memory make up to 0.1
LEAST_MIB = 8  # of memory, below which an exponent says nothing
REPEATS, ENOUGH_SECONDS = 5, 2.0  # of a measurement: at most, and in all
MODULES = [f"benchmarks.growth_{name}" for name in ("features", "samples", "networks", "processes")]
STAGES = {}  # by (name, grows), once `stages` has imported MODULES


@dataclass(frozen=True)
class Stage:
    """A row of the table.

    Attributes:
        name: what is measured.
        grows: what there is more and more of.
        sizes: how much of it.
        tiny: a size for the warm-up, and for --tiny.
        open: open(folder, size) gives the work, a function without arguments; or, of a stage that measures itself,
            seconds and MiB.
        prepare: prepare(folder, size) writes what `open` reads; stages that share it share the folder.
        why: why an exponent is above STEEP.
    """

    name: str
    grows: str
    sizes: tuple[int, ...]
    tiny: int
    open: Callable
    prepare: Callable | None
    why: str | None

    def sizes_of(self, tiny: bool) -> tuple[int, ...]:
        return (self.tiny, 4 * self.tiny) if tiny else self.sizes

    def folder(self, root: Path, size: int) -> Path:
        return root / f"{(self.prepare or self.open).__name__}-{size}"


def stage(name, grows, sizes, tiny, prepare=None, why=None):
    """Make a function `open` a stage: see `Stage`."""

    def add(function):
        STAGES[name, grows] = Stage(name, grows, sizes, tiny, function, prepare, why)
        return function

    return add


def stages() -> dict[tuple[str, str], Stage]:
    for module in MODULES:
        importlib.import_module(module)
    return STAGES


#################################################################################
#                          In a process of its own                              #
#################################################################################


def prepare(key: tuple[str, str], root: Path, size: int) -> None:
    """Write what a stage reads at a size, unless another stage has done so."""
    chosen = stages()[key]
    folder = chosen.folder(root, size)
    if not folder.exists():
        folder.mkdir(parents=True)
        if chosen.prepare:
            chosen.prepare(folder, size)


def measure(key: tuple[str, str], root: Path, size: int) -> tuple[float, float]:
    """The seconds of a stage's work, and the MiB that memory rises by."""
    chosen = stages()[key]
    work = chosen.open(chosen.folder(root, chosen.tiny), chosen.tiny)
    if isinstance(work, tuple):
        return chosen.open(chosen.folder(root, size), size)
    work()  # loads libraries, starts threads
    del work
    before = reset_peak()
    work, seconds = chosen.open(chosen.folder(root, size), size), []
    while len(seconds) < REPEATS and sum(seconds) < ENOUGH_SECONDS:
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds), (int(peak_kilobytes()) - before) / 1024


def reset_peak() -> int:
    """Give free memory back, and begin this process's peak of memory anew. Returns the kilobytes in use."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # another libc than glibc
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return int(peak_kilobytes())


def answer(sender, function, *arguments):
    sender.send(function(*arguments))


def in_a_process(function, *arguments):
    """function(*arguments) in a process of its own, forked from one that has imported everything and done nothing.

    Raises RuntimeError where it ends without an answer, as when memory is short.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(MODULES)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(sender, function, *arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f"{function.__name__}{arguments} ended early") from None
    finally:
        process.join()


#################################################################################
#                                   Table                                       #
#################################################################################


def exponent(sizes, values, least=0.0) -> float | None:
    """The slope of log value over log size between the last two sizes; None where a value is below `least`."""
    if min(values[-2:]) <= least:
        return None
    return math.log(values[-1] / values[-2]) / math.log(sizes[-1] / sizes[-2])


def row_of(chosen: Stage, sizes, measured) -> dict:
    """A row of the table, of (seconds, MiB) at each size."""
    seconds, memory = zip(*measured)
    exponents = exponent(sizes, seconds), exponent(sizes, memory, LEAST_MIB)
    steep = any(one is not None and one > STEEP for one in exponents)
    return {
        "": chosen.name,
        "grows": chosen.grows,
        "from … to": " / ".join(f"{size:,}" for size in sizes),
        "seconds": " / ".join(f"{value:.2g}" if value < 100 else f"{value:.0f}" for value in seconds),
        "exponent": exponents[0],
        "MiB": " / ".join(f"{value:,.0f}" for value in memory),
        "memory exponent": exponents[1],
        "why": (chosen.why or "not known") if steep else None,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="WORDS", help="measure rows whose name holds one of these [all]")
    parser.add_argument("--tiny", action="store_true", help="try it out: sizes so small that they say nothing")
    parser.add_argument("--dir", help="folder for the temporary files [the system's]")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=args.dir) as root:
        for key, chosen in stages().items():
            if args.only and not any(words in chosen.name for words in args.only):
                continue
            sizes, measured = chosen.sizes_of(args.tiny), []
            for size in dict.fromkeys((chosen.tiny, *sizes)):
                in_a_process(prepare, key, Path(root), size)
            for size in sizes:
                measured.append(in_a_process(measure, key, Path(root), size))
            rows.append(row_of(chosen, sizes, measured))
            print(rows[-1], flush=True)
    record("growth", rows)


if __name__ == "__main__":
    from benchmarks import growth  # the stages add themselves to the module of this name, not to __main__

    growth.main()
