"""A share of a set that several launches make at once, such as the tasks of a job array, each without a launcher."""

import os
import re
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from dlc.machine.cli import NotHere


@dataclass(frozen=True)
class Part:
    """Part `index`, from 0, of `count`. Of blocks of numbers, the i-th belongs to part i % count.

    source: the flag or variable that says so.
    """

    index: int = 0
    count: int = 1
    source: str = field(default="--part", compare=False)

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def share(self, numbers: Iterable[int], block: int = 1) -> list[int]:
        """The numbers that belong to this part. block: consecutive numbers that belong together."""
        return [number for number in numbers if number // block % self.count == self.index]

    def said(self, what: str) -> list[str]:
        """A line for the log; none of all of it."""
        if self.count == 1:
            return []
        return [f"part {self} of the {what}, by {self.source}; --part 0/1 is all of them"]

    def said_left(self, left: list[int], what: str) -> str:
        """A line for the log: what other launches are left to make."""
        return f"done: part {self}; {len(left):,} {what} are left to other parts, of which the last completes the set"


WHOLE = Part()


def _part(text):
    """The argparse type of --part."""
    match = re.fullmatch(r"(\d{1,7})/(\d{1,7})", text)
    if not match or int(match[1]) >= int(match[2]):
        raise ArgumentTypeError(f"{text}: wanted i/n, such as 0/8, 1/8, … 7/8")
    return Part(int(match[1]), int(match[2]))


def add_part_flag(add: Callable, what: str) -> None:
    """The flag --part of a command that makes `what`, in the plural."""
    add(
        "--part",
        type=_part,
        metavar="I/N",
        help=f"make part I (from 0) of N parts of the {what}; other launches make the other parts in the same folder, "
        "at once or later, and the last one completes it [all, or in a SLURM job array the task's part]",
    )
    add("--task-id", "--total-num", action=NotHere, help="give --part I/N, with I from 0, or leave it out under SLURM")


def asked_part(flag: Part | None) -> Part:
    """What --part says; without it, what SLURM's variables say of a job array, and of tasks that no launcher joins.

    Raises ValueError where the array's tasks are not evenly spaced, so that they do not say which part is whose.
    """
    if flag is not None:
        return flag

    def number(variable, default):
        return int(os.environ.get(f"SLURM_{variable}") or default)

    index, count, sources = 0, number("ARRAY_TASK_COUNT", 1), []
    if count > 1:
        task, first, step = number("ARRAY_TASK_ID", 0), number("ARRAY_TASK_MIN", 0), number("ARRAY_TASK_STEP", 1)
        index, rest = divmod(task - first, step)
        sources.append("SLURM_ARRAY_TASK_ID")
        if rest or not 0 <= index < count:
            raise ValueError(
                f"SLURM_ARRAY_TASK_ID is {task}, one of {count} tasks that are not evenly spaced: say which part this "
                "one makes with --part I/N"
            )
    tasks = number("STEP_NUM_TASKS", 1)  # of srun; SLURM_NTASKS is also that of a batch script's or a shell's job
    if tasks > 1 and "RANK" not in os.environ:
        index, count = index * tasks + number("PROCID", 0), count * tasks
        sources.append("SLURM_PROCID")
    return Part(index, count, " and ".join(sources))
