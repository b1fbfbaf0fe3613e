"""Tensors from untrusted files: no code in them is run, and they are given no more memory than they hold.

    weights = check_tensors(load_tensors("model.safetensors"), "model.safetensors")

Every file of torch or safetensors that this program opens goes through here: weights of models, VAEs and encoders, the
optimizer's state of a resumed run, codes in a `.pt`. What kind of file one is, its first bytes tell, not its name.
Errors are in our words, because those of the libraries are long, and some advise the user to load the file unsafely.
"""

import argparse
import pickletools
import re
import warnings
import zipfile
from pathlib import Path

import safetensors.torch
import torch

from dlc.machine.cli import one_line
from dlc.weights.foreign.legacy_files import LARGEST_INDEX, START, load_legacy

ZIP = b"PK\x03\x04"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
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


WRAPPERS = re.compile(r"(^|(?<=\.))(module|_orig_mod)\.")  # of DDP and of torch.compile


def plain_name(name) -> str:
    """A tensor's name without the wrappers of DDP and torch.compile."""
    return WRAPPERS.sub("", str(name))


class PassedOver:
    """Stands where a file has an object that is no tensor and no plain value; takes anything and keeps nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass


def load_tensors(path):
    """The dict in a `.safetensors` file or in a file of torch.save, which may also hold values that are not tensors.

    Tensors are memory-mapped, so that unused ones are never read. Raises ValueError naming the file.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    with open(path, "rb") as file:
        start = file.read(9)
    if start[:4] == START:
        return load_legacy(path)
    if start[:4] == ZIP or (path.suffix != ".safetensors" and start[8:] != b"{"):
        value = read_torch(path)
        if not isinstance(value, dict):
            raise ValueError(f"{path} holds {in_words(value)}, wanted a dict of tensors")
        return value
    if int.from_bytes(start[:8], "little") <= LARGEST_INDEX:
        try:
            return safetensors.torch.load_file(path)
        except Exception:  # broken files raise many types
            pass
    raise ValueError(f"{path} cannot be read as weights: it is no .safetensors, or cut off or damaged")


def in_words(value):
    """What a value from a file is, for errors."""
    return "an object that is no tensor" if isinstance(value, PassedOver) else f"a {type(value).__name__}"


def read_torch(path, what="weights"):
    """The value in a file of torch.save, with memory-mapped tensors. Raises ValueError naming the file and `what`.

    Objects that PASSED_OVER names are `PassedOver` in it.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    try:
        fault = archive_fault(path)
        if not fault:
            inert = [
                (PassedOver, name.replace(" ", ".")) for name in set(names_in(path)) if PASSED_OVER.fullmatch(name)
            ]
            with torch.serialization.safe_globals([argparse.Namespace, *inert]), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about layouts in beta, which are refused anyway
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # zip readers and the unpickler raise many types
        fault = "it is cut off or damaged"
    raise ValueError(f"{path} cannot be read as {what}: {fault}")


def names_in(path):
    """The names "module name" of all that the pickle in a torch file asks for.

    It is read as torch.load reads it, because other zip readers may find another entry.
    """
    for opcode, argument, _ in pickletools.genops(torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")):
        if opcode.name == "GLOBAL":
            yield argument


def archive_fault(path):
    """Why a file must not go to torch.load, in words: it would fill the memory, or is no file of tensors. Else None."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        if file.read(4) != ZIP:
            return "it is no file of torch.save"
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        return "it has compressed entries, which torch.save does not write"
    if sum(max(entry.file_size, entry.compress_size) for entry in entries) > size:
        return f"its entries claim more than the file's {size:,} bytes"
    if sum(entry.file_size for entry in entries if not re.search(r"/data/\d+$", entry.filename)) > LARGEST_INDEX:
        return f"it has more than {LARGEST_INDEX:,} bytes beside its tensors"
    for name in names_in(path):
        if not (ADMITTED.fullmatch(name) or PASSED_OVER.fullmatch(name)):
            return (
                f"it names {shown(name.replace(' ', '.'))}, and may only hold tensors and plain values: save "
                "the weights alone"
            )
    return None


def check_tensors(tensors, path):
    """Return the dict if all its values can be weights. Raises ValueError naming file and tensor.

    Weights are floating point, dense, in memory and finite. A single value that is not finite makes all outputs NaN,
    which nothing would notice in a VAE or an encoder.
    """
    if not isinstance(tensors, dict):
        raise ValueError(f"{path} does not hold a dict of named tensors")
    for name, tensor in tensors.items():
        if not (isinstance(name, str) and isinstance(tensor, torch.Tensor)):
            raise ValueError(f"{path} does not hold a dict of named tensors: {shown(name)} is {in_words(tensor)}")
        fault = tensor_fault(tensor)
        if fault:
            raise ValueError(f"{path}: tensor {shown(name)} {fault}")
    return tensors


def tensor_fault(tensor):
    """Why a tensor cannot be a weight, in words, or None."""
    if tensor.dtype not in FLOATS:
        return f"is of type {tensor.dtype}, wanted floating point of 16, 32 or 64 bits"
    fault = storage_fault(tensor)
    # as float32, which all of them become: a float64 may hold what is infinite there
    if not fault and tensor.numel() and not torch.stack(tensor.aminmax()).float().isfinite().all():
        fault = "has values that are NaN or infinite"
    return fault


def storage_fault(tensor):
    """Why a tensor does not have as many values in memory as its shape says, in words, or None."""
    if tensor.layout != torch.strided:
        return f"is {str(tensor.layout).removeprefix('torch.')}, wanted dense"
    if tensor.device.type != "cpu":
        return f"is on the device {tensor.device.type}, without values"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"has shape {one_line(tuple(tensor.shape), 60)}, but fewer values"  # repeated by strides of 0
    return None


def differences_from(wanted, weights):
    """How named tensors differ from the wanted ones in names and shapes, in words; "" if they agree."""
    misshapen = [
        f"{shown(name)} {one_line(tuple(weights[name].shape), 40)}, wanted {tuple(wanted[name].shape)}"
        for name in sorted(wanted.keys() & weights.keys())
        if weights[name].shape != wanted[name].shape
    ]
    for what, items in (
        ("lacks", map(shown, sorted(wanted.keys() - weights.keys()))),
        ("has unknown", map(shown, sorted(weights.keys() - wanted.keys()))),
        ("has other shapes:", misshapen),
    ):
        items = list(items)
        if items:
            return one_line(
                f"{what} {', '.join(items[:2])}{f' and {len(items) - 2} more' if len(items) > 2 else ''}", 170
            )
    return ""


def shown(name):
    """A name from a file as errors show it: printable and short."""
    return one_line(str(name)[:1000], 80)
