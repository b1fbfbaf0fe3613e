"""Files that may come from anyone: nothing in them is run, nothing they name is opened or fetched, and one line says
why they are refused, before memory is taken for what they claim."""

import importlib
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from conftest import ROOT, golden
from diffusers import AutoencoderKL
from PIL import Image

from dlc.data import Features, read_manifest
from dlc.data.rows import load_array
from dlc.features import main as features_tool
from dlc.nets.encoder import SEMEncoder
from dlc.sampling.conditions import open_codes
from dlc.sampling.pictures import check_npz, npz_rows
from dlc.training.record import draw_losses, read_metrics
from dlc.weights.checkpoint import load_checkpoint
from dlc.weights.foreign.safe import load_tensors
from dlc.weights.info import info
from dlc.weights.load import load_pretrained, load_weights, model_from_weights
from dlc.weights.meta import RunMeta, read_meta
from dlc.weights.networks import downsampling_factor, load_encoder, load_vae
from models import DiT_models

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def refusal(function, *args, **kwargs):
    """The line by which a call refuses a file."""
    with pytest.raises(ValueError) as raised:
        function(*args, **kwargs)
    line = str(raised.value)
    assert len(re.sub(r"/\S*/", "/", line)) < 320 and "\n" not in line and "\x1b" not in line, line
    assert "weights_only=False" not in line and "trust" not in line, line
    return line


def tiny(**sizes):
    torch.manual_seed(0)
    return DiT_models["DiTSEM-Ti/8"](input_size=8, **(sizes or dict(L=3, V=4)))


WEIGHTS = tiny().state_dict()


def model_at(path):
    return model_from_weights(load_weights(path)[0], path)


#################################################################################
#                                 Torch's files                                 #
#################################################################################


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


def compressed(path):
    rezip(path, zipfile.ZIP_DEFLATED)


def bomb(path):
    rezip(path, zipfile.ZIP_DEFLATED, lambda name, content: bytes(2**26) if name.endswith("data.pkl") else content)


@pytest.mark.parametrize(
    "value, harm, message",
    [
        ({"a": torch.zeros(9)}, compressed, "compressed entries"),
        ({"a": torch.zeros(9)}, bomb, "compressed entries"),
        ({"a": torch.zeros(9)}, lambda path: claim(path, "data/0", 2**31), "claim more than the file's"),
        ({"a": "x" * 2**23}, None, "more than 4,194,304 bytes beside its tensors"),
        (
            {"a": torch.zeros(9)},
            lambda path: rezip(path, change=lambda name, content: content + bytes(2**23 * name.endswith("byteorder"))),
            "more than 4,194,304 bytes beside its tensors",
        ),
        ({"a": torch.zeros(9)}, lambda path: path.write_bytes(path.read_bytes()[:-200]), "cut off or damaged"),
        ({"a": torch.zeros(9)}, lambda path: path.write_bytes(b""), "no file of torch.save"),
        ({"a": torch.zeros(9)}, lambda path: path.write_bytes(b"PK\x03\x04"), "cut off or damaged"),
        (
            {"a": torch.zeros(9)},
            lambda path: rezip(
                path, change=lambda name, content: b"\x80\x02}q\x00X\xff" if name.endswith("data.pkl") else content
            ),
            "cut off or damaged",
        ),
        (Call(bytearray, 10**13), None, "it names __builtin__.bytearray"),
        (Call(os.system, "touch touched"), None, "it names posix.system"),
        (Call(eval, "1"), None, "it names __builtin__.eval"),
        (Call(torch.Tensor, 10**6, 10**6), None, "it names torch.Tensor"),
        (Call(np.zeros, 3), None, "it names numpy.zeros"),
        ([torch.zeros(3)], None, "holds a list, wanted a dict of tensors"),
        (torch.zeros(3), None, "holds a Tensor, wanted a dict of tensors"),
        ({"a": torch.zeros(1).expand(10**12)}, None, r"tensor a has shape \(1000000000000,\), but fewer values"),
        ({"a": {"b": torch.zeros(1)}}, None, "dict of named tensors: a is a dict"),
        ({3: torch.zeros(1)}, None, "dict of named tensors: 3 is a Tensor"),
        ({"\x1b[31m" + "n" * 5000: torch.full((2,), torch.nan)}, None, "tensor n+ … n+ has values that are NaN"),
    ],
)
def test_files_of_torch(tmp_path, monkeypatch, value, harm, message):
    monkeypatch.chdir(tmp_path)
    for name in ("file.pt", "file.pth", "pytorch.bin"):
        path = tmp_path / name
        torch.save(value, path)
        if harm:
            harm(path)
        assert re.search(message, refusal(load_weights, path))
        assert path.name in refusal(load_encoder, path)
        assert path.name in refusal(load_pretrained, path, tiny())
    shutil.copy(path, tmp_path / "codes.pt")
    assert "codes.pt" in refusal(open_codes, tmp_path / "codes.pt")
    assert not (tmp_path / "touched").exists()


def test_files_from_before_torch_1_6(tmp_path):
    """Bare, and a training checkpoint with its arguments; codes of that time are read, too."""
    import argparse

    old = dict(_use_new_zipfile_serialization=False)
    torch.save(WEIGHTS, tmp_path / "old.pt", **old)
    training = dict(ema=WEIGHTS, model={}, opt=dict(state=[]), args=argparse.Namespace(model="DiT-Ti/8"))
    torch.save(training, tmp_path / "0000007.pt", **old)
    for name in ("old.pt", "0000007.pt"):
        weights, meta = load_weights(tmp_path / name)
        assert all(torch.equal(weights[key], value) for key, value in WEIGHTS.items())
    assert meta.step == 7 and meta.weights == "ema"
    nested = {}
    for _ in range(60):  # as a tree, 2**60 dicts
        nested = {"a": nested, "b": nested}
    torch.save(dict(WEIGHTS, nested=nested), tmp_path / "nested.pt", **old)
    assert "nested" in refusal(load_weights, tmp_path / "nested.pt")
    torch.save(torch.zeros(2, 3, dtype=torch.int64), tmp_path / "codes.pt", **old)
    open_codes(tmp_path / "codes.pt")


