"""The disk is tried before the work, and its errors keep their own words."""

import errno
import os

import pytest

from dlc.machine.files import DirectoryLock


def fails(monkeypatch, name, number, when=lambda *arguments: True):
    """os.name(…) raises an OSError where when(arguments) holds."""
    works = getattr(os, name)

    def call(*arguments):
        if when(*arguments):
            raise OSError(number, os.strerror(number))
        return works(*arguments)

    monkeypatch.setattr(os, name, call)


@pytest.mark.parametrize(
    "name, number, when, words",
    [
        ("replace", errno.EPERM, lambda source, target: os.path.isdir(source), "Operation not permitted"),
        ("replace", errno.EXDEV, lambda *_: True, "Invalid cross-device link"),
        ("fsync", errno.EIO, lambda *_: True, "Input/output error"),
        ("mkdir", errno.ENOSPC, lambda path, *_: ".trial." in str(path), "No space left on device"),
    ],
)
def test_a_disk_that_does_not_do_what_is_needed(name, number, when, words, monkeypatch, tmp_path):
    lock = DirectoryLock(tmp_path / "results")
    with monkeypatch.context() as faulty:
        fails(faulty, name, number, when)
        with pytest.raises(OSError, match=f"results does not take what is .*{words}.*: give a folder on a disk"):
            lock.acquire(rename_folders=True)
    assert not (tmp_path / "results").exists()
    lock.acquire(rename_folders=True)
    assert [path.name for path in (tmp_path / "results").iterdir()] == [".lock"]
