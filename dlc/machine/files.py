"""Files written whole or not at all, JSON, and a lock against a second launch.

Some network disks cannot sync a directory, some have no locks. There, one warning is printed and the work goes on. An
error that means lost data (EIO, ENOSPC, …) is always raised.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import time
import uuid
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from dlc.machine.cli import one_line, warn_once

LOCK_PATIENCE = 20  # seconds to wait for a launch that was just killed
POLL = 0.05  # seconds between two attempts to lock
LARGEST_JSON = 2**28  # bytes; about twice a manifest with a million skipped images
UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK}
SHEET = "DLC-DiT contact sheet"  # the key of the text in a PNG that a later one may replace
FULL = {errno.ENOSPC, errno.EDQUOT}  # errors that more room on the disk mends
REMEDIES = {
    errno.ENOSPC: ": make room",
    errno.EDQUOT: ": make room, your quota is used up",
    errno.EFBIG: ": raise the limit of a file's size (ulimit -f)",
    errno.EROFS: ": name a folder on a disk that can be written to",
}  # a disk that fails in another way keeps the system's words


#################################################################################
#                          Errors of reading and writing                        #
#################################################################################


class Damaged(ValueError):
    """A file was read and, by its size, header, form or digest, is not whole. Nothing else is called damage."""


def errno_of(error: BaseException) -> int | None:
    """The system's error number in an exception, also where a library wraps it in its own; None if there is none."""
    if isinstance(error, OSError):
        return None if error.errno == errno.EINVAL else error.errno  # a seek to where a damaged file says
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return errno.ENOMEM
    if isinstance(error, ValueError):
        return None
    if isinstance(error.__context__, OSError):  # as of torch.save to a file of Python's
        return error.__context__.errno
    found = re.search(r"(?:errno|os error|error code) (\d+)|: [A-Z][^()]* \((\d+)\)$", str(error), re.IGNORECASE)
    return int(found[1] or found[2]) if found else None