def test_files_that_are_kept(tmp_path):
    """A training checkpoint with its arguments, parameters and optimizer; without checksums; of another prefix."""
    import argparse

    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.zeros(2, 3, dtype=torch.long)).sum().backward()
    optimizer.step()
    torch.save(
        dict(
            model=dict(model.named_parameters(), pos_embed=model.pos_embed),
            opt=optimizer.state_dict(),
            steps={3},
            args=argparse.Namespace(lr=1e-4, size=torch.Size([3]), dtype=torch.bfloat16),
        ),
        tmp_path / "one.pt",
    )
    computed = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(model.state_dict(), tmp_path / "two.pt")
    finally:
        torch.serialization.set_crc32_options(computed)
    for name in ("one.pt", "two.pt"):
        loaded, _ = model_from_weights(load_weights(tmp_path / name, use_ema=False)[0], name)
        assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        torch.save({key: value.to(dtype) for key, value in WEIGHTS.items()}, tmp_path / "cast.pt")
        loaded, _ = model_at(tmp_path / "cast.pt")
        assert {value.dtype for value in loaded.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"junk",
        struct.pack("<Q", 2**40),
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**23) + b" " * 2**23,
        struct.pack("<Q", 8) + b'{"a": 1}',
    ],
)
def test_files_of_safetensors(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert "model.safetensors cannot be read as weights" in refusal(load_tensors, path)
    path.unlink()
    path.mkdir()
    assert "does not exist" in refusal(load_tensors, path)


def test_a_bomb_takes_no_memory(tmp_path):
    """A file of 0.3 MB that inflates to 256 MB: in C++, where only the process's own memory tells."""
    torch.save({}, tmp_path / "bomb.pt")
    rezip(
        tmp_path / "bomb.pt", zipfile.ZIP_DEFLATED, lambda name, content: bytes(2**28 * name.endswith("pkl")) or content
    )
    assert (tmp_path / "bomb.pt").stat().st_size < 2**19
    code = (
        "import resource, sys; from dlc.weights.foreign.safe import load_tensors\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: load_tensors(sys.argv[1])\n"
        "except ValueError: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "bomb.pt"], cwd=ROOT, capture_output=True, text=True
    )
    assert int(result.stdout) < 20_000, result.stderr  # KiB


#################################################################################
#                             Tensors in each loader                            #
#################################################################################

BAD_TENSORS = {
    "NaN": (
        lambda tensor: torch.where(torch.arange(tensor.numel()).view(tensor.shape) == 1, torch.nan, tensor),
        "has values that are NaN or infinite",
    ),
    "infinite": (lambda tensor: torch.full_like(tensor, -torch.inf), "has values that are NaN or infinite"),
    "half NaN": (lambda tensor: torch.full_like(tensor, torch.nan, dtype=torch.float16), "NaN or infinite"),
    "infinite as float32": (lambda tensor: torch.full_like(tensor, 1e300, dtype=torch.float64), "NaN or infinite"),
    "int64": (lambda tensor: tensor.long(), "is of type torch.int64"),
    "bool": (lambda tensor: tensor.bool(), "is of type torch.bool"),
    "complex": (lambda tensor: tensor.to(torch.complex64), "is of type torch.complex64"),
    "float8": (lambda tensor: tensor.to(torch.float8_e4m3fn), "is of type torch.float8_e4m3fn"),
    "sparse": (lambda tensor: tensor.to_sparse(), "is sparse_coo, wanted dense"),
    "meta": (lambda tensor: tensor.to("meta"), "is on the device meta"),
    "repeated": (lambda tensor: torch.zeros(1).expand(tensor.shape), "but fewer values"),
    "0-d": (lambda tensor: torch.tensor(0.5), ""),
    "5-d": (lambda tensor: torch.zeros(1, 2, 1, 2, 1), ""),
    "empty": (lambda tensor: torch.zeros(0), ""),
    "endless and empty": (lambda tensor: torch.zeros(10**15, 0), ""),
}
ONLY_TORCH = ("sparse", "meta", "repeated")  # safetensors has no such


@pytest.mark.parametrize("kind", BAD_TENSORS)
@pytest.mark.parametrize("loader", ["model", "directory", "pretrained", "encoder", "teacher", "vae", "vae.bin"])
def test_bad_tensors(tmp_path, tiny_models, loader, kind):
    change, message = BAD_TENSORS[kind]
    if loader in ("model", "pretrained"):
        name, path, weights = "blocks.3.mlp.fc2.bias", tmp_path / "model.pt", dict(WEIGHTS)

        def load(path):
            return model_at(path) if loader == "model" else load_pretrained(path, tiny())
    elif loader == "directory":
        name, path, weights = "blocks.3.mlp.fc2.bias", tmp_path / "ema.safetensors", dict(WEIGHTS)
        (tmp_path / "meta.json").write_text(json.dumps(dict(step=1)))

        def load(path):
            return model_at(path.parent)
    elif loader == "encoder":
        shutil.copytree(tiny_models[1], tmp_path / "sem")
        name, path = "sem_norm.bias", tmp_path / "sem/model.safetensors"
        weights = safetensors.torch.load_file(path)

        def load(path):
            return load_encoder(path.parent)
    elif loader == "teacher":
        # positions and class token are added and resized before they are compared
        name, path = "pos_embed" if "-d" in kind else "cls_token", tmp_path / "teacher.pth"
        shapes = {
            "cls_token": (1, 1, 384),
            "register_tokens": (1, 4, 384),
            "pos_embed": (1, 17, 384),
            "patch_embed.proj.weight": (384, 3, 14, 14),
            "blocks.0.mlp.fc1.weight": (1536, 384),
            "blocks.0.mlp.fc2.weight": (384, 1536),
            "sem_embed.weight": (512, 1920),
        }
        weights = {key: torch.zeros(shape) for key, shape in shapes.items()}

        def load(path):
            return load_encoder(path, L=2)
    else:
        shutil.copytree(tiny_models[0], tmp_path / "vae")
        path = tmp_path / "vae/diffusion_pytorch_model.safetensors"
        weights, name = safetensors.torch.load_file(path), "decoder.conv_in.bias"
        if loader == "vae.bin":
            path.unlink()
            path = path.with_suffix(".bin")

        def load(path):
            return load_vae(str(path.parent))

    weights[name] = change(weights[name])
    if path.suffix == ".safetensors" and kind in ONLY_TORCH:
        return
    if path.suffix == ".safetensors":
        safetensors.torch.save_file({key: value.contiguous() for key, value in weights.items()}, path)
    else:
        torch.save(weights, path)
    if loader == "pretrained" and not message:
        assert f"{name} not taken" in load(path)  # takes what fits, and says what does not
        return
    line = refusal(load, path)
    assert message in line and (loader == "teacher" and not message or name in line) and path.parent.name in line


@pytest.mark.parametrize(
    "name",
    [
        "x_embedder.proj.weight",
        "pos_embed",
        "final_layer.linear.bias",
        "sem_embedder.embedding_table",
        "blocks.0.attn.qkv.weight",
    ],
)
@pytest.mark.parametrize(
    "shape",
    [
        (),
        (0,),
        (5,),
        (0, 0),
        (0, 0, 0),
        (1, 0, 192),
        (0, 0, 0, 0),
        (10**15, 0, 0),
        (1, 10**15, 0),
        (10**9, 10**9, 0, 1),
        (1, 1, 1, 1, 1),
    ],
)
def test_shapes_of_a_model(tmp_path, name, shape):
    assert "model.pt" in refusal(model_from_weights, {**WEIGHTS, name: torch.zeros(shape)}, "model.pt")


@pytest.mark.parametrize(
    "change",
    [
        dict.clear,
        lambda weights: weights.pop("pos_embed"),
        lambda weights: weights.pop("blocks.5.attn.qkv.bias"),
        *[
            lambda weights, name=name: weights.update({name: torch.zeros(1)})
            for name in (
                "blocks.999999999.attn.qkv.bias",
                "blocks.x.attn.qkv.bias",
                "blocks.-1.a",
                "blocks.",
                "blocks.1e9.a",
                "more",
                "blocks.\u0663.a",
                "y_embedder.fake_latent",
                f"blocks.{'9' * 5000}.a",
                "\x1b[2J",
            )
        ],
    ],
)
def test_names_of_a_model(change):
    weights = dict(WEIGHTS)
    change(weights)
    assert "checkpoint model.pt" in refusal(model_from_weights, weights, "model.pt")


def test_metrics_that_are_not_finite(tmp_path, capsys):
    """Such lines are left out with one warning; the plot is drawn from the others."""
    lines = ['{"step": 1, "loss": 0.5}', '{"step": 2, "loss": 1e400}', '{"step": 3, "loss": NaN}']
    lines.append(f'{{"step": {10**30}, "loss": 0.25}}')
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert metrics == [dict(step=1, loss=0.5)]
    assert re.fullmatch("warning: .*metrics.jsonl: 3 damaged lines.*\n", capsys.readouterr().err)
    draw_losses(metrics, tmp_path / "loss.png")
    assert Image.open(tmp_path / "loss.png").size == (800, 400)


def test_models_without_conditions():
    """A table of the null row alone: V would be 0."""
    line = refusal(model_from_weights, {**WEIGHTS, "sem_embedder.embedding_table": torch.zeros(3, 1, 192)}, "model.pt")
    assert "V is 0" in line


def test_a_run_that_continues(tmp_path):
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters())
    for weights, message in (
        ({**WEIGHTS, "pos_embed": WEIGHTS["pos_embed"] * torch.nan}, "tensor pos_embed has values"),
        ({"pos_embed": WEIGHTS["pos_embed"]}, "lacks"),
        ({**WEIGHTS, "pos_embed": torch.zeros(2)}, "has other shapes: pos_embed"),
    ):
        safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
        assert f"model.safetensors{':' * ('tensor' in message)} {message}" in refusal(
            load_checkpoint, tmp_path, model=model, ema=model, optimizer=optimizer
        )
    for name in ("model", "ema"):
        safetensors.torch.save_file(WEIGHTS, tmp_path / f"{name}.safetensors")
    state = dict(optimizer=optimizer.state_dict(), scaler=None)
    for sums in (torch.zeros(11), torch.zeros(2, 12), torch.zeros(0, 11), torch.zeros(1, 11).int(), None):
        torch.save(dict(state, sums=sums), tmp_path / "optimizer.pt")
        assert re.search(
            "is damaged .optimizer.pt is no optimizer's state",
            refusal(load_checkpoint, tmp_path, model=model, ema=model, optimizer=optimizer, sums_shape=(11,)),
        )
    torch.save(Call(bytearray, 10**13), tmp_path / "optimizer.pt")
    assert "cannot be read as an optimizer's state" in refusal(
        load_checkpoint, tmp_path, model=model, ema=model, optimizer=optimizer
    )


