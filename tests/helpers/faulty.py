"""A real script with a fault: `faulty FAULT SCRIPT flags…`, for forked.Run. A system call fails, or a wait is short."""

import errno
import fcntl
import importlib
import os
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


def impatient():
    dlc.machine.files.LOCK_PATIENCE = 1


def said_soon():
    dlc.machine.processes.SAID_WAITING = 1


def main():
    fault, script = sys.argv[1:3]
    globals()[fault]()
    sys.argv[:3] = [script]
    importlib.import_module(script).main()
