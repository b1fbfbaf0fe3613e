"""SIGINT, SIGTERM and SIGUSR1 as requests to stop: the first is handled, a second SIGINT or SIGTERM ends at once."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
ENDING = (signal.SIGINT, signal.SIGTERM)  # a second one ends the process; clusters may repeat SIGUSR1
ECHO_SECONDS = 2  # torchrun repeats Ctrl-C to its ranks, which already have it from the terminal

_watched = {}  # time of each signal's first arrival; empty until the watcher runs


def on_first_signal(numbers: Iterable[int], react: Callable[[int], object]) -> None:
    """Call react(number) in the main thread when each of these signals first arrives, and do nothing at later ones.

    A second SIGINT or SIGTERM ends the process at once, even if the main thread hangs: a separate thread learns of it
    through the file descriptor to which the interpreter writes each signal's number.
    """
    if not _watched:
        _start_watcher()
    seen = set()

    def receive(number, frame):
        if number not in seen:
            seen.add(number)
            react(number)

    for number in numbers:
        signal.signal(number, receive)


def _start_watcher():
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    # a data reader that does not ignore signals yet must not write to the same pipe
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    _watched.update(dict.fromkeys(ENDING))
    threading.Thread(target=_watch, args=(readable,), daemon=True, name="second signal").start()


def _watch(readable):
    echo = ECHO_SECONDS if "TORCHELASTIC_RUN_ID" in os.environ else 0
    while True:
        number = os.read(readable, 1)[0]
        if number not in ENDING:
            continue
        if _watched[number] is None:
            _watched[number] = time.monotonic()
        elif time.monotonic() - _watched[number] >= echo:
            os.write(2, f"ended at once by a second {signal.Signals(number).name}\n".encode())
            os._exit(128 + number)
