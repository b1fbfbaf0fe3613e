"""Files that may come from anyone: nothing in them is run, nothing they name is opened or fetched, and one line says
why they are refused, before memory is taken for what they claim. What the system refuses is no fault of a file."""

import argparse
import contextlib
import errno
import json
import os
import pathlib
import pickle
import shutil
import struct
import zipfile

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from conftest import change_json, fails, refusal
from tiny_weights import Call, assert_same, claim, rezip, save, save_folder, tiny

from dlc.machine.files import read_json
from dlc.weights.checkpoint import load_checkpoint
from dlc.weights.foreign.safe import check_tensors, load_tensors
from dlc.weights.load import load_model, load_pretrained, load_prior
from dlc.weights.meta import config_of, newest_of_run, read_meta
from dlc.weights.networks import load_encoder, load_vae

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
WEIGHTS = tiny("DiTSEM-Ti/8", L=3, V=4).state_dict()
BIAS, ZEROS = "final_layer.linear.bias", {"a": torch.zeros(9)}
EVIL = Call(os.system, "touch touched")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n"
OLD = dict(_use_new_zipfile_serialization=False)


# ---------------------------------------------------------------------- one file, for the reader


def saved(value, harm=None, **options):
    """A file of torch.save, then harmed: by a function of its path, or of its bytes."""

    def write(path):
        torch.save(value, path, **options)
        if harm and (content := harm(path if harm.__code__.co_varnames[:1] == ("path",) else path.read_bytes())):
            path.write_bytes(content)

    return write


def holding(content):
    return lambda path: path.write_bytes(content)


def in_entry(ending, content, compression=zipfile.ZIP_STORED):
    return lambda path: rezip(path, compression, lambda name, old: content if name.endswith(ending) else old)


def script(path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)


def claiming_more(content):
    return content.replace(struct.pack("<q", 77), struct.pack("<q", 2**50)).replace(b"KM", b"J\0\0\0\x40")


CUT = "cut off or damaged"
HEADER = json.dumps({"x": dict(dtype="F32", shape=[9], data_offsets=[0, 36])}).ljust(70).encode()
READER = {  # what is written, and words of the line
    "bomb.pt": (saved(ZEROS, in_entry("data.pkl", bytes(2**24), zipfile.ZIP_DEFLATED)), "compressed entries"),
    "claims.pt": (saved(ZEROS, lambda path: claim(path, "data/0", 2**31)), "claim more than the file's"),
    "text.pt": (saved({"a": "x" * 2**23}), "more than 4,194,304 bytes beside its tensors"),
    "cut.pt": (saved(ZEROS, lambda content: content[:-200]), CUT),
    # whose index is as many bytes long as the first byte of a pickle is high
    "pickle.safetensors": (holding(bytes([0x80, 2, 0, 0, 0, 0, 0, 0]) + HEADER), CUT),
    "page.pt": (holding(b"<!DOCTYPE html><html>not found</html>"), "it is a web page"),
    "pointer.safetensors": (holding(POINTER), "it is a git-lfs pointer, .*: run git lfs pull"),
    "script.pt": (script, "it is a TorchScript program, which is not run"),
    "protocol 4.pt": (saved(ZEROS, pickle_protocol=4), "it has pickle protocol 4: save it again"),
    "raw pickle.pt": (holding(pickle.dumps(EVIL)), "it is a bare pickle"),
    "memory.pt": (saved(Call(bytearray, 10**13)), "it names __builtin__.bytearray"),
    "call.pt": (saved(EVIL), "it names posix.system"),
    "method.pt": (saved(dict(ema=Call(pathlib.Path.touch, pathlib.Path("touched")))), "it names __builtin__.getattr"),
    "list.pt": (saved([torch.zeros(3)]), "holds a list, wanted a dict of tensors"),
    "old memory.pt": (saved(Call(bytearray, 10**10), **OLD), "it names __builtin__.bytearray"),
    "old claims.pt": (saved({"a": torch.zeros(77)}, claiming_more, **OLD), CUT),
    "cut.safetensors": (holding(struct.pack("<Q", 2**40)), CUT),
    "spaces.safetensors": (holding(struct.pack("<Q", 2**23) + b" " * 2**23), CUT),
    "beyond.safetensors": (holding(struct.pack("<Q", 70) + HEADER), CUT),
    "folder.safetensors": (lambda path: path.mkdir(), "does not exist"),
}