def failed(what: str, error: BaseException, folder: Path | None = None) -> OSError:
    """An OSError of the same number: what failed, why in the system's words, and what to do where that is known.

    folder: where it was written.
    """
    number, kind = errno_of(error), type(error) if isinstance(error, OSError) else OSError
    why = os.strerror(number) if number else one_line(error, 200)
    remedy = REMEDIES.get(number, "")
    with contextlib.suppress(OSError):
        disk = os.statvfs(folder) if number == errno.ENOSPC and folder else None
        if disk and disk.f_files and not disk.f_favail:
            remedy = ": the disk has no inodes left, remove files, however small"
    made = kind(f"{what} ({why}){remedy}")
    made.errno = number
    return made


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Around every reader of a file. What the system refuses, such as permission, open files, memory or a failing disk,
    becomes an OSError in its own words, whatever the reader makes of it: it says nothing about the file. Other errors
    pass: the reader calls them `Damaged` if the bytes that it read prove that. The reader opens the file by itself
    before a library does: some call every failure to open "no such file". A pipe or a device, which could keep its
    reader for ever, is a ValueError.
    """
    with contextlib.suppress(OSError):  # which the reader raises, in its own words
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise ValueError(f"{path} is a pipe or a device, not a file")
    try:
        yield
    except Exception as error:
        if errno_of(error) is None:
            raise
        raise failed(f"cannot read {path}", error) from error


@contextlib.contextmanager
def reading_whole(
    path: str | Path, otherwise: str, broken: tuple[type[Exception], ...] = (Exception,)
) -> Iterator[None]:
    """As `reading`; what the reader raises of a damaged file becomes a ValueError of one line: PATH otherwise (why).

    broken: the exceptions that it raises then; many readers raise any.
    """
    try:
        with reading(path):
            yield
    except broken as error:
        if errno_of(error) is not None:
            raise
        is_lfs = os.path.isfile(path) and is_pointer(path)
        why = "a git-lfs pointer, not the file: run git lfs pull" if is_lfs else one_line(error, 120)
        raise ValueError(f"{path} {otherwise} ({why})") from None


#################################################################################
#                                  Whole files                                  #
#################################################################################


def sync(path: str | Path) -> None:
    """Flush a file's bytes, or a directory's names, to the disk, so that they survive a crash of the machine.

    On a disk that cannot do this, warn once. Raises OSError if the disk can do it and fails.
    """
    is_directory = os.path.isdir(path)
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # on some mounts a directory cannot be opened for syncing (EACCES, EISDIR), and still holds files
        if error.errno not in UNSUPPORTED | ({errno.EACCES, errno.EISDIR, errno.EBADF} if is_directory else set()):
            raise
        what = "directories" if is_directory else "files"
        warn_once(
            f"sync {what}",
            f"the disk of {path} cannot sync {what} ({error.strerror}): what was written last "
            "may be lost if the machine crashes",
        )


@contextlib.contextmanager
def replacing(path: Path, what: str = "", folder: Path | None = None) -> Iterator[Path]:
    """Give a path to write a file or folder to, then sync it and rename it to path: readers see the whole or none.

    Args:
        what: words before the path in an error.
        folder: the path to give, of a folder that is to replace the one at path [a new one; a folder at path is kept].

    If that raises, or is interrupted, nothing is left behind. Raises OSError, naming the path, if the disk fails.
    """
    parent = path.absolute().parent
    temporary = folder or parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        yield temporary
        for one in (*temporary.rglob("*"), temporary):
            sync(one)
        if folder:
            shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
        sync(parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True) if temporary.is_dir() else temporary.unlink(missing_ok=True)
        # whatever the writers raise on a full disk
        if isinstance(error, (OSError, RuntimeError)) or isinstance(error, Exception) and errno_of(error):
            raise failed(f"cannot write {what}{path}", error, parent) from error
        raise


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let write(file) fill a file, see `replacing`."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        write(file)


def write_bytes(path: Path, content: bytes) -> None:
    write_whole(path, lambda file: file.write(content))


def write_folder(path: Path, write: Callable[[Path], object], what: str = "", temporary: Path | None = None) -> None:
    """Let write(folder) fill a folder, see `replacing`. One that a killed process left at `temporary` is removed."""
    with replacing(path, what, temporary) as folder:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write(folder)
        for file in filter(Path.is_file, folder.rglob("*")):  # safetensors lets nobody else read its files
            with contextlib.suppress(OSError):
                file.chmod(file.stat().st_mode | folder.stat().st_mode & 0o666)


def folder_names(folder: str | Path) -> list[str]:
    """The names in a folder, sorted; none where there is no such folder.

    Raises OSError, naming it, for a folder that the system does not list, which pathlib's glob calls empty.
    """
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise failed(f"cannot list {folder}", error) from error


def names_in(path: str | Path) -> set[str]:
    """The arrays of an .npz, the keys of a JSON object, or SHEET of a `save_sheet`; of any other file none."""
    with contextlib.suppress(ValueError, OSError, zipfile.BadZipFile), reading(path):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return {name.removesuffix(".npy") for name in archive.namelist()}
        with open(path, "rb") as file:
            if f"tEXt{SHEET}\0".encode() in file.read(100):
                return {SHEET}
        return {*read_json(path)}
    return set()


def check_apart(output: str | Path, flag: str, inputs: Iterable[str | Path | None]) -> None:
    """Raise ValueError, naming the flag of an output, where it is one of the inputs, by whatever name or link."""
    for one in filter(None, inputs):
        if os.path.exists(output) and os.path.exists(one) and os.path.samefile(output, one):
            raise ValueError(f"{flag} {output} is read by this command, as {one}: name another")


def check_outside(output: str | Path, flag: str, data_path: str | Path) -> None:
    """Raise ValueError, naming the flag of an output, where it lies in the folder of images --data-path."""
    images, path = (Path(os.path.realpath(one)) for one in (data_path, output))
    if images in (path, *path.parents):
        raise ValueError(
            f"{flag} {output} lies in --data-path {data_path}, whose folders are the classes: give another"
        )


def check_output(path: str | Path, flag: str, inputs: Iterable = (), own: Iterable[str] | None = None) -> None:
    """Refuse, before any work, a file that cannot be written, or that would replace what is not this command's.

    Args:
        flag: that the path was given to.
        inputs: the files and folders that the command reads, None among them.
        own: what each file of this command holds, see `names_in`; None: `write_new` will look at what is there.

    Raises ValueError, naming flag and path.
    """
    check_apart(path, flag, inputs)
    path = Path(path)
    folder = path.absolute().parent
    if path.is_dir():
        raise ValueError(f"{flag} {path} is a folder: name a file")
    if not folder.is_dir():
        raise ValueError(f"{flag} {path}: there is no such folder")
    if path.exists() and not (path.is_file() and (own is None or {*own} <= names_in(path))):
        raise ValueError(f"{flag} {path} exists, and was not written by this command: name another file, or move it")
    try:
        try_disk(folder)
    except OSError as error:
        raise ValueError(f"{flag} {path} cannot be written: {error}") from None


def write_new(path: Path, content: bytes, flag: str) -> None:
    """Write bytes as `write_whole` does, unless they are there. Raises ValueError where other bytes are."""
    if path.exists() and path.read_bytes() != content:
        raise ValueError(f"{flag} {path} exists, and holds something else: name another file")
    write_bytes(path, content)


def remove_temporaries(directory: Path, name: str = "") -> None:
    """Remove the temporary files of killed `write_whole` calls whose targets' names start with `name`."""
    for temporary in directory.glob(f".*.{'?' * 32}.tmp"):
        if temporary.name.startswith(f".{name}"):
            temporary.unlink(missing_ok=True)


