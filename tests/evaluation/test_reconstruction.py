"""PSNR and SSIM against closed forms and a direct formula; code agreement of codes whose truth is known; and the
commands `evaluate.py reconstruction` and `evaluate.py agreement`."""

import dataclasses
import json
import math
import shutil
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import IMAGE_SIZE, ROOT, L, V, change_json, launch, refusal, sample_folder
from PIL import Image
from scipy.signal import convolve2d

from dlc.data import Features
from dlc.data.codes import CodeSpec
from dlc.data.images import center_crop, load_rgb
from dlc.machine.files import write_json
from dlc.nets.encoder import SEMEncoder, save_encoder
from dlc.sampling.code_folder import open_codes
from dlc.sampling.samples_record import SamplesRecord
from dlc.weights.meta import RunMeta
from dlc.weights.networks import DEFAULT_ENCODER, load_encoder, load_vae
from evaluation import agreement
from evaluation.feature_images import FeatureImages, Reconstruction
from evaluation.metrics import FeatureStatistics, frechet_distance
from evaluation.similarity import psnr, ssim
from evaluation.tokens import EncoderNetwork, encoder_of, token_agreement

CPU = torch.device("cpu")
SIZES = "vit_tiny_patch16_224", 32, dict(embed_dim=24, depth=1, num_heads=2, reg_tokens=2)


def noise(*shape, seed=0, low=0, high=256):
    return torch.from_numpy(np.random.default_rng(seed).integers(low, high, shape, dtype=np.uint8))


def test_psnr_of_a_known_error():
    """Pixels that are 5 grey levels apart: 20 log10(255 / 5). One image per number; equal images are capped."""
    images = noise(3, 16, 12, 3, high=200)
    others = torch.stack([images[0] + 5, images[1], images[2]])
    others[2, 0, 0, 0] += 4  # one of 576 values
    wanted = [20 * math.log10(255 / 5), 100.0, 10 * math.log10(255**2 * 576 / 16)]
    assert psnr(images, others).tolist() == pytest.approx(wanted, rel=1e-6)


def direct_ssim(a, b):
    """The formula of Wang et al. by two-dimensional windows, in float64, of one image (H, W, 3)."""
    weights = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window, values = np.outer(weights, weights) / weights.sum() ** 2, []
    for x, y in zip(a.transpose(2, 0, 1).astype(float), b.transpose(2, 0, 1).astype(float)):
        mx, my, xx, yy, xy = (convolve2d(z, window, mode="valid") for z in (x, y, x * x, y * y, x * y))
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        likeness = (2 * mx * my + c1) * (2 * (xy - mx * my) + c2)
        values.append(likeness / ((mx**2 + my**2 + c1) * (xx - mx**2 + yy - my**2 + c2)))
    return np.mean(values)


def test_ssim_is_the_formula():
    a = noise(2, 17, 15, 3)
    b = (a.float() * 0.7 + noise(2, 17, 15, 3, seed=1).float() * 0.3).to(torch.uint8)
    a[1], b[1] = 240, 250  # flat and bright, where variances are differences of large squares
    b[1, 8, 8] = 251
    assert ssim(a, b).tolist() == pytest.approx([direct_ssim(*pair) for pair in zip(a.numpy(), b.numpy())], rel=1e-9)
    assert ssim(a, a).tolist() == pytest.approx([1, 1])
    refusal(ssim, noise(1, 10, 20, 3), noise(1, 10, 20, 3), words="11 x 11 pixels or more, these have")


def test_agreement_of_known_codes():
    wanted = np.array([[0, 1, 2], [0, 1, 2], [1, 1, 2], [1, 1, 0]], np.uint8)
    found = np.array([[0, 0, 2], [0, 0, 1], [1, 2, 1], [1, 2, 1]])
    result = token_agreement(wanted, found, 3)
    assert result["share_by_position"] == [1, 0, 0.25]
    assert result["share"] == pytest.approx(1.25 / 3)
    # p q by token: 2/4 2/4 twice; none in common; token 1 is never wanted, token 2 is 3/4 1/4
    assert result["chance_by_position"] == [0.5, 0, 0.1875]
    shares = np.array([2, 1, 1, 1]) / 3
    assert result["standard_error"] == pytest.approx(shares.std(ddof=1) / 2)
    assert (result["images"], result["L"], result["V"], result["whole_codes"]) == (4, 3, 3, 0)