@pytest.mark.parametrize("name", READER)
def test_reader(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write, words = READER[name]
    write(tmp_path / name)
    line = refusal(load_tensors, tmp_path / name, words=words)
    assert name in line and not (tmp_path / "touched").exists()


# ---------------------------------------------------------------------- what the system refuses


@contextlib.contextmanager
def refused(path, number=errno.EACCES):
    """The call that opens it says so, as no mode of a file stops root."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("builtins.open", "io.open"):  # as zipfile calls it
            fails(patch, name, number, lambda file, *_: not isinstance(file, int) and os.fspath(file) == str(path))
        yield


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "old.pt", "a.json"])
def test_what_cannot_be_read_is_not_damaged(name, tmp_path):
    """It is said in the system's words, whatever the library makes of it, and the same file is read afterwards."""
    path, read = tmp_path / name, read_json if name == "a.json" else load_tensors
    if name == "a.json":
        path.write_text('{"a": 1}')
    elif name == "old.pt":
        torch.save(ZEROS, path, **OLD)
    else:
        save(ZEROS, path)
    for number in (errno.EACCES, errno.EMFILE, errno.ENOMEM):
        words = f"^cannot read .*{name} .{os.strerror(number)}.$"
        with refused(path, number), pytest.raises(OSError, match=words):
            read(path)
        assert read(path)["a"] is not None


def test_a_checkpoint_that_cannot_be_read_is_not_to_be_removed(tmp_path):
    files = ("config.json", "model.safetensors", "optimizer.pt")
    path = save_folder(tmp_path / "checkpoints/0000002", OURS, WEIGHTS)
    save(ZEROS, path / "optimizer.pt")
    for file in files:
        with refused(path / file), pytest.raises(OSError, match=f"^cannot read .*{file} .Permission denied.$"):
            newest_of_run(tmp_path, files)
    assert newest_of_run(tmp_path, files) == path
    change_json(path / "config.json", format_version=9)
    assert "remove" not in refusal(newest_of_run, tmp_path, files, words="has format 9, this program reads")


# ---------------------------------------------------------------------- tensors


def test_tensors():
    for tensor, words in (
        (torch.tensor([0, torch.nan]), "NaN or infinite"),
        (torch.full((2,), 1e300, dtype=torch.float64), "NaN or infinite"),  # as float32
        (torch.zeros(2).long(), "is of type torch.int64"),
        (torch.zeros(2).to(torch.float8_e4m3fn), "is of type torch.float8_e4m3fn"),
        (torch.zeros(2).to_sparse(), "is sparse_coo, wanted dense"),
        (torch.zeros(2, device="meta"), "is on the device meta"),
        (torch.zeros(1).expand(10**12), "but fewer values"),
        ({"b": torch.zeros(1)}, "is a dict"),
    ):
        refusal(check_tensors, {"\x1b[31m" + "n" * 5000: tensor}, "file.pt", words=words)


def test_what_is_kept(tmp_path):
    model = tiny("DiTSEM-Ti/8", L=3, V=4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.zeros(2, 3, dtype=torch.long)).sum().backward()
    args = argparse.Namespace(lr=1e-4, size=torch.Size([3]), dtype=torch.bfloat16)
    weights = dict(model.named_parameters(), pos_embed=model.pos_embed)
    for options in ({}, OLD):
        torch.save(dict(model=weights, opt=optimizer.state_dict(), steps={3}, args=args), tmp_path / "1.pt", **options)
        assert_same(load_model(tmp_path / "1.pt", ema=False)[0], WEIGHTS)
    nested = {}
    for _ in range(60):  # as a tree, 2**60 dicts
        nested = {"a": nested, "b": nested}
    torch.save(dict(WEIGHTS, nested=nested), tmp_path / "nested.pt", **OLD)
    refusal(load_model, tmp_path / "nested.pt", words="nested")
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        torch.save({key: value.to(dtype) for key, value in WEIGHTS.items()}, tmp_path / "cast.pt")
        state = load_model(tmp_path / "cast.pt")[0].state_dict()
        assert {value.dtype for value in state.values()} == {torch.float32}


# ---------------------------------------------------------------------- each flag that takes such a file


def folder(**files):
    """A folder of files: tensors of a model.safetensors, JSON of other dicts, bytes as they are."""

    def write(path):
        path.mkdir()
        for name, content in files.items():
            content = safetensors.torch.save(content) if name == "model.safetensors" else content
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).write_bytes(json.dumps(content).encode() if isinstance(content, dict) else content)

    return write


def changed(name, value):
    return saved({**WEIGHTS, name: value})


