"""The disk is tried before the work, and its errors keep their own words."""

import errno
import os
import types

import pytest
import safetensors.torch
import torch
from conftest import fails, refusal

from dlc.data.listing import read_labels
from dlc.machine.files import DirectoryLock, failed, read_json, write_bytes, write_folder


@pytest.mark.parametrize(
    "name, number, when, words",
    [
        ("os.replace", errno.EPERM, lambda source, target: os.path.isdir(source), "Operation not permitted"),
        ("os.replace", errno.EXDEV, lambda *_: True, "Invalid cross-device link"),
        ("os.fsync", errno.EIO, lambda *_: True, "Input/output error"),
        ("os.mkdir", errno.ENOSPC, lambda path, *_: ".trial." in str(path), "No space left on device"),
    ],
)
def test_a_disk_that_does_not_do_what_is_needed(name, number, when, words, monkeypatch, tmp_path):
    lock = DirectoryLock(tmp_path / "results")
    with monkeypatch.context() as faulty:
        fails(faulty, name, number, when)
        with pytest.raises(OSError, match=f"trial in .*results failed: .* and folders .{words}"):
            lock.acquire(rename_folders=True)
    assert not (tmp_path / "results").exists()
    lock.acquire(rename_folders=True)
    assert [path.name for path in (tmp_path / "results").iterdir()] == [".lock"]


def test_a_lock_that_the_disk_refuses_is_named(monkeypatch, tmp_path):
    fails(monkeypatch, "fcntl.flock", errno.EPERM)
    refusal(DirectoryLock(tmp_path).acquire, error=OSError, words=f"cannot lock {tmp_path}/.lock .Operation not per")


@pytest.mark.parametrize("umask, mode", [(0o002, 0o664), (0o077, 0o600)])
def test_others_may_read_weights_as_the_umask_says(umask, mode, tmp_path):
    """A group shares a disk, and safetensors makes files that their owner alone reads."""
    before = os.umask(umask)
    try:
        save = safetensors.torch.save_file
        write_folder(tmp_path / "new", lambda folder: save(dict(x=torch.zeros(1)), folder / "x.safetensors"))
    finally:
        os.umask(before)
    assert (tmp_path / "new/x.safetensors").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("name, read", [("x.json", read_json), ("x.csv", lambda path: read_labels(path, ["a"]))])
def test_a_pipe_is_no_file(name, read, tmp_path):
    """To open one would wait for ever for what is never written."""
    os.mkfifo(tmp_path / name)
    refusal(read, tmp_path / name, words=f"{tmp_path}/{name} is a pipe or a device, not a file")


@pytest.mark.parametrize(
    "number, inodes, words",
    [
        (errno.ENOSPC, 9, "No space left on device): make room"),
        (errno.ENOSPC, 0, "No space left on device): the disk has no inodes left, remove files, however small"),
        (errno.EDQUOT, 9, "Disk quota exceeded): make room, your quota is used up"),
        (errno.EFBIG, 9, "File too large): raise the limit of a file's size (ulimit -f)"),
        (errno.ESTALE, 0, "Stale file handle)"),
    ],
)
def test_what_is_said_of_a_write_that_failed(number, inodes, words, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "statvfs", lambda path: types.SimpleNamespace(f_files=9, f_favail=inodes))
    fails(monkeypatch, "os.replace", number)
    with pytest.raises(OSError) as raised:
        write_bytes(tmp_path / "file", b"x")
    assert str(raised.value) == f"cannot write {tmp_path}/file ({words}" and raised.value.errno == number
    assert str(failed("x", RuntimeError("I/O error: full (os error 28)"), tmp_path)).startswith("x (No space left")
