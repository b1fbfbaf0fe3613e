"""Data readers: processes that load what this one needs next, and send it through pipes.

A pipe needs no shared memory, socket or semaphore, which containers keep small and long paths of TMPDIR break. What
goes wrong in a reader comes back as data, and nothing waits without end for one that died or is silent.
"""

import atexit
import contextlib
import fcntl
import io
import os
import pickle
import select
import signal
import struct
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import torch
from torch.utils._pytree import tree_map

from dlc.machine.signals import STOPPING

PATIENCE = 300  # seconds for which a reader may be silent
PIPE_BYTES = 2**20  # what Linux lets a user have; other systems keep theirs
running = set()  # process ids of the readers


class ReaderFailed(OSError):
    """A reader cannot be started, has died, or is silent; the text says what to do."""


def read_ahead(load: Callable, items: Sequence, workers: int, pin: bool = False) -> Iterator:
    """load(item) of each item, in order, by forked processes that each load two ahead.

    Args:
        load: gives tensors on the CPU, and what else pickle takes.
        workers: how many processes; 0: this one.
        pin: whether to copy the tensors to pinned memory, from which a GPU copies while the CPU goes on.

    Raises ReaderFailed, and for an exception of `load` a MemoryError or RuntimeError with its traceback as the text.
    """
    readers = []
    try:
        for number in range(min(workers, len(items))):
            try:
                readers.append(Reader(load, items[number::workers], readers))
            except OSError as error:
                raise ReaderFailed(
                    f"cannot start data reader {number + 1} of {workers} ({error.strerror}): lower --num-workers, or "
                    "raise the limit (ulimit -n for files, -u for processes)"
                ) from error
        for place, item in enumerate(items):
            value = readers[place % len(readers)].receive() if readers else load(item)
            yield tree_map(_pinned, value) if pin else value
    finally:
        for reader in readers:
            reader.end()


def _pinned(value):
    return value.pin_memory() if isinstance(value, torch.Tensor) else value


class Reader:
    """A process that sends load(item) of its items. It ignores signals: launchers and terminals signal the whole
    process group, but this process may still need what it reads, and kills it at the end."""

    def __init__(self, load: Callable, items: Sequence, others: Sequence["Reader"]):
        readable, writable = os.pipe()
        try:
            self.pid = os.fork()
        except OSError:
            os.close(readable), os.close(writable)
            raise
        if not self.pid:
            try:
                for number in STOPPING:
                    signal.signal(number, signal.SIG_IGN)
                for end in (readable, *(other.pipe.fileno() for other in others)):
                    os.close(end)  # with one open in here, no reader would learn that the main process has died
                torch.set_num_threads(1)  # OpenMP's other threads are not here after a fork
                _serve(load, items, os.fdopen(writable, "wb"))
            finally:
                os._exit(0)
        os.close(writable)
        self.pipe = os.fdopen(readable, "rb", buffering=0)
        self.poll = select.poll()
        self.poll.register(self.pipe, select.POLLIN)
        with contextlib.suppress(AttributeError, OSError):  # another system, or a user of many pipes
            fcntl.fcntl(self.pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        running.add(self.pid)
        atexit.register(self.end)

    def receive(self) -> Any:
        """What the reader sends next. Raises as `read_ahead` does."""
        (count,) = struct.unpack("<q", self._exactly(8))
        head, *buffers = [self._exactly(size) for size in struct.unpack(f"<{count}q", self._exactly(8 * count))]
        fault, value = pickle.loads(head, buffers=buffers)
        if fault:
            raise fault
        return value

    def _exactly(self, count: int) -> memoryview:
        found, done = memoryview(bytearray(count)), 0
        while done < count:
            if not self.poll.poll(1000 * PATIENCE):
                raise ReaderFailed(f"a data reader sent nothing for {PATIENCE} s: does the disk of the data hang?")
            size = self.pipe.readinto(found[done:])
            if not size:
                raise ReaderFailed(self._how_it_died())
            done += size
        return found

    def _how_it_died(self) -> str:
        running.discard(self.pid)
        number = 0
        with contextlib.suppress(ChildProcessError):  # whoever started this process ignores SIGCHLD
            number = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        if number == -signal.SIGKILL:
            return "a data reader was killed, by the kernel where memory is short: lower --num-workers"
        if number == -signal.SIGBUS:
            return "a data reader died of SIGBUS: a file that it read was cut short, or its disk fails"
        return f"a data reader died of {signal.Signals(-number).name if number < 0 else f'exit status {number}'}"

    def end(self) -> None:
        atexit.unregister(self.end)
        self.pipe.close()
        if self.pid in running:
            running.discard(self.pid)
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(self.pid, signal.SIGKILL)
                for _ in range(100):  # one that hangs in a disk dies when the disk answers
                    if os.waitpid(self.pid, os.WNOHANG)[0]:
                        break
                    time.sleep(0.01)


class _ByValue(pickle.Pickler):
    """A pickler to which a tensor is the NumPy array in its memory."""

    def reducer_override(self, value):
        return (torch.from_numpy, (value.numpy(),)) if isinstance(value, torch.Tensor) else NotImplemented


def _pickled(value) -> list:
    """A value as bytes, the arrays' memory apart."""
    head, buffers = io.BytesIO(), []
    _ByValue(head, 5, buffer_callback=buffers.append).dump(value)
    return [head.getbuffer(), *(buffer.raw() for buffer in buffers)]


def _serve(load, items, pipe: BinaryIO):
    """Send (exception or None, load(item)) of each item: its number of parts, their sizes, the parts."""

    def send(parts):
        pipe.write(struct.pack(f"<{len(parts) + 1}q", len(parts), *map(len, parts)))
        for part in parts:
            pipe.write(part)
        pipe.flush()

    with ThreadPoolExecutor(1) as pool:
        sent = None
        for item in items:
            try:
                parts = _pickled((None, load(item)))
            except Exception as error:
                kind = MemoryError if isinstance(error, MemoryError) else RuntimeError
                parts = _pickled((kind(traceback.format_exc()), None))
            if sent:
                sent.result()  # raises, and so ends the reader, where the main process is gone
            sent = pool.submit(send, parts)
        if sent:
            sent.result()
