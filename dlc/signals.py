"""SIGINT, SIGTERM and SIGUSR1 as requests: the first one is reacted to, a second SIGINT or SIGTERM ends the process."""
import os
import signal
import sys
import threading
import time

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
ENDING = (signal.SIGINT, signal.SIGTERM)        # whose second one ends; clusters may repeat SIGUSR1 as they like
ECHO_SECONDS = 2                                # torchrun passes Ctrl-C on to ranks that have it from the terminal

_watched = {}           # the time of the first one of each signal; empty until the watcher runs


def on_first_signal(numbers, react):
    """Call react(number) in the main thread at the first of each of these signals, nothing at the later ones.

    A second SIGINT or SIGTERM ends the process at once, in whatever the main thread hangs: it is a thread of its own
    that learns of it, through the descriptor that the interpreter writes each signal's number to.
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


def ignore_signals(worker):
    """A data loader's worker_init_fn: launchers and terminals signal the whole process group, but the main process decides
    when its readers end, and may need their batches until then."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    # an error in reading comes back as data; what is printed else is that the main process closed a connection
    sys.excepthook = lambda *error: None


def _start_watcher():
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    # a data loader's reader, before it comes to ignore signals, must not write to the same pipe
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
