"""VAEs of other than four channels, and with a shift, from extraction to samples."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import IMAGE_SIZE, change_json, extract_command, launch, refusal, sample_folder, tiny_vae
from PIL import Image, ImageOps

from dlc.data import Features
from dlc.data.images import center_crop, normalize
from dlc.machine.noise import Stream, integers
from dlc.nets.vae import check_decodes, latent_settings, posterior
from dlc.weights.networks import load_vae

CHANNELS, SCALE, SHIFT = 16, 1.5305, 0.0609  # the latter two are those of Stable Diffusion 3
NORMAL = dict(latents_mean=[0.1 * i for i in range(CHANNELS)], latents_std=[0.5 + 0.1 * i for i in range(CHANNELS)])
PATH = "dog/6.png"  # after the broken one, image 14


@pytest.fixture(scope="module")
def deep_vae(tmp_path_factory):
    """A tiny VAE like Stable Diffusion 3's: 16 channels, 4 pixels per cell, no 1x1 convolutions."""
    path = tmp_path_factory.mktemp("deep_vae")
    torch.manual_seed(1)
    config = dict(scaling_factor=SCALE, shift_factor=SHIFT, use_quant_conv=False, use_post_quant_conv=False)
    tiny_vae(3, **config, latent_channels=CHANNELS).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def normal_vae(deep_vae, tmp_path_factory):
    """The same VAE, but that its config says mean and standard deviation of each channel, in place of a shift."""
    path = shutil.copytree(deep_vae, tmp_path_factory.mktemp("normal_vae") / "vae")
    change_json(path / "config.json", **NORMAL, shift_factor=None)
    return path


@pytest.fixture(scope="module")
def deep_features(deep_vae, normal_vae, tiny_models, images, tmp_path_factory):
    """deep_features[kind of latents]: features of the images, float32; means by the first VAE, moments by the other."""
    root = tmp_path_factory.mktemp("deep_features")
    for kind, vae, flags in (("mean", deep_vae, ""), ("moments", normal_vae, " --flip none")):
        flags = f"--posterior {kind} --dtype float32{flags}".split()
        launch(extract_command("forked", 1, images, root / kind, (vae, tiny_models[1]), *flags), root)
    return {kind: root / kind for kind in ("mean", "moments")}


@pytest.mark.slow
def test_extracted(deep_features, deep_vae, normal_vae, images):
    features = Features(deep_features["mean"])
    features.validate()
    assert features.latent_shape == (CHANNELS, 16, 16) and features.latents.array(0).shape[1:] == (CHANNELS, 16, 16)
    written = json.loads((deep_features["mean"] / "manifest.json").read_text())
    assert (written["latent_channels"], written["shift_factor"]) == (CHANNELS, SHIFT)
    vae, names = load_vae(str(deep_vae)), features.paths.gather(np.arange(features.count)).tolist()
    crop = center_crop(Image.open(images / PATH), IMAGE_SIZE)
    if integers(0, Stream.FLIP, torch.tensor([14]), 2).item():
        crop = ImageOps.mirror(crop)
    with torch.inference_mode():
        z = vae.encode(normalize(torch.from_numpy(np.array(crop))[None])).latent_dist.mean
    np.testing.assert_allclose(features.latents.gather([names.index(PATH)]), (z - SHIFT) * SCALE, atol=1e-4)
    moments = Features(deep_features["moments"])
    assert {key: getattr(moments.manifest, key) for key in NORMAL} == NORMAL and moments.manifest.shift_factor == 0
    paths, normal = moments.paths.gather(np.arange(moments.count)).tolist(), load_vae(str(normal_vae))
    crop = center_crop(Image.open(images / PATH), IMAGE_SIZE)
    with torch.inference_mode():
        expected = torch.cat(posterior(normal, normalize(torch.from_numpy(np.array(crop))[None])), dim=1)
    np.testing.assert_allclose(moments.latents.gather([paths.index(PATH)]), expected, atol=1e-4)
    assert moments.latent_shape == (CHANNELS, 16, 16) and moments.latents.array(0).shape[1:] == (2 * CHANNELS, 16, 16)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mean", "moments"])
def test_trained_on_and_sampled(kind, deep_features, deep_vae, tiny_models, tmp_path):
    flags = "--max-steps 2 --global-batch-size 4 --num-workers 0 --sample-every 2".split()
    model = ("--model", "DiTSEM-Ti/4")
    train = ("forked", 1, "train_diffusion.py", *model, "--features-path", deep_features[kind], *flags)
    launch(train, tmp_path)
    meta = json.loads((tmp_path / "results/checkpoints/0000002/meta.json").read_text())
    assert (meta["shift_factor"], meta["scaling_factor"]) == (SHIFT if kind == "mean" else 0, SCALE)
    assert {key: meta.get(key) for key in NORMAL} == (dict.fromkeys(NORMAL) if kind == "mean" else NORMAL)
    assert (tmp_path / "results/previews/0000002.png").is_file()
    flags = ("--dlc-dir", deep_features[kind], "--num-fid-samples", 2, "--num-sampling-steps", 2)
    sample = ("forked", 1, "sample_ddp_computed_dlc.py", *model, *flags)
    launch(sample, tmp_path)
    assert Image.open(sample_folder(tmp_path / "samples") / "000001.png").size == (IMAGE_SIZE, IMAGE_SIZE)
    other = ("--vae", tiny_models[0])
    for command in ((*train, "--results-dir", "other"), sample):
        result = launch((*command, *other), tmp_path, check=False)
        assert result.returncode == 2 and "has 4 latent channels, the " in result.stdout, result.stdout
        assert "Traceback" not in result.stdout


def test_what_a_vae_cannot_decode(deep_vae, tiny_models):
    vae = load_vae(str(deep_vae))
    settings = latent_settings(vae)
    check_decodes(vae, "x", CHANNELS, settings, "the latents")
    check_decodes(vae, "x", CHANNELS, dict(scaling_factor=None), "the latents")  # nothing is known
    check_decodes(load_vae(str(tiny_models[0])), "x", 4, dict(scaling_factor=0.18215), "the latents")
    for channels, source, message in (
        (CHANNELS, dict(settings, **NORMAL), r"has latents mean None, the latents \[0.0, 0.1"),
        (CHANNELS, dict(settings, latents_std=NORMAL["latents_std"]), "has latents std None"),
        (4, settings, "--vae x has 16 latent channels, the latents 4"),
        (CHANNELS, dict(settings, scaling_factor=0.5), f"has scaling factor {SCALE}, the latents 0.5"),
        (CHANNELS, dict(settings, shift_factor=0.5), f"has shift factor {SHIFT}, the latents 0.5"),
        (CHANNELS, dict(scaling_factor=SCALE), f"has shift factor {SHIFT}, the latents 0.0"),
    ):
        refusal(check_decodes, vae, "x", channels, source, "the latents", words=message)
