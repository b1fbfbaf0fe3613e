"""Tensors and plain values out of a file that torch.save wrote before torch 1.6, such as published Inception weights.

Such a file is five pickles (a magic number, a version, facts about the machine, the objects, the keys of their
storages) and then each storage: its number of values as an int64, and the values. torch's own reader allocates what the
pickle claims; this one takes no more memory than the file holds, and calls nothing that the file names.
"""

import argparse
import io
import math
import pickle
import pickletools
from collections import OrderedDict
from pathlib import Path

import torch

from dlc.machine.cli import one_line

# Bytes of the index of a file's tensors: the pickle of torch.save, the header of a .safetensors. That of a training
# checkpoint of a DiT-XL/2, with weights, EMA and optimizer, has 0.2 MB. A hostile one grows about 70-fold as objects.
LARGEST_INDEX = 2**22
START = b"\x80\x02\x8a\n"  # of a pickle of protocol 2 that begins with the magic number
MAGIC = 0x1950A86A20F9469CFC6C
LARGEST_MEMO = 2**20  # entries: Python's unpickler allocates as many as the largest index says
DTYPES = dict(
    FloatStorage=torch.float32,
    DoubleStorage=torch.float64,
    HalfStorage=torch.float16,
    BFloat16Storage=torch.bfloat16,
    LongStorage=torch.int64,
    IntStorage=torch.int32,
)


class _Fault(ValueError):
    """What is wrong with a file, in our words."""


class _Storage:
    """A reference of the pickle to a storage that comes later in the file."""

    def __init__(self, key, dtype, numel):
        self.key, self.dtype, self.numel = key, dtype, numel


class _Tensor:
    """A tensor of the pickle: a storage, and where the values lie in it."""

    def __init__(self, storage, offset, size, stride, *_):
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride


class _Unpickler(pickle.Unpickler):
    """Knows dicts, tensors and a training script's arguments, and nothing else that could be called."""

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if (module, name) == ("argparse", "Namespace"):
            return argparse.Namespace
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        raise _Fault(f"it names {one_line(f'{module}.{name}', 80)}, and may only hold tensors")

    def persistent_load(self, reference):
        kind, dtype, key, _, numel, view = reference
        if kind != "storage" or not isinstance(dtype, torch.dtype) or view is not None:
            raise _Fault("it refers to something other than a whole storage")
        return _Storage(key, dtype, numel)


def _pickles(data: memoryview, count: int):
    """The first `count` pickles of a file, and where the bytes after them begin."""
    values, start = [], 0
    for _ in range(count):
        length = 0
        for opcode, argument, position in pickletools.genops(bytes(data[start : start + LARGEST_INDEX])):
            length = position + 1
            if opcode.name in ("LONG_BINPUT", "PUT") and int(argument) > LARGEST_MEMO:
                raise _Fault("its index of objects is too large")
        values.append(_Unpickler(io.BytesIO(data[start : start + length])).load())
        start += length
    return values, start


def load_legacy(path) -> dict:
    """The dict in a file of the old format: tensors by name, dicts of them, and plain values.

    Raises ValueError, naming the file, if it holds none.
    """
    try:
        data = memoryview(Path(path).read_bytes())
        (magic, _, _, objects, keys), place = _pickles(data, 5)
        if magic != MAGIC or not isinstance(objects, dict):
            raise _Fault("it holds no dict of torch.save")
        dtypes = {one.storage.key: one.storage.dtype for one in _tensors(objects)}
        storages = {}
        for key in keys:
            numel = int.from_bytes(data[place : place + 8], "little", signed=True)
            size = dtypes[key].itemsize * numel
            place += 8
            if numel < 0 or place + size > len(data):
                raise _Fault("it is cut off")
            storages[key] = torch.frombuffer(bytearray(data[place : place + size]), dtype=dtypes[key])
            place += size
        return _whole(objects, storages)
    except Exception as error:  # the unpickler raises many types
        reason = one_line(error, 150) if isinstance(error, _Fault) else "it is cut off or damaged"
        raise ValueError(f"{path} cannot be read as weights of torch before 1.6: {reason}") from None


def _tensors(value, seen=None):
    """All `_Tensor` in dicts of dicts, each dict looked at once, however many refer to it."""
    seen = set() if seen is None else seen
    if isinstance(value, _Tensor):
        yield value
    elif isinstance(value, dict) and id(value) not in seen:
        seen.add(id(value))
        for one in value.values():
            yield from _tensors(one, seen)


def _whole(value, storages, done=None):
    """A value with tensors in the place of each `_Tensor`. Raises _Fault for one that its storage does not hold."""
    done = {} if done is None else done
    if isinstance(value, dict):
        if id(value) not in done:
            done[id(value)] = whole = {}
            whole.update({name: _whole(one, storages, done) for name, one in value.items()})
        return done[id(value)]
    if not isinstance(value, _Tensor):
        return value
    storage = storages[value.storage.key]
    if math.prod(value.size) > len(storage):
        raise _Fault("it has a tensor with fewer values than its shape says")
    return storage.as_strided(value.size, value.stride, value.offset)
