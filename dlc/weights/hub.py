"""Names of weights: a local path if it exists, else a repository on the Hugging Face hub, of which files are fetched.

    path = locate("stabilityai/sd-vae-ft-ema", "vae", "--vae")     # the folder of its weights in the hub's cache
    path = locate("owner/name@v1.0", …)                            # a branch, a tag or a commit
    path = locate("owner/name:0400000.pt", …)                      # one file of it, or one folder
    path = locate("results/checkpoints/0000500", …)                # a local path comes back as it is

huggingface_hub keeps the cache (HF_HOME), shows progress, resumes downloads, and reads HF_ENDPOINT, HF_HUB_OFFLINE and
the token (`hf auth login` or HF_TOKEN). Only the files asked for are fetched; nothing in them is run.
"""

import contextlib
import fnmatch
import functools
import glob
import http.client
import os
import re
import socket
import sys
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from dlc.machine.cli import one_line, say, warn_once
from dlc.machine.files import FULL, is_plain_name, sync
from dlc.weights.foreign.safe import WEIGHTS_SUFFIXES, check_tensors, differences_from, load_tensors, weights_in
from models import DiT_models

# A name that ends like a file of weights is a path, such as pretrained/encoder.pth, which could be an id, too.
FILE_SUFFIXES = (*WEIGHTS_SUFFIXES, ".pkl", ".npy", ".npz", ".json", ".yaml", ".zip")
PART_OF_ID = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?", re.ASCII)
DLC_EMA, DLC_STATE = "custom_checkpoint_0.pkl", "random_states_0.pkl"  # of accelerate's folders, in the DLC project
IN_PIPELINES = dict(model="transformer", vae="vae", prior="", encoder="")  # the folder of such weights
# What is fetched beside weights: small files, and the EMA of our checkpoints and of the DLC project's.
BESIDE = ("*.json", "*/*.json", "ema.safetensors", DLC_EMA, DLC_STATE)
LOG_IN = "log in (hf auth login, or HF_TOKEN)"
NO_ANSWER = 30  # seconds after which an address counts as out of reach


def parts_of(name: object) -> tuple[str, str, str]:
    """The hub id in a name; the revision, a branch, a tag or a commit ["main"]; the file or folder in it [""]."""
    name, _, inside = str(name).partition(":")
    repository, _, revision = name.partition("@")
    return repository, revision or "main", inside.strip("/")


def is_id(name: object) -> bool:
    """Whether a name can be a hub id, `owner/name[@revision][:file]`, rather than a local path."""
    repository, _, inside = parts_of(name)
    parts = repository.split("/")
    return (
        not os.path.lexists(name)
        and len(parts) == 2
        and all(map(PART_OF_ID.fullmatch, parts))
        and not parts[1].lower().endswith(FILE_SUFFIXES)
        and (not inside or all(map(is_plain_name, inside.split("/"))))
    )


def locate(name: object, kind: str, flag: str = "checkpoint") -> Path:
    """The local path that a name stands for; of a hub id, its folder or file in the hub's cache.

    If the hub is out of reach or refuses, the copy in the cache is used, with a warning, if it is whole.
    A repository is asked for once per process; the library's locks let one process of a node fetch a file.

    Args:
        kind: of network that is wanted, a key of IN_PIPELINES, which says what files are.
        flag: that the name was given to, for errors.

    Raises ValueError, one line with the remedy, if there is no such path, repository or file of weights, and if the hub
    refuses access or is out of reach.
    """
    if os.path.exists(name):
        return Path(name)
    said = f"{flag} {one_line(str(name)[:1000], 100)}".strip()
    if not is_id(name):
        raise ValueError(
            f"{said} does not exist: it is neither a file or folder nor a hub id (owner/name or owner/name@revision)"
        )
    try:
        return fetched(str(name), kind)
    except ValueError as error:
        raise ValueError(f"{said}: {error}") from None


@functools.cache  # all parts of a program see one commit
def fetched(name: str, kind: str) -> Path:
    """The path of a hub id. Raises ValueError saying what is wrong, without the name."""
    from huggingface_hub import _CACHED_NO_EXIST, constants, try_to_load_from_cache

    repository, revision, inside = parts_of(name)
    cache = Path(constants.HF_HUB_CACHE) / "--".join(["models", *repository.split("/")])
    refusal = ""
    if not constants.HF_HUB_OFFLINE:
        try:
            return _download(cache, repository, revision, kind, inside) / inside
        except LookupError as error:
            raise ValueError(f"the hub's repository, at revision {revision}, {error.args[0]}") from None
        except Exception as error:  # the hub's client and its transport raise many types
            refusal = refusal_of(error, revision)
    # the library refuses a snapshot that lacks a file of any pattern, though other alternatives may be there
    reference, wanted = cache / "refs" / revision, []
    commit = reference.read_text().strip() if reference.is_file() else revision
    folder, there = cache / "snapshots" / commit, sorted(path.name for path in cache.glob("snapshots/*"))
    if commit in there:
        with contextlib.suppress(LookupError):
            files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
            wanted = wanted_files(files, kind, inside)
    remedy = "fetch it once where the hub is in reach, or give a local path"
    if not wanted:
        has = f"; the cache has {repository}@{there[0]}" if there and commit not in there else ""
        offline = ", while HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
        lacks = f"no such local path, and the hub's cache {constants.HF_HUB_CACHE} does not have all of it{offline}"
        raise ValueError((refusal or f"{lacks}: {remedy}") + has)
    config = next(filter(None, map(config_beside, wanted)))
    if config not in wanted and try_to_load_from_cache(repository, config, revision=revision) is not _CACHED_NO_EXIST:
        raise ValueError(
            f"the hub's cache {constants.HF_HUB_CACHE} has its weights, but no {config}, which decides what they are: "
            + remedy
        )
    if refusal:
        warn_once(f"hub {name}", f"{name}: {refusal}; its copy in the hub's cache is used")
    return folder / inside