#################################################################################
#                                   Encoders                                    #
#################################################################################


@pytest.fixture
def sem(tmp_path, tiny_models):
    return shutil.copytree(tiny_models[1], tmp_path / "sem")


EVIL_ARGS = (
    "checkpoint_path",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "features_only",
    "scriptable",
    "cache_dir",
    "model_name",
    "img_size",
    "num_classes",
    "weight_init",
    "norm_layer",
    "act_layer",
    "block_fn",
    "global_pool",
    "exportable",
    "no_jit",
    "file",
    "url",
    "hf_hub_id",
    "state_dict",
    "custom_load",
    "device",
    "dtype",
    "__class__",
    "out_indices",
    "\x1b[31m",
)


@pytest.mark.parametrize(
    "change",
    [
        *[
            dict(backbone=name)
            for name in (
                "hf-hub:timm/vit_tiny_patch16_224",
                "hf_hub:x/y",
                "local-dir:.",
                "local_dir:.",
                "./vit",
                "../x",
                "/somewhere/x",
                "timm/vit_tiny_patch16_224",
                "vit_tiny_patch16_224@main",
                "vit_tiny_patch16_224?",
                "",
                " ",
                "vit_nothing",
                "vit_tiny_patch16_224.a.b",
                "vit_tiny_patch16_224\n",
                "x" * 10**5,
                "\x1b[31mvit",
                [],
                ["vit_tiny_patch16_224"],
                {},
                None,
                3,
                True,
            )
        ],
        *[dict(backbone_args={key: "evil.pth"}) for key in EVIL_ARGS],
        *[dict(backbone_args=value) for value in ([], "x", 3, [1], True)],
        *[
            dict(backbone_args={key: value})
            for key, value in dict(
                depth=10**9,
                embed_dim=10**9,
                patch_size=0,
                num_heads=-1,
                mlp_ratio=float("nan"),
                reg_tokens=1.5,
                init_values="0.1",
                class_token=1,
                qk_norm="yes",
            ).items()
        ],
        *[dict(backbone_args={"depth": value}) for value in (0, -3, "2", None, True, [2], {"a": 1}, 1e3)],
        dict(L=-3),
        dict(L=0),
        dict(L=1_000_000),
        dict(L=65536),
        dict(L="6"),
        dict(L=6.0),
        dict(L=True),
        dict(L=None),
        dict(L=10**4000),
        dict(V=1),
        dict(V=70000),
        dict(V=[300]),
        dict(image_size=-32),
        dict(image_size=10**9),
        dict(image_size=[32, 32]),
        dict(image_size=4096),
        dict(temperature=0),
        dict(temperature=float("nan")),
        dict(temperature=float("inf")),
        dict(temperature="1"),
        dict(temperature=None),
        dict(checkpoint_path="evil.pth"),
        dict(pretrained=True),
        dict(_target_="os.system"),
        {"\x1b[2J" * 500: 1},
    ],
    ids=lambda change: repr(change)[:60],
)
def test_encoder_configs(sem, monkeypatch, change):
    def create_model(name, **given):
        assert re.fullmatch(r"\w+", name) and given.keys() <= {
            "pretrained",
            "num_classes",
            "img_size",
            "patch_size",
            "embed_dim",
            "depth",
            "num_heads",
            "reg_tokens",
        }
        assert given["pretrained"] is False
        return create(name, **given)

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", create_model)
    config = json.loads((sem / "config.json").read_text())
    assert load_encoder(sem).config == config
    config.update(
        {
            **change,
            **(
                {"backbone_args": {**config["backbone_args"], **change["backbone_args"]}}
                if isinstance(change.get("backbone_args"), dict)
                else {}
            ),
        }
    )
    (sem / "config.json").write_text(json.dumps(config))
    line = refusal(load_encoder, sem)
    assert str(sem) in line


