"""Progress in a terminal and elsewhere, errors in one line, and what flags take."""

import argparse
import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
from conftest import ROOT

from dlc.machine.cli import LONGEST_LINE, ArgumentParser, one_line, path_or_name, progress

WORK = """
import time
from dlc.machine.cli import progress
with progress(total=16, initial=4, desc="drawing", unit="img") as bar:
    for _ in range(12):
        bar.set_postfix(loss="0.5", refresh=False)
        bar.update(0.5)
        bar.update(0.5)
        time.sleep(0.01)
for _ in progress(range(3), desc="short", unit="file", delay=2):
    pass
"""


def test_progress_outside_a_terminal(capsys, monkeypatch):
    """Lines of done, of, time, time left and rate: one at each end, and one every 30 s; of rank 0 alone."""
    clock = iter(range(10**6))
    monkeypatch.setattr("tqdm.std.time", lambda: next(clock) / 10)  # each look at the clock is 0.1 s later
    for _ in progress(range(1000), desc="extracting", unit="img"):
        pass
    said = capsys.readouterr().err
    seconds = [int(minutes) * 60 + int(rest) for minutes, rest in re.findall(r"/1000 \[(\d+):(\d+)<", said)]
    assert len(seconds) == len(said.splitlines()) > 4 and "1000/1000" in said.splitlines()[-1] and "\r" not in said
    assert "img/s]" in said and all(later - earlier >= 30 for earlier, later in zip(seconds, seconds[1:-1]))
    monkeypatch.setenv("RANK", "1")
    assert list(progress([1])) == [1] and not capsys.readouterr().err


def test_progress_of_short_work(capsys):
    exec(WORK)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("drawing: ") for line in lines) and "16.0/16" in lines[1]
    assert lines[1].endswith("loss=0.5]")


@pytest.mark.slow
def test_progress_in_a_terminal():
    """A bar drawn in place."""
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))  # rows, columns
    subprocess.run([sys.executable, "-c", WORK], cwd=ROOT, stderr=terminal, check=True, timeout=60)
    os.set_blocking(main, False)
    said = b""
    with contextlib.suppress(BlockingIOError):  # all is read
        while True:
            said += os.read(main, 4096)
    said = said.decode()
    assert "\r" in said and "16.0/16" in said


def test_one_line():
    assert one_line("a\n\tb\x1b[31m  c\x07\u202e") == "a b c ?"
    long = one_line("x" * 10**6 + " do this")
    assert len(long) <= LONGEST_LINE and long.endswith("do this") and "…" in long


@pytest.mark.parametrize("text", ["", " ", "\t", "~nobody-here/x"])
def test_values_that_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError):
        path_or_name(text)


def test_values_that_are_taken(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/mine")
    assert path_or_name("~/x") == "/home/of/mine/x"
    assert path_or_name("a/~b") == "a/~b" and path_or_name("./~x") == "./~x"


@pytest.mark.parametrize(
    "error, status, said",
    [
        (OSError(28, "No space left on device"), 2, "on device; what is done is kept: run the same command again"),
        (KeyboardInterrupt(), 130, "stopped; what is done is kept: run the same command again"),
        (MemoryError(), 2, "the memory is full: lower --batch-size; what is done is kept"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 2, "the memory is full: lower --batch-size"),
        (
            RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer"),
            2,
            "another process failed, see its message",
        ),
    ],
)
def test_what_ends_the_work(error, status, said, capsys):
    with (
        pytest.raises(SystemExit) as stopped,
        ArgumentParser("", prog="script").kept_on_error("what is done is kept", "--batch-size"),
    ):
        raise error
    assert stopped.value.code == status and said in capsys.readouterr().err


def test_a_bug_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shape"), ArgumentParser("").kept_on_error("", ""):
        raise RuntimeError("a shape is wrong")
