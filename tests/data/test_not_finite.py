"""Latents and codes that are not finite numbers are never stored, nor trained on, in silence."""

import numpy as np
import pytest
import torch
from accelerate import PartialState
from conftest import IMAGE_SIZE, extract_command, launch, save_images
from diffusers import AutoencoderKL
from test_feature_tools import lone_files

from dlc.data import Features, kind_dir
from dlc.nets.encoder import save_encoder
from dlc.nets.pixels import PixelEncoder
from dlc.training.batches import draw_posterior
from dlc.training.image_batches import ImageBatches, Images
from dlc.weights.networks import load_encoder


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
    for networks, what in (
        ((tmp_path / "vae", tiny_models[1]), "latents"),
        ((tiny_models[0], tmp_path / "sem"), "the encoder's logits"),
    ):
        for precision in ("fp16", "bf16"):
            flags = ("--flip", "none", "--dtype", "float32", "--posterior", "moments", "--precision", precision)
            command = extract_command("forked", 1, folder, tmp_path / precision / what, networks, *flags)
            result = launch(command, tmp_path, check=precision == "bf16")
            assert "Traceback" not in result.stdout and "Warning" not in result.stdout, result.stdout
            if precision == "fp16":
                line = f"error: {what} of 'cat/0.png' are not finite numbers: try --precision bf16 or fp32; what is"
                assert result.returncode == 2 and line in result.stdout and result.stdout.count("error:") == 1
        assert Features(tmp_path / "bf16" / what).count == 6
        assert not (tmp_path / "fp16" / what / "manifest.json").exists()


def test_the_encoder_marks_them(tiny_models):
    encoder = load_encoder(tiny_models[1])
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        codes = encoder.codes(images)
        assert codes.min() >= 0
        for value in (torch.nan, torch.inf, -torch.inf):
            images[1, 0, 3, 3] = value
            assert torch.equal(encoder.codes(images)[[0, 2]], codes[[0, 2]]) and (encoder.codes(images)[1] == -1).all()


def test_training_on_images_sees_them(folder, tiny_models):
    """NaN latents stand for a code that is none, and so does the loss; the other images are as they were."""
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


@pytest.mark.slow
def test_composing_refuses_them(error_of, folder, tiny_models, tmp_path):
    encoder = load_encoder(tiny_models[1])
    with torch.no_grad():
        encoder.backbone.patch_embed.proj.bias.fill_(3e38)
    save_encoder(encoder, tmp_path / "sem")
    error = error_of("compose_dlc", folder / "cat/0.png", folder / "dog/0.png", "--encoder", tmp_path / "sem")
    assert f"the encoder's logits of {folder}/cat/0.png are not finite numbers" in error
    assert not (tmp_path / "composed.npy").exists()


# ---------------------------------------------------------------------- stored and converted


@pytest.mark.parametrize(
    "value, dtype, message",
    [
        (1e5, "float16", "are too large for float16: give --dtype float32"),
        (np.nan, "float32", "are not finite numbers: fix that row, or take it out"),
        (-np.inf, None, "are not finite numbers: fix that row, or take it out"),
    ],
)
def test_pack_refuses_them(value, dtype, message, tmp_path, tool):
    lone_files(tmp_path / "old", codes=False)
    path = kind_dir(tmp_path / "old", 64, "features") / "21.npy"
    latent = np.load(path).astype(np.float32)
    latent[..., 0, 3, 3] = value
    np.save(path, latent)
    flags = ("--shard-size", 8, *(("--dtype", dtype) if dtype else ()))
    status, _, said = tool("pack", tmp_path / "old", tmp_path / "new", *flags)
    assert status == 2 and said.count("\n") == 1 and f"old, row 21 {message}" in said
    written = sorted(file.name for file in kind_dir(tmp_path / "new", 64, "features").glob("*.npy"))
    assert written == ["000000.npy", "000001.npy"]
    assert not (tmp_path / "new/manifest.json").exists()
