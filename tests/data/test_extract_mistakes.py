"""Mistakes at extraction: one line on standard error that names them, and exit status 2, before any work; and latents
and codes that are not finite numbers, which are never stored, nor trained on, in silence."""

import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from accelerate import PartialState
from conftest import IMAGE_SIZE, extract_command, launch, save_images
from diffusers import AutoencoderKL

from dlc.data import Features
from dlc.data.images import save_png
from dlc.nets.encoder import save_encoder
from dlc.nets.pixels import PixelEncoder
from dlc.training.batches import draw_posterior
from dlc.training.image_batches import ImageBatches, Images
from dlc.weights.networks import load_encoder


@pytest.fixture
def extract_error(error_of, images, tiny_models):
    """The line by which extraction refuses flags, which come after those of a good launch."""
    good = ("--image-size", IMAGE_SIZE, "--vae", tiny_models[0], "--encoder", tiny_models[1])
    return lambda *flags, data_path=images: error_of(
        "extract_features_withdlc", "--data-path", data_path, *good, *flags
    )


def test_folders(extract_error, images, tmp_path):
    """A picture of somebody else is kept, and no features go among codes, which would be read in their place."""
    assert "--data-path nowhere is not a folder" in extract_error(data_path="nowhere")
    assert not (tmp_path / "features").exists()
    for path in (images, images / "cat/../features/x"):
        assert "--features-path" in extract_error("--features-path", path) and not (images / "features").exists()
    save_png(tmp_path / "preview.png", np.zeros((4, 4, 3), np.uint8))
    before = (tmp_path / "preview.png").read_bytes()
    assert f"the picture {tmp_path}/preview.png exists, and was not" in extract_error("--features-path", tmp_path)
    assert (tmp_path / "preview.png").read_bytes() == before
    (tmp_path / "preview.png").unlink()
    (tmp_path / "codes.json").write_text("{}")
    words = f"{tmp_path} holds a prior's codes (codes.json): name another"
    assert words in extract_error("--features-path", tmp_path) and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "loop").symlink_to("loop")
    assert f"cannot make the folder {tmp_path}/loop (it is a" in extract_error("--features-path", tmp_path / "loop")


def test_flags(extract_error, tmp_path):
    for flags, message in (
        (("--encoder", "none", "--L", 6), "--L, --V and --encoder-backbone describe an --encoder"),
        (("--model", "DiT-XXL/2"), "argument --model: invalid choice: 'DiT-XXL/2'"),
        (("--encoder", "nowhere"), "encoder nowhere does not exist"),
        (("--V", 70000), "argument --V: 70000: must be 2 to 65536"),
        (("--L", 512), "L 6 there, 512 here"),
        (("--vae", tmp_path), "is a folder of no layout that is known"),
        (("--vae", "mse"), "--vae stabilityai/sd-vae-ft-mse: no such local path, and the hub's cache"),
    ):
        assert message in extract_error(*flags), flags
    assert not (tmp_path / "features").exists()


@pytest.mark.slow
def test_features_of_other_settings_images_or_networks(extract_error, images, tiny_models, features, tmp_path):
    same = ("--features-path", features, "--shard-size", 4)
    for flags, message in (
        (("--flip", "none", "--global-seed", 3), "flip 'random' there, 'none' here; seed 0 there, 3 here"),
        (("--encoder", "none"), "L 6 there, None here; V 300 there, None here"),
        (("--shard-size", 5), "shard_size 4 there, 5 here"),
    ):
        assert message in extract_error(*same, *flags), flags
    moved = shutil.copytree(images, tmp_path / "images") / "cat/3.png"
    moved = moved.rename(moved.with_name("3b.png"))
    error = extract_error(*same, data_path=tmp_path / "images")
    assert "listing_sha256" in error and "images 15" not in error
    moved.unlink()
    assert "images 15 there, 14 here" in extract_error(*same, data_path=tmp_path / "images")
    for network, flag, file in zip(tiny_models, ("vae", "encoder"), ("diffusion_pytorch_model", "model")):
        path = shutil.copytree(network, tmp_path / flag) / f"{file}.safetensors"
        weights = safetensors.torch.load_file(path)
        next(iter(weights.values())).view(-1)[0] += 1
        safetensors.torch.save_file(weights, path, metadata=dict(format="pt"))
        assert f"{flag}_sha256" in extract_error(*same, f"--{flag}", tmp_path / flag)


# ---------------------------------------------------------------------- what is not finite


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six images in 2 classes."""
    path = tmp_path_factory.mktemp("images")
    save_images(path, per_class=3)
    return path


@pytest.mark.slow
def test_what_is_too_large_for_the_precision(folder, tiny_models, tmp_path):
    """Weights that are finite in float32, and not in float16: of the VAE's mean, and of the encoder's first layer."""
    vae, encoder = AutoencoderKL.from_pretrained(tiny_models[0]), load_encoder(tiny_models[1])
    with torch.no_grad():
        vae.quant_conv.bias[:4].fill_(1e5)
        encoder.backbone.patch_embed.proj.bias.fill_(1e5)
    vae.save_pretrained(tmp_path / "vae")
    save_encoder(encoder, tmp_path / "sem")
    for what, precision, networks in (
        ("latents", "fp16", (tmp_path / "vae", tiny_models[1])),
        ("the encoder's logits", "fp16", (tiny_models[0], tmp_path / "sem")),
        ("neither", "bf16", (tmp_path / "vae", tmp_path / "sem")),
    ):
        flags = ("--flip", "none", "--dtype", "float32", "--posterior", "moments", "--precision", precision)
        command = extract_command("forked", 1, folder, tmp_path / what, networks, *flags)
        result = launch(command, tmp_path, check=precision == "bf16")
        assert "Traceback" not in result.stdout and "Warning" not in result.stdout, result.stdout
        if precision == "fp16":
            line = f"error: {what} of 'cat/0.png' are not finite numbers: try --precision bf16 or fp32; what is"
            assert result.returncode == 2 and line in result.stdout and result.stdout.count("error:") == 1
            assert not (tmp_path / what / "manifest.json").exists()
    assert Features(tmp_path / "neither").count == 6


def test_training_on_images_sees_them(folder, tiny_models):
    """NaN latents stand for a code that is none; the other images are as they were."""
    images = Images(PartialState(cpu=True), folder, image_size=IMAGE_SIZE, vae=tiny_models[0], encoder=tiny_models[1])
    batch = ImageBatches(images, dict(codes=None), seed=0, global_batch=6)[0]
    crops, views = batch["images"], batch["codes"]
    encode = PixelEncoder(images.vae, images.encoder, torch.device("cpu"))
    moments, codes = encode(crops, views)
    assert moments.isfinite().all()
    embed = encode.encoder.backbone.patch_embed.forward
    encode.encoder.backbone.patch_embed.forward = lambda x: embed(x).index_fill(0, torch.tensor([2]), torch.nan)
    spoilt, marked = encode(crops, views)
    others = [0, 1, 3, 4, 5]
    assert torch.equal(spoilt[others], moments[others]) and torch.equal(marked[others], codes[others])
    assert marked.min() >= 0 and spoilt[2].isnan().all()
    assert draw_posterior(spoilt, 0, torch.arange(6))[2].isnan().all()
