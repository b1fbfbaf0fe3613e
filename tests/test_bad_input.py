"""A user's mistake gets one line on standard error that names it, and exit status 2, before any work."""

import ast
import importlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import IMAGE_SIZE, ROOT, L, V, launch, save_images

from dlc.data import kind_dir
from dlc.sampling.prior_options import PriorOptions, flags_of
from dlc.weights.networks import DEFAULT_ENCODER
from models import DiT_models

SCRIPTS = (
    *("extract_features_withdlc", "train_diffusion", "sample_ddp_computed_dlc", "sample_ddp", "compose_dlc"),
    *("train_prior", "sample_prior", "evaluate"),
)


def save_checkpoint(path, name="DiTSEM-Ti/4", input_size=IMAGE_SIZE // 8, vae=None, features=None, **sizes):
    """A checkpoint directory of an untrained model."""
    path.mkdir(parents=True)
    model = DiT_models[name](input_size=input_size, **(sizes or dict(L=L, V=V)))
    safetensors.torch.save_file(model.state_dict(), path / "ema.safetensors")
    meta = dict(step=1, model=name, vae=str(vae) if vae else None)
    if features:
        meta["features_path"] = str(features)
    (path / "meta.json").write_text(json.dumps(meta))
    return path


#################################################################################
#                                  Extraction                                   #
#################################################################################


@pytest.fixture
def extract_error(error_of, images, tiny_models):
    def call(*flags, data_path=images):
        return error_of(
            "extract_features_withdlc",
            "--data-path",
            data_path,
            "--image-size",
            IMAGE_SIZE,
            "--vae",
            tiny_models[0],
            "--encoder",
            tiny_models[1],
            *flags,
        )

    return call


def test_data_folder(extract_error, tmp_path):
    assert "--data-path nowhere is not a folder" in extract_error(data_path="nowhere")
    (tmp_path / "data").mkdir()
    assert "has no class folders" in extract_error(data_path=tmp_path / "data")
    assert "--L, --V and --encoder-backbone say what" in extract_error("--encoder", "none", "--L", 6)
    (tmp_path / "data/cat").mkdir()
    assert "no images in them" in extract_error(data_path=tmp_path / "data")
    assert not (tmp_path / "features").exists()


def test_features_within_the_data(extract_error, images):
    for path in (images, images / "features", images / "cat/../features/x"):
        assert "--features-path" in extract_error("--features-path", path) and not (images / "features").exists()


def test_extraction_flags(extract_error, tmp_path):
    assert "--image-size 100 is not a multiple of 8" in extract_error("--image-size", 100)
    assert "--image-size 100 is not a multiple of 8" in extract_error("--image-size", 100, "--vae", "ema")
    error = extract_error("--model", "DiT-XXL/2")
    assert "argument --model: invalid choice: 'DiT-XXL/2'" in error and "DiTCONT-Ti/8" in error
    assert "--encoder pretrained/dlc_encoder.pth does not exist" in extract_error(
        "--encoder", "pretrained/dlc_encoder.pth"
    )
    assert "encoder nowhere does not exist" in extract_error("--encoder", "nowhere")
    assert f"{tmp_path} is not a directory of a diffusers AutoencoderKL" in extract_error("--vae", tmp_path)
    assert "argument --batch-size: 0: must be at least 1" in extract_error("--batch-size", 0)
    assert "argument --V: 70000: must be 2 to 65536" in extract_error("--V", 70000)
    assert "argument --global-seed: 9223372036854775808: must be 0 to" in extract_error("--global-seed", 2**63)
    assert "argument --L: invalid int value: 'many'" in extract_error("--L", "many")
    assert "L 6 there, 512 here" in extract_error("--L", 512)
    (tmp_path / "config.json").write_text("{}")
    assert "config.json is not an AutoencoderKL's" in extract_error("--vae", tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "config.json is not readable JSON" in extract_error("--vae", tmp_path)
    (tmp_path / "junk.pth").write_bytes(b"junk")
    assert "junk.pth cannot be read as weights" in extract_error("--encoder", tmp_path / "junk.pth")
    (tmp_path / "file").write_text("")
    assert "file" in extract_error("--features-path", tmp_path / "file")
    assert "unrecognized arguments: --btch-size" in extract_error("--btch-size", 3)
    assert not (tmp_path / "features").exists()


def test_hub_out_of_reach(extract_error):
    for flags, name in (
        (("--vae", "mse"), "--vae stabilityai/sd-vae-ft-mse"),
        (("--encoder", "owner/name@v1"), "--encoder owner/name@v1"),
        (("--encoder", DEFAULT_ENCODER), f"--encoder {DEFAULT_ENCODER}"),
    ):
        error = extract_error(*flags)
        assert f"{name}: no such local path, and the hub's cache" in error and "or give a local path" in error


def test_features_of_other_settings(extract_error, features):
    error = extract_error("--features-path", features, "--shard-size", 4, "--flip", "none", "--global-seed", 3)
    assert "flip 'random' there, 'none' here; seed 0 there, 3 here" in error
    for flags, message in (
        (("--posterior", "moments"), "latents 'sample' there, 'moments' here"),
        (("--dtype", "float32"), "dtype 'float16' there, 'float32' here"),
        (("--precision", "bf16"), "precision 'fp32' there, 'bf16' here"),
        (("--flip", "both"), "flip 'random' there, 'both' here"),
        (("--encoder", "none"), "L 6 there, None here; V 300 there, None here"),
        (("--image-size", 32), "image_size 64 there, 32 here"),
        ((), "shard_size 4 there, 1024 here"),
    ):
        assert message in extract_error("--features-path", features, *flags)


def test_features_of_other_images_or_networks(extract_error, images, tiny_models, features, tmp_path):
    """Told by what they are, not by where they lie."""
    same = ("--features-path", features, "--shard-size", 4)
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images/cat/3.png").rename(tmp_path / "images/cat/3b.png")
    error = extract_error(*same, data_path=tmp_path / "images")
    assert "listing_sha256" in error and "images 15" not in error
    (tmp_path / "images/cat/3b.png").unlink()
    assert "images 15 there, 14 here" in extract_error(*same, data_path=tmp_path / "images")
    for flag, name, file in (
        ("--vae", "vae", "diffusion_pytorch_model.safetensors"),
        ("--encoder", "sem", "model.safetensors"),
    ):
        shutil.copytree(tiny_models[flag == "--encoder"], tmp_path / name)
        weights = safetensors.torch.load_file(tmp_path / name / file)
        next(iter(weights.values())).view(-1)[0] += 1
        safetensors.torch.save_file(weights, tmp_path / name / file, metadata=dict(format="pt"))
        assert f"{flag[2:]}_sha256" in extract_error(*same, flag, tmp_path / name)


#################################################################################
#                                   Training                                    #
#################################################################################


def test_features_path(error_of, features, tmp_path):
    assert "features path nowhere does not exist" in error_of("train_diffusion", "--features-path", "nowhere")
    assert "has no features" in error_of("train_diffusion", "--features-path", tmp_path)
    half = tmp_path / "half"
    shutil.copytree(features, half)
    (half / "manifest.json").unlink()
    assert "half-written" in error_of("train_diffusion", "--features-path", half)
    (half / "progress").mkdir()
    assert "half-written" in error_of("train_diffusion", "--features-path", half)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    "model, kind, value, message",
    [
        ("DiTSEM-Ti/2", "sem", V, rf"imagenet64_sem/000002.npy, row 1: value {V} outside 0..{V - 1}"),
        ("DiT-Ti/2", "labels", 2, r"imagenet64_labels/000002.npy, row 1: value 2 outside 0..1"),
    ],
)
def test_values_outside_their_range(error_of, features, tmp_path, model, kind, value, message):
    copy = tmp_path / "copy"
    shutil.copytree(features, copy)
    path = kind_dir(copy, IMAGE_SIZE, kind) / "000002.npy"
    array = np.load(path)
    array[1] = value
    np.save(path, array)
    assert re.search(message, error_of("train_diffusion", "--features-path", copy, "--model", model))


def test_pickled_objects(error_of, features, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(features, copy)
    np.save(kind_dir(copy, IMAGE_SIZE, "sem") / "000000.npy", np.array([None] * 4, dtype=object), allow_pickle=True)
    assert "holds pickled objects" in error_of("train_diffusion", "--features-path", copy)


def test_training_flags(error_of, features, tmp_path):
    def error(*flags):
        return error_of("train_diffusion", "--features-path", features, *flags)

    assert "invalid choice: 'DiTSEM-XXL/2'" in error("--model", "DiTSEM-XXL/2")
    assert "DiTCONT-S/2 is trained on vectors: give --condition-path" in error("--model", "DiTCONT-S/2")
    assert "argument --global-batch-size: 0: must be at least 1" in error("--global-batch-size", 0)
    assert "argument --lr: -1: must be at least 0" in error("--lr", "-1")
    (tmp_path / "file").write_text("")
    assert "file" in error("--results-dir", tmp_path / "file", "--model", "DiTSEM-Ti/2")
    assert "--V 7" in error("--V", 7)
    assert "--vae decodes previews" in error("--vae", "ema")


@pytest.mark.parametrize(
    "vectors, message",
    [
        (np.where(np.arange(14)[:, None] == 9, np.nan, np.zeros((14, 3))), r"0.npy, row 9: values that are not finite"),
        (np.zeros((14, 0)), "0.npy has vectors of no numbers"),
        (np.zeros((14, 3), int), "0.npy has values of type int64, wanted floats"),
        (np.zeros((13, 3)), "has 13 rows, the data 14"),
    ],
    ids=["NaN", "no width", "integers", "rows"],
)
def test_vectors_to_train_on(error_of, features, tmp_path, vectors, message):
    (tmp_path / "vectors").mkdir()
    np.save(tmp_path / "vectors/0.npy", vectors)
    flags = ("--model", "DiTCONT-Ti/2", "--features-path", features, "--condition-path", tmp_path / "vectors")
    assert re.search(message, error_of("train_diffusion", *flags))
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("name", ["checkpoints", "previews", "args.json", "log.txt", "metrics.jsonl", "loss.png"])
def test_results_of_the_wrong_kind(error_of, features, tmp_path, name):
    (tmp_path / "results").mkdir()
    path = tmp_path / "results" / name
    path.mkdir() if "." in name else path.write_text("")
    error = error_of("train_diffusion", "--features-path", features, "--model", "DiTSEM-Ti/2")
    assert f"results/{name} is a {'folder' if '.' in name else 'file'}, where a run has a" in error


def test_results_of_another_run(error_of, features, tmp_path):
    path = save_checkpoint(tmp_path / "results/checkpoints/0000001")
    meta = dict(
        step=1,
        model="DiTSEM-Ti/2",
        image_size=64,
        L=L,
        V=V,
        features_count=14,
        latents="sample",
        flip="random",
        global_batch_size=8,
        global_seed=0,
        scaling_factor=0.3,
    )
    (path / "meta.json").write_text(json.dumps(meta))

    def error(*flags):
        return error_of("train_diffusion", "--features-path", features, "--global-batch-size", 4, *flags)

    other = error("--model", "DiTSEM-Ti/4")
    assert "model 'DiTSEM-Ti/2' there, 'DiTSEM-Ti/4' here; give another --results-dir" in other
    changed = error("--model", "DiTSEM-Ti/2")
    assert "global_batch_size 8 there, 4 here" in changed and "scaling_factor 0.3 there, 0.18215 here" in changed
    assert "--allow-change to continue that one so" in changed


#################################################################################
#                                   Sampling                                    #
#################################################################################


@pytest.fixture
def sample_error(error_of, features, tiny_models, tmp_path):
    checkpoint = save_checkpoint(tmp_path / "results/checkpoints/0000001", vae=tiny_models[0], features=features)

    def call(*flags, ckpt=checkpoint, script="sample_ddp_computed_dlc"):
        error = error_of(script, "--model", "DiTSEM-Ti/4", "--ckpt", ckpt, *flags)
        assert not (tmp_path / "samples").exists()
        return error

    return call


def test_sampling_flags(sample_error):
    assert "argument --num-fid-samples: 0: must be at least 1" in sample_error("--num-fid-samples", 0)
    assert "argument --cfg-scale: 0.9: must be at least 1" in sample_error("--cfg-scale", 0.9)
    for value in ("nan", "inf"):
        assert f"argument --cfg-scale: {value}" in sample_error("--cfg-scale", value)
    assert "argument --num-sampling-steps: 1001: must be 2 to 1000" in sample_error("--num-sampling-steps", 1001)
    assert "--eta 0.5: --sampler ddpm has none" in sample_error("--eta", 0.5)
    assert "--ckpt names one: give one of them" in sample_error("--results-dir", "elsewhere")
    assert "--sampler dpmsolver++ has at most 999" in sample_error(
        "--sampler", "dpmsolver++", "--num-sampling-steps", 1000
    )
    assert "--t-min 500 is above --t-max 400" in sample_error("--t-min", 500, "--t-max", 400)
    assert "argument --progressive: 1: must be at least 2" in sample_error("--progressive", 1)
    assert "--progressive 8: there are 4 steps" in sample_error("--progressive", 8, "--num-sampling-steps", 4)
    assert "invalid choice: 'DiTSEM-XXL/2'" in sample_error("--model", "DiTSEM-XXL/2")
    assert "--image-size 256: checkpoint" in sample_error("--image-size", 256)
    other = sample_error(script="sample_ddp")
    assert "not conditioned on labels: draw from it with sample_ddp_computed_dlc.py" in other
    assert "not conditioned on codes or vectors: draw from it with sample_ddp.py" in sample_error("--model", "DiT-S/2")
    assert "--condition-path is for models conditioned on vectors" in sample_error("--condition-path", "vectors")


def test_flags_of_vectors(sample_error, tmp_path):
    vectors = save_checkpoint(tmp_path / "vectors", "DiTCONT-Ti/4", in_dim=3)

    def error(*flags):
        return sample_error("--model", "DiTCONT-Ti/4", *flags, ckpt=vectors)

    assert "DiTCONT-Ti/4 is conditioned on vectors: name them with --condition-path" in error()
    assert "--dlc-dir is for models conditioned on codes" in error("--dlc-dir", "x")
    assert "--prior-class is for models conditioned on codes" in error("--prior-class", 1)
    assert "--condition-path nowhere does not exist" in error("--condition-path", "nowhere")
    np.save(tmp_path / "wide.npy", np.zeros((2, 4)))
    assert "in_dim=4, the checkpoint's model in_dim=3" in error("--condition-path", tmp_path / "wide.npy")


def test_checkpoint_of_another_kind(sample_error, error_of, tmp_path, tiny_models):
    assert "checkpoint nowhere.pt does not exist" in sample_error(ckpt="nowhere.pt")
    assert "is of model DiTSEM-Ti/4, not DiTSEM-Ti/2" in sample_error("--model", "DiTSEM-Ti/2")
    (tmp_path / "broken.pt").write_bytes(b"not a checkpoint")
    assert "broken.pt cannot be read as weights" in sample_error(ckpt=tmp_path / "broken.pt")
    torch.save(torch.zeros(3), tmp_path / "lone.pt")
    assert "lone.pt holds a Tensor" in sample_error(ckpt=tmp_path / "lone.pt")
    (tmp_path / "dir").mkdir()
    assert "has no meta.json" in sample_error(ckpt=tmp_path / "dir")
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert "is not a DiT, DiTSEM or DiTCONT" in sample_error(ckpt=tmp_path / "other.safetensors")
    label_model = save_checkpoint(tmp_path / "dit", "DiT-Ti/4", num_classes=3)
    assert "is of model DiT-Ti/4, not DiTSEM-Ti/4" in sample_error(ckpt=label_model)
    assert "(there are some of DiTSEM-Ti/4)" in error_of("sample_ddp_computed_dlc", "--model", "DiTSEM-S/2")
    shutil.rmtree(tmp_path / "results")
    assert "no checkpoint of DiTSEM-XL/2 under --results-dir results" in error_of("sample_ddp_computed_dlc")


def test_code_sources(sample_error, features, tmp_path):
    other = save_checkpoint(tmp_path / "other", L=L + 1, V=V)
    assert f"have L={L}, but those of the checkpoint's model have L={L + 1}" in sample_error(
        "--dlc-dir", features, ckpt=other
    )
    assert "does not say which features it was trained on" in sample_error(ckpt=other)
    small = save_checkpoint(tmp_path / "small", L=L, V=2)
    assert f"have V={V}, but those of the checkpoint's model have V=2" in sample_error(
        "--dlc-dir", features, ckpt=small
    )
    assert re.search(
        r"imagenet64_sem/0.*npy, row \d: value \d+ outside 0..1",
        sample_error("--dlc-dir", kind_dir(features, IMAGE_SIZE, "sem"), ckpt=small),
    )
    meta = json.loads((small.parent / "results/checkpoints/0000001/meta.json").read_text())
    stranger = save_checkpoint(tmp_path / "stranger")
    (stranger / "meta.json").write_text(json.dumps({**meta, "encoder_sha256": "0"}))
    assert "come from another encoder" in sample_error("--dlc-dir", features, ckpt=stranger)
    assert "code source nowhere does not exist" in sample_error("--dlc-dir", "nowhere")
    np.save(tmp_path / "codes.npy", np.array([[None] * L], dtype=object), allow_pickle=True)
    assert "holds pickled objects" in sample_error("--sem-dir", tmp_path / "codes.npy")
    np.save(tmp_path / "codes.npy", np.full((3, L), -1))
    assert "value -1 outside 0..299" in sample_error("--dlc-dir", tmp_path / "codes.npy")
    np.save(tmp_path / "codes.npy", np.zeros((0, L), int))
    assert "has no rows" in sample_error("--dlc-dir", tmp_path / "codes.npy")
    np.savez(tmp_path / "codes.npz", np.zeros((3, L), int))
    assert "codes.npz is not a readable .npy" in sample_error("--dlc-dir", tmp_path / "codes.npz")


#################################################################################
#                                 All scripts                                   #
#################################################################################


@pytest.mark.parametrize("processes", [1, 2])
def test_one_line_under_the_launcher(processes, tmp_path):
    """Among what torchrun says of a failed child, the line appears once, and nothing is left behind."""
    save_images(tmp_path / "images", per_class=1)
    flags = ("--data-path", "images", "--image-size", 100)
    result = launch(("torchrun", processes, "extract_features_withdlc.py", *flags), tmp_path, check=False)
    assert result.returncode != 0
    assert result.stderr.count("error: --image-size 100 is not a multiple of 8") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_help_and_is_read(script, monkeypatch):
    """Each destination of the script's parser is read as an attribute of `args` in some source file."""
    parsers = []

    def parse_args(parser, argv=None):
        parsers.append(parser)
        raise SystemExit

    monkeypatch.setattr("dlc.machine.cli.ArgumentParser.parse_args", parse_args)
    with pytest.raises(SystemExit):
        importlib.import_module(script).main()
    read = {
        node.attr
        for path in [*ROOT.glob("*.py"), *ROOT.glob("dlc/**/*.py"), *ROOT.glob("evaluation/*.py")]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args"
    }
    read |= {f"prior_{flags_of(one)[0].replace('-', '_')}" for one in fields(PriorOptions)}  # read in a loop
    actions = [action for action in parsers[0]._actions if action.dest != "help"]
    assert len(actions) > 8
    for action in actions:
        assert action.help and action.dest in read, action.option_strings


@pytest.mark.parametrize("command", [("check",), ("format", "--check")], ids=" ".join)
def test_sources_are_clean(command):
    """By ruff's rules in pyproject.toml."""
    result = subprocess.run([sys.executable, "-m", "ruff", *command, ROOT], text=True, capture_output=True)
    assert result.returncode == 0, result.stdout
