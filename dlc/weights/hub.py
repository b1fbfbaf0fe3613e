"""Names of weights: a local path if it exists, else a repository on the Hugging Face hub, of which files are fetched.

    folder = fetch("stabilityai/sd-vae-ft-ema", ["config.json", ("*.safetensors", "*.bin")], flag="--vae")
    folder = fetch("owner/name@v1.0", …)                           # a branch, a tag or a commit
    folder = fetch("results/checkpoints/0000500", …)               # a local path comes back as it is
    path = fetch_file("https://…/weights.pth", Path("weights.pth"), check)

huggingface_hub keeps the cache (HF_HOME), shows progress, resumes downloads, and reads HF_ENDPOINT, HF_HUB_OFFLINE and
the token (`hf auth login` or HF_TOKEN). Only the files asked for are fetched; nothing in them is run.
"""

import contextlib
import errno
import fnmatch
import glob
import hashlib
import http.client
import os
import re
import socket
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from dlc.machine.cli import one_line, warn_once
from dlc.machine.files import is_plain_name, sync
from dlc.machine.processes import from_all, is_first_of_node

# A name that ends like a file of weights is a path, such as pretrained/encoder.pth, which could be an id, too.
FILE_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".pkl", ".npy", ".npz", ".json", ".yaml", ".zip")
PART_OF_ID = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?", re.ASCII)
FETCHED = {}  # what this process has fetched: all parts of a program see one commit
LOG_IN = "log in (hf auth login, or HF_TOKEN)"
NO_ANSWER = 30  # seconds after which an address counts as out of reach


def is_id(name: object) -> bool:
    """Whether a name can be a hub id, `owner/name` or `owner/name@revision`, rather than a local path."""
    parts = str(name).partition("@")[0].split("/")
    return (
        not os.path.lexists(name)
        and len(parts) == 2
        and all(map(PART_OF_ID.fullmatch, parts))
        and not parts[1].lower().endswith(FILE_SUFFIXES)
    )


def id_and_revision(name: object) -> tuple[str, str]:
    """The hub id in a name, and the revision: a branch, a tag or a commit; "main" where the name has none."""
    repository, _, revision = str(name).partition("@")
    return repository, revision or "main"


def fetch(name, needed, optional=(), flag: str = "", ask: bool = True) -> Path:
    """The local path that a name stands for; of a hub id, the folder of the wanted files in the hub's cache.

    Args:
        name: a local path, which comes back unread, or a hub id with or without @revision.
        needed: patterns of files, such as "vae/*.json"; `*` matches no slash. In place of one pattern, a tuple of
            alternatives: the first that matches files is taken.
        optional: the same, of files that need not be there.
        flag: the flag that the name was given to, for errors.
        ask: whether to ask the hub; else only the cache is read. See `fetched_by_node`.

    If the hub is out of reach or refuses, the copy in the cache is used, with a warning, provided that all needed
    files are there. A repository is asked for once per process.

    Raises ValueError, one line with the remedy, if there is no such path or repository, if the hub refuses access or
    is out of reach, and if needed files are missing.
    """
    if os.path.exists(name):
        return Path(name)
    said = f"{flag} {one_line(str(name)[:1000], 100)}".strip()
    if not is_id(name):
        raise ValueError(
            f"{said} does not exist: it is no file or folder, nor a hub id (owner/name or owner/name@revision)"
        )
    key = (str(name), *map(tuple, (needed, optional)))
    if key not in FETCHED:
        try:
            FETCHED[key] = _snapshot(str(name), needed, optional, ask)
        except ValueError as error:
            raise ValueError(f"{said}: {error}") from None
    return FETCHED[key]


def _snapshot(name, needed, optional, ask):
    """The folder of a hub id's wanted files, see `fetch`. Raises ValueError saying what is wrong, without the name."""
    from huggingface_hub import constants

    repository, revision = id_and_revision(name)
    offline = not ask or constants.HF_HUB_OFFLINE
    refusal = (
        f"no such local path, and the hub's cache {constants.HF_HUB_CACHE} does not have all of it"
        + (", while HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "")
        + ": fetch it once where the hub is in reach, or give a local path"
    )
    if not offline:
        try:
            return _download(repository, revision, needed, optional)
        except LookupError as error:
            raise ValueError(error.args[0]) from None
        except Exception as error:  # the hub's client and its transport raise many types
            refusal = in_words(error, revision)
    # the library refuses a snapshot that lacks a file of any pattern, though other alternatives may be there
    folder = cached_snapshot(repository, revision)
    if folder is None or missing(files_in(folder), needed):
        raise ValueError(refusal)
    if not offline:
        warn_once(f"hub {name}", f"{name}: {refusal}; its copy in the hub's cache is used")
    return folder


def _download(repository, revision, needed, optional):
    """Fetch the wanted files that the cache does not have yet. Raises LookupError if the repository lacks a needed
    file, and what the hub's client raises."""
    import huggingface_hub

    with quiet():
        info = huggingface_hub.HfApi().model_info(repository, revision=revision, timeout=NO_ANSWER)
        files = [entry.rfilename for entry in info.siblings or []]
        files = [file for file in files if all(map(is_plain_name, file.split("/")))]
        lack = missing(files, needed)
        if lack:
            raise LookupError(f"the hub's repository, at revision {revision}, has no {lack}")
        wanted = chosen(files, (*needed, *optional))
        folder = cached_snapshot(repository, info.sha)
        absent = set(wanted) - set(files_in(folder) if folder else ())
        if absent and os.environ.get("RANK", "0") == "0":
            print(f"fetching {repository} from the hub: {len(absent)} files", file=sys.stderr, flush=True)
        patterns = [glob.escape(file) for file in wanted]
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=patterns))


