"""Mistakes at extraction: one line on standard error that names them, and exit status 2, before any work."""

import shutil

import pytest
import safetensors.torch
from conftest import IMAGE_SIZE

from dlc.weights.networks import DEFAULT_ENCODER


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
    assert "no images in its class folders" in extract_error(data_path=tmp_path / "data")
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
    assert f"{tmp_path} is a folder of no layout that is known" in extract_error("--vae", tmp_path)
    assert "argument --batch-size: 0: must be at least 1" in extract_error("--batch-size", 0)
    assert "argument --V: 70000: must be 2 to 65536" in extract_error("--V", 70000)
    assert "argument --global-seed: 9223372036854775808: must be 0 to" in extract_error("--global-seed", 2**63)
    assert "argument --L: invalid int value: 'many'" in extract_error("--L", "many")
    assert "L 6 there, 512 here" in extract_error("--L", 512)
    (tmp_path / "config.json").write_text("{}")
    assert "config.json is that of no AutoencoderKL" in extract_error("--vae", tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "config.json is not readable JSON" in extract_error("--vae", tmp_path)
    (tmp_path / "config.json").unlink()
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
