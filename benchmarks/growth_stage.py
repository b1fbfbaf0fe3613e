"""What a row of benchmarks/growth.py is, and how it is measured: in a process of its own."""

import contextlib
import ctypes
import gc
import importlib
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.npz import peak_kilobytes

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