def _download(cache: Path, repository: str, revision: str, kind: str, inside: str) -> Path:
    """Fetch the wanted files that the cache does not have whole. Raises LookupError if there are no weights of a kind,
    and what the hub's client raises."""
    import huggingface_hub
    from huggingface_hub import errors, utils

    # the client's log lines say in many words what the errors here say in one
    utils.logging.set_verbosity(utils.logging.CRITICAL)
    if not (sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"):
        utils.disable_progress_bars()
    info = huggingface_hub.HfApi().model_info(repository, revision=revision, timeout=NO_ANSWER, files_metadata=True)
    sizes = {file.rfilename: file.size for file in info.siblings or []}
    sizes = {file: size for file, size in sizes.items() if all(map(is_plain_name, file.split("/")))}
    wanted, folder, lacking = wanted_files(sizes, kind, inside), cache / "snapshots" / info.sha, 0
    for path, size in ((folder / file, sizes[file]) for file in wanted):
        cut = path.is_file() and size not in (None, path.stat().st_size)  # such as by a full disk
        if cut:
            path.resolve().unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        lacking += cut or not path.is_file()
    if lacking and os.environ.get("RANK", "0") == "0":
        say(f"fetching {repository} from the hub: {lacking} files")
    patterns = [glob.escape(file) for file in wanted]
    folder = Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=patterns))
    for config in {*map(config_beside, wanted)} - {None, *sizes}:  # asked for, so that the cache knows it is absent
        with contextlib.suppress(errors.EntryNotFoundError):
            huggingface_hub.hf_hub_download(repository, config, revision=info.sha)
    return folder


