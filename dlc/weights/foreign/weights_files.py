"""Which file of a folder holds its weights, in whole or as shards, and what it holds."""

from pathlib import Path

from dlc.machine.files import is_plain_name, read_json
from dlc.weights.foreign.safe import LARGEST_INDEX, load_tensors

# Of a folder the first of these is read: weights whole before shards, full precision before half.
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
ENDS = {  # of a file, and of what is fetched of the hub for it
    ".safetensors": ".safetensors",
    ".safetensors.index.json": "-*-of-*.safetensors",
    ".bin": ".bin",
    ".bin.index.json": "-*-of-*.bin",
    ".fp16.safetensors": ".fp16.safetensors",
    ".safetensors.index.fp16.json": ".fp16-*-of-*.safetensors",
    ".fp16.bin": ".fp16.bin",
    ".bin.index.fp16.json": ".fp16-*-of-*.bin",
}
WEIGHTS_FILES = tuple(stem + end for end in ENDS for stem in STEMS)
WEIGHTS_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


def hub_patterns(folder: str = "", stems=STEMS) -> tuple[str, ...]:
    """Patterns of what is fetched of a repository on the hub for such a file, in the order of preference."""
    return tuple(f"{folder}{stem}{end}" for end in ENDS.values() for stem in stems)


def weights_in(files) -> str | None:
    """The name of the file of weights to read of a folder: one of WEIGHTS_FILES, or the only one there; or None."""
    files = set(files)
    others = [name for name in files if name.endswith(WEIGHTS_SUFFIXES)]
    return next((name for name in WEIGHTS_FILES if name in files), others[0] if len(others) == 1 else None)


def read_file(path: Path) -> tuple[dict, str]:
    """What a file of weights, or an index of shards, holds; and words for shards and variants, or ""."""
    values, words = read_shards(path) if is_index(path) else (load_tensors(path), "")
    return values, ", ".join(filter(None, [words, "fp16 variant" if ".fp16." in path.name else ""]))


def is_index(path: Path) -> bool:
    """Whether a file is the JSON index of shards, by its first bytes."""
    if not path.is_file() or path.stat().st_size > LARGEST_INDEX:
        return False
    with open(path, "rb") as file:
        start = file.read(64)
    # a .safetensors begins with the length of its header, whose first bytes are no text
    return start.lstrip()[:1] == b"{" and b"\0" not in start


def read_shards(path: Path) -> tuple[dict, str]:
    """The tensors that an index names, out of the files beside it, and words for how many files those are.

    Raises ValueError naming index and tensor.
    """
    names = read_json(path).get("weight_map")
    if not isinstance(names, dict) or not names or not all(map(is_plain_name, names.values())):
        raise ValueError(f"{path} is no index of shards: its weight_map is not of names of files beside it")
    shards = {name: load_tensors(path.with_name(name)) for name in sorted(set(names.values()))}
    lacking = next((key for key, name in names.items() if key not in shards[name]), None)
    if lacking is not None:
        raise ValueError(f"{path} says that {names[lacking]} has {lacking[:80]!r}, which it does not")
    return {key: shards[name][key] for key, name in names.items()}, f"{len(shards)} shards"
