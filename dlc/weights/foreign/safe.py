"""Tensors from untrusted files: no code in them is run, and they are given no more memory than they hold.

    weights = check_tensors(load_tensors(path), path)

Every file of torch or safetensors that this program opens goes through here: weights of models, VAEs and encoders, the
optimizer's state of a resumed run, codes in a `.pt`. Files are recognised by their first bytes, not by their names.
Errors are in our words, because those of the libraries are long, and some advise the user to load the file unsafely.
"""

import argparse
import contextlib
import ctypes
import errno
import io
import os
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import safetensors.torch
import torch

from dlc.machine.cli import one_line
from dlc.machine.files import Damaged, errno_of, failed, is_pointer, reading

# Of a folder the first of these is read: weights whole before shards, full precision before half.
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
ENDS = "safetensors safetensors.index.json bin bin.index.json".split()
ENDS += "fp16.safetensors safetensors.index.fp16.json fp16.bin bin.index.fp16.json".split()
WEIGHTS_FILES = tuple(f"{stem}.{end}" for end in ENDS for stem in STEMS)
WEIGHTS_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
ZIP, OLD = b"PK\x03\x04", b"\x80\x02\x8a\n"  # first bytes of what torch.save writes since 1.6, and before
PAGE = 4096  # bytes; the least of any system's pages
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# what our own checkpoints may hold as well: masks, indices, an optimizer's counters
RECORDABLE = (*FLOATS, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# Bytes of the index of a file's tensors: the pickle of torch.save, the header of a .safetensors. That of a training
# checkpoint of a DiT-XL/2, with weights, EMA and optimizer, has 0.2 MB. A hostile one grows about 70-fold as objects.
LARGEST_INDEX = 2**22
# The names in a pickle of tensors and plain values, including the arguments of training scripts. With weights_only,
# torch admits more, and other packages add to it: bytearray(10**12), for example, would fill the memory.
ADMITTED = re.compile(
    r"collections (OrderedDict|Counter)|argparse Namespace|__builtin__ set|torch (Size|device)|"
    r"torch (\w+Storage|(b?float|complex|u?int|bool)\w*)|torch\.storage UntypedStorage|"
    r"torch\.serialization _get_layout|"
    r"torch\._utils _rebuild_(tensor_v2|tensor_v3|parameter|sparse_tensor|meta_tensor_no_storage)"
)
# Names of plain values that training scripts keep beside the weights, as in their arguments. An inert object takes the
# place of each: nothing of these modules is imported or called for a file.
PASSED_OVER = re.compile(
    r"pathlib(\._local)? (Pure)?(Posix|Windows)?Path|"
    r"numpy(\.core|\._core)\.multiarray (scalar|_reconstruct)|numpy (dtype|ndarray|\w+_)|numpy\.dtypes \w+|"
    r"_codecs encode|datetime (datetime|date|time|timedelta|timezone)|"
    r"omegaconf(\.\w+)* \w+|typing \w+|__builtin__ (list|dict|int|float|str|bool|object)"
)


def weights_in(files: Iterable[str]) -> str | None:
    """The name of the file of weights to read in a folder: one of WEIGHTS_FILES, or the only one there; or None."""
    files = set(files)
    others = [name for name in files if name.endswith(WEIGHTS_SUFFIXES) and name[0] != "."]  # a Mac's ._x
    return next((name for name in WEIGHTS_FILES if name in files), others[0] if len(others) == 1 else None)


#################################################################################
#                                    Reading                                    #
#################################################################################


class PassedOver:
    """Stands where a file has an object that is no tensor and no plain value; takes anything and keeps nothing."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass


@contextlib.contextmanager
def utf8_path(path: str | Path) -> Iterator[tuple[str, BinaryIO]]:
    """The path by which a library opens a file of weights, and the file, open. The libraries want UTF-8, which names on
    Linux need not be: the open file has another."""
    with open(path, "rb") as file:
        is_utf8 = os.fsencode(path).decode(errors="ignore") == str(path)
        yield str(path) if is_utf8 else f"/proc/self/fd/{file.fileno()}", file


def load_tensors(path: Path) -> dict:
    """The dict in a `.safetensors` file or in a file of torch.save, which may also hold values that are not tensors.

    Tensors are memory-mapped, so that unused ones are never read: `check_tensors` is the first that touches them.
    Raises ValueError naming the file, `Damaged` for one that is not whole, and OSError as `files.reading` does.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    with reading(path), utf8_path(path) as (name, file):
        start = file.read(9)
        if start[:4] in (ZIP, OLD) or (path.suffix != ".safetensors" and start[8:] != b"{"):
            value = read_torch(path, mapped=zipfile.is_zipfile(path))
            if not isinstance(value, dict):
                raise ValueError(f"{path} holds {in_words(value)}, wanted a dict of tensors")
            return value
        try:
            if int.from_bytes(start[:8], "little") <= LARGEST_INDEX:
                return safetensors.torch.load_file(name)
        except Exception as error:  # broken files raise many types
            if errno_of(error) is not None:
                raise
    raise Damaged(
        f"{path} cannot be read as weights: {other_form(path) or 'it is no .safetensors, or cut off or damaged'}"
    )


def in_words(value: object) -> str:
    """What a value from a file is, for errors."""
    return "an object that is no tensor" if isinstance(value, PassedOver) else f"a {type(value).__name__}"


def other_form(path: Path) -> str:
    """What a file is that is often met in the place of weights, and the remedy; or ""."""
    with open(path, "rb") as file:
        start = file.read(64)
    if start[8:9] == b"{":  # the index of a .safetensors; before it lies its length, of any bytes
        return ""
    start = start.lstrip()
    if is_pointer(path):
        return "it is a git-lfs pointer, which stands for a file that was not fetched: run git lfs pull"
    if start[:1] == b"<":
        return "it is a web page: fetch the file itself"
    if start[:1] == b"\x80":
        return "it is a bare pickle, which would have to be run: save the state dict with torch.save"
    return ""


def read_torch(path: Path, what: str = "weights", mapped: bool = False) -> object:
    """The value in a file of torch.save, whose tensors are read or, if `mapped`, memory-mapped.

    Objects that PASSED_OVER names are `PassedOver` in it. Raises errors as `load_tensors` does, naming the file and
    `what`.
    """
    with reading(path), utf8_path(path) as (name, _):
        try:
            fault, names = survey(Path(name))
            if not fault:
                inert = [(PassedOver, one.replace(" ", ".")) for one in names if PASSED_OVER.fullmatch(one)]
                with torch.serialization.safe_globals([argparse.Namespace, *inert]), warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # about layouts in beta, which are refused anyway
                    return torch.load(name, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:  # zip readers and the unpickler raise many types
            if errno_of(error) is not None:
                raise
            raise Damaged(f"{path} cannot be read as {what}: it is cut off or damaged") from None
    raise ValueError(f"{path} cannot be read as {what}: {fault}")


def survey(path: Path) -> tuple[str, set[str]]:
    """Why a file must not go to torch.load, because it would fill the memory or is no file of tensors, or ""; and the
    names, "module name", of all that its pickles ask for."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(LARGEST_INDEX)
    if start[:4] == ZIP:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        if any(re.search(r"/code/|/constants\.pkl$", entry.filename) for entry in entries):
            return "it is a TorchScript program, which is not run: save the state_dict() of the loaded one", set()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            return "it has compressed entries, which torch.save does not write", set()
        if sum(max(entry.file_size, entry.compress_size) for entry in entries) > size:
            return f"its entries claim more than the file's {size:,} bytes", set()
        if sum(entry.file_size for entry in entries if not re.search(r"/data/\d+$", entry.filename)) > LARGEST_INDEX:
            return f"it has more than {LARGEST_INDEX:,} bytes beside its tensors", set()
        # as torch.load reads it, because other zip readers may find another entry
        pickles, count = io.BytesIO(torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")), 1
    elif start[:4] == OLD:
        # a magic number, a version, facts about the machine, the objects, the keys of their storages
        pickles, count = io.BytesIO(start), 5
    else:
        return other_form(path) or "it is no file of torch.save", set()
    found = [(opcode.name, argument) for _ in range(count) for opcode, argument, _ in pickletools.genops(pickles)]
    protocol = max((argument for opcode, argument in found if opcode == "PROTO"), default=0)
    if protocol > 2:
        return f"it has pickle protocol {protocol}: save it again by torch.save without pickle_protocol", set()
    names = {argument for opcode, argument in found if opcode in ("GLOBAL", "INST")}
    for name in sorted(names):
        if not (ADMITTED.fullmatch(name) or PASSED_OVER.fullmatch(name)):
            name = shown(name.replace(" ", "."))
            return f"it names {name}, and may only hold tensors and plain values: save the weights alone", names
    return "", names


#################################################################################
#                                     Checks                                    #
#################################################################################


def check_tensors(tensors: dict, path: object, types: tuple[torch.dtype, ...] = FLOATS) -> dict[str, torch.Tensor]:
    """Return the dict if all its values can be weights. Raises `Damaged` naming file and tensor.

    Weights are floating point, or of `types`, dense, in memory and finite. A single value that is not finite makes
    all outputs NaN, which nothing would notice in a VAE or an encoder.
    """
    if not isinstance(tensors, dict):
        raise ValueError(f"{path} does not hold a dict of named tensors")
    for name, tensor in tensors.items():
        if not (isinstance(name, str) and isinstance(tensor, torch.Tensor)):
            raise Damaged(f"{path} does not hold a dict of named tensors: {shown(name)} is {in_words(tensor)}")
        fault = storage_fault(tensor)
        if tensor.dtype not in types:
            fault = f"is of type {tensor.dtype}, wanted floating point of 16, 32 or 64 bits"
        if not fault and tensor.numel():
            page_in(tensor, path)
            # as float32, which all of them become: a float64 may hold what is infinite there
            if not torch.stack(tensor.aminmax()).float().isfinite().all():
                fault = "has values that are NaN or infinite"
        if fault:
            raise Damaged(f"{path}: tensor {shown(name)} {fault}")
    return tensors


def page_in(tensor: torch.Tensor, path: object) -> None:
    """Have the system read a mapped tensor's pages, a byte of each into a pipe. Raises OSError where the disk fails or
    the file was cut: to touch such a page from here would end this process."""
    size = tensor.element_size() * (1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride())))
    memory, (out, into) = memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())), os.pipe()
    try:
        for start in range(0, size, 1000 * PAGE):  # a call takes 1,024 pieces
            block = memory[start : start + 1000 * PAGE]
            pieces = [*(block[place : place + 1] for place in range(0, len(block), PAGE)), block[-1:]]
            if os.writev(into, pieces) < len(pieces):
                raise OSError(errno.EIO, "")
            os.read(out, len(pieces))
    except OSError:
        raise failed(f"cannot read {path}", OSError(errno.EIO, "")) from None
    finally:
        os.close(out), os.close(into)


def storage_fault(tensor: torch.Tensor) -> str | None:
    """Why a tensor has fewer values in memory than its shape says, in words, or None."""
    if tensor.layout != torch.strided:
        return f"is {str(tensor.layout).removeprefix('torch.')}, wanted dense"
    if tensor.device.type != "cpu":
        return f"is on the device {tensor.device.type}, without values"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"has shape {one_line(tuple(tensor.shape), 60)}, but fewer values"  # repeated by strides of 0
    return None


def differences_from(wanted: dict, weights: dict) -> str:
    """How named tensors differ from the wanted ones in names and shapes, in words; "" if they agree."""
    misshapen = [
        f"{shown(name)} {one_line(tuple(weights[name].shape), 40)}, wanted {tuple(wanted[name].shape)}"
        for name in sorted(wanted.keys() & weights.keys())
        if weights[name].shape != wanted[name].shape
    ]
    for what, items in (
        ("lacks", [*map(shown, sorted(wanted.keys() - weights.keys()))]),
        ("has unknown", [*map(shown, sorted(weights.keys() - wanted.keys()))]),
        ("has other shapes:", misshapen),
    ):
        if items:
            more = f" and {len(items) - 2} more" if len(items) > 2 else ""
            return one_line(f"{what} {', '.join(items[:2])}{more}", 170)
    return ""


def fill(model: torch.nn.Module, tensors: dict, said: str, more: str = "") -> torch.nn.Module:
    """Give a model that was built without memory these tensors, as float32. Returns it, in eval mode.

    Raises ValueError, said before and more after the fault, if they are not all its own, of its shapes.
    """
    different = differences_from(model.state_dict(), tensors)
    if different:
        raise ValueError(f"{said} {different}{more}")
    # copied: a mapped file that another program overwrites would end this process
    dtypes = {name: torch.float32 if value.is_floating_point() else value.dtype for name, value in tensors.items()}
    model.load_state_dict({name: value.to(dtypes[name], copy=True) for name, value in tensors.items()}, assign=True)
    return model.eval()


def shown(name: object) -> str:
    """A name from a file as errors show it: printable and short."""
    return one_line(str(name)[:1000], 80)