def try_disk(folder: Path, rename_folders: bool = False) -> None:
    """Write, sync and rename a file, and if wanted a folder, before any work. Raises OSError, naming the folder."""
    trial, renamed = (folder / f".trial.{uuid.uuid4().hex}.tmp" for _ in range(2))
    try:
        trial.mkdir()
        write_bytes(trial / "file", b"trial")
        if rename_folders:
            os.replace(trial, renamed)
    except OSError as error:
        what = f"a trial in {folder} failed: its disk has to write, sync and rename files"
        raise failed(what + " and folders" * rename_folders, error, folder) from error
    finally:
        for path in (trial, renamed):
            shutil.rmtree(path, ignore_errors=True)


def wait_for_lock(directory: Path, attempt: Callable[[], bool]) -> None:
    """Repeat an attempt to lock a directory. Raises ValueError where it fails for LOCK_PATIENCE."""
    deadline = time.monotonic() + LOCK_PATIENCE
    while not attempt():
        if time.monotonic() > deadline:
            raise ValueError(f"another process is writing to {directory}: wait for it, or give another path")
        time.sleep(POLL)


class DirectoryLock:
    """Keeps a second launch out of a directory while this process works there, by flock on a file in it.

    The kernel releases the lock when the process ends, however it ends. (On a disk without flock, filelock would fall
    back to a file that a killed process leaves behind.)
    """

    def __init__(self, directory: str | Path, name: str = ".lock"):
        self.path, self.file = Path(directory) / name, None

    def acquire(self, rename_folders: bool = False) -> None:
        """Take the lock; create the directory if it does not exist. On a disk without locks, warn once and go on.

        Raises ValueError if another launch keeps the lock for LOCK_PATIENCE, OSError if the file cannot be opened, and
        as `try_disk` does.
        """
        wait_for_lock(self.path.parent, self.attempt)
        try:
            try_disk(self.path.parent, rename_folders)
        except OSError:
            self.release()
            raise

    def attempt(self) -> bool:
        """Take the lock as `acquire` does, unless another launch has it. Returns whether it is taken."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            where = f"the folder {self.path.parent} (it is a file, a link to nowhere, or in one of these?)"
            raise failed(f"cannot make {where}", error) from error
        try:
            file = open(self.path, "ab")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the last holder may have removed this file in the meantime: the lock would exclude nobody
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(self.path)):
                return False
        except (BlockingIOError, FileNotFoundError):
            return False
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise failed(f"cannot lock {self.path}", error) from error
            warn_once(
                "locks",
                f"the disk of {self.path.parent} has no locks ({error.strerror}): make sure that only one launch, "
                "or one of each --part, writes there at a time",
            )
        self.file = file
        return True

    def release(self) -> None:
        """Release the lock, and remove its file and, if empty, the directory. Does nothing if the lock is not held."""
        if self.file is None:
            return
        with contextlib.suppress(OSError):
            self.path.unlink()  # before the release: a waiter could otherwise lock a file that is then removed
            self.path.parent.rmdir()
        self.file.close()
        self.file = None


def write_json(path: Path, value: dict) -> None:
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: str | Path) -> dict:
    """The dict in a JSON file. Raises `Damaged`, naming the file, if there is none, and OSError as `reading` does."""
    with reading(path):
        try:
            if os.path.getsize(path) > LARGEST_JSON:
                raise ValueError(f"{os.path.getsize(path):,} bytes, more than any that this program writes")
            value = json.loads(Path(path).read_bytes())
        except RecursionError:
            raise Damaged(f"{path} is not readable JSON (nested too deeply)") from None
        except ValueError as error:
            pointer = "a git-lfs pointer: run git lfs pull" if is_pointer(path) else error
            raise Damaged(f"{path} is not readable JSON ({pointer})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, wanted an object")
    return value


def sha256_of(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def is_pointer(path: str | Path | BinaryIO) -> bool:
    """Whether a file, by its path or open, is what git-lfs leaves in the place of one that was not fetched."""
    with contextlib.nullcontext(path) if hasattr(path, "read") else open(path, "rb") as file:
        file.seek(0)
        return file.read(40).startswith(b"version https://git-lfs")


def is_plain_name(text: object) -> bool:
    """Whether a text from a file is the name of an entry of a folder, rather than a path that leads out of it."""
    return isinstance(text, str) and text.isprintable() and text not in ("", ".", "..") and not set("/\\:") & set(text)


def recorded_id(name: str | Path) -> str:
    """The name of a model or folder as files record it: a hub id as it is, a local path as an absolute path."""
    return str(Path(name).resolve()) if Path(name).exists() else name