def in_words(error: Exception, revision: str) -> str:
    """What went wrong with the hub, and the remedy."""
    from huggingface_hub import constants, errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return f"its owner gates it: accept the terms on its page on the hub, then {LOG_IN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the hub has no revision {one_line(repr(revision), 60)} of it"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such local path, and the hub has no such repository, or keeps it private: then {LOG_IN}"
    if status in (401, 403):
        return f"the hub refuses access (status {status}): {LOG_IN}, with a token that may read it"
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
        return (
            f"the hub's cache {constants.HF_HUB_CACHE} cannot be written ({os.strerror(error.errno)}): "
            "free the disk, or set HF_HOME"
        )
    what = f"status {status}" if status else type(error).__name__
    return (
        f"no such local path, and fetching it from the hub at {constants.ENDPOINT} failed ({what}): run again when "
        "the hub is in reach, or give a local path"
    )


@contextlib.contextmanager
def quiet():
    """Without the log lines of the hub's client, which say in many words what the errors here say in one line; and
    with its progress bars only in the terminal of rank 0."""
    from huggingface_hub import utils

    level, bars = utils.logging.get_verbosity(), not utils.are_progress_bars_disabled()
    hidden = bars and not (sys.stderr.isatty() and os.environ.get("RANK", "0") == "0")
    utils.logging.set_verbosity(utils.logging.CRITICAL)
    if hidden:
        utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.logging.set_verbosity(level)
        if hidden:
            utils.enable_progress_bars()


#################################################################################
#                                     Files                                     #
#################################################################################


def matches(file: str, pattern: str) -> bool:
    """Whether a pattern matches a path with slashes. `*` matches no slash: both have as many."""
    return file.count("/") == pattern.count("/") and fnmatch.fnmatchcase(file, pattern)


def chosen(files: Iterable[str], patterns) -> list[str]:
    """The files that patterns match; of a tuple of patterns, only those of the first that matches any."""
    found = set()
    for one in patterns:
        alternatives = (one,) if isinstance(one, str) else one
        hits = ([file for file in files if matches(file, pattern)] for pattern in alternatives)
        found.update(next(filter(None, hits), ()))
    return sorted(found)


def missing(files: Iterable[str], needed) -> str:
    """The first of the needed patterns that no file matches, in words, or ""."""
    return next((one if isinstance(one, str) else " or ".join(one) for one in needed if not chosen(files, [one])), "")


def cached_snapshot(repository: str, revision: str) -> Path | None:
    """The folder of a revision in the hub's cache, whether all files are there or not, or None."""
    from huggingface_hub import constants

    root = Path(constants.HF_HUB_CACHE) / "--".join(["models", *repository.split("/")])
    reference, commit = root / "refs" / revision, revision
    if not re.fullmatch("[0-9a-f]{40}", revision):
        if ".." in revision or not reference.is_file():
            return None
        commit = reference.read_text().strip()
    folder = root / "snapshots" / commit
    return folder if is_plain_name(commit) and folder.is_dir() else None


def files_in(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def fetched_by_node(state, fetch_all: Callable[[bool], object]) -> None:
    """Fetch what a program needs from the hub: first one process of each node, then the others, from the cache.

    Args:
        state: accelerate's PartialState.
        fetch_all: a function fetch_all(ask) that calls `fetch(…, ask=ask)` for each name, in every process.

    Later calls of `fetch` in the same process find what this one has found. Raises ValueError in every process if a
    first one does.
    """
    error = None
    if is_first_of_node():
        try:
            fetch_all(True)
        except (ValueError, OSError) as raised:
            error = str(raised)
    errors = list(filter(None, from_all(error)))  # also waits for the first ones
    if errors:
        raise ValueError(errors[0])
    if not is_first_of_node():
        fetch_all(False)


#################################################################################
#                               Public addresses                                #
#################################################################################


def is_offline() -> bool:
    """Whether the user asks that nothing be fetched (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def sha256_of(path) -> str:
    """The SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def fetch_file(url: str, path: Path, check: Callable[[Path], None]) -> Path:
    """The file at path, fetched from url if it is not there yet: by the first process that gets to it.

    Args:
        check: raises ValueError if a file is not the wanted one, or not whole; nothing is kept then.

    Raises ValueError if url is out of reach or refuses, and what check raises.
    """
    import filelock
    import torch.hub

    path.parent.mkdir(parents=True, exist_ok=True)
    part, patience = path.with_name(f".{path.name}.part"), socket.getdefaulttimeout()
    with filelock.FileLock(path.with_name(f".{path.name}.lock")):
        if path.is_file():
            return path
        for left in path.parent.glob(f"{glob.escape(part.name)}*"):  # by a process that was killed
            left.unlink()
        if os.environ.get("RANK", "0") == "0":
            print(f"fetching {url}", file=sys.stderr, flush=True)
        try:
            socket.setdefaulttimeout(NO_ANSWER)
            torch.hub.download_url_to_file(url, str(part), progress=sys.stderr.isatty())
            check(part)
            sync(part)
            os.replace(part, path)
        except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise
            why = f"status {error.code}" if hasattr(error, "code") else getattr(error, "reason", error)
            raise ValueError(f"{url} is out of reach ({one_line(why, 80)})") from None
        finally:
            socket.setdefaulttimeout(patience)
            part.unlink(missing_ok=True)
    return path
