"""DiT's published weights, fetched from their public address: whole or not at all, continued where they were cut off.

    path = published_weights("DiT-XL-2-256x256.pt")                # pretrained_models/DiT-XL-2-256x256.pt

The address publishes no digest, so a file counts as whole if it has all names and shapes of its model and only finite
values. DIT_WEIGHTS_URL names a mirror.
"""

import contextlib
import http.client
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

import torch

from dlc.cli import one_line, progress
from dlc.disk import DirectoryLock, sync
from dlc.tensor_files import check_tensors, differences_from, load_tensors
from models import DiT_models

ADDRESS = "https://dl.fbaipublicfiles.com/DiT/models"
ADDRESS_VARIABLE = "DIT_WEIGHTS_URL"
FOLDER = Path("pretrained_models")
PUBLISHED = {"DiT-XL-2-256x256.pt": ("DiT-XL/2", 256), "DiT-XL-2-512x512.pt": ("DiT-XL/2", 512)}
SECONDS, TRIES, CHUNK = 30, 4, 2**20  # without an answer; connections; bytes
PATIENCE = 6 * 3600  # seconds that the other processes wait for the one that fetches


def published_name(model: str, image_size: int) -> str | None:
    """The file of a model's published weights, or None if there are none."""
    return next((name for name, which in PUBLISHED.items() if which == (model, image_size)), None)


def published_weights(name: str, folder: Path = FOLDER) -> Path:
    """The local file of published weights, fetched if it is not there yet: by the first process that gets to it.

    Raises ValueError, saying where to put the file, if its address is out of reach or does not send these weights.
    """
    path = folder / name
    if path.is_file():
        return path
    base = os.environ.get(ADDRESS_VARIABLE)
    url = f"{(base or ADDRESS).rstrip('/')}/{name}"
    if not base and os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise unreachable(path, url, "HF_HUB_OFFLINE is set")
    lock, part = DirectoryLock(folder), path.with_name(f".{name}.part")
    lock.acquire(PATIENCE)
    try:
        if not path.is_file():
            fetch(url, part, path)
            check(part, url, name)
            sync(part)
            os.replace(part, path)
            sync(folder)
            validator_of(part).unlink(missing_ok=True)
    finally:
        lock.release()
    return path


def unreachable(path, url, why):
    return ValueError(
        f"{path} is not there, and {url} is out of reach ({one_line(why, 80)}): put the file at {path}, or name "
        "weights with --ckpt"
    )


def check(part: Path, url: str, name: str) -> None:
    """Raise ValueError, and remove the file, if it does not hold its model's weights: names, shapes, finiteness."""
    model, image_size = PUBLISHED[name]
    try:
        with torch.device("meta"):
            wanted = DiT_models[model](input_size=image_size // 8).state_dict()
        different = differences_from(wanted, check_tensors(load_tensors(part), part))
    except ValueError as error:
        different = str(error).replace(str(part), "it")
    if different:
        part.unlink(missing_ok=True)
        raise ValueError(f"{url} did not send the weights of {model} ({different}): nothing is kept of it")


#################################################################################
#                                   Transport                                   #
#################################################################################


def validator_of(part: Path) -> Path:
    """Beside a part: what the server called the version of the file that it is of."""
    return part.with_name(f"{part.name}.version")


def fetch(url: str, part: Path, path: Path) -> None:
    """Fetch a file to part, continuing what is there. Raises ValueError if it ends up incomplete; the part is kept."""
    why, total = "", None
    for _ in range(TRIES):
        before = size_of(part)
        try:
            total = receive(url, part)
            if size_of(part) == total:
                return
            why = "the connection was cut off"
        except urllib.error.HTTPError as error:
            why = f"status {error.code}"
            if error.code != 416:  # the part is not of this file: begin anew
                break
            part.unlink(missing_ok=True)
            continue
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            why = str(getattr(error, "reason", error)) or type(error).__name__
        if size_of(part) <= before:
            break
    if total:
        raise ValueError(
            f"{url}: {one_line(why, 80)} after {size_of(part):,} of {total:,} bytes, which are kept: run the same "
            "command again to fetch the rest"
        )
    raise unreachable(path, url, why)


def size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def receive(url: str, part: Path) -> int:
    """One connection: append to part what it lacks. Returns the size of the whole file."""
    start, version = size_of(part), validator_of(part)
    headers = {"User-Agent": "dlc-dit"}
    if start:
        headers["Range"] = f"bytes={start}-"
        if version.is_file():
            headers["If-Range"] = version.read_text()
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=SECONDS) as answer:
        if answer.status != 206:  # all of it, from the beginning
            start = 0
        total = start + int(answer.headers.get("Content-Length") or 0)
        validator = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
        with contextlib.suppress(OSError):
            version.write_text(validator) if validator else version.unlink(missing_ok=True)
        if os.environ.get("RANK", "0") == "0":
            print(f"fetching {url}, {total / 1e6:,.1f} MB", file=sys.stderr, flush=True)
        with (
            open(part, "ab" if start else "wb") as file,
            progress(total=total / 1e6, initial=start / 1e6, desc="fetching", unit="MB", delay=2) as bar,
        ):
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk) / 1e6)
    return total
