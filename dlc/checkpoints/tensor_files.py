"""Tensors out of files that may come from anyone: nothing in them is run, and they get no more memory than they hold.

    weights = check_tensors(load_tensors("model.safetensors"), "model.safetensors")

Every file of torch or safetensors that this program opens goes through here: weights of models, VAEs and encoders, the
optimizer's state of a run that continues, codes in a `.pt`. What is wrong with one is said in our words: those of the
libraries are long, and some advise to read the file unsafely.
"""
import argparse
import pickletools
import re
import warnings
import zipfile
from pathlib import Path

import safetensors.torch
import torch

from dlc.cli import one_line

# Bytes of what names a file's tensors: the pickle in torch's zip, the header of a .safetensors. A DiT-XL/2's training
# checkpoint with weights, EMA and optimizer has 0.2 MB of it. As objects, a hostile one takes some 70 times its size.
LARGEST_INDEX = 2**22
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# The names in a pickle of tensors and plain values, arguments of training scripts among them. torch admits more where
# weights_only is set, and other packages add to that; bytearray(10**12), for one, fills the memory.
ADMITTED = re.compile(
    r"collections (OrderedDict|Counter)|argparse Namespace|__builtin__ set|torch (Size|device)|"
    r"torch (\w+Storage|(b?float|complex|u?int|bool)\w*)|torch\.storage UntypedStorage|"
    r"torch\.serialization _get_layout|"
    r"torch\._utils _rebuild_(tensor_v2|tensor_v3|parameter|sparse_tensor|meta_tensor_no_storage)")


def load_tensors(path):
    """The dict in a `.safetensors`, or in what torch.save wrote, which may hold other than tensors, too.

    Tensors are mapped: what is not used is never read. Raises ValueError naming the file.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        value = read_torch(path)
        if not isinstance(value, dict):
            raise ValueError(f"{path} holds a {type(value).__name__}, wanted a dict of tensors")
        return value
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header <= LARGEST_INDEX:
        try:
            return safetensors.torch.load_file(path)
        except Exception:                               # whatever it makes of a broken file
            pass
    raise ValueError(f"{path} cannot be read as weights: it is no .safetensors, or cut off or damaged")


def read_torch(path, what="weights"):
    """The value in a file of torch.save, its tensors mapped. Raises ValueError naming the file and what was wanted."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    try:
        fault = archive_fault(path)
        if not fault:
            with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
                warnings.simplefilter("ignore")         # of layouts in beta, which are refused as it is
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:                                   # whatever the zip's readers and the unpickler make of it
        fault = "it is cut off or damaged"
    raise ValueError(f"{path} cannot be read as {what}: {fault}")


def archive_fault(path):
    """What keeps a file from torch.load, in words: what would fill the memory, or is no file of tensors; else None."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return "it is no file of torch.save (of one from before torch 1.6, save the weights anew)"
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        return "it has compressed entries, which torch.save does not write"
    if sum(max(entry.file_size, entry.compress_size) for entry in entries) > size:
        return f"its entries claim more than the file's {size:,} bytes"
    if sum(entry.file_size for entry in entries if not re.search(r"/data/\d+$", entry.filename)) > LARGEST_INDEX:
        return f"it has more than {LARGEST_INDEX:,} bytes beside its tensors"
    # as torch.load finds it, whatever the zip's directory says to others
    for opcode, argument, _ in pickletools.genops(torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")):
        if opcode.name == "GLOBAL" and not ADMITTED.fullmatch(argument):
            return (f"it names {shown(argument.replace(' ', '.'))}, and may only hold tensors and plain values: save "
                    "the weights alone")
    return None


def check_tensors(tensors, path):
    """The same dict, if it is one of named tensors that weights can be. Raises ValueError naming file and tensor.

    Weights are floating point, dense, in memory and finite. One value that is not makes all outputs NaN, of which a VAE
    and an encoder say nothing.
    """
    if not isinstance(tensors, dict):
        raise ValueError(f"{path} does not hold a dict of named tensors")
    for name, tensor in tensors.items():
        if not (isinstance(name, str) and isinstance(tensor, torch.Tensor)):
            raise ValueError(f"{path} does not hold a dict of named tensors: {shown(name)} is a "
                             f"{type(tensor).__name__}")
        fault = tensor_fault(tensor)
        if fault:
            raise ValueError(f"{path}: tensor {shown(name)} {fault}")
    return tensors


def tensor_fault(tensor):
    """What keeps a tensor from being a weight, in words, else None."""
    if tensor.dtype not in FLOATS:
        return f"is of type {tensor.dtype}, wanted floating point of 16, 32 or 64 bits"
    fault = storage_fault(tensor)
    if not fault and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
        fault = "has values that are NaN or infinite"
    return fault


def storage_fault(tensor):
    """What keeps a tensor from having as many values in memory as its shape says, in words, else None."""
    if tensor.layout != torch.strided:
        return f"is {str(tensor.layout).removeprefix('torch.')}, wanted dense"
    if tensor.device.type != "cpu":
        return f"is on the device {tensor.device.type}, without values"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"has shape {one_line(tuple(tensor.shape), 60)}, but fewer values"         # repeated by strides of 0
    return None


def differences_from(wanted, weights):
    """How named tensors differ from those wanted, in names and shapes, in words; "" where they agree."""
    misshapen = [f"{shown(name)} {one_line(tuple(weights[name].shape), 40)}, "
                 f"wanted {tuple(wanted[name].shape)}"
                 for name in sorted(wanted.keys() & weights.keys()) if weights[name].shape != wanted[name].shape]
    for what, items in (("lacks", map(shown, sorted(wanted.keys() - weights.keys()))),
                        ("has unknown", map(shown, sorted(weights.keys() - wanted.keys()))),
                        ("has other shapes:", misshapen)):
        items = list(items)
        if items:
            return one_line(f"{what} {', '.join(items[:2])}{f' and {len(items) - 2} more' if len(items) > 2 else ''}",
                            170)
    return ""


def shown(name):
    """A name out of a file as an error may show it: printable, and not long."""
    return one_line(str(name)[:1000], 80)
