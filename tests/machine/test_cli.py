"""Progress in a terminal and elsewhere, errors in one line, and what flags take."""

import errno
import importlib
import io
import os
import re
import subprocess
import sys
import types

import pytest
from conftest import ROOT

import dlc
from dlc.machine import cli
from dlc.machine.cli import LONGEST_LINE, ArgumentParser, one_line, path_or_name, progress, shortened, warn_once
from dlc.machine.processes import create_logger
from dlc.machine.records import differences, told_apart


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
    with progress(total=16, initial=4, desc="drawing", unit="img") as bar:
        for _ in range(12):
            bar.set_postfix(loss="0.5", refresh=False)
            bar.update(1.0)
    assert list(progress(range(3), desc="short", delay=2)) == [0, 1, 2]
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("drawing: ") and "16.0/16" in last and last.endswith("loss=0.5]")


@pytest.mark.parametrize("value", ["/x" * 10**5, "'" + "a b " * 10**5 + "'", str([*range(10**5)])])
def test_long_values_are_shortened_and_sentences_are_not(value):
    words = "a sentence of a message which says what is wrong with"
    message = shortened(f"{words} {value} or {value}: {words}; give another")
    assert len(message) <= LONGEST_LINE and message.startswith(words) and message.endswith(f": {words}; give another")
    assert " or " in message and message.count("…") >= 2
    whole = " ".join([words] * 11)  # longer than a line, with nothing to shorten
    assert shortened(whole) == whole and len(whole) > LONGEST_LINE
    assert one_line("a\n\tb\x1b[31m  c\x07\u202e") == "a b c ?"


FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")


@pytest.mark.parametrize("streams", [">&- 2>&- <&-", pytest.param(">/dev/full 2>/dev/full", marks=FULL)])
def test_streams_that_are_closed_or_full(streams, tmp_path):
    """The exit status is that of the work, and a file of the work's gets no descriptor of a stream's."""
    code = """
import contextlib, sys
from dlc.machine.cli import drop_at_exit, say
file = open("file", "w")
say("lost")
with contextlib.suppress(OSError):
    print("lost", flush=True)
drop_at_exit(sys.stdout)
sys.stderr.isatty()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}  # what is buffered fails at the end
    command = ["bash", "-c", f"'{sys.executable}' -c '{code}' {streams}"]
    assert subprocess.run(command, cwd=tmp_path, env=environment).returncode == 0
    assert (tmp_path / "file").read_text() == ""


def test_streams_that_take_nothing_any_more(monkeypatch, capsys, tmp_path):
    number = errno.EPIPE

    class Lost(io.StringIO):
        def write(self, text):
            raise OSError(number, os.strerror(number))

    dropped = []
    monkeypatch.setattr(cli.atexit, "register", dropped.append)
    monkeypatch.setattr(sys, "stdout", Lost())
    monkeypatch.setattr(cli, "WARNED", set())
    logger = create_logger(types.SimpleNamespace(is_main_process=True), tmp_path / "log.txt")
    logger.info("first")
    said = f"warning: cannot write standard output ([Errno {number}] {os.strerror(number)})\n"
    assert capsys.readouterr().err == said
    monkeypatch.setattr(sys, "stderr", Lost())
    assert list(progress(range(3))) == [0, 1, 2]
    warn_once("lost", "nobody reads this")
    logger.info("second")
    assert [line[22:] for line in (tmp_path / "log.txt").read_text().splitlines()] == ["first", "second"]
    assert len(dropped) == 2


def test_systems_that_are_not_supported(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit, match="runs on Linux and macOS, not on Windows: use"):
        importlib.reload(dlc)


def test_values_of_flags(monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/home/of/mine")
    parser, tools = ArgumentParser("", prog="script"), ArgumentParser("", prog="tool")
    one = tools.add_subparsers(dest="command", metavar="one|two").add_parser("one", doc="")
    for each in (parser, one):
        each.add_argument("--path")  # as every flag without a type
        each.add_argument("--class", nargs="+")
    for parsed in (parser.parse_args(["--path=~/x"]), tools.parse_args(["one", "--path", "~/x"])):
        assert parsed.path == "/home/of/mine/x"
    assert [path_or_name(text) for text in ("a/~b", "./~x")] == ["a/~b", "./~x"]
    assert vars(parser.parse_args(["--class=-cat"]))["class"] == ["-cat"]
    for words, said in (
        (["--path="], "script: error: argument --path: is empty: give a value (is a shell variable unset?)"),
        (["--path", "~nobody-here/x"], "~nobody-here/x: no such user's home folder (write ./~nobody-here/x"),
        (["--path", "-cat"], "argument (of a value that begins with -, write --flag=-value)"),
        (["--class", "-cat"], "argument (of a value that begins with -, write --flag=-value)"),
    ):
        with pytest.raises(SystemExit):
            parser.parse_args(words)
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tools.parse_args(["one", "--path", "\t"])
    assert "tool one: error: argument --path: is empty" in capsys.readouterr().err


NO_COMPILER = (
    "Failed to find C compiler. Please specify via CC environment variable.",
    "Command '['/usr/bin/gcc', 'main.c', …]' returned non-zero exit status 1.",
    "No working C++ compiler found in torch._inductor.config.cpp.cxx: (None, 'g++')",
)


@pytest.mark.parametrize(
    "error, status, said",
    [
        (OSError(28, "No space left on device"), 2, "on device; what is done is kept: run the same command again"),
        (KeyboardInterrupt(), 130, "stopped; what is done is kept: run the same command again"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 2, "the memory is full: lower --batch-size"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer"), 2, "another process failed, see"),
        *((RuntimeError(said), 2, "or give --no-compile; what is done is kept") for said in NO_COMPILER),
    ],
)
def test_what_ends_the_work(error, status, said, capsys):
    with (
        pytest.raises(SystemExit) as stopped,
        ArgumentParser("", prog="script").one_line_errors("what is done is kept", "--batch-size"),
    ):
        raise error
    assert stopped.value.code == status and said in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError), ArgumentParser("").one_line_errors("", ""):  # a bug keeps its traceback
        _ = 1 / 0


@pytest.mark.parametrize(
    "one, other",
    [
        ("/data/" + "a/" * 40 + "one/end", "/data/" + "a/" * 40 + "two/end"),
        (list(range(99)), [*range(50), 0, *range(51, 99)]),
        (None, dict(model="DLCPrior")),
        ("short", "s" * 99),
    ],
)
def test_values_that_differ_are_told_apart(one, other):
    """Long ones shortened, short ones whole, and never two texts that look alike."""
    there, here = told_apart(one, other)
    assert there != here and max(len(there), len(here)) < 70 and "{" not in there + here
    assert differences(dict(key=one), dict(key=other)) == f"key {there} there, {here} here"


def test_flags_of_the_reference(error_of):
    for script, flag, words in (
        ("train_diffusion", "--sem-dir", "--features-path"),
        ("extract_features_withdlc", "--dino-cfg", "L and V come from --encoder"),
        ("sample_prior", "--total-num", "give --part I/N"),
    ):
        said = error_of(script, flag, "cfg.yaml")
        assert f"{flag} is a flag of the reference's scripts: " in said and words in said
