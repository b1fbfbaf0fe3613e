"""Fetch a file of weights from a public address: continued where it was cut off, and whole or not at all."""

import contextlib
import hashlib
import http.client
import os
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from dlc.machine.cli import one_line, progress
from dlc.machine.files import DirectoryLock, sync

SECONDS, TRIES, CHUNK = 30, 4, 2**20  # without an answer; connections; bytes
PATIENCE = 6 * 3600  # seconds that the other processes wait for the one that fetches
LARGEST = 2**33  # bytes; three times the largest file that is fetched


class OutOfReach(ValueError):
    """An address does not answer, or refuses: whoever wants the file says what else can be done."""


def is_offline() -> bool:
    """Whether the user asks that nothing be fetched, as huggingface_hub has it."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def sha256_of(path) -> str:
    """The SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def fetch(url: str, path: Path, check: Callable[[Path], None]) -> Path:
    """The file at path, fetched from url if it is not there yet: by the first process that gets to it.

    Args:
        check: raises ValueError if a file, which is whole by its size, is not the wanted one; nothing is kept then.

    Raises OutOfReach if url does not answer, ValueError if it sends another file or only a part, which is kept in
    .NAME.part: the next call goes on from there.
    """
    if path.is_file():
        return path
    lock, part = DirectoryLock(path.parent), path.with_name(f".{path.name}.part")
    lock.acquire(PATIENCE)
    try:
        if not path.is_file():
            receive_all(url, part)
            try:
                check(part)
                sync(part)
                os.replace(part, path)
                sync(path.parent)
            except ValueError:
                part.unlink(missing_ok=True)
                raise
            finally:
                validator_of(part).unlink(missing_ok=True)
    finally:
        lock.release()
    return path


def validator_of(part: Path) -> Path:
    """Beside a part: what the server called the version of the file that it is of."""
    return part.with_name(f"{part.name}.version")


def size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def receive_all(url: str, part: Path) -> None:
    """Fetch a file to part, continuing what is there. Raises ValueError if it ends up incomplete; the part is kept."""
    why, total, first = "", None, size_of(part)
    for _ in range(TRIES):
        before = size_of(part)
        try:
            total = receive(url, part)
            if total in (None, size_of(part)):
                return
            why = "the connection was cut off"
        except urllib.error.HTTPError as error:
            why = f"status {error.code}"
            if error.code != 416:
                break
            if error.headers.get("Content-Range") == f"bytes */{before}":  # all of it was there
                return
            part.unlink(missing_ok=True)  # it is not of this file: begin anew
            continue
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            why = str(getattr(error, "reason", error)) or type(error).__name__
        if size_of(part) <= before:
            break
    if total or size_of(part) > first:
        raise ValueError(
            f"{url}: {one_line(why, 80)} after {size_of(part):,}{f' of {total:,}' if total else ''} bytes, which are "
            "kept: run the same command again to fetch the rest"
        )
    raise OutOfReach(f"{url} is out of reach ({one_line(why, 80)})")


def receive(url: str, part: Path) -> int | None:
    """One connection: append to part what it lacks. Returns the size of the whole file, if the server says it."""
    start, version = size_of(part), validator_of(part)
    headers = {"User-Agent": "dlc-dit"}
    if start:
        headers["Range"] = f"bytes={start}-"
        if version.is_file():
            headers["If-Range"] = version.read_text()
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=SECONDS) as answer:
        if answer.status != 206:  # all of it, from the beginning
            start = 0
        length = answer.headers.get("Content-Length", "")
        total = start + int(length) if re.fullmatch(r"\d{1,15}", length) else None
        validator = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
        with contextlib.suppress(OSError):
            version.write_text(validator) if validator else version.unlink(missing_ok=True)
        if os.environ.get("RANK", "0") == "0":
            print(f"fetching {url}{f', {total / 1e6:,.1f} MB' if total else ''}", file=sys.stderr, flush=True)
        with (
            open(part, "ab" if start else "wb") as file,
            progress(total=total and total / 1e6, initial=start / 1e6, desc="fetching", unit="MB", delay=2) as bar,
        ):
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk) / 1e6)
                if file.tell() > LARGEST:
                    raise ValueError(f"{url} sends more than {LARGEST:,} bytes, more than any file that is wanted")
    return total
