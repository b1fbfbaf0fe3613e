"""Data readers: what they send, and that nothing waits for one that cannot."""

import faulthandler
import os
import resource
import signal
import threading

import numpy as np
import pytest
import torch
from conftest import extract_command, launch
from training_runs import metrics, train_command

from dlc.machine import readers
from dlc.machine.readers import ReaderFailed, read_ahead


def loaded(item):
    return dict(codes=torch.full((2, 3), item), names=np.array(["a", "b"]), none=(item, None), empty=torch.zeros(0, 4))


@pytest.mark.parametrize("workers", [0, 3, 9])
def test_items_come_in_order_as_they_were_loaded(workers):
    for item, value in enumerate(read_ahead(loaded, range(5), workers)):
        assert torch.equal(value["codes"], torch.full((2, 3), item)) and value["none"] == (item, None)
        assert value["names"].tolist() == ["a", "b"] and value["empty"].shape == (0, 4)
        value["codes"] += 1  # it may be written to
    assert item == 4 and not readers.running


def raise_(error):
    raise error


def signalled(number):
    faulthandler.disable()  # pytest's
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    "fail, kind, message",
    [
        (lambda: raise_(KeyError("no such row")), RuntimeError, "no such row"),
        (lambda: raise_(MemoryError()), MemoryError, "Traceback"),
        (lambda: threading.Lock(), RuntimeError, "cannot pickle"),
        (lambda: signalled(signal.SIGKILL), ReaderFailed, "by the kernel .*lower --num-workers"),
        (lambda: signalled(signal.SIGBUS), ReaderFailed, "SIGBUS: a file that it read was cut short"),
        (lambda: signalled(signal.SIGSTOP), ReaderFailed, "sent nothing for 1 s: does the disk"),
        (lambda: os._exit(3), ReaderFailed, "died of exit status 3"),
    ],
)
def test_a_reader_that_fails(fail, kind, message, monkeypatch):
    """At the third item; the first two, each more than a pipe takes, may still come."""
    monkeypatch.setattr(readers, "PATIENCE", 1)
    given = []
    with pytest.raises(kind, match=message):
        for item in read_ahead(lambda item: fail() if item == 2 else torch.zeros(10**6), range(5), 2):
            given.append(item)
    assert len(given) <= 2 and not readers.running


def test_too_few_descriptors():
    used, limits = len(os.listdir("/dev/fd")), resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 3, limits[1]))
    try:
        with pytest.raises(ReaderFailed, match="cannot start data reader . of 8 .Too many open files.: lower --num-w"):
            list(read_ahead(loaded, range(9), 8))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert not readers.running


@pytest.mark.slow
def test_small_machines(images, tiny_models, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("x" * (138 - len(str(tmp_path))))))
    os.mkdir(os.environ["TMPDIR"])
    command = extract_command("forked", 1, images, "features", tiny_models, "--num-workers", 8)
    launch(command, tmp_path, fault="limited,NOFILE,64")
    flags = ("--max-steps", 3, "--num-workers", 8)
    launch(train_command(1, "features", "run", *flags), tmp_path, fault="limited,NOFILE,64")
    assert len(metrics(tmp_path / "run")) == 3