def refusal_of(error: Exception, revision: str) -> str:
    """What went wrong with the hub, and the remedy."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError):  # which stands for what kept a file from coming
        error = error.__cause__ or error
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return f"its owner gates it: accept the terms on its page on the hub, then {LOG_IN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the hub has no revision {one_line(repr(revision), 60)} of it"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such local path, and the hub has no such repository, or keeps it private: then {LOG_IN}"
    if status in (401, 403):
        return f"the hub refuses access (status {status}): {LOG_IN}, with a token that may read it"
    if status == 429:
        return f"the hub takes no more requests from here for now (status 429): wait some minutes, or {LOG_IN}"
    if isinstance(error, OSError) and (error.filename or error.errno in FULL):
        return (
            f"the hub's cache {constants.HF_HUB_CACHE} cannot be written ({os.strerror(error.errno)}): "
            f"{'free the disk, or ' if error.errno in FULL else ''}set HF_HOME"
        )
    # other errors' own words, such as which package a SOCKS proxy takes, or that the answer is no JSON but a login page
    what = f"status {status}" if status else f"{type(error).__name__}: {one_line(error, 100)}"
    (scheme, _, host), proxies = constants.ENDPOINT.partition("://"), urllib.request.getproxies()
    proxy = next((name for name in (scheme, "all") if name in proxies), None)
    if proxy and not urllib.request.proxy_bypass(host):
        what += f", by the proxy that {proxy.upper()}_PROXY names"
    where = constants.ENDPOINT + " (HF_ENDPOINT)" * ("HF_ENDPOINT" in os.environ)
    return (
        f"no such local path, and fetching it from the hub at {where} failed ({what}): run again when "
        "the hub is in reach, or give a local path"
    )


#################################################################################
#                                     Files                                     #
#################################################################################


def wanted_files(files: Iterable[str], kind: str, inside: str = "") -> list[str]:
    """Of a repository's files, the weights of a kind and what is read beside them.

    inside: a file or a folder of it, which the user named.

    Raises LookupError, saying what there is, without one file of weights, or one set of shards.
    """
    files = list(files)
    folder = inside.rpartition("/")[0] if inside in files else inside
    top = f"{folder}/" if folder else ""

    def matching(pattern):  # `*` matches no slash: both have as many
        return [file for file in files if file.count("/") == pattern.count("/") and fnmatch.fnmatchcase(file, pattern)]

    chosen, beside = (inside, BESIDE[:1]) if inside in files else (None, BESIDE)
    for place in (f"{top}{IN_PIPELINES[kind]}/", top):
        name = weights_in(file.removeprefix(place) for file in matching(f"{place}*"))
        chosen = chosen or (name and f"{place}{name}")
    if not chosen:
        found = [file for suffix in WEIGHTS_SUFFIXES for file in matching(f"{top}*{suffix}")]
        others = found or [file for file in files if file.endswith(WEIGHTS_SUFFIXES)]
        names = ", ".join(one_line(file, 60) for file in others[:4]) + ", …" * (len(others) > 4)
        what = f"no file of weights{f' in {inside}' if inside else ''}" if not found else "several files of weights"
        raise LookupError(f"has {what}" + (f": name one of {names} after a colon, ID:FILE" if others else ""))
    patterns = [f"{top}{one}" for one in beside]
    if chosen.endswith(".json"):  # of shards, model.safetensors.index.fp16.json for example
        folder, slash, name = chosen.rpartition("/")
        stem, ending, *variant = name.split(".")
        patterns.append(f"{folder}{slash}{stem}{'.fp16' * ('fp16' in variant)}-*-of-*.{ending}")
    return sorted({chosen, *(file for pattern in patterns for file in matching(pattern))})


def config_beside(file: str) -> str | None:
    """The config.json that belongs to a file of weights; None if it is none."""
    return f"{file.rpartition('/')[0]}/config.json".lstrip("/") if file.endswith(WEIGHTS_SUFFIXES) else None


#################################################################################
#                               Public addresses                                #
#################################################################################

ADDRESS = "https://dl.fbaipublicfiles.com/DiT/models"
ADDRESS_VARIABLE = "DIT_WEIGHTS_URL"
FOLDER = Path("pretrained_models")
PUBLISHED = {  # by model and image size: the repository on the hub, and the file at the address
    ("DiT-XL/2", 256): ("facebook/DiT-XL-2-256", "DiT-XL-2-256x256.pt"),
    ("DiT-XL/2", 512): ("facebook/DiT-XL-2-512", "DiT-XL-2-512x512.pt"),
}


def is_offline() -> bool:
    """Whether the user asks that nothing be fetched (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def published_dit(model: str, image_size: int) -> str | Path:
    """The hub id or the local file of the published weights of a key of PUBLISHED, fetched if it is not there yet.

    Raises ValueError, saying where to put the file, if neither the hub nor the address gives it.
    """
    repository, name = PUBLISHED[model, image_size]
    path, mirror = FOLDER / name, os.environ.get(ADDRESS_VARIABLE)
    if path.is_file():
        return path
    if not mirror:
        try:
            locate(repository, "model", "--ckpt")
            return repository
        except ValueError as error:
            if is_offline():
                raise ValueError(f"{error}; or put DiT's {name} at {path}") from None
    url = f"{(mirror or ADDRESS).rstrip('/')}/{name}"

    def check(part):
        try:
            with torch.device("meta"):
                wanted = DiT_models[model](input_size=image_size // 8).state_dict()
            different = differences_from(wanted, check_tensors(load_tensors(part), part))
        except ValueError as error:
            different = str(error).replace(str(part), "it")
        if different:
            raise ValueError(f"{url} did not send the weights of {model} ({different}), and nothing is kept of it")

    try:
        return fetch_file(url, path, check)
    except ValueError as error:
        raise ValueError(f"{error}: put the file at {path}, or name weights with --ckpt") from None


def fetch_file(url: str, path: Path, check: Callable[[Path], None]) -> Path:
    """The file at path, fetched from url if it is not there yet: by the first process that gets to it.

    Raises ValueError if url is out of reach or refuses, and what `check` raises of a file that is not the wanted one;
    nothing is kept of it then.
    """
    import filelock

    path.parent.mkdir(parents=True, exist_ok=True)
    part, patience = path.with_name(f".{path.name}.part"), socket.getdefaulttimeout()
    with filelock.FileLock(path.with_name(f".{path.name}.lock")):
        if path.is_file():
            return path
        for left in path.parent.glob(f"{glob.escape(part.name)}*"):  # by a process that was killed
            left.unlink()
        if os.environ.get("RANK", "0") == "0":
            say(f"fetching {url}")
        try:
            socket.setdefaulttimeout(NO_ANSWER)
            torch.hub.download_url_to_file(url, str(part), progress=sys.stderr.isatty())
            check(part)
            sync(part)
            os.replace(part, path)
        except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
            if getattr(error, "errno", None) in FULL:
                raise
            why = f"status {error.code}" if hasattr(error, "code") else getattr(error, "reason", error)
            raise ValueError(f"{url} is out of reach ({one_line(why, 80)})") from None
        finally:
            socket.setdefaulttimeout(patience)
            part.unlink(missing_ok=True)
    return path