OURS = config_of("DiTSEM-Ti/8", tiny("DiTSEM-Ti/8", L=3, V=4)).to_json()
NO_POSITIONS = {key: value for key, value in WEIGHTS.items() if key != "pos_embed"}
MODELS = {  # what is written; a part of a model --pretrained-path takes
    "call beside the weights.pt": saved(dict(ema=WEIGHTS, model=WEIGHTS, args=argparse.Namespace(value=EVIL))),
    "array in place of weights.pt": saved(dict(ema=np.zeros(3))),
    "part: no patches.pt": changed("x_embedder.proj.weight", torch.zeros(192, 0, 0, 0)),
    "part: no codes.pt": changed("sem_embedder.embedding_table", torch.zeros(3, 1, 192)),
    "part: no blocks.pt": saved({key: value for key, value in WEIGHTS.items() if "blocks." not in key}),
    "part: block.pt": changed("blocks.999999999.attn.qkv.bias", torch.zeros(1)),
    "part: escape.pt": changed("\x1b[2J", torch.zeros(1)),
    "twice.pt": changed(f"module.{BIAS}", torch.ones(32)),
    "leads out.index.json": holding(b'{"weight_map": {"a": "../x.safetensors"}}'),
    "pipeline of nothing": folder(**{"model_index.json": {"_class_name": ["os", "system"]}}),
    "part: endless size": folder(**{"config.json": dict(input_size=10**12), "model.safetensors": NO_POSITIONS}),
    "evil code": folder(**{"config.json": b"{", "transformer_dit.py": b"import os; os.system('touch touched')"}),
    "DLC of evil": folder(**{"custom_checkpoint_0.pkl": pickle.dumps(EVIL)}),
    "ours of evil meta": folder(
        **{"config.json": OURS, "meta.json": dict(step="x" * 10**4), "model.safetensors": WEIGHTS}
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name, tmp_path, call, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, said = tmp_path / name, name.split(".")[0]
    MODELS[name](path)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.exists()}
    status, _, error = call("dlc.checkpoints", "info", path)
    assert status == 2 and said in error and error.count("\n") == 1 and len(error) < 380 + len(str(tmp_path)), error
    assert "weights_only" not in error and "trust" not in error and "\x1b" not in error
    if not name.startswith("part: "):
        assert said in refusal(load_pretrained, path, tiny())
    assert said in refusal(load_prior, path)
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.exists()}


def test_folders_in_the_place_of_weights(tmp_path):
    for number, (files, words) in enumerate(
        (
            ({}, "is a folder of no layout that is known: it has no file of weights"),
            ({"a.pt": b"x", "b.pt": b"x"}, "has several files of weights: name one of a.pt, b.pt"),
            ({"adapter_config.json": {}, "adapter_model.safetensors": b"x"}, "is a LoRA adapter: merge it"),
            ({"zero_to_fp32.py": b"x", "latest": b"x"}, "is a DeepSpeed checkpoint: `python zero_to_fp32.py"),
            ({"global_step9/mp_rank_00_model_states.pt": b"x"}, "is a DeepSpeed checkpoint"),
            ({".metadata": b"x", "__0_0.distcp": b"x"}, r"is a sharded checkpoint of torch \(DCP\)"),
            ({"pytorch_model_fsdp_0/.metadata": b"x"}, r"has sharded checkpoints of torch \(DCP\) in it"),
        )
    ):
        folder(**files)(tmp_path / f"{number}")
        refusal(load_model, tmp_path / f"{number}", words=words)


def test_a_run_that_continues(tmp_path):
    model = tiny("DiTSEM-Ti/8", L=3, V=4)
    for name in ("model", "ema"):
        safetensors.torch.save_file(WEIGHTS, tmp_path / f"{name}.safetensors")
    torch.save(Call(bytearray, 10**13), tmp_path / "optimizer.pt")
    words = "cannot be read as an optimizer's state: it names __builtin__.bytearray"
    refusal(load_checkpoint, tmp_path, model=model, ema=model, optimizers=[], words=words)


def test_meta(tmp_path, call):
    for text, words in (
        ('{"step": -1}', "meta.json: step is -1"),
        ('{"vae": ["\\u001b[31m' + "x" * 5000 + '"]}', "meta.json: vae is"),
        ('{"scaling_factor": Infinity}', "scaling_factor is inf"),
        ('{"format_version": 9}', "has format 9"),
        ("[" * 100_000, "not readable JSON"),
        (POINTER.decode(), "not readable JSON .a git-lfs pointer: run git lfs pull"),
        ('{"step": ' + "9" * 5000 + "}", "meta.json"),
    ):
        (tmp_path / "meta.json").write_text(text)
        refusal(read_meta, tmp_path, words=words)
    save_folder(tmp_path, OURS, WEIGHTS, "ema.safetensors")
    (tmp_path / "meta.json").write_text(json.dumps(dict(step=1, features_path="\x1b[31m" + "z" * 5000)))
    _, said, _ = call("dlc.checkpoints", "info", tmp_path)
    assert "\x1b" not in said and max(map(len, said.splitlines())) <= 2001


