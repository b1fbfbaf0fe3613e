"""Signals as requests to stop: the first of each is handled, a second SIGINT or SIGTERM ends at once."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable

# what clusters, schedulers and terminals send before they take a machine, or themselves, away
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGXCPU)
ENDING = (signal.SIGINT, signal.SIGTERM)  # a second one ends the process; the others may be repeated
ECHO_SECONDS = 2  # torchrun repeats Ctrl-C to its ranks, and schedulers repeat SIGTERM: within these it is the first

_watched = {}  # time of each signal's first arrival; empty until the watcher runs


def on_first_signal(numbers: Iterable[int], react: Callable[[int], object]) -> None:
    """Call react(number) in the main thread when each of these signals first arrives, and do nothing at later ones.

    A second SIGINT or SIGTERM ends the process at once, even if the main thread hangs: a separate thread learns of it
    through the file descriptor to which the interpreter writes each signal's number. nohup's SIGHUP stays ignored.
    """
    if not _watched:
        readable, writable = os.pipe()
        os.set_blocking(writable, False)
        signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # a data reader's signals are its own
        _watched.update(dict.fromkeys(ENDING))
        threading.Thread(target=_watch, args=(readable,), daemon=True, name="second signal").start()
    seen = set()

    def receive(number, frame):
        if number not in seen:
            seen.add(number)
            react(number)

    for number in numbers:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, receive)


def _watch(readable):
    while True:
        number = os.read(readable, 1)[0]
        if number in ENDING and _watched[number] is None:
            _watched[number] = time.monotonic()
        elif number in ENDING and time.monotonic() - _watched[number] >= ECHO_SECONDS:
            os.write(2, f"ended at once by a second {signal.Signals(number).name}\n".encode())
            os._exit(128 + number)
