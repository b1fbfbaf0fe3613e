"""A request to stop a run after a step, on which all processes agree."""

import math
import signal
import time

import torch
import torch.distributed as dist

from dlc.machine.processes import files_group
from dlc.machine.signals import STOPPING, on_first_signal

# beside the signals' numbers: the time is over; a process asked to stop for a reason of its own
TIME, ASKED = 999, 1000


class Stopped(Exception):
    """A request to stop cuts off what a later launch does, or what training can do without."""


class StopRequest:
    """A request to stop after a step: one of the signals STOPPING, the end of the time, or `ask`, in any process.

    Processes get a signal at different moments but must stop after the same step. They agree by an asynchronous
    all-reduce on the CPU (gloo) at each step, whose result is read one step later, so no rank blocks.

    Args:
        deadline: when to stop, by time.monotonic() [never].

    Attributes:
        reason: why this process asked to stop; None if it did not.
        steps: how many calls of `agreed` it takes until all processes know of a request.
    """

    def __init__(self, deadline: float = math.inf):
        self.deadline = deadline
        self.signal, self.reason, self.reduced, self.pending = None, None, None, None
        self.group = files_group()
        self.steps = 1 if self.group is None else 2
        on_first_signal(STOPPING, self._receive)

    def _receive(self, number):
        self.signal = self.signal or number

    def ask(self, reason: str) -> None:
        """Stop all processes after this step or the next, with a checkpoint: for an error that leaves time for one."""
        self.signal, self.reason = ASKED, self.reason or reason

    def here(self) -> int:
        """What this process alone knows: a signal's number, TIME, ASKED, or 0."""
        return self.signal or (TIME if time.monotonic() >= self.deadline else 0)

    def agreed(self) -> str | None:
        """Why all processes are to stop, in words, or None. All must call this equally often, and after each step."""
        number = self.here()
        if self.group is not None:
            reduced, pending = self.reduced, self.pending
            self.reduced = torch.tensor([number])
            self.pending = dist.all_reduce(self.reduced, dist.ReduceOp.MAX, group=self.group, async_op=True)
            number = 0
            if pending is not None:
                pending.wait()
                number = reduced.item()
        words = {0: None, TIME: "--stop-after", ASKED: "an error"}
        return words[number] if number in words else signal.Signals(number).name