@pytest.mark.parametrize("backbone", ["hf-hub:timm/vit_tiny_patch16_224", "local-dir:.", "vit_tiny_patch16_224/x"])
def test_backbones_by_flag(tmp_path, monkeypatch, backbone):
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("reached"))
    torch.save({"sem_norm.bias": torch.zeros(3), "sem_norm.weight": torch.zeros(3)}, tmp_path / "teacher.pth")
    assert "timm cannot build the encoder" in refusal(load_encoder, tmp_path / "teacher.pth", backbone=backbone)


@pytest.mark.parametrize(
    "backbone",
    [
        "resnet18",
        "swin_tiny_patch4_window7_224",
        "vgg11",
        "convnext_tiny",
        "mixer_s16_224",
        "vit_base_patch16_siglip_224",
        "vit_tiny_patch16_224.nothing",
        "efficientnet_b0",
    ],
)
def test_models_that_are_no_such_transformer(sem, backbone):
    config = json.loads((sem / "config.json").read_text())
    (sem / "config.json").write_text(json.dumps(dict(config, backbone=backbone, backbone_args={})))
    refusal(load_encoder, sem)


def test_timms_names(tmp_path):
    encoder = SEMEncoder(
        "vit_tiny_patch16_224", 32, L=3, V=4, backbone_args=dict(embed_dim=24, depth=1, num_heads=2, reg_tokens=2)
    )
    for weights, message in (
        (encoder.backbone.state_dict(), "has a backbone, but no SEM head (sem_embed, sem_norm)"),
        (encoder.state_dict(), "lacks backbone.blocks.1."),
        ({"teacher": encoder.state_dict()}, "lacks backbone.blocks.1."),
    ):
        torch.save(weights, tmp_path / "timm.pth")
        assert message in refusal(load_encoder, tmp_path / "timm.pth", backbone="vit_tiny_patch16_224", L=3, V=4)
    vit = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0)
    torch.save(vit.state_dict(), tmp_path / "timm.pth")
    assert "has a backbone, but no SEM head" in refusal(load_encoder, tmp_path / "timm.pth")


#################################################################################
#                                     VAEs                                      #
#################################################################################


