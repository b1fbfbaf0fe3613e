"""Names of weights: a local path if it exists, else a repository on the Hugging Face hub, of which files are fetched.

    folder = fetch("stabilityai/sd-vae-ft-ema", ["config.json", ("*.safetensors", "*.bin")], flag="--vae")
    folder = fetch("owner/name@v1.0", …)                           # a branch, a tag or a commit
    folder = fetch("results/checkpoints/0000500", …)               # a local path comes back as it is

huggingface_hub keeps the cache (HF_HOME), and reads HF_ENDPOINT, HF_HUB_OFFLINE and the token (`hf auth login` or
HF_TOKEN). Only files are fetched, and only those asked for; nothing in them is run.
"""

import contextlib
import errno
import fnmatch
import glob
import os
import re
import sys
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

from dlc.machine.cli import one_line, progress, warn_once
from dlc.machine.files import is_plain_name

# A name that ends like a file of weights is a path, such as pretrained/encoder.pth, which could be an id, too.
FILE_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".pkl", ".npy", ".npz", ".json", ".yaml", ".zip")
PART_OF_ID = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?", re.ASCII)
MEGABYTE = 1e6
ATTEMPTS = 6  # at a download whose connection breaks
FETCHED = {}  # what this process has fetched: all parts of a program see one commit
LOG_IN = "log in (hf auth login, or HF_TOKEN)"


def is_id(name) -> bool:
    """Whether a name can be a hub id, `owner/name` or `owner/name@revision`, rather than a local path."""
    parts = str(name).partition("@")[0].split("/")
    return (
        not os.path.lexists(name)
        and len(parts) == 2
        and all(map(PART_OF_ID.fullmatch, parts))
        and not parts[1].lower().endswith(FILE_SUFFIXES)
    )


def id_and_revision(name) -> tuple[str, str]:
    """The hub id in a name, and the revision: a branch, a tag or a commit; "main" where the name has none."""
    repository, _, revision = str(name).partition("@")
    return repository, revision or "main"


