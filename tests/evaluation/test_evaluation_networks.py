"""The networks against other implementations, with seeded weights; their files, and the fetching of these."""

import functools
import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refusal
from PIL import Image
from tiny_networks import tiny_dinov2

from evaluation import feature_networks as networks
from evaluation.dinov2 import load_dinov2, preprocess, resample_positions
from evaluation.inception import InceptionV3, load_inception


@functools.cache
def seeded_inception():
    """Inception with random weights whose activations neither vanish nor explode."""
    torch.manual_seed(0)
    network = InceptionV3()
    for name, value in network.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif value.is_floating_point():
            value.normal_(float(name.endswith("bn.weight")), 0.1)
            if value.ndim == 4:
                value.mul_(16 / math.sqrt(value[0].numel()))
    network.fc.weight.mul_(0.2)
    return network


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """The seeded weights as the published file has them: by torch before 1.6."""
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(seeded_inception().state_dict(), path, _use_new_zipfile_serialization=False)
    return path


def test_inception_is_torch_fidelitys(inception_file):
    """Pool, spatial features (by a hook, flattened as TensorFlow lays them out) and the softmax without the bias."""
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    oracle = FeatureExtractorInceptionV3(
        "oracle", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(inception_file)
    )
    spatial = []
    oracle.Mixed_6d.branch1x1.register_forward_hook(
        lambda module, inputs, output: spatial.append(output[:, :7].permute(0, 2, 3, 1).flatten(1))
    )
    images = torch.randint(0, 256, (1, 3, 64, 80), dtype=torch.uint8)
    with torch.inference_mode():
        pool, logits = oracle(images)
        network = load_inception(inception_file)
        found = network(images)
    assert found[0].shape == (1, 2048) and found[1].shape == (1, 2023) and found[1].std() > 0.01
    torch.testing.assert_close(found[0], pool, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], spatial[0], rtol=1e-5, atol=1e-5)
    probabilities = network.probabilities(found[0])
    assert probabilities.shape == (1, 1008)
    torch.testing.assert_close(probabilities, torch.softmax(logits, dim=1), rtol=1e-5, atol=1e-5)


def test_files_of_weights(inception_file, tmp_path):
    """Both layouts of the published names; and a published name with other bytes."""
    weights = seeded_inception().state_dict()
    few = {key: value for key, value in weights.items() if not key.endswith("num_batches_tracked")}
    assert (len(weights), len(few)) == (566, 472)
    torch.save(few, tmp_path / "new.pth")
    for path in (inception_file, tmp_path / "new.pth"):
        network = networks.InceptionNetwork(path, torch.device("cpu"))
        loaded = network.module.state_dict()
        assert loaded.keys() == weights.keys() and all(torch.equal(loaded[key], weights[key]) for key in few), path
        assert "not the published file" in network.notes[0]
    named = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    named.write_bytes(b"cut off")
    refusal(networks.InceptionNetwork, named, "cpu", words="SHA-256 .*…, wanted 6726825d…, as its name says")


def test_where_weights_are_looked_for(tmp_path, monkeypatch):
    kind, cache, content, asked = networks.InceptionNetwork, tmp_path / "hub/checkpoints", b"sent", []

    def fetch_file(url, path, check):
        asked.append(url)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".part").write_bytes(content)
        check(path.with_suffix(".part"))
        return path.with_suffix(".part").rename(path)

    monkeypatch.setattr(networks, "fetch_file", fetch_file)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match="not the published file.*put it into .*hub/checkpoints, or name.*--inception"):
        networks.find_weights("inception")
    monkeypatch.setattr(kind, "sha256_prefix", hashlib.sha256(content).hexdigest()[:8])
    for _ in range(2):
        assert networks.find_weights("inception") == cache / kind.files[0] and asked == [kind.url] * 2
    (cache / kind.files[0]).rename(cache / kind.files[1])
    assert networks.find_weights("inception") == cache / kind.files[1]
    (cache / kind.files[1]).rename(kind.files[1])
    assert networks.find_weights("inception") == Path(kind.files[1]) and len(asked) == 2


def test_positions_are_resampled_as_dinov2_does():
    """By hand: cell i lies at (i + 0.5) * 37 / 16.1 - 0.5; Keys's kernel (a = -0.75) of 4 cells, edges repeated."""
    positions = torch.randn(1, 1 + 37 * 37, 5, generator=torch.Generator().manual_seed(0))
    matrix = np.zeros((16, 37))
    for row, place in enumerate((np.arange(16) + 0.5) * 37 / 16.1 - 0.5):
        for cell in range(math.floor(place) - 1, math.floor(place) + 3):
            x = abs(place - cell)
            weight = 1.25 * x**3 - 2.25 * x**2 + 1 if x <= 1 else -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
            matrix[row, min(max(cell, 0), 36)] += weight
    grid = positions[0, 1:].reshape(37, 37, 5).double().numpy()
    wanted = np.einsum("ip,jq,pqd->ijd", matrix, matrix, grid).reshape(256, 5)
    found = resample_positions(positions)
    np.testing.assert_allclose(found[0, 1:], wanted, atol=2e-5)
    assert torch.equal(found[:, 0], positions[:, 0])
    assert torch.equal(resample_positions(found), found)  # of 16 x 16 already


def test_dinov2_class_token(tmp_path):
    """That of the whole ViT (timm's agrees with DINOv2's, which tests of the encoder show) on images Pillow resized."""
    tiny_dinov2(tmp_path / "tiny.pth")
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 52, 3), dtype=np.uint8)
    network = networks.DINOv2Network(tmp_path / "tiny.pth", torch.device("cpu"))
    views = np.stack([np.asarray(Image.fromarray(one).resize((224, 224), Image.Resampling.BICUBIC)) for one in images])
    x = torch.from_numpy(views).float() / 255
    x = ((x - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])).permute(0, 3, 1, 2)
    torch.testing.assert_close(preprocess(torch.from_numpy(images)), x)
    with torch.inference_mode():
        found, wanted = network(torch.from_numpy(images))["pool"], network.module(x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert found.untyped_storage().nbytes() == found.nbytes  # the other tokens are not kept
    assert network.module.norm.eps == 1e-6 and "no ViT-L/14" in network.notes[0]


def test_files_that_are_no_dinov2(tmp_path, inception_file):
    weights = tiny_dinov2(tmp_path / "tiny.pth")
    for change, words in (
        (dict(register_tokens=torch.zeros(1, 4, 64)), "has registers"),
        (dict(pos_embed=torch.zeros(1, 7, 64)), "not a class token and a square grid"),
        ({"norm.bias": torch.full((64,), torch.nan)}, "norm.bias has values that are NaN"),
    ):
        torch.save({**weights, **change}, tmp_path / "other.pth")
        refusal(load_dinov2, tmp_path / "other.pth", words=f"other.pth.*{words}")
