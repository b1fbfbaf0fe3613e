"""What a user may choose of a process or a sampler, beside a number of steps: the scripts make a flag of each."""
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """An argument of a process or of a sampler: its flag has its name, with dashes, and its default."""
    about: str                              # the flag's help
    low: float = -math.inf                  # of a number
    high: float = math.inf
    choices: tuple[str, ...] = ()           # of a text; else it is a number
    training_only: bool = False             # whether what a model predicts does not depend on it


def default_of(build: Callable, name: str) -> object:
    """The default of an argument."""
    return inspect.signature(build).parameters[name].default