@pytest.fixture
def vae(tmp_path, tiny_models):
    return shutil.copytree(tiny_models[0], tmp_path / "vae")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(latent_channels=16), "has other shapes"),
        (dict(shift_factor="0.1"), "shift_factor is '0.1'"),
        (dict(shift_factor=float("nan")), "shift_factor is nan"),
        (dict(in_channels=1), "has 1 in channels, wanted 3"),
        (dict(out_channels=1), "has 1 out channels, wanted 3"),
        (dict(latent_channels=10**12), "latent_channels is"),
        (dict(latents_mean=[0, 0, 0, 0.0], latents_std=None), "has latents_mean alone"),
        (dict(latents_std=[1.0] * 4), "has latents_std alone"),
        (
            dict(latents_mean=[0.0] * 3, latents_std=[1.0] * 3),
            "latents_mean has 3 numbers, wanted one per latent channel",
        ),
        (dict(latents_mean=[0.0] * 4, latents_std=[1.0, 1.0, 0, 1.0]), "latents_std is"),
        (dict(latents_mean=[0.0] * 4, latents_std=[1.0] * 4, shift_factor=0.1), "both latents_mean and shift_factor"),
        (dict(scaling_factor=0), "scaling_factor is 0"),
        (dict(scaling_factor=-1), "scaling_factor is -1"),
        (dict(scaling_factor=float("nan")), "scaling_factor is nan"),
        (dict(scaling_factor=float("inf")), "scaling_factor is inf"),
        (dict(scaling_factor="1"), "scaling_factor is '1'"),
        (dict(scaling_factor=True), "scaling_factor is True"),
        (dict(scaling_factor=None), "scaling_factor is None"),
        (dict(quantization_config=dict(quant_method="bitsandbytes", load_in_8bit=True)), "the key quantization_config"),
        (dict(auto_map=dict(AutoModel="evil.Model")), "the key auto_map"),
        (dict(pretrained="x"), "the key pretrained"),
        (dict(_class_name="UNet2DModel"), "its config.json is that of no"),
        (dict(_class_name=["a"]), "its config.json is that of no"),
        (dict(block_out_channels=[]), "block_out_channels is []"),
        (dict(block_out_channels=8), "block_out_channels is 8"),
        (dict(block_out_channels=[8] * 100), "block_out_channels is"),
        (dict(block_out_channels=[8] * 3), "diffusers cannot build"),
        (dict(block_out_channels=[9] * 4), "diffusers cannot build"),
        (dict(block_out_channels=["8"] * 4), "block_out_channels is"),
        (dict(down_block_types=["os.system"] * 4), "diffusers cannot build"),
        (dict(down_block_types="Down"), "diffusers cannot build"),
        (dict(up_block_types=["UpDecoderBlock2D"]), "has unknown"),
        (dict(act_fn="evil"), "it from its config"),
        (dict(layers_per_block=10**9), "layers_per_block is"),
        (dict(layers_per_block=2), "lacks"),
        (dict(norm_num_groups=0), "diffusers cannot build"),
        (dict(use_quant_conv=False), "has unknown"),
        (dict(block_out_channels=[16] * 4), "has other shapes"),
        (dict(block_out_channels=[8192] * 4), "has other shapes"),
        (dict(sample_size=[]), "diffusers cannot build"),
        ({"\x1b[31mkey" * 99: 1}, "the key key"),
    ],
)
def test_vae_configs(vae, change, message):
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps({**config, **change}))
    assert message in refusal(load_vae, str(vae))


def test_vae_without_all_its_tensors(vae):
    path = vae / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(path)
    bias = weights.pop("encoder.conv_out.bias")
    safetensors.torch.save_file(weights, path)
    assert "lacks encoder.conv_out.bias" in refusal(load_vae, str(vae))
    safetensors.torch.save_file({**weights, "encoder.conv_out.bias": bias, "more": bias + 1}, path)
    assert "has unknown more" in refusal(load_vae, str(vae))


def test_vae_whose_index_points_elsewhere(vae, tmp_path):
    """An index is read only where no whole file is, and refused where it names files elsewhere."""
    index = dict(metadata={}, weight_map={"encoder.conv_in.weight": "../outside.safetensors"})
    (vae / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    load_vae(str(vae))
    shutil.move(vae / "diffusion_pytorch_model.safetensors", tmp_path / "outside.safetensors")
    assert "its weight_map is not of names of files beside it" in refusal(load_vae, str(vae))


def test_vae_of_old_names(vae):
    """Stability AI's files name the attention's layers as diffusers did before 0.17."""
    path = vae / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(path)
    expected = load_vae(str(vae)).state_dict()
    assert sum("attentions" in name for name in weights) == 20
    for old, new in dict(query="to_q", key="to_k", value="to_v", proj_attn="to_out.0").items():
        weights = {name.replace(f".{new}.", f".{old}."): value for name, value in weights.items()}
    path.unlink()
    torch.save(weights, vae / "diffusion_pytorch_model.bin")
    config = json.loads((vae / "config.json").read_text())
    for key in ("scaling_factor", "force_upcast", "shift_factor", "latents_mean", "use_quant_conv"):
        del config[key]  # as old, its config says less
    (vae / "config.json").write_text(json.dumps(config))
    loaded = load_vae(str(vae))
    assert loaded.config.scaling_factor == AutoencoderKL().config.scaling_factor == 0.18215
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize(
    "name", ["nobody/nothing", "../nothing", "a b", "\x1b[31m", "http://localhost/x", "x" * 3000, "nobody/nothing\0"]
)
def test_names_that_no_hub_has(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = (
        "HF_HUB_OFFLINE is set" if name == "nobody/nothing" else "does not exist: it is no file or folder, nor a hub id"
    )
    assert said in refusal(load_vae, name)
    assert downsampling_factor("ema") == downsampling_factor("stabilityai/sd-vae-ft-mse") == 8


#################################################################################
#                      One file given to --vae or --encoder                     #
#################################################################################

LONE_FILES = {
    "pickle.ckpt": pickle.dumps(Call(os.system, "touch touched")),
    "pickle.safetensors": pickle.dumps(Call(os.system, "touch touched")),
    "page.pt": b"<!DOCTYPE html><html>not found</html>",
    "page.safetensors": b"<!DOCTYPE html><html>not found</html>",
    "empty.ckpt": b"",
    "empty.safetensors": b"",
    "header.safetensors": struct.pack("<Q", 2**62) + b"{}",
    "json.pt": b'{"weight_map": {"encoder.conv_in.weight": "../evil.pt"}}',
    "beyond.safetensors": struct.pack("<Q", 70)
    + json.dumps({"x": dict(dtype="F32", shape=[9], data_offsets=[0, 36])}).ljust(70).encode(),
}


@pytest.mark.parametrize("load", [load_vae, load_encoder])
@pytest.mark.parametrize("name", [*LONE_FILES, "zip.pt", "cut.ckpt", "folder.safetensors", "loop.pt", "dangling.ckpt"])
def test_lone_files(tmp_path, monkeypatch, load, name):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    if name in LONE_FILES:
        path.write_bytes(LONE_FILES[name])
    elif name == "zip.pt":
        torch.save(dict(state_dict=Call(os.system, "touch touched")), path)
    elif name == "cut.ckpt":
        torch.save({"encoder.conv_in.weight": torch.zeros(9, 9)}, path)
        path.write_bytes(path.read_bytes()[:-200])
    elif name == "folder.safetensors":
        path.mkdir()
    else:
        path.symlink_to(name if name == "loop.pt" else "nowhere")
    assert name in refusal(load, str(path))
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(num_attention_heads="2"), "num_heads is '2'"),
        (dict(num_attention_heads=0), "timm cannot build"),
        (dict(num_attention_heads=5), "timm cannot build the encoder"),
        (dict(L=-3), "says L -3"),
        (dict(V=10**9), "V is 1000000000"),
        (dict(temp=float("nan")), "temperature is nan"),
        (dict(hidden_size=[3]), "hidden_size is [3]"),
        (dict(backbone_config=dict(num_attention_heads=[])), "timm cannot build"),
        (dict(auto_map=dict(AutoModel="evil.Model"), hidden_act="os.system"), "hidden_act is 'os.system'"),
        ({"preprocessor": dict(crop_size=dict(height=10**9))}, "image_size is 1000000000"),
        ({"preprocessor": dict(crop_size=225)}, "no multiple of its patch"),
        ({"preprocessor": dict(image_std="x")}, "image_std is x"),
    ],
)
def test_configurations_of_transformers(tmp_path, config, message):
    _, weights = golden("dinov2_registers_sem")
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config.pop("preprocessor", {})))
    usual = dict(model_type="dinov2_with_registers", num_attention_heads=2, L=8)
    usual.update(config)
    if "backbone_config" in config:
        del usual["num_attention_heads"]
    (tmp_path / "config.json").write_text(json.dumps(usual))
    line = refusal(load_encoder, tmp_path)
    assert message in line and tmp_path.name in line