# ---------------------------------------------------------------------- encoders and VAEs


@pytest.fixture
def sem(tmp_path, tiny_models):
    return shutil.copytree(tiny_models[1], tmp_path / "sem")


@pytest.fixture
def vae(tmp_path, tiny_models):
    return shutil.copytree(tiny_models[0], tmp_path / "vae")


def test_damaged_networks(sem, vae):
    for path, name, load in (
        (sem / "model.safetensors", "sem_norm.bias", load_encoder),
        (vae / "diffusion_pytorch_model.safetensors", "decoder.conv_in.bias", lambda path: load_vae(str(path))),
    ):
        weights = safetensors.torch.load_file(path)
        for value, words in (
            (weights[name] * torch.nan, "has values that are NaN"),
            (weights[name][1:], "has other sh"),
        ):
            save({**weights, name: value}, path)
            assert str(path.parent) in refusal(load, path.parent, words=f"{name} {words}|{words}.*: {name}")


ENCODERS = [
    *[dict(backbone=name) for name in ("hf-hub:timm/vit", "local-dir:.", "vit_nothing", "\x1b[31mvit", [])],
    *[dict(backbone=name, backbone_args={}) for name in ("resnet18", "vit_base_patch16_siglip_224")],
    *[dict(backbone_args={key: "evil.pth"}) for key in ("checkpoint_path", "file", "\x1b[31m")],
    *[dict(backbone_args=value) for value in ([], dict(depth=10**9), dict(num_heads=-1), dict(depth="2"))],
    *[dict(L=value) for value in (65536, "6", True)],
    *[dict(V=1), dict(image_size=10**9), dict(image_size=4096), dict(temperature=float("nan"))],
    *[dict(checkpoint_path="evil.pth"), dict(_target_="os.system")],
]


def test_encoder_configs(sem, monkeypatch):
    def create_model(name, **given):
        assert name.isidentifier() and given["pretrained"] is False
        assert not given.keys() & {"checkpoint_path", "pretrained_cfg", "features_only", "file"}
        return create(name, **given)

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", create_model)
    content = (sem / "config.json").read_text()
    usual = json.loads(content)["backbone_args"]
    for change in ENCODERS:
        if isinstance(change.get("backbone_args"), dict) and "backbone" not in change:
            change = {**change, "backbone_args": {**usual, **change["backbone_args"]}}
        (sem / "config.json").write_text(content)
        change_json(sem / "config.json", **change)
        assert str(sem) in refusal(load_encoder, sem), change


def test_a_mapped_file_that_is_cut(tmp_path):
    """As a bad sector, it would end this process, without a word, when the tensor is looked at."""
    for name in ("weights.pt", "weights.safetensors"):
        path, tensors = tmp_path / name, dict(a=torch.zeros(3), b=torch.ones(50_000)[::2], c=torch.ones(0))
        save(tensors if name == "weights.pt" else {key: value.contiguous() for key, value in tensors.items()}, path)
        found = load_tensors(path)
        assert check_tensors(found, path) is found
        os.truncate(path, 5000)
        with pytest.raises(OSError, match=f"cannot read {path} .Input/output error.$") as error:
            check_tensors(found, path)
        assert error.value.errno == errno.EIO


def test_vae_configs(vae):
    content = (vae / "config.json").read_text()
    for change, words in (
        (dict(latent_channels=16), "has other shapes"),
        (dict(latent_channels=10**12), "latent_channels is"),
        (dict(in_channels=1), "has 1 in channels, wanted 3"),
        (dict(latents_mean=[0, 0, 0, 0.0], latents_std=None), "has latents_mean alone"),
        (dict(latents_mean=[0.0] * 4, latents_std=[1.0] * 4, shift_factor=0.1), "both latents_mean and shift_factor"),
        (dict(scaling_factor=float("nan")), "scaling_factor is nan"),
        (dict(auto_map=dict(AutoModel="evil.Model")), "unexpected keyword argument .auto_map"),
        (dict(_class_name="UNet2DModel"), "has the config.json of no"),
        (dict(down_block_types=["os.system"] * 4), "diffusers cannot build"),
        (dict(layers_per_block=10**9), "layers_per_block is"),
        *(
            (dict(block_out_channels=value), "block_out_channels is .*, wanted a list")
            for value in (5, None, [], ["8"])
        ),
        ({"\x1b[31mkey" * 99: 1}, "diffusers cannot build"),
    ):
        (vae / "config.json").write_text(content)
        change_json(vae / "config.json", **change)
        refusal(load_vae, str(vae), words=words)
