"""Signals as requests to stop, in processes of their own that import nothing else."""

import signal
import subprocess
import sys

from conftest import ROOT

CODE = """
import hashlib, os, signal, threading, time
from dlc.machine import signals
signals.ECHO_SECONDS = 0.2
signals.on_first_signal(signals.STOPPING, lambda number: print(signal.Signals(number).name, flush=True))
for word in {words}:
    os.kill(os.getpid(), signal.Signals[word]) if isinstance(word, str) else time.sleep(word)
if {hangs}:  # in a call that no signal interrupts, as a collective
    for seconds in (0.1, 0.5):
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()
    hashlib.pbkdf2_hmac("sha1", b"", b"", 2**31 - 1)
time.sleep(0.1)
print("on", flush=True)
"""


def said(*words, ignored=(), hangs=False):
    """What a process says that sends itself these signals, with pauses in seconds between them, and how it ends."""
    code = CODE.format(words=repr(words), hangs=hangs)
    ignore = lambda: [signal.signal(number, signal.SIG_IGN) for number in ignored]  # noqa: E731
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, preexec_fn=ignore)
    return (ended.stdout + ended.stderr).split("\n")[:-1], ended.returncode


def test_a_signal_is_a_request():
    """Repeated at once, it is the same request; a second SIGTERM, as a second SIGINT, later ends at once."""
    names = ["SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGXCPU"]
    twice = [name for name in names for _ in range(2)]
    assert said(*twice, 0.4, *names[2:], "SIGTERM", 9) == ([*names, "ended at once by a second SIGTERM"], 143)


def test_a_process_that_hangs():
    assert said(hangs=True) == (["ended at once by a second SIGINT"], 130)


def test_nohup():
    assert said("SIGHUP", ignored=[signal.SIGHUP]) == (["on"], 0)
