"""Files of weights from before torch 1.6: what they hold, and hostile ones."""

import struct

import pytest
import torch

from dlc.weights.foreign.safe import load_tensors


class Call:
    def __reduce__(self):
        return print, ("called",)


def test_hostile_old_files(tmp_path, capsys):
    """No call, no memory, one line."""
    path = tmp_path / "old.pth"
    tensors = dict(a=torch.arange(6.0).reshape(2, 3).T, b=torch.zeros(3, dtype=torch.float16))
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    assert all(torch.equal(tensors[key], value) for key, value in load_tensors(path).items())
    whole = path.read_bytes()
    torch.save(dict(a=Call()), tmp_path / "call.pth", _use_new_zipfile_serialization=False)
    for content, words in (
        (whole[:-8], "cut off"),
        (whole[:40], "cut off or damaged"),
        (b"\x80\x02" + b"junk" * 50, "no file of torch.save"),
        (whole.replace(b"torch\nFloatStorage", b"builtins\ngetattr\x00"), "cut off or damaged|may only hold tensors"),
        ((tmp_path / "call.pth").read_bytes(), r"names (__builtin__|builtins)\.print, and may only hold tensors"),
        (whole.replace(struct.pack("<q", 6), struct.pack("<q", 2**50)), "cut off"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"old.pth cannot be read as weights: .*({words})"):
            load_tensors(path)
    assert "called" not in capsys.readouterr().out
