"""Options of a process or a sampler that a user may set, beside the number of steps: each is a flag of the scripts."""
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
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
    """The default of an argument, of a class also one that its constructor passes on to a base."""
    signatures = map(inspect.signature, getattr(build, "__mro__", [build]))
    return next(one.parameters[name].default for one in signatures if name in one.parameters)


def uses_of(owners: Iterable[tuple[str, Callable, Mapping[str, Option]]]) -> dict[str, dict]:
    """Who has which options, {name: {(Option, default): [owner, ...]}}.

    owners: a name, what it builds, and its options; a name may come twice.
    """
    uses = {}
    for owner, build, options in owners:
        for name, option in options.items():
            had = uses.setdefault(name, {}).setdefault((option, default_of(build, name)), [])
            had += [owner] if owner not in had else []
    return uses
