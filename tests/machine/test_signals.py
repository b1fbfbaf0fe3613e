"""Signals as requests to stop, in processes of their own that import nothing else."""

import signal
import subprocess
import sys

import pytest
from conftest import ROOT

CODE = """
import os, signal, time
from dlc.machine import signals
signals.ECHO_SECONDS = 0.2
signals.on_first_signal(signals.STOPPING, lambda number: print(signal.Signals(number).name, flush=True))
for word in {words}:
    os.kill(os.getpid(), signal.Signals[word]) if isinstance(word, str) else time.sleep(word)
time.sleep(0.1)
print("on", flush=True)
"""


def said(*words, ignored=()):
    """What a process says that sends itself these signals, with pauses in seconds between them, and how it ends."""

    def ignore():
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)

    code = CODE.format(words=repr(words))
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, preexec_fn=ignore)
    return (ended.stdout + ended.stderr).split("\n")[:-1], ended.returncode


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGXCPU"])
def test_a_signal_is_a_request(name):
    """Repeated at once, it is the same request."""
    assert said(name, name) == ([name, "on"], 0)


def test_a_second_signal_ends_at_once():
    assert said("SIGTERM", 0.4, "SIGTERM", 9) == (["SIGTERM", "ended at once by a second SIGTERM"], 143)
    assert said("SIGUSR1", 0.4, "SIGUSR1", "SIGTERM") == (["SIGUSR1", "SIGTERM", "on"], 0)


def test_nohup():
    assert said("SIGHUP", ignored=[signal.SIGHUP]) == (["on"], 0)
