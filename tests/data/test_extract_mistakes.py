"""Mistakes at extraction: one line on standard error that names them, and exit status 2, before any work."""

import shutil

import numpy as np
import pytest
import safetensors.torch
from conftest import IMAGE_SIZE

from dlc.data.images import save_png
from dlc.weights.networks import DEFAULT_ENCODER


@pytest.fixture
def extract_error(error_of, images, tiny_models):
    """The line by which extraction refuses flags, which come after those of a good launch."""
    good = ("--image-size", IMAGE_SIZE, "--vae", tiny_models[0], "--encoder", tiny_models[1])
    return lambda *flags, data_path=images: error_of(
        "extract_features_withdlc", "--data-path", data_path, *good, *flags
    )


def test_data_folder(extract_error, tmp_path):
    assert "--data-path nowhere is not a folder" in extract_error(data_path="nowhere")
    (tmp_path / "data").mkdir()
    assert "has no images (.jpg" in extract_error(data_path=tmp_path / "data")
    (tmp_path / "data/cat").mkdir()
    assert "no images in its class folders" in extract_error(data_path=tmp_path / "data")
    assert not (tmp_path / "features").exists()


def test_features_within_the_data(extract_error, images):
    for path in (images, images / "features", images / "cat/../features/x"):
        assert "--features-path" in extract_error("--features-path", path) and not (images / "features").exists()


def test_a_folder_of_somebody_else(extract_error, tmp_path):
    """Its picture is kept, and no features go among codes, which would be read in their place."""
    save_png(tmp_path / "preview.png", np.zeros((4, 4, 3), np.uint8))
    before = (tmp_path / "preview.png").read_bytes()
    assert f"the picture {tmp_path}/preview.png exists, and is no" in extract_error("--features-path", tmp_path)
    assert (tmp_path / "preview.png").read_bytes() == before
    (tmp_path / "preview.png").unlink()
    holds = {"codes.json": "a prior's codes", "args.json": "a run of training", "config.json": "weights"}
    for name, what in holds.items():
        (tmp_path / name).write_text("{}")
        assert f"{tmp_path} holds {what} ({name}): name another" in extract_error("--features-path", tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [name]
        (tmp_path / name).unlink()
    (tmp_path / "loop").symlink_to("loop")
    assert f"cannot make the folder {tmp_path}/loop (it is a" in extract_error("--features-path", tmp_path / "loop")


def test_extraction_flags(extract_error, tmp_path):
    for name, content in (("empty/config.json", "{}"), ("cut/config.json", "{"), ("junk.pth", "junk"), ("file", "")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "nothing").mkdir()
    cache = ": no such local path, and the hub's cache"
    for flags, message in (
        (("--encoder", "none", "--L", 6), "--L, --V and --encoder-backbone say what"),
        (("--image-size", 100), "--image-size 100 is not a multiple of 8"),
        (("--model", "DiT-XXL/2"), "argument --model: invalid choice: 'DiT-XXL/2'"),
        (("--encoder", "pretrained/x.pth"), "--encoder pretrained/x.pth does not exist"),
        (("--encoder", "nowhere"), "encoder nowhere does not exist"),
        (("--vae", tmp_path / "nothing"), "nothing is a folder of no layout that is known"),
        (("--batch-size", 0), "argument --batch-size: 0: must be at least 1"),
        (("--V", 70000), "argument --V: 70000: must be 2 to 65536"),
        (("--global-seed", 2**63), "argument --global-seed: 9223372036854775808: must be 0 to"),
        (("--L", 512), "L 6 there, 512 here"),
        (("--vae", tmp_path / "empty"), "config.json is that of no AutoencoderKL"),
        (("--vae", tmp_path / "cut"), "config.json is not readable JSON"),
        (("--encoder", tmp_path / "junk.pth"), "junk.pth cannot be read as weights"),
        (("--features-path", tmp_path / "file"), "file"),
        (("--vae", "mse"), "--vae stabilityai/sd-vae-ft-mse" + cache),
        (("--encoder", "owner/name@v1"), "--encoder owner/name@v1" + cache),
        (("--encoder", DEFAULT_ENCODER), f"--encoder {DEFAULT_ENCODER}" + cache),
    ):
        assert message in extract_error(*flags), flags
    assert not (tmp_path / "features").exists()


@pytest.mark.slow
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
        assert message in extract_error("--features-path", features, *flags), flags


@pytest.mark.slow
def test_features_of_other_images_or_networks(extract_error, images, tiny_models, features, tmp_path):
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
