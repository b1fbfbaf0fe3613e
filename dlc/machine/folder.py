"""A folder that one launch begins and the next completes: features, samples, the codes of a prior.

A JSON file in it, the record, holds the settings. A launch takes the folder's lock, refuses a folder that holds
something else, lists the parts that are missing, and notes itself in the record before it makes the first of them.
"""

from dataclasses import replace
from pathlib import Path

from dlc.machine.files import DirectoryLock, remove_temporaries, write_json
from dlc.machine.records import Record


class ResumableFolder:
    """The base of such a folder. A subclass gives the attributes below and `missing`.

    Attributes:
        record_type, record_name: the dataclass of the record, and the name of its file.
        holds, files: what the folder holds, in the plural, and the glob patterns of those files.
        elsewhere: what a user is to do about a folder that holds something else.
        count: the record's key for the size of the set, which may grow but not shrink. None: the size is fixed.
        parts: the key for the number of missing parts in an entry of the record's `runs`.
    """

    record_type: type[Record]
    record_name: str
    holds: str
    files: tuple[str, ...]
    elsewhere: str = "give another folder"
    count: str | None = None
    parts: str = "parts"

    def __init__(self, path: str | Path):
        self.path, self.lock = Path(path), DirectoryLock(path)

    @property
    def record_path(self) -> Path:
        return self.path / self.record_name

    def missing(self, record: Record) -> list[int]:
        """The numbers of the parts that are missing or not whole, ascending."""
        raise NotImplementedError

    def difference(self, record: Record, earlier: Record) -> str:
        """How the settings of earlier launches differ from these, in words; "" where they do not."""
        return record.difference(earlier)

    def write_record(self, record: Record) -> None:
        write_json(self.record_path, record.to_json())

    def open(self, record: Record, launch: dict | None = None) -> list[int]:
        """Lock the folder, and write its record where something is missing. Returns the missing parts.

        One process of a launch calls this before any of them writes.

        Args:
            launch: a new entry of the record's `runs` [none].

        Raises ValueError where another launch holds the lock, and as `compare` does; the lock is then released.
        """
        self.lock.acquire()
        try:
            earlier = self.compare(record)
        except ValueError:
            self.lock.release()
            raise
        missing = self.missing(record)
        if missing or earlier is None:  # of a whole folder, another launch may be writing the picture
            remove_temporaries(self.path)
            if launch is not None:
                runs = [*(earlier.runs if earlier else []), {**launch, self.parts: len(missing)}]
                record = replace(record, runs=runs)
            self.write_record(record)
        return missing

    def compare(self, record: Record) -> Record | None:
        """The record that is there; None where the folder holds nothing, or nothing yet of an earlier record.

        Raises ValueError where the folder has no record of what it holds, or holds something else, or more.
        """
        some = any(one.name[0] != "." for pattern in self.files for one in self.path.glob(pattern))
        if not self.record_path.is_file():
            if some:
                raise ValueError(
                    f"{self.path} holds {self.holds} but no {self.record_name} to say what they are; {self.elsewhere}"
                )
            return None
        earlier = self.record_type.read(self.record_path)
        if some:
            self.refuse_others(self.path, record, earlier)
        return None if not some and self.difference(record, earlier) else earlier

    def refuse_others(self, path: Path, record: Record, there: Record) -> None:
        """Raise ValueError where what path holds, by its record, is another set than record says, or more."""
        different = self.difference(record, there)
        if different:
            raise ValueError(f"{path} holds {self.holds} made with other settings: {different}; {self.elsewhere}")
        count, wanted = (getattr(one, self.count) if self.count else 0 for one in (there, record))
        if count > wanted:
            raise ValueError(f"{path} is a set of {count:,} {self.holds}, more than {wanted:,}: {self.elsewhere}")
