"""Files written whole or not at all, locks against a second launch, and JSON: what every stage needs of a disk.

Disks differ. Some network disks cannot sync a directory, some have no locks: there, a warning is printed once and the
work goes on. An error that says that data were lost (EIO, ENOSPC, …) is never passed over.
"""
import contextlib
import errno
import json
import os
import re
import time
import uuid
from pathlib import Path

from dlc.cli import one_line, warn_once

try:
    import fcntl
except ImportError:                 # not a Unix
    fcntl = None

LOCK_PATIENCE = 20                  # seconds to wait for a launch that may just have been killed
LARGEST_JSON = 2**28                # bytes; the manifest of a million skipped images has about half of that
UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK}


def sync(path):
    """Bring a file's bytes, or a directory's names, to the disk, so that they outlive a crash of the machine.

    A disk that cannot do that gets one warning. Raises OSError where it can and fails.
    """
    is_directory = os.path.isdir(path)
    if is_directory and os.name != "posix":
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # a directory that cannot be opened to sync it (EACCES, EISDIR on some mounts) can still hold files
        if error.errno not in UNSUPPORTED | ({errno.EACCES, errno.EISDIR, errno.EBADF} if is_directory else set()):
            raise
        what = "directories" if is_directory else "files"
        warn_once(f"sync {what}", f"the disk of {path} cannot sync {what} ({error.strerror}): what was written last may "
                                  "be lost if the machine crashes")


def write_whole(path, write):
    """Let write(file) fill a temporary file, then rename it to path: a reader sees the whole file or none.

    An exception in write, or Ctrl-C, leaves nothing behind. Raises OSError, naming the file, if the disk fails.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(f"cannot write {path} ({error})") from error
        raise


def remove_temporaries(directory, name=""):
    """Remove the temporary files of write_whole calls that were killed, for target names that start with `name`."""
    for temporary in directory.glob(f".*.{'?' * 32}.tmp"):
        if temporary.name.startswith(f".{name}"):
            temporary.unlink(missing_ok=True)


class DirectoryLock:
    """Keeps a second launch out of a directory while this process works there: flock on `directory/.lock`.

    The kernel drops the lock when the process dies, however it dies.
    """

    def __init__(self, directory):
        self.path, self.file = Path(directory) / ".lock", None

    def acquire(self, patience=None):
        """Take the lock, in a directory that is made where missing. On a disk without locks, warn once and go on.

        Args:
            patience: seconds to wait for another launch, which may have been killed and not be gone yet
                [LOCK_PATIENCE].

        Raises ValueError if another launch keeps the lock, OSError if the lock file cannot be opened.
        """
        deadline, told = time.monotonic() + (LOCK_PATIENCE if patience is None else patience), False
        while not self._try():
            if time.monotonic() > deadline:
                raise ValueError(f"another process is writing to {self.path.parent}: wait for it, or give another path")
            if not told:
                print(f"waiting for another process that writes to {self.path.parent}", flush=True)
                told = True
            time.sleep(0.05)

    def _try(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = open(self.path, "ab+")
        except FileNotFoundError:               # the launch before has just removed the directory, too
            return False
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, "no flock on this system")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the launch before may have removed the file in the meantime: then this is a lock on nothing
            held = os.path.exists(self.path) and os.path.samestat(os.fstat(file.fileno()), os.stat(self.path))
        except OSError as error:
            held = error.errno in UNSUPPORTED
            if held:
                warn_once("locks", f"the disk of {self.path.parent} has no locks ({error.strerror}): make sure that only "
                                   "one launch writes there at a time")
            elif error.errno not in (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES):
                file.close()
                raise
        if held:
            self.file = file
        else:
            file.close()
        return held

    def release(self):
        """Give the lock up, and remove its file and an empty directory; without effect where it is not held."""
        if self.file is None:
            return
        with contextlib.suppress(OSError):
            self.path.unlink()      # before it is released: afterwards, it could be the file of a launch that waited
            self.path.parent.rmdir()
        self.file.close()
        self.file = None


def write_json(path, value):
    write_whole(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))


def read_json(path):
    """The dict in a JSON file. Raises ValueError naming the file."""
    try:
        if os.path.getsize(path) > LARGEST_JSON:
            raise ValueError(f"{os.path.getsize(path):,} bytes, more than any that this program writes")
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is not readable JSON (nested too deeply)") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is not readable JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, wanted an object")
    return value


# What a value out of JSON has to be: whether it is, and the words for it.
TEXT = (lambda value: isinstance(value, str)), "text"
SWITCH = (lambda value: isinstance(value, bool)), "true or false"


def whole_number(low, high=2**63 - 1):
    return (lambda value: type(value) is int and low <= value <= high,
            f"a whole number from {low:,}" + (f" to {high:,}" if high < 2**63 - 1 else " on"))


def real_number(low, high=1e300):
    """Never NaN or infinite, which Python's JSON has as well."""
    return (lambda value: type(value) in (int, float) and low <= value <= high,
            f"a number from {low:g}" + (f" to {high:g}" if high < 1e300 else " on"))


def or_null(kind):
    fits, words = kind
    return (lambda value: value is None or fits(value)), f"{words} or null"


def list_of(kind, least=0, most=2**63):
    fits, words = kind
    return (lambda value: isinstance(value, list) and least <= len(value) <= most and all(map(fits, value)),
            f"a list{f' of {least:,} to {most:,}' if most < 2**63 else ''}, each {words}")


def one_of(*values):
    return (lambda value: isinstance(value, str) and value in values), f"one of {', '.join(values)}"


def check_values(where, values, kinds, needed=()):
    """Raise ValueError, naming where and key, for a value that is not of its kind, and where a needed one is missing.

    Keys without a kind are passed over.
    """
    for key, (fits, words) in kinds.items():
        if key in values and not fits(values[key]):
            raise ValueError(f"{where}: {key} is {one_line(repr(values[key])[:1000], 60)}, wanted {words}")
        if key in needed and key not in values:
            raise ValueError(f"{where}: {key} is missing, wanted {words}")


def is_plain_name(text):
    """Whether a text out of a file names an entry of a folder, not a way out of it."""
    return (isinstance(text, str) and text.isprintable() and text not in ("", ".", "..")
            and not set("/\\:") & set(text))


def differences(there, here):
    """How a dict on disk differs from the one here, in words; "" where they agree in all keys that are here."""
    def short(value):
        text = repr(value)
        if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):           # a digest
            return f"{value[:8]}…"
        if len(text) <= 60:
            return text
        return f"{text[:30]}… ({len(value)} items)" if isinstance(value, list) else f"…{text[-40:]}"
    return "; ".join(f"{key} {short(there.get(key))} there, {short(value)} here"
                     for key, value in here.items() if there.get(key) != value)


def recorded_id(name):
    """How files record a model or folder: a hub id as it is, a local path as an absolute path."""
    return str(Path(name).resolve()) if Path(name).exists() else name
