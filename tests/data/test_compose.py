"""compose_dlc.py: each token from one source, in the asked-for shares, and what it does not take."""

import re

import numpy as np
import pytest
import torch
from conftest import L, V, assert_codes, encoder_logits, launch

from compose_dlc import choose, compose
from dlc.data import Features
from dlc.nets.encoder import save_encoder
from dlc.sampling.code_folder import open_codes
from dlc.weights.networks import load_encoder


def test_tokens_come_from_the_sources_by_weight():
    uniform = torch.tensor([0.0, 0.2499, 0.25, 0.9999, 1 - 2**-32], dtype=torch.float64)
    assert choose(torch.tensor([0.0, 1.0, 3.0, 0.0]).expand(5, 4), uniform).tolist() == [1, 1, 2, 2, 2]
    sources = torch.stack([torch.arange(32), torch.arange(32) + 100, torch.arange(32) + 200])
    weights = torch.tensor([1.0, 0.0, 3.0])
    codes, source = compose(sources, weights, 400, seed=0)
    assert torch.equal(codes, sources[source, torch.arange(32)]) and not (source == 1).any()
    assert abs((source == 2).double().mean() - 0.75) < 0.02
    assert len({tuple(row) for row in codes.tolist()}) == 400
    few, _ = compose(sources, weights, 7, seed=0)
    assert torch.equal(few, codes[:7])  # code i is (seed, i)'s
    assert not torch.equal(compose(sources, weights, 7, seed=1)[0], few)


def test_sem_draws_from_the_mean_of_the_distributions():
    torch.manual_seed(0)
    distributions = torch.softmax(2 * torch.randn(2, 3, 5), dim=2)  # K, L, V
    weights = torch.tensor([1.0, 2.0])
    codes, source = compose(distributions, weights, 30_000, seed=0)
    seen = torch.nn.functional.one_hot(codes, 5).double().mean(0)
    torch.testing.assert_close(seen, (distributions[0] + 2 * distributions[1]).double() / 3, atol=0.015, rtol=0)
    one = torch.nn.functional.one_hot(codes[source[:, 1] == 0, 1], 5).double().mean(0)
    torch.testing.assert_close(one, distributions[0, 1].double(), atol=0.02, rtol=0)


@pytest.mark.slow
def test_the_script(images, features, tiny_models, tmp_path, monkeypatch, said_by):
    files = [images / "cat/0.png", images / "dog/3.png"]

    monkeypatch.chdir(tmp_path)

    def run(*flags, out="composed.npy"):
        said = said_by("compose_dlc", *flags, "--num", "30", "--out", out)
        return np.load(out), said

    command = ("python", 1, "compose_dlc.py", *files, "--encoder", tiny_models[1], "--num", 30, "--out", "composed.npy")
    said, composed = launch(command, tmp_path).stdout, np.load("composed.npy")
    counts = [int(count) for count in re.findall(r"^ +(\d+) of 180 tokens", said, re.M)]
    assert len(counts) == 2 and sum(counts) == 30 * L and min(counts) > 60
    assert composed.shape == (30, L) and composed.dtype == np.uint16
    codes = torch.cat([encoder_logits(tiny_models[1], [path]) for path in files]).argmax(dim=2).numpy()
    assert ((composed == codes[0]) | (composed == codes[1])).all()
    assert (composed == codes[0]).all(0).sum() == (codes[0] == codes[1]).sum()
    assert len(open_codes(tmp_path / "composed.npy")) == 30

    # by the encoder that the features name, which need not be given
    (tmp_path / "features").symlink_to(features)
    again, said = run(*files)
    np.testing.assert_array_equal(again, composed)
    assert f"encoder {tiny_models[1]}, of features: " in said

    # the features' rows of the same images: cat/0.png is row 0, dog/3.png row 10
    assert Features(features).paths.gather([0, 10]).tolist() == ["cat/0.png", "dog/3.png"]
    of_rows, _ = run("--features-path", features, "--rows", 0, 10, out="rows.npy")
    stored = Features(features).codes.gather([0, 10])
    assert_codes(stored, encoder_logits(tiny_models[1], files))  # extracted in other batches
    same = (stored == codes).all(0)
    assert ((of_rows == stored[0]) | (of_rows == stored[1])).all()
    np.testing.assert_array_equal(of_rows[:, same], composed[:, same])

    for temp, own in ((1e-4, True), (1, False)):  # towards temperature 0 only the sources' own tokens are left
        sem, _ = run(*files, "--encoder", tiny_models[1], "--mode", "sem", "--temp", temp, out=f"{temp}.npy")
        assert sem.shape == (30, L) and sem.max() < V
        assert ((sem == codes[0]) | (sem == codes[1])).all() == own


@pytest.mark.slow
def test_what_it_refuses(images, features, tiny_models, tmp_path, error_of):
    encoder = load_encoder(tiny_models[1])
    torch.nn.init.ones_(encoder.sem_norm.bias)
    save_encoder(encoder, tmp_path / "other")
    with torch.no_grad():
        encoder.backbone.patch_embed.proj.bias.fill_(3e38)
    save_encoder(encoder, tmp_path / "infinite")
    cat, broken = images / "cat/0.png", images / "dog/1_broken.jpg"
    two, rows = (cat, cat), ("--features-path", features, "--rows", 0, 1)
    for arguments, message in (
        ((), "name the sources as image files, or by --features-path with --rows"),
        ((cat,), "two or more sources"),
        ((cat, images), f"{images} holds images: name them one by one, such as {images}/cat/0.png"),
        ((*two, "--weights", 1), "--weights: give one for each of the 2 sources"),
        ((*two, "--weights", 0, 0), "not all 0"),
        ((*two, "--temp", 1), "--temp applies to --mode sem only"),
        ((*two, "--out", "codes.txt"), "--out codes.txt: wanted a .npy"),
        ((*two, "--out", "no/codes.npy"), "--out no/codes.npy: there is no such folder"),
        ((cat, broken, "--encoder", tiny_models[1]), f"{broken} cannot be read as an image (cannot identify"),
        (two, "--encoder lavoies/SEM_dinov2_L512: no such local path, and the hub's cache"),
        ((*two, *rows[:2], "--encoder", "other"), f"codes of features {features} come from another encoder than"),
        ((*two, "--encoder", "infinite"), f"the encoder's logits of {cat} are not finite numbers"),
        ((*two, "--background", "blu"), "--background: blu: not a colour, such as white or #ff8000"),
        ((*rows, 99), f"--rows 99: features {features} have rows 0 to 13"),
        ((*rows, "--mode", "sem"), "--mode sem needs images"),
        ((*rows, "--L", 9), "--L does not go with --rows"),
    ):
        assert message in error_of("compose_dlc", *arguments)
    assert not (tmp_path / "composed.npy").exists()