@pytest.mark.slow
def test_reconstruction_command(workplace, images, tiny_models, tmp_path, evaluate):
    out = tmp_path / "numbers.json"
    command = ("reconstruction", workplace / "features", "--data-path", images, "--features", "encoder", "--out", out)
    said = evaluate(*command)
    numbers = json.loads(out.read_text())
    features, encoder = Features(workplace / "features"), load_encoder(tiny_models[1])
    reconstruction, read = Reconstruction(load_vae(str(tiny_models[0])), CPU), EncoderNetwork(encoder, CPU)
    of_features = FeatureImages(features, images)
    assert (of_features.rows == np.arange(14)).all() and FeatureImages(features, images, 3).rows.tolist() == [0, 6, 13]
    originals = torch.from_numpy(next(of_features.batches(0, 14, 14)))
    found = reconstruction.reconstruct(originals)
    crop = np.array(center_crop(load_rgb(images / "dog/6.png"), IMAGE_SIZE))
    assert originals.shape == (14, IMAGE_SIZE, IMAGE_SIZE, 3) and (originals[13].numpy() == crop).all()
    assert numbers["psnr"] == pytest.approx(psnr(originals, found).mean().item(), rel=1e-6)
    assert numbers["ssim"] == pytest.approx(ssim(originals, found).mean().item(), rel=1e-6)
    codes = features.codes.gather(np.arange(14))
    assert numbers["code_agreement"] == token_agreement(codes, read(found)["codes"].numpy(), V)
    network = EncoderNetwork(encoder, CPU)
    sets = [FeatureStatistics.of(network(one)["pool"]) for one in (originals, found)]
    assert numbers["frechet_distances"] == {"encoder": pytest.approx(frechet_distance(*sets), rel=1e-3)}
    assert f"{numbers['psnr']:.3f}" in said and "tokens kept" in said and "FD of encoder features" in said
    assert numbers["images"] == 14 and numbers["vae_sha256"] == features.manifest.vae_sha256
    text = (ROOT / "docs/formats.md").read_text()
    assert all(f"`{key}`" in text for key in {**numbers, **numbers["code_agreement"]})
    launch(("forked", 2, "evaluate.py", *command), tmp_path)
    two = json.loads(out.read_text())
    assert all(two[key] == numbers[key] for key in ("psnr", "ssim", "code_agreement"))


def test_logits_that_are_not_finite_are_no_codes(tiny_models):
    encoder = load_encoder(tiny_models[1])
    encoder.sem_embed.weight.data[0] = math.nan
    with pytest.raises(ValueError, match="logits of an image are not finite numbers: try another --encoder"):
        EncoderNetwork(encoder, CPU)(noise(2, 32, 32, 3))


@pytest.fixture
def samples(workplace, tmp_path):
    """A copy of samples of a DiTSEM for the codes of workplace's features."""
    folder = sample_folder(workplace / "samples")
    shutil.copytree(folder, tmp_path / "samples" / folder.name)
    return tmp_path / "samples" / folder.name


@pytest.mark.slow
def test_agreement_command(samples, workplace, images, tiny_models, evaluate):
    metrics, features = samples.with_name(samples.name + ".metrics.json"), Features(workplace / "features")
    said = evaluate("agreement", samples, "--data-path", images)
    result = json.loads(metrics.read_text())["code_agreement"]
    rows = np.array(json.loads((samples / "samples.json").read_text())["code_rows"])
    pictures = np.stack([np.array(Image.open(samples / f"{index:06d}.png")) for index in range(21)])
    found = EncoderNetwork(load_encoder(tiny_models[1]), CPU)(torch.from_numpy(pictures))["codes"].numpy()
    agreed = token_agreement(features.codes.gather(rows), found, V)
    assert {key: value for key, value in result.items() if key != "ceiling"} == agreed
    evaluate("reconstruction", workplace / "features", "--data-path", images, "--features", "none")
    reconstructed = json.loads((workplace / "features/reconstruction.json").read_text())
    (workplace / "features/reconstruction.json").unlink()
    assert result["ceiling"] == reconstructed["code_agreement"] and result["ceiling"]["images"] == 14
    assert f"code agreement {result['share']:.3f} +- " in said and "VAE reconstructions of 14 images" in said
    # numbers of two commands lie beside each other, while the images are the same
    evaluate(samples, "--metrics", "is")
    score = json.loads(metrics.read_text())["metrics"]
    assert json.loads(metrics.read_text())["code_agreement"] == result
    evaluate("agreement", samples)
    assert json.loads(metrics.read_text())["metrics"] == score
    # samples that are what their codes were made of
    source = FeatureImages(features, images).source
    for index, row in enumerate(rows):
        center_crop(load_rgb(source.open(int(row))), 32).save(samples / f"{index:06d}.png")
    assert "; its numbers of other images are gone" in evaluate("agreement", samples)
    numbers = json.loads(metrics.read_text())
    assert "metrics" not in numbers and numbers["code_agreement"]["share"] == 1 > numbers["code_agreement"]["chance"]


