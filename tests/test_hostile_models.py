"""Hostile and broken files given to each flag that takes a diffusion transformer: one line, exit 2, nothing is run."""

import argparse
import datetime
import json
import os
import pathlib
import pickle
import re
import struct
import sys
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from test_hostile_files import Call, bomb, claim, compressed, refusal
from test_layouts import tiny

from dlc import checkpoints as tool
from dlc.weights.load import load_pretrained

WEIGHTS = tiny().state_dict()
EVIL = Call(os.system, "touch touched")
PAGE = b"<!DOCTYPE html><html>not found</html>"


def torch_file(value, harm=None):
    def write(path):
        torch.save(value, path)
        if harm:
            harm(path)

    return write


def folder(**files):
    """A folder of files: JSON of dicts, tensors where a name ends in "weights", bytes as they are."""

    def write(path):
        path.mkdir()
        for name, content in files.items():
            file = path / name.replace("__", "/")
            file.parent.mkdir(exist_ok=True)
            if name.endswith("weights"):
                safetensors.torch.save_file(content, file.with_name("model.safetensors"))
            else:
                file.write_bytes(json.dumps(content).encode() if isinstance(content, (dict, list)) else content)

    return write


def without(name):
    return {key: value for key, value in WEIGHTS.items() if key != name}


def changed(name, value):
    return {**WEIGHTS, name: value}


def truncate(path):
    path.write_bytes(path.read_bytes()[:-300])


BIAS = "final_layer.linear.bias"
FILES = {
    "raw pickle.pt": lambda path: path.write_bytes(pickle.dumps(EVIL)),
    "raw pickle.safetensors": lambda path: path.write_bytes(pickle.dumps(EVIL)),
    "pickle in a zip.pt": torch_file(EVIL),
    "call beside the weights.pt": torch_file(dict(ema=WEIGHTS, model=WEIGHTS, args=argparse.Namespace(value=EVIL))),
    "call as a tensor.pt": torch_file(changed("more", EVIL)),
    "call that fills the memory.pt": torch_file(dict(ema=Call(bytearray, 10**13))),
    "method of a harmless class.pt": torch_file(dict(ema=Call(pathlib.Path.touch, pathlib.Path("touched")))),
    "array in place of weights.pt": torch_file(dict(ema=np.zeros(3))),
    "date in place of weights.pt": torch_file(dict(ema=datetime.date(2025, 1, 1))),
    "whole module.pt": torch_file(dict(ema=torch.nn.Linear(2, 2))),
    "compressed.pt": torch_file(WEIGHTS, compressed),
    "inflates.pt": torch_file(WEIGHTS, bomb),
    "claims more.pt": torch_file(WEIGHTS, lambda path: claim(path, "data/0", 2**31)),
    "cut off.pt": torch_file(WEIGHTS, truncate),
    "empty.pt": lambda path: path.write_bytes(b""),
    "page.pt": lambda path: path.write_bytes(PAGE),
    "page.safetensors": lambda path: path.write_bytes(PAGE),
    "long header.safetensors": lambda path: path.write_bytes(struct.pack("<Q", 2**62) + b"{}"),
    "zip of something.pt": lambda path: zipfile.ZipFile(path, "w").writestr("x/data.txt", "x"),
    "not a number.pt": torch_file(changed(BIAS, torch.full((128,), torch.nan))),
    "whole numbers.pt": torch_file({key: value.long() for key, value in WEIGHTS.items()}),
    "no dimensions.pt": torch_file(changed(BIAS, torch.tensor(0.5))),
    "sparse.pt": torch_file(changed(BIAS, torch.zeros(128).to_sparse())),
    "without values.pt": torch_file(changed(BIAS, torch.zeros(128, device="meta"))),
    "repeated.pt": torch_file(changed(BIAS, torch.zeros(1).expand(10**12))),
    "no ema.pt": torch_file(dict(ema=None, model=None)),
    "text as ema.pt": torch_file(dict(ema="x", model="x")),
    "no patches.pt": torch_file(changed("x_embedder.proj.weight", torch.zeros(192, 0, 0, 0))),
    "lists.json": lambda path: path.write_bytes(b"[" * 10**5),
    "leads out.index.json": lambda path: path.write_text(json.dumps(dict(weight_map={"a": "../x.safetensors"}))),
    "itself.index.json": lambda path: path.write_text(json.dumps(dict(weight_map={"a": path.name}))),
    "loop": lambda path: path.symlink_to(path.name),
    "dangling": lambda path: path.symlink_to("nowhere"),
    "empty folder": folder(),
    "pipeline of nothing": folder(**{"model_index.json": {"_class_name": ["os", "system"]}}),
    "brackets": folder(**{"model_index.json": b"[" * 10**5}),
    "heads of text": folder(**{"config.json": dict(num_heads="3"), "weights": WEIGHTS}),
    "endless size": folder(**{"config.json": dict(input_size=10**12), "weights": without("pos_embed")}),
    "large size": folder(**{"config.json": dict(input_size=65536), "weights": without("pos_embed")}),
    "evil training": folder(
        **{"config.json": dict(format="dlc-dit", training=dict(step="x" * 10**4)), "weights": WEIGHTS}
    ),
    "evil code": folder(**{"config.json": b"{", "transformer_dit.py": b"import os; os.system('touch touched')"}),
    "DLC of evil": folder(**{"custom_checkpoint_0.pkl": pickle.dumps(EVIL)}),
    "ours of nothing": folder(**{"meta.json": dict(step=1)}),
}
PARTS = (
    "no dimensions.pt",
    "no patches.pt",
    "heads of text",
    "endless size",
    "large size",
)  # --pretrained-path reads on


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", FILES)
def test_each_flag_refuses(name, tmp_path, error_of, monkeypatch, capsys):
    path = tmp_path / name
    FILES[name](path)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.exists()}
    lines = [error_of("sample_ddp", "--ckpt", path)]
    for command in (("info", path), ("export", path, "out", "--format", "safetensors")):
        monkeypatch.setattr(sys, "argv", ["tool", *map(str, command)])
        with pytest.raises(SystemExit) as stopped:
            tool.main()
        lines.append(capsys.readouterr().err)
        assert stopped.value.code == 2 and re.fullmatch(r"python -m dlc.checkpoints: error: .*\n", lines[-1]), lines[-1]
    for line in lines:
        assert name.split(".")[0] in line and len(line) < 360, line
        assert "weights_only" not in line and "trust" not in line
    if name not in PARTS:
        assert name.split(".")[0] in refusal(load_pretrained, path, tiny())
    after = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.exists()}
    assert before == after
