"""JSON files of ours as dataclasses: each field is a key, with the kind of its value and the format that introduced it.

@dataclass(frozen=True, kw_only=True)
class Pond(Record):
    FORMAT = 2
    depth: float = key(real_number(0))                      # in every file
    fish: int | None = key(or_null(whole_number(0)), None, since=2)  # in every file of format 2; older ones: None

Pond.read("pond.json")                          # ValueError, naming file and key, for a value missing or wrong
"""

from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from typing import ClassVar

from dlc.machine.files import check_values, differences, read_json, whole_number


def key(kind, default=MISSING, *, since: int = 1, needed: bool = True, decides: bool = True, name: str | None = None):
    """A key of a file, as a field of its `Record`.

    Args:
        kind: the test of its value and the words for it, see `check_values`.
        default: the value of a file without the key [there is none].
        since: the format that introduced the key; from that format on it must be there.
        needed: False for a key that may be missing in every format.
        decides: whether what the file describes depends on it: by these keys two records are compared.
        name: the key, if it is not the field's name.
    """
    metadata = dict(kind=kind, since=since, needed=needed, decides=decides, name=name)
    if isinstance(default, list):
        return field(default_factory=list, metadata=metadata)
    return field(default=default, metadata=metadata)


class Record:
    """The base of such a dataclass. A field that is not made by `key` is not in the file.

    Attributes:
        FORMAT: the format that this program writes, and the newest that it reads.
        OLDEST: the format of a file without format_version; None where such a file is refused.
    """

    FORMAT: ClassVar[int]
    OLDEST: ClassVar[int | None] = None

    @classmethod
    def keys(cls) -> dict[str, Field]:
        """The field of each key but format_version."""
        return {one.metadata["name"] or one.name: one for one in fields(cls) if one.metadata}

    @classmethod
    def read(cls, path: Path, **options):
        """The record in a file. Raises ValueError, naming file and key, for a value that is missing or of another kind.

        Args:
            options: those of `from_json`.
        """
        return cls.from_json(read_json(path), path, **options)

    @classmethod
    def from_json(cls, values: dict, where, also_needed=()):
        """The record in a dict. Raises ValueError as `read` does, and for a newer format.

        Args:
            where: what error lines call it.
            also_needed: keys that must be there although they have defaults.
        """
        version, kind = values.get("format_version", cls.OLDEST), whole_number(1)
        check_values(where, values, dict(format_version=kind), ["format_version"] if version is None else [])
        if version > cls.FORMAT:
            raise ValueError(f"{where} is of format {version}, this program knows up to {cls.FORMAT}: update it")
        keys = cls.keys()
        needed = {name for name, one in keys.items() if one.metadata["needed"] and one.metadata["since"] <= version}
        check_values(where, values, {name: one.metadata["kind"] for name, one in keys.items()}, needed | {*also_needed})
        return cls(**{one.name: values[name] for name, one in keys.items() if name in values})

    def to_json(self) -> dict:
        """The dict that the file holds."""
        return dict(format_version=self.FORMAT, **{name: getattr(self, one.name) for name, one in self.keys().items()})

    def settings(self) -> dict:
        """What decides what the file describes, by key."""
        return {name: getattr(self, one.name) for name, one in self.keys().items() if one.metadata["decides"]}

    def difference(self, there: "Record") -> str:
        """How the settings of another record differ from these, in words; "" where they do not."""
        return differences(there.settings(), self.settings())
