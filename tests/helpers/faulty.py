"""A real script with a fault: `faulty FAULT SCRIPT flags…`, for forked.Run and, by its path, for launchers.

A system call fails, a wait is short, or a process gets a signal at a named point. FAULT is the name of a function below
and its arguments, joined by commas.
"""

import errno
import fcntl
import importlib
import multiprocessing
import os
import signal
import stat
import sys

import dlc.machine.files
import dlc.machine.processes


def no_directory_sync():
    """As CIFS and some FUSE file systems do it."""
    fsync = os.fsync

    def failing(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    os.fsync = failing


def no_locks():
    """As NFS without its lock daemon."""

    def failing(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    fcntl.flock = failing


def patient():
    dlc.machine.files.LOCK_PATIENCE = 600


def impatient():
    dlc.machine.files.LOCK_PATIENCE = 1


def said_soon():
    dlc.machine.processes.SAID_WAITING = 1


def signalled(name, part, number, rank="0"):
    """Of this rank alone: before the Nth file whose path has `part` in it is renamed, the process gets that signal.

    Or, by a name such as readers:SIGKILL, its data readers do.
    """
    to, _, name = name.rpartition(":")
    replace, seen = os.replace, []

    def replaced(source, target):
        if part in str(target) and os.environ.get("RANK", "0") == rank:
            seen.append(target)
            if len(seen) == int(number):
                for pid in [reader.pid for reader in multiprocessing.active_children()] if to else [os.getpid()]:
                    os.kill(pid, signal.Signals[name])
        replace(source, target)

    os.replace = replaced


def main():
    fault, script = sys.argv[1:3]
    name, *arguments = fault.split(",")
    globals()[name](*arguments)
    sys.argv[:3] = [script]
    importlib.import_module(script).main()


if __name__ == "__main__":
    main()