@pytest.mark.slow
def test_samples_that_cannot_be_compared(samples, workplace, images, tiny_models, error_of, tmp_path):
    codes = Features(workplace / "features").codes.gather(np.arange(14))
    np.save(tmp_path / "right.npy", codes)
    np.save(tmp_path / "wrong.npy", codes[::-1])
    unsaid = shutil.copytree(samples, tmp_path / "unsaid", ignore=shutil.ignore_patterns("*.json"))
    for positions in (L, L - 1):
        save_encoder(SEMEncoder(*SIZES[:2], positions, V, backbone_args=SIZES[2]), tmp_path / f"sem{positions}")
    for path, flags, words in (
        (tmp_path / "x.npz", "", "x.npz does not exist"),
        (unsaid, "", "no samples.json says what its 21 images were drawn for: name a folder, or"),
        (samples, "--vae ema", "--vae sets up the ceiling, which needs images: add --data-path"),
        (samples, "--dlc-dir nowhere", "nowhere does not exist; name the codes that"),
        (samples, "--dlc-dir wrong.npy", "by the digest in samples.json: name them with --dlc-dir"),
        (samples, f"--dlc-dir right.npy --encoder {tiny_models[1]} --data-path {images}", "is no features directory"),
        (samples, f"--encoder sem{L}", "come from another encoder than"),
        (samples, f"--encoder sem{L - 1}", f"have L={L}, but those of"),
    ):
        assert words in error_of("evaluate", "agreement", path, *flags.split())
    (samples / "000003.png").unlink()
    said = error_of("evaluate", "agreement", samples)
    assert "has 20 images, and its samples.json says 21: run the sampling command again" in said
    labels = dataclasses.replace(SamplesRecord.read(samples / "samples.json"), conditions=dict(kind="labels"))
    refusal(agreement.DrawnCodes, samples, labels, words="drawn for labels, not for codes")


def test_encoder_that_the_checkpoint_names(tmp_path, monkeypatch):
    """Of codes that lie alone, composed or drawn by a prior, which name none; and where there are none."""
    opened = []
    monkeypatch.setattr("evaluation.tokens.open_encoder", lambda args: opened.append(args.encoder))
    monkeypatch.setattr("evaluation.tokens.codes_of", lambda encoder, owner: CodeSpec(owner=owner, L=2))
    np.save(tmp_path / "composed.npy", np.zeros((3, 2), np.uint8))
    write_json(tmp_path / "meta.json", RunMeta(noted=dict(encoder="owner/mine")).to_json())
    codes = open_codes(tmp_path / "composed.npy")
    for some, checkpoint in ((codes, "."), (codes, "ema.safetensors"), (None, "."), (codes, "gone/x")):
        encoder_of(Namespace(encoder=None), some, str(tmp_path / checkpoint))
    assert opened == ["owner/mine"] * 3 + [DEFAULT_ENCODER]


@pytest.mark.slow
def test_reconstruction_that_is_refused(workplace, images, tmp_path, error_of, tiny_models):
    features, lone = workplace / "features", tmp_path / "lone"
    shutil.copytree(features, lone)
    change_json(lone / "manifest.json", encoder=None, L=None, V=None)
    shutil.rmtree(lone / f"imagenet{IMAGE_SIZE}_sem")
    one = shutil.copytree(features, tmp_path / "one")
    change_json(one / "manifest.json", count=1, shards=[dict(name="000000", rows=1)])
    for file in one.glob("imagenet*/000000.npy"):
        np.save(file, np.load(file)[:1])
    for place, name in (("above", "../cat/0.png"), ("root", "/etc/passwd")):
        names = shutil.copytree(features, tmp_path / place) / f"imagenet{IMAGE_SIZE}_path/000000.npy"
        np.save(names, np.array([name, *np.load(names)[1:]]))
    for path, flags, words in (
        (tmp_path / "x", "", "does not exist: make it with extract_features_withdlc.py"),
        (features, "--num-images 15", "--num-images 15: features"),
        (features, f"--data-path {tmp_path}/nowhere", "nowhere is not a folder"),
        (features, f"--data-path {tmp_path}", "has no cat/0.png: features"),
        (tmp_path / "above", "", "name an image outside of any folder"),
        (tmp_path / "root", "", "name an image outside of any folder"),
        (features, "--features none encoder", "--features none goes with no other"),
        (features, "--features encoder --encoder none", "there are none, or it is left out"),
        (features, f"--out {features}/manifest.json", "manifest.json exists, and was not written by this command"),
        (lone, "--encoder x", "--encoder x: features"),
        (one, "--features encoder", "come from 1 image, and a Frechet distance needs 2: --features none"),
    ):
        assert words in error_of("evaluate", "reconstruction", path, "--data-path", images, *flags.split())
