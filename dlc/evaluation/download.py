"""Fetch a file from a public address: continued where an earlier attempt stopped, and whole or not at all."""

import contextlib
import hashlib
import http.client
import os
import re
import urllib.error
import urllib.request
from pathlib import Path

from dlc.cli import one_line, progress
from dlc.disk import DirectoryLock, sync

TIMEOUT = 20  # seconds of silence
CHUNK = 2**20  # bytes
LARGEST = 2**31  # bytes; ten times the largest file that is fetched


def sha256_of(path) -> str:
    """The SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file):  # Python 3.10
    digest = hashlib.sha256()
    while block := file.read(CHUNK):
        digest.update(block)
    return digest.hexdigest()


def fetch(url: str, path: Path, sha256_prefix: str = "") -> Path:
    """The file at path; where it is missing, fetched from url to path.part, checked, and renamed.

    The size is compared with what the server says, and the SHA-256 with its known first digits. What an interrupted
    attempt fetched is kept in path.part, from where the next one goes on.

    Raises ValueError in one line where the file cannot be fetched, or is another.
    """
    if path.is_file():
        return path
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = DirectoryLock(path.parent)
    lock.acquire(patience=600)  # another launch may be fetching it
    try:
        if not path.is_file():
            _continue(url, part)
            found = sha256_of(part)
            if not found.startswith(sha256_prefix):
                part.unlink()
                raise ValueError(
                    f"what {url} sent has the SHA-256 {found[:8]}…, wanted {sha256_prefix}…: it is not the "
                    "published file, and was removed"
                )
            sync(part)
            os.replace(part, path)
    finally:
        lock.release()
    return path


def _continue(url: str, part: Path) -> None:
    """Append to part what it lacks of the file at url. Raises ValueError where that does not succeed."""
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "dlc-dit", "Range": f"bytes={done}-"})
    try:
        with contextlib.closing(urllib.request.urlopen(request, timeout=TIMEOUT)) as answer:
            total = _total(answer, done)
            if answer.status != 206:  # this server starts over
                done = 0
            if total is not None and total > LARGEST:
                raise ValueError(f"{url} has {total:,} bytes, more than any file that is wanted")
            with (
                open(part, "r+b" if part.exists() else "wb") as file,
                progress(total=total, initial=done, unit="B", unit_scale=True, desc=f"fetching {part.stem}") as bar,
            ):
                file.truncate(done)
                file.seek(done)
                while block := answer.read(CHUNK):
                    file.write(block)
                    done += len(block)
                    bar.update(len(block))
                    if done > LARGEST:
                        raise ValueError(f"{url} sends more than {LARGEST:,} bytes")
    except urllib.error.HTTPError as error:
        size = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
        if error.code == 416 and size and int(size[1]) == done > 0:
            return  # all of it was there already
        if error.code == 416:
            part.unlink(missing_ok=True)
        raise ValueError(f"{url} answers {error.code} {one_line(error.reason, 60)}") from None
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
        reason = one_line(getattr(error, "reason", None) or error or type(error).__name__, 80)
        raise ValueError(f"{url} is out of reach ({reason}){kept(done)}") from None
    if total is not None and done != total:
        raise ValueError(f"{url} ended at {done:,} of {total:,} bytes{kept(done)}")


def kept(done):
    return "; what came is kept, and the same command goes on from there" if done else ""


def _total(answer, done):
    """Bytes of the whole file, as the server says, or None."""
    if answer.status == 206:
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
        if not span or int(span[1]) != done:
            raise ValueError(f"{answer.url} continues at another place than asked for")
        return int(span[2])
    length = answer.headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None
