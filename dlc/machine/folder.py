"""A folder that one launch begins and others complete: features, samples, the codes of a prior.

A JSON file in it, the record, holds the settings. A launch takes its lock, refuses a folder that holds something else,
lists the files that are missing, and notes itself in the record before it makes the first of them. It makes all of
them, and is alone; or it makes its `Part`, while others make theirs, and the launch that finds all of them completes
the folder. Each of these holds a lock of its part while it works, and the folder's turn when it begins and ends.
"""

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from dlc.machine.files import POLL, DirectoryLock, remove_temporaries, try_disk, wait_for_lock, write_json
from dlc.machine.part import WHOLE, Part
from dlc.machine.records import Record

# What a folder holds, by a file in it: another command's files there would be read as part of that.
HOLDS = {
    "manifest.json": "features",
    "progress/settings.json": "features",
    "samples.json": "samples",
    "codes.json": "a prior's codes",
    "args.json": "a run of training",
    "config.json": "weights",
}


def refuse_other_kind(folder: Path, own: str = "") -> None:
    """Raise ValueError where a folder that this command is to fill holds something else by HOLDS. own: its record."""
    for name, what in HOLDS.items():
        if what != HOLDS.get(own) and (folder / name).is_file():
            raise ValueError(f"{folder} holds {what} ({name}): name another folder")


class ResumableFolder(ABC):
    """The base of such a folder. A subclass gives the attributes below and `missing`.

    Attributes:
        record_type, record_name: the dataclass of the record, and the name of its file.
        holds, files: what the folder holds, in the plural, and the glob patterns of those files.
        elsewhere: what a user is to do about a folder that holds something else.
        count: the record's key for the size of the set, which may grow but not shrink. None: the size is fixed.
        makes: the key for the number of files that a launch is to make in an entry of the record's `runs`.
    """

    record_type: type[Record]
    record_name: str
    holds: str
    files: tuple[str, ...]
    elsewhere: str = "give another folder"
    count: str | None = None
    makes: str = "files"

    def __init__(self, path: str | Path, part: Part = WHOLE):
        self.path, self.part = Path(path), part
        own = "" if part == WHOLE else f".{part.index}-of-{part.count}"
        self.lock, self.turn = DirectoryLock(path, f".lock{own}"), DirectoryLock(path, ".turn")
        self.opened: Record | None = None  # what `open` was given
        self.left_over: list[int] = []  # what is missing when this launch ends

    @property
    def record_path(self) -> Path:
        return self.path / self.record_name

    @abstractmethod
    def missing(self, record: Record, part: Part = WHOLE) -> list[int]:
        """The numbers of the files of a part that are missing or not whole, ascending."""

    def difference(self, record: Record, earlier: Record) -> str:
        """How the settings of earlier launches differ from these, in words; "" where they do not."""
        return record.difference(earlier)

    def write_record(self, record: Record) -> None:
        write_json(self.record_path, record.to_json())

    def clear(self) -> None:
        """Remove what killed launches left. Called while no other one is at work."""
        remove_temporaries(self.path)

    # ---------------------------------------------------------------------- the launches

    def open(self, record: Record, launch: dict | None = None) -> list[int]:
        """Enter the folder, and write its record where something is missing. Returns what this launch is to make.

        One process of a launch calls this before any of them writes.

        Args:
            launch: a new entry of the record's `runs` [none].

        Raises ValueError where another launch is at work that makes some of the same files, and as `compare` does.
        """
        with self.entering():
            return self.begin(record, launch)

    @contextlib.contextmanager
    def entering(self) -> Iterator[None]:
        """Take the lock of this launch, and within the folder's turn. Both are released where that raises an error."""
        wait_for_lock(self.path, self._enter)
        try:
            try_disk(self.path)
            yield
        except (ValueError, OSError):
            self.lock.release()
            raise
        finally:
            self.turn.release()

    def begin(self, record: Record, launch: dict | None = None) -> list[int]:
        """What `open` does, once it has entered."""
        self.opened, earlier = record, self.compare(record)
        missing = self.missing(record, self.part)
        if missing or earlier is None:  # of a whole folder, another launch may be writing the picture
            if self.part == WHOLE:
                self.clear()
            if launch is not None:
                runs = [*(earlier.runs if earlier else []), {**launch, self.makes: len(missing)}]
                record = replace(record, runs=runs)
            self.write_record(record)
        return missing

    @contextlib.contextmanager
    def leaving(self) -> Iterator[bool]:
        """Release the lock of this launch. Before that give whether nothing is missing, or else note it in `left_over`.

        If nothing is, the folder is completed within: one launch at a time is here.
        """
        self._take_turn()
        try:
            self.left_over = [] if self.part == WHOLE else self.left()
            yield not self.left_over
            if not self.left_over and self.is_alone():
                self.clear()
        finally:
            self.lock.release()
            self.turn.release()

    def left(self) -> list[int]:
        """What is missing of all."""
        return self.missing(self.opened)

    def is_alone(self) -> bool:
        """Whether no other launch is at work. Called in turn."""
        return not self._at_work(self.lock.path.name)

    def _take_turn(self):
        while not self.turn.attempt():  # another launch may be writing a large file
            time.sleep(POLL)

    def _enter(self):
        self._take_turn()
        mates = ".lock" if self.part == WHOLE else f".lock.*-of-{self.part.count}"
        if not self._at_work(mates) and self.lock.attempt():
            return True
        self.turn.release()
        return False

    def _at_work(self, mates):
        """Whether a launch is at work whose lock has another name than this pattern says."""
        for path in self.path.glob(".lock*"):
            if not fnmatch(path.name, mates):
                other = DirectoryLock(self.path, path.name)
                if not other.attempt():
                    return True
                other.release()
        return False

    # ---------------------------------------------------------------------- what is there

    def compare(self, record: Record) -> Record | None:
        """The record that is there; None where the folder holds nothing, or nothing yet of an earlier record.

        Raises ValueError where the folder has no record of what it holds, or holds something else, or more; and as
        `refuse_other_kind` does.
        """
        refuse_other_kind(self.path, self.record_name)
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
