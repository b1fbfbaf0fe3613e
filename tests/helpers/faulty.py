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

    By a name such as readers:SIGKILL its data readers do instead, by group:SIGKILL it and they.
    """
    replace, seen = os.replace, []

    def replaced(source, target):
        if part in str(target) and os.environ.get("RANK", "0") == rank:
            seen.append(target)
            if len(seen) == int(number):
                send(name)
        replace(source, target)

    os.replace = replaced


def send(name):
    """See `signalled`."""
    to, _, name = name.rpartition(":")
    readers = [reader.pid for reader in multiprocessing.active_children()]
    for pid in {"": [os.getpid()], "readers": readers, "group": [0]}[to]:
        os.kill(pid, signal.Signals[name])


def signalled_at_step(name, step, rank):
    """Of this rank alone: at this step's end, as `signalled`."""
    from dlc.training.run import Run

    report = Run.report

    def reporting(self, number):
        if number == int(step) and self.state.process_index == int(rank):
            send(name)
        report(self, number)

    Run.report = reporting


def killed_syncing(name, number):
    """SIGKILL after the Nth time that a file or folder of this name was synced."""
    fsync, seen = os.fsync, []

    def synced(descriptor):
        fsync(descriptor)
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(f"/{name}"):
            seen.append(name)
            if len(seen) == int(number):
                send("group:SIGKILL")

    os.fsync = synced


def killed_in_a_line(number):
    """SIGKILL when the Nth line of metrics.jsonl is written but for its end."""
    from dlc.training import log

    append, seen = log.append_metrics, []

    def cut_short(path, line):
        append(path, line)
        seen.append(line)
        if len(seen) == int(number):
            os.truncate(path, path.stat().st_size - 9)
            send("group:SIGKILL")

    log.append_metrics = cut_short


def main():
    fault, script = sys.argv[1:3]
    name, *arguments = fault.split(",")
    globals()[name](*arguments)
    sys.argv[:3] = [script]
    importlib.import_module(script).main()


if __name__ == "__main__":
    main()