#################################################################################
#                           meta.json and manifest.json                         #
#################################################################################


@pytest.mark.parametrize(
    "text, message",
    [
        *[
            (json.dumps({key: value}), f"meta.json: {key} is")
            for key, values in dict(
                step=[None, "3", -1, 1.5, True, [], 10**30],
                place=[None, "0"],
                logged=["x"],
                skipped=[{}],
                model=[3, []],
                vae=[3, ["ema"], {}, True],
                versions=["2.6", [], None, {"torch": 2}],
                L=["6", 0, None, True],
                V=[-1],
                num_classes=[0.5],
                in_dim=["x"],
                image_size=[0, "256"],
                scaling_factor=["x", 0, -1, [], True],
                vae_sha256=[1],
                encoder_sha256=[{}],
                listing_sha256=[[]],
                features_path=[3],
                data_path=[False],
                global_batch_size=["8"],
                global_seed=[-1],
                lr=["x"],
                precision=[None],
                flip=[1],
                ema_decay=[None],
                code_init=["x", 1, None],
                format_version=[0, "1", None, True],
            ).items()
            for value in values
        ],
        ('{"format_version": 4}', "format 4, this program knows format 1: update it"),
        ('{"lr": NaN}', "lr is nan"),
        ('{"scaling_factor": Infinity}', "scaling_factor is inf"),
        ("[" * 100_000, "not readable JSON"),
        ('{"step": ' + "[" * 100_000, "not readable JSON"),
        ("[]", "holds a JSON list"),
        ("{", "not readable JSON"),
        ('{"vae": ["\\u001b[31m' + "x" * 5000 + '"]}', "vae is"),
        ('{"step": ' + "9" * 5000 + "}", "meta.json"),
    ],
    ids=lambda value: value[:40],
)
def test_meta(tmp_path, text, message):
    (tmp_path / "meta.json").write_text(text)
    assert message in refusal(read_meta, tmp_path)
    safetensors.torch.save_file(WEIGHTS, tmp_path / "ema.safetensors")
    assert message in refusal(load_weights, tmp_path)


def test_meta_that_says_little_or_more(tmp_path):
    for meta in ({}, dict(step=0), dict(more=[[["x"]]], vae=None, scaling_factor=None, model=None)):
        (tmp_path / "meta.json").write_text(json.dumps(meta))
        assert read_meta(tmp_path) == RunMeta(step=meta.get("step"))