def fetch(name, needed, optional=(), flag="", kind="model", ask=True) -> Path:
    """The local path that a name stands for; of a hub id, the folder of the wanted files in the hub's cache.

    Args:
        name: a local path, which comes back unread, or a hub id with or without @revision.
        needed: patterns of files, such as "vae/*.json"; `*` matches no slash. In place of one pattern, a tuple of
            alternatives: the first that matches files is taken.
        optional: the same, of files that need not be there.
        flag: the flag that the name was given to, for errors.
        kind: "model" or "dataset".
        ask: whether to ask the hub; else only the cache is read. See `fetched_by_node`.

    Where the hub cannot be asked, or refuses, the copy in the cache is taken if all needed files are there, with a
    warning. A repository is asked for once per process.

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
    key = (str(name), *map(tuple, (needed, optional)), kind)
    if key not in FETCHED:
        try:
            FETCHED[key] = snapshot(str(name), needed, optional, kind, ask)
        except ValueError as error:
            raise ValueError(f"{said}: {error}") from None
    return FETCHED[key]


def snapshot(name, needed, optional, kind, ask):
    """The folder of a hub id's wanted files, see `fetch`. Raises ValueError saying what is wrong, without the name."""
    try:
        from huggingface_hub import constants
    except ImportError:
        raise ValueError("hub ids need a package: pip install huggingface_hub") from None
    repository, revision = id_and_revision(name)
    offline = not ask or constants.HF_HUB_OFFLINE
    refusal = (
        f"no such local path, and the hub's cache {constants.HF_HUB_CACHE} does not have all of it"
        + (", while HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "")
        + ": fetch it once where the hub is in reach, or give a local path"
    )
    if not offline:
        with quiet():
            try:
                return download(repository, revision, needed, optional, kind)
            except Missing as error:
                raise ValueError(str(error)) from None
            except Exception as error:  # the hub's client and its transport raise many types
                refusal = in_words(error, revision)
    folder = cached_snapshot(repository, revision, kind)
    if folder is None or missing(files_in(folder), needed):
        raise ValueError(refusal)
    if not offline:
        warn_once(f"hub {name}", f"{name}: {refusal}; its copy in the hub's cache is used")
    return folder


def download(repository, revision, needed, optional, kind):
    """Fetch the wanted files that the cache does not have yet. Raises Missing, and what the hub's client raises."""
    import huggingface_hub

    listing = list_repository(repository, revision, kind)
    lack = missing(listing.sizes, needed)
    if lack:
        raise Missing(f"the hub's repository, at revision {revision}, has no {lack}")
    wanted = chosen(listing.sizes, (*needed, *optional))
    absent = [
        file
        for file in wanted
        if not isinstance(
            huggingface_hub.try_to_load_from_cache(repository, file, revision=listing.commit, repo_type=kind), str
        )
    ]
    patterns = [glob.escape(file) for file in wanted]
    with progress_of(repository, kind, absent, sum(listing.sizes[file] for file in absent)):
        for attempt in range(ATTEMPTS):
            try:
                folder = huggingface_hub.snapshot_download(
                    repository, revision=revision, repo_type=kind, allow_patterns=patterns
                )
                break
            except Exception as error:  # clients before 1.0 resume a broken connection only when called again
                if type(error).__name__ != "ChunkedEncodingError" or attempt == ATTEMPTS - 1:
                    raise
    return Path(folder)


@dataclass(frozen=True)
class Listing:
    """The files of a repository at a commit: bytes by path."""

    repository: str
    commit: str
    sizes: dict[str, int]


def list_files(name, flag="", kind="model") -> Listing:
    """The files of a hub id. Raises ValueError, one line with the remedy, if the hub refuses or is out of reach."""
    repository, revision = id_and_revision(name)
    with quiet():
        try:
            return list_repository(repository, revision, kind)
        except Exception as error:  # the hub's client and its transport raise many types
            raise ValueError(f"{flag} {name}: {in_words(error, revision)}".strip()) from None


def list_repository(repository, revision, kind) -> Listing:
    import huggingface_hub

    info = huggingface_hub.HfApi().repo_info(
        repository, revision=revision, repo_type=kind, files_metadata=True, timeout=30
    )
    sizes = {entry.rfilename: entry.size or 0 for entry in info.siblings or []}
    plain = {file: size for file, size in sizes.items() if all(map(is_plain_name, file.split("/")))}
    return Listing(repository, info.sha, plain)


class Missing(Exception):
    """A repository on the hub does not have the files that are needed of it."""


def in_words(error, revision):
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


#################################################################################
#                                     Files                                     #
#################################################################################


def matching(files, pattern):
    """The files, paths with slashes, that a pattern matches part by part, in order."""
    parts = pattern.split("/")
    return sorted(
        file
        for file in files
        if file.count("/") == len(parts) - 1 and all(map(fnmatch.fnmatchcase, file.split("/"), parts))
    )


def chosen(files, patterns):
    """The files that patterns match; of a tuple of patterns, only those of the first that matches any."""
    found = []
    for one in patterns:
        alternatives = (one,) if isinstance(one, str) else one
        found += next(filter(None, (matching(files, pattern) for pattern in alternatives)), [])
    return sorted(set(found))


def missing(files, needed):
    """The first of the needed patterns that no file matches, in words, or ""."""
    return next((one if isinstance(one, str) else " or ".join(one) for one in needed if not chosen(files, [one])), "")


def cached_snapshot(repository, revision, kind):
    """The folder of a revision in the hub's cache, whether all files are there or not, or None."""
    root = repository_folder(repository, kind)
    reference = root / "refs" / revision
    commit = revision
    if not re.fullmatch("[0-9a-f]{40}", revision):
        if ".." in revision or not reference.is_file():
            return None
        commit = reference.read_text().strip()
    folder = root / "snapshots" / commit
    return folder if is_plain_name(commit) and folder.is_dir() else None


def repository_folder(repository, kind):
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / "--".join([f"{kind}s", *repository.split("/")])


def files_in(folder):
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


#################################################################################
#                                   Progress                                    #
#################################################################################


@contextlib.contextmanager
def quiet():
    """Without the hub client's own bars, log lines and warnings: this module says what matters in its own words."""
    from huggingface_hub import utils

    level, bars = utils.logging.get_verbosity(), not utils.are_progress_bars_disabled()
    utils.logging.set_verbosity(utils.logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        utils.disable_progress_bars()
        try:
            yield
        finally:
            utils.logging.set_verbosity(level)
            if bars:
                utils.enable_progress_bars()


@contextlib.contextmanager
def progress_of(repository, kind, files, size):
    """Say what is fetched, and how far it is: by the growth of the cache, since the client has no stable callback.

    Only rank 0 says it. size: bytes of the files.
    """
    if not files or os.environ.get("RANK", "0") != "0":
        yield
        return
    print(
        f"fetching {repository} from the hub: {len(files)} files, {size / MEGABYTE:,.1f} MB",
        file=sys.stderr,
        flush=True,
    )
    blobs, ended = repository_folder(repository, kind) / "blobs", threading.Event()

    def cached_bytes():
        total = 0
        for blob in blobs.glob("*"):
            with contextlib.suppress(OSError):  # a part that has just become whole has another name
                total += blob.stat().st_size
        return total

    def watch():
        before = done = cached_bytes()
        with progress(total=size / MEGABYTE, desc="fetching", unit="MB", delay=2) as bar:
            while not ended.wait(0.5):
                now = cached_bytes()
                bar.update(max(0, now - done) / MEGABYTE)
                done = max(done, now)
            bar.update(max(0, min(size, cached_bytes() - before) / MEGABYTE - bar.n))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


#################################################################################
#                                   Processes                                   #
#################################################################################


def fetched_by_node(state, fetch_all):
    """Fetch what a program needs of the hub: first one process of each node, then the others, from the cache.

    Args:
        state: accelerate's PartialState.
        fetch_all: a function fetch_all(ask) that calls `fetch(…, ask=ask)` for each name, in every process.

    Later calls of `fetch` in the same process find what this one has found. Raises ValueError in every process if a
    first one does.
    """
    from accelerate.utils import gather_object

    error = None
    if state.is_local_main_process:
        try:
            fetch_all(True)
        except (ValueError, OSError) as raised:
            error = str(raised)
    errors = list(filter(None, gather_object([error])))  # also waits for the first ones
    if errors:
        raise ValueError(errors[0])
    if not state.is_local_main_process:
        fetch_all(False)
