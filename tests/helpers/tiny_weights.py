"""Small models whose outputs are not the zeros of a model before training, and ways to harm files of weights."""

import struct
import zipfile

import torch

from dlc.nets.digest import weights_sha256
from models import DiT_models


def tiny(name="DiT-Ti/4", seed=0, **sizes):
    torch.manual_seed(seed)
    model = DiT_models[name](input_size=8, **(sizes or dict(num_classes=5)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


def assert_same(model, expected):
    assert weights_sha256(model) == weights_sha256(expected) and not model.training


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def rezip(path, compression=zipfile.ZIP_STORED, change=None):
    """Write the zip at path anew; change(name, content) gives an entry's new content."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, change(name, content) if change else content)


def claim(path, entry, size):
    """Have a zip's directory say that an entry has so many bytes."""
    content = bytearray(path.read_bytes())
    # the directory comes last, a header before each name
    at = content.rindex(f"{path.stem}/{entry}".encode()) - 46
    assert content[at : at + 4] == b"PK\x01\x02"
    content[at + 20 : at + 28] = struct.pack("<II", size, size)
    path.write_bytes(content)
