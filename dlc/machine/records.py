"""JSON files of ours as dataclasses: each field is a key, with the kind of its value.

@dataclass(frozen=True, kw_only=True)
class Pond(Record):
    depth: float = key(real_number(0))                      # in every file
    fish: int | None = key(or_null(whole_number(0)), None)  # a file without it is read as one that says null

Pond.read("pond.json")                          # ValueError, naming file and key, for a value missing or wrong
"""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlc.machine.cli import one_line
from dlc.machine.files import read_json

if TYPE_CHECKING:
    from typing import Self  # Python 3.11

FORMAT = 1  # of every record
LONGEST_VALUE = 48  # characters that an error shows of a value
DIGEST_OF = {"listing_sha256": " (the names of the images)"}  # said of a key that differs

#################################################################################
#                                Kinds of values                                #
#################################################################################

Kind = tuple[Callable[[Any], bool], str]  # a test of a JSON value, and words for what it has to be

TEXT: Kind = (lambda value: isinstance(value, str)), "text"
SWITCH: Kind = (lambda value: isinstance(value, bool)), "true or false"
OBJECT: Kind = (lambda value: isinstance(value, dict)), "an object"


def whole_number(low: int, high: int = 2**63 - 1) -> Kind:
    return (
        lambda value: type(value) is int and low <= value <= high,
        f"a whole number from {low:,}" + (f" to {high:,}" if high < 2**63 - 1 else " on"),
    )


def real_number(low: float, high: float = 1e300) -> Kind:
    """A finite number: Python's JSON also has NaN and infinities."""
    return (
        lambda value: type(value) in (int, float) and low <= value <= high,
        f"a number from {low:g}" + (f" to {high:g}" if high < 1e300 else " on"),
    )


def or_null(kind: Kind) -> Kind:
    fits, words = kind
    return (lambda value: value is None or fits(value)), f"{words} or null"


def list_of(kind: Kind, least: int = 0, most: int = 2**63) -> Kind:
    fits, words = kind
    return (
        lambda value: isinstance(value, list) and least <= len(value) <= most and all(map(fits, value)),
        f"a list{f' of {least:,} to {most:,}' if most < 2**63 else ''}, each {words}",
    )


def one_of(*values: str) -> Kind:
    return (lambda value: isinstance(value, str) and value in values), f"one of {', '.join(values)}"


def check_values(where: object, values: Mapping, kinds: Mapping[str, Kind], needed: Iterable[str] = ()) -> None:
    """Raise ValueError, naming where and key, for a value of another kind than its key's, and for a missing needed key.

    Keys without a kind are ignored.
    """
    for name, (fits, words) in kinds.items():
        if name in values and not fits(values[name]):
            raise ValueError(f"{where}: {name} is {one_line(repr(values[name])[:1000], 60)}, wanted {words}")
        if name in needed and name not in values:
            raise ValueError(f"{where}: {name} is missing, wanted {words}")


def told_apart(one: object, other: object) -> list[str]:
    """Two values that differ, as texts that differ: of long ones, the part where they do so."""
    # what a dict holds, other keys describe
    texts = ["some" if isinstance(value, dict) else repr(value) for value in (one, other)]
    start = max(0, len(os.path.commonprefix(texts)) - 16)
    start, end = start * (max(map(len, texts)) > LONGEST_VALUE), start + LONGEST_VALUE
    return [
        text if len(text) <= LONGEST_VALUE else f"{'…' * (start > 0)}{text[start:end]}{'…' * (end < len(text))}"
        for text in texts
    ]


def differences(there: Mapping, here: Mapping, outer: str = "") -> str:
    """How a dict from disk differs from one of this launch, in words; "" if all keys of the latter agree.

    A dict within a dict is compared key by key. outer: said before each key.
    """
    found = {}
    for name, value in here.items():
        other, of, name = there.get(name), DIGEST_OF.get(name, ""), outer + name
        if isinstance(value, dict) and isinstance(other, dict):
            found[name] = differences(other, value, f"{name}.")
        elif other != value:
            found[name] = "{} {} there, {} here{}".format(name, *told_apart(other, value), of)
    found = {name: words for name, words in found.items() if words}
    names = list(found)[4:] if len(found) > 5 else []
    shown = [words for name, words in found.items() if name not in names]
    return "; ".join(shown + ([f"other values of {', '.join(names)}"] if names else []))


#################################################################################
#                                    Records                                    #
#################################################################################


def key(kind: Kind, default: Any = MISSING, *, decides: bool = True, name: str | None = None) -> Any:
    """A key of a file, as a field of its `Record`.

    Args:
        kind: what its value has to be.
        default: the value where a file lacks the key [it may not].
        decides: whether what the file describes depends on it: by these keys two records are compared.
        name: the key, if it is not the field's name.
    """
    metadata = dict(kind=kind, decides=decides, name=name)
    if isinstance(default, (list, dict)):
        return field(default_factory=type(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class Record:
    """The base of such a dataclass. A field that is not made by `key` is not in the file."""

    @classmethod
    def keys(cls) -> dict[str, Field]:
        """The field of each key but format_version."""
        return {one.metadata["name"] or one.name: one for one in fields(cls) if one.metadata}

    @classmethod
    def read(cls, path: Path, also_needed: Iterable[str] = ()) -> "Self":
        """The record in a file. Raises ValueError, naming file and key, for a value that is missing or of another kind.

        Args:
            also_needed: keys that must be there although they have defaults.
        """
        return cls.from_json(read_json(path), path, also_needed)

    @classmethod
    def from_json(cls, values: dict, where: object, also_needed: Iterable[str] = ()) -> "Self":
        """The record in a dict, which error lines call `where`. Raises ValueError as `read` does, and for a newer
        format."""
        check_values(where, values, dict(format_version=whole_number(1)))
        version = values.get("format_version", FORMAT)
        if version > FORMAT:
            raise ValueError(f"{where} has format {version}, this program reads format {FORMAT}: update it")
        keys = cls.keys()
        needed = {name for name, one in keys.items() if one.default is one.default_factory is MISSING}
        check_values(where, values, {name: one.metadata["kind"] for name, one in keys.items()}, needed | {*also_needed})
        return cls(**{one.name: values[name] for name, one in keys.items() if name in values})

    def to_json(self) -> dict:
        """The dict that the file holds."""
        return dict(format_version=FORMAT, **{name: getattr(self, one.name) for name, one in self.keys().items()})

    def settings(self) -> dict:
        """What decides what the file describes, by key."""
        return {name: getattr(self, one.name) for name, one in self.keys().items() if one.metadata["decides"]}

    def difference(self, there: "Record") -> str:
        """How the settings of another record differ from these, in words; "" where they do not."""
        return differences(there.settings(), self.settings())
