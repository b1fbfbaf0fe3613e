"""A real script with a fault: `faulty FAULT SCRIPT flags…`, for forked.Run and, by its path, for launchers.

A system call fails, a wait is short, a gradient overflows, or a process gets a signal at a named point. FAULT is the
name of a function below and its arguments, joined by commas, or several joined by +. What such a function gives is
called at the end.
"""

import importlib
import itertools
import math
import os
import resource
import signal
import sys

import torch
from accelerate import Accelerator

import dlc.machine.processes
import dlc.machine.readers


def limited(kind, most):
    """The disk takes so many bytes of one file (FSIZE), or a process may open so many files (NOFILE)."""
    resource.setrlimit(getattr(resource, f"RLIMIT_{kind}"), (int(most), int(most)))


def said_soon():
    dlc.machine.processes.SAID_WAITING = 1


def at_call(owner, name, number, act, when=lambda *_: True, after=False):
    """act(arguments) before, or after, the Nth call of a function of `owner` for which when(arguments) holds."""
    function, calls = getattr(owner, name), itertools.count(1)

    def called(*arguments, **options):
        due = when(*arguments) and next(calls) == int(number)
        if due and not after:
            act(*arguments)
        result = function(*arguments, **options)
        if due and after:
            act(*arguments)
        return result

    setattr(owner, name, called)


def send(name):
    """Send this process a signal; by a name such as readers:SIGKILL its data readers, by group:SIGKILL it and they."""
    to, _, name = name.rpartition(":")
    readers = list(dlc.machine.readers.running)
    for pid in {"": [os.getpid()], "readers": readers, "group": [0]}[to]:
        os.kill(pid, signal.Signals[name])


def signalled(name, part, number, rank="0"):
    """`send` to this rank alone before the Nth file whose path has `part` in it is renamed."""
    if name.startswith("readers:"):
        dlc.machine.readers.PIPE_BYTES = 4096  # with all of it in a pipe, nobody would miss the reader
    here = os.environ.get("RANK", "0") == rank
    at_call(os, "replace", number, lambda *_: send(name), lambda source, target: here and part in str(target))


def signalled_looking(name, number, rank="0"):
    """As `signalled`, at the Nth look for a request to stop within a measurement or a preview."""
    from dlc.training.run import Run

    at_call(Run, "go_on", number, lambda run, *_: run.state.process_index == int(rank) and send(name))


def killed_syncing(name, number):
    """SIGKILL after the Nth time that a file or folder of this name was synced."""
    synced = lambda descriptor: os.readlink(f"/proc/self/fd/{descriptor}").endswith(f"/{name}")  # noqa: E731
    at_call(os, "fsync", number, lambda _: send("group:SIGKILL"), synced, after=True)


def killed_in_a_line(number):
    """SIGKILL when the Nth line of metrics.jsonl is written but for its end."""
    from dlc.training import run

    def cut_short(path, line):
        os.truncate(path, path.stat().st_size - 9)
        send("group:SIGKILL")

    at_call(run, "append_metrics", number, cut_short, after=True)


def nan_gradients(step):
    """At this step, though its loss is finite."""
    backward, calls = Accelerator.backward, itertools.count(1)

    def broken(self, loss, **kwargs):
        backward(self, loss * (math.nan if next(calls) == int(step) else 1), **kwargs)

    Accelerator.backward = broken


def skipping():
    """The fp16 scaler, on the CPU; gradients overflow in steps 3 and 5 to 7, in the last process."""
    from dlc.training import run

    create_accelerator, backward = run.create_accelerator, run.Run.backward

    def with_scaler(*args):
        accelerator, *others = create_accelerator(*args)
        accelerator.scaler = torch.amp.GradScaler("cpu")
        return accelerator, *others

    def overflowing(self, terms, t, num_timesteps):
        self.number = getattr(self, "number", self.first_step) + 1
        if self.number in (3, 5, 6, 7) and self.state.process_index == self.state.num_processes - 1:
            terms = dict(terms, loss=terms["loss"] * math.inf)
        backward(self, terms, t, num_timesteps)

    run.create_accelerator, run.Run.backward = with_scaler, overflowing


def spying():
    """Nothing is compiled; at the end a line says what would have been, and what else flags turn on."""
    from models import DiT, DiTBlock

    compiled, checkpointing, set_grad_checkpointing = [], [], DiT.set_grad_checkpointing
    DiTBlock.compile = lambda self, **keywords: compiled.append(self)
    DiT.set_grad_checkpointing = lambda self, on=True: checkpointing.append(on) or set_grad_checkpointing(self, on)
    return lambda: print(
        f"compiled: {len(compiled)} blocks; checkpointing: {any(checkpointing)}; TF32: "
        f"{torch.backends.cuda.matmul.allow_tf32}, {torch.backends.cudnn.allow_tf32}"
    )


def main():
    fault, script = sys.argv[1:3]
    ends = [globals()[name](*arguments) for name, *arguments in (one.split(",") for one in fault.split("+"))]
    sys.argv[:3] = [script]
    importlib.import_module(script).main()
    for end in filter(None, ends):
        end()


if __name__ == "__main__":
    main()