@pytest.mark.parametrize(
    "change, message",
    [
        *[
            (dict(shards=[dict(name=name, rows=4)]), "a shard is")
            for name in (
                "../outside",
                "/etc/passwd",
                "..",
                ".",
                "",
                "a/b",
                "a\\b",
                "C:x",
                "a\0b",
                "\x1b[31m",
                3,
                None,
                ["a"],
            )
        ],
        *[(dict(shards=[dict(name="000000", rows=rows)]), "a shard is") for rows in (-1, "4", 1.5, None, True, 10**30)],
        (dict(shards=[dict(name="000000", rows=10**12)]), "says 1,000,000,000,000 rows"),
        (dict(shards=["000000"]), "shards is"),
        (dict(shards={}), "shards is"),
        (dict(shards=None), "shards is"),
        *[
            ({key: value}, f"{key} is")
            for key, values in dict(
                count=["4", True, -1, None],
                image_size=[0, "64", 64.0, True, 10**40],
                images=[None],
                L=["6", 0, True],
                V=["300", 10**9],
                classes=["ab", [1], {}, None],
                skipped=[["x"], [["a"]], [["a", 1]], "x"],
                vae=[3, ["ema"], {}],
                vae_sha256=[3],
                scaling_factor=["x", 0, -1, [0.1]],
                encoder_sha256=[3],
                listing_sha256=[[]],
                flip=[3, True],
                seed=["0", -1, 1.5],
                precision=[[]],
                shard_size=[0, "4"],
                source=[3],
                latent_channels=["4", 0, None],
                shift_factor=["0", None, []],
                latents=[3, None],
                dtype=[16],
                format_version=["1", None, True],
            ).items()
            for value in values
        ],
        (dict(latents="\x1b[31m" + "x" * 999), "latents of kind"),
        (dict(dtype="x" * 999), "type"),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_manifests(features, tmp_path, change, message):
    manifest = json.loads((features / "manifest.json").read_text())
    for directory in features.glob("imagenet*"):
        (tmp_path / directory.name).symlink_to(directory)
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, **change}))
    assert message in refusal(read_manifest, tmp_path)
    assert message in refusal(Features, tmp_path)


#################################################################################
#                                .npy and .npz                                  #
#################################################################################


def npy(header, body=b"", version=(1, 0), length=None):
    """A .npy of any header."""
    header = header if isinstance(header, bytes) else header.encode()
    size = (len(header) if length is None else length).to_bytes(2 if version == (1, 0) else 4, "little")
    return b"\x93NUMPY" + bytes(version) + size + header + body


def described(shape, descr="'|u1'", order=False):
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n"


BAD_NPY = [
    (npy(described("(1099511627776, 6)"), bytes(60)), "its header claims 6,597,069,766,656 bytes, 60 follow"),
    (npy(described("(11,)"), bytes(10)), "claims 11 bytes, 10 follow"),
    (npy(described("(4611686018427387904, 4611686018427387904)"), bytes(60)), "claims"),
    (npy(described("(10,)", "'<U250000000'"), bytes(60)), "claims 10,000,000,000 bytes"),
    (npy(described("(-1,)"), bytes(60)), "shape"),
    (npy(described("(True,)"), bytes(60)), "shape"),
    (npy(described("(1,) * 10**9"), bytes(60)), "not a readable"),
    (npy(described(str((1,) * 60)), bytes(60)), "shape"),
    (npy(described("[4]"), bytes(60)), "not a readable"),
    (npy(described("(1,)", "'|V0'"), bytes(60)), "values of type"),
    (npy(described("(1,)", "[('a', '<f4')]"), bytes(60)), "values of type"),
    (npy(described("(1,)", "'<M8[s]'"), bytes(60)), "values of type"),
    (npy(described("(1,)", "'|O'"), bytes(60)), "holds pickled objects"),
    (npy(b"(" * 9000), "not a readable"),
    (npy(b"[" * 60_000), "header of 60,000 bytes"),
    (npy(b"{}", version=(2, 0), length=2**32 - 1), "header of 4,294,967,295 bytes"),
    (npy(b"{}", version=(3, 0)), "version"),
    (npy(b"{}", version=(9, 9)), "not a readable"),
    (b"", "not a readable"),
    (b"\x93NUMPY", "not a readable"),
    (npy("{'descr': '\x1b[31m', 'fortran_order': False, 'shape': (1,)}"), "not a readable"),
]


@pytest.mark.parametrize("content, message", BAD_NPY, ids=range(len(BAD_NPY)))
def test_npy(tmp_path, content, message):
    path = tmp_path / "bad.npy"
    path.write_bytes(content)
    for mmap in (True, False):
        assert re.search(message, refusal(load_array, path, mmap))
    assert "bad.npy" in refusal(open_codes, path)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24).reshape(2, 3, 4),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.zeros((0, 4), np.float16),
        np.array(3),
        np.array(["a", "bc"]),
        np.arange(4, dtype=">i4"),
        np.array([True, False]),
    ],
)
def test_npy_that_are_kept(tmp_path, array):
    np.save(tmp_path / "good.npy", array)
    for mmap in (True, False):
        loaded = load_array(tmp_path / "good.npy", mmap)
        np.testing.assert_array_equal(loaded, array)
        assert loaded.dtype == array.dtype and loaded.flags.fnc == array.flags.fnc


@pytest.mark.parametrize(
    "content, message",
    [
        *[(content, "bad.npz: arr_0 ") for content, _ in BAD_NPY],
        (npy(described("(1, 20000, 20000, 3)"), bytes(2**21)), "more than it has or than images are"),
        (npy(described("(1000000000000, 8, 8, 3)"), bytes(8 * 8 * 3)), "more than it has or than images are"),
        (npy(described("()"), bytes(8)), "wanted uint8"),
        (npy(described("(2, 8, 8, 3)"), bytes(2 * 8 * 8 * 3 + 1)), "there is more"),
    ],
    ids=lambda value: "",
)
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_npz(tmp_path, content, message, compression):
    path = tmp_path / "bad.npz"
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("arr_0.npy", content)
    message = "another way than NumPy's" if compression == zipfile.ZIP_LZMA else message
    assert re.search(message, refusal(check_npz, path))
    assert npz_rows(path) in (0, 2)


def test_npz_that_inflates_without_end(tmp_path):
    """One image of 192 MB in 0.2 MB is refused by its header; so is a header without end."""
    for head in (npy(described("(1, 8000, 8000, 3)")), npy(b"{}", version=(2, 0), length=2**27)):
        with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            with archive.open("arr_0.npy", "w") as entry:
                entry.write(head)
                for _ in range(192):
                    entry.write(bytes(10**6))
        tracemalloc.start()
        refusal(check_npz, tmp_path / "bomb.npz")
        assert npz_rows(tmp_path / "bomb.npz") == 0
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**22


#################################################################################
#                              Through the commands                             #
#################################################################################


