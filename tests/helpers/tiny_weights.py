"""Small models whose outputs are not the zeros of a model before training, and ways to harm files of weights."""

import json
import struct
import zipfile

import safetensors.torch
import torch

from models import DiT_models


def tiny(name="DiT-Ti/4", seed=0, **sizes):
    torch.manual_seed(seed)
    model = DiT_models[name](input_size=8, **(sizes or dict(num_classes=5)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


def assert_same(model, expected):
    """A model, in eval mode, has exactly the tensors of another model or of a dict, which may have more."""
    expected = expected if isinstance(expected, dict) else expected.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items()) and not model.training


def save(tensors, path):
    (safetensors.torch.save_file if path.suffix == ".safetensors" else torch.save)(tensors, path)
    return path


def save_folder(folder, config, tensors, file="model.safetensors"):
    """A folder of a config.json and a file of weights; gives the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save(tensors, folder / file)
    return folder


def contents(folder):
    """Bytes by path, as the stand-in of the hub takes them."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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