@pytest.mark.parametrize("script", ["info", "sample", "extract", "vae"])
def test_commands_end_with_one_line(script, tmp_path, images, sem, vae, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(Call(os.system, "touch touched"), tmp_path / "evil.pt")
    (tmp_path / "meta.json").write_text("[" * 100_000)
    change_json(sem / "config.json", lambda config: config["backbone_args"].update(checkpoint_path="evil.pt"))
    if script == "vae":
        change_json(vae / "config.json", lambda config: config.update(in_channels=1))
    module, *flags = dict(
        info=("dlc.checkpoints", "info", "evil.pt"),
        sample=("sample_ddp_computed_dlc", "--ckpt", tmp_path),
        extract=("extract_features_withdlc", "--data-path", images, "--encoder", sem, "--vae", vae),
        vae=("extract_features_withdlc", "--data-path", images, "--encoder", "none", "--vae", vae),
    )[script]
    monkeypatch.setattr(sys, "argv", [module, *map(str, flags)])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(module).main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and len(error) < 360 and "trust" not in error, error
    assert (
        dict(
            info="names posix.system",
            sample="not readable JSON",
            extract="no key checkpoint_path",
            vae="has 1 in channels",
        )[script]
        in error
    )
    assert not (tmp_path / "touched").exists()


#################################################################################
#                       What a dataset folder makes us open                     #
#################################################################################


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    datasets = pytest.importorskip("datasets")
    path = tmp_path_factory.mktemp("dataset") / "saved"
    datasets.Dataset.from_dict(dict(features=np.zeros((2, 4, 8, 8)).tolist(), labels=[0, 1])).save_to_disk(path)
    return path


def change_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    "file, change, message",
    [
        (
            "state.json",
            lambda state: state["_data_files"][0].update(filename="../outside.arrow"),
            "names '../outside.arrow'",
        ),
        ("state.json", lambda state: state["_data_files"][0].update(filename="/etc/passwd"), "names '/etc/passwd'"),
        ("state.json", lambda state: state["_data_files"][0].update(filename=3), "names 3"),
        ("state.json", lambda state: state.clear(), "is not a dataset saved to disk"),
        (
            "dataset_info.json",
            lambda info: info["features"].update(features={"_type": "Image"}),
            "columns of the kind Image",
        ),
        (
            "dataset_info.json",
            lambda info: info["features"].update(labels={"feature": {"_type": "Audio"}, "_type": "Sequence"}),
            "columns of the kind Audio",
        ),
        (
            "dataset_info.json",
            lambda info: info["features"].update(more={"_type": "\x1b[31mpopen" + "x" * 999}),
            "columns of the kind popen",
        ),
        ("dataset_info.json", lambda info: info.update(features="x"), "is not a dataset saved to disk"),
    ],
)
def test_datasets(dataset, tmp_path, monkeypatch, capsys, file, change, message):
    copy = shutil.copytree(dataset, tmp_path / "copy")
    change_json(copy / file, change)
    monkeypatch.setattr("datasets.load_from_disk", lambda *_: pytest.fail("reached"))
    assert message in import_error(monkeypatch, capsys, copy, tmp_path / "new")


def import_error(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["dlc.features", "import-hf", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        features_tool()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and len(error) < 360 and "\x1b" not in error, error
    return error


def test_datasets_whose_arrow_files_name_other_columns(tmp_path, monkeypatch, capsys):
    """What dataset_info.json does not say, the schema of the Arrow file may."""
    datasets = pytest.importorskip("datasets")
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    data = datasets.Dataset.from_dict(dict(features=[str(tmp_path / "x.png")], labels=[1]))
    data.cast_column("features", datasets.Image()).save_to_disk(tmp_path / "images")
    change_json(tmp_path / "images/dataset_info.json", lambda info: info.pop("features"))
    monkeypatch.setattr("datasets.load_from_disk", lambda *_: pytest.fail("reached"))
    capsys.readouterr()
    assert "columns of the kind Image" in import_error(monkeypatch, capsys, tmp_path / "images", tmp_path / "new")
    for place in ("hf://datasets/x", "http://localhost/x", "s3://x"):
        assert "no such directory" in import_error(monkeypatch, capsys, place, tmp_path / "new")
    (tmp_path / "dict").mkdir()
    (tmp_path / "dict/dataset_dict.json").write_text(json.dumps(dict(splits=["../images"])))
    assert "names '../images'" in import_error(monkeypatch, capsys, tmp_path / "dict", tmp_path / "new")


def test_what_is_no_file(tmp_path):
    """A pipe, at which a reader would wait for ever, or a device, which has no end."""
    os.mkfifo(tmp_path / "pipe.npy")
    (tmp_path / "endless.npz").symlink_to("/dev/zero")
    for read, name in ((load_array, "pipe.npy"), (check_npz, "pipe.npy"), (check_npz, "endless.npz"), (open_codes, "")):
        assert "it is no file" in refusal(read, tmp_path / name)


def test_info_of_hostile_checkpoints(tmp_path):
    model = DiT_models["DiT-Ti/4"](input_size=8, num_classes=2)
    weights = model.state_dict()
    safetensors.torch.save_file(weights, tmp_path / "ema.safetensors")
    (tmp_path / "meta.json").write_text(json.dumps(dict(step=1, features_path="\x1b[31m" + "z" * 5000, versions={})))
    for raw, message in ((dict(weights, more=torch.zeros(1)), "has unknown more"), ({}, "lacks ")):
        safetensors.torch.save_file(raw, tmp_path / "model.safetensors")
        assert message in refusal(info, tmp_path)
    safetensors.torch.save_file({name: tensor * 0 for name, tensor in weights.items()}, tmp_path / "model.safetensors")
    assert info(tmp_path)
    said = subprocess.run(
        [sys.executable, "-m", "dlc.checkpoints", "info", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "\x1b" not in said and max(map(len, said.splitlines())) <= 2001
