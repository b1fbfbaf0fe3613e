"""The digits demo's parts: its images, its assets, its table and its models of codes. The whole is `bash demo.sh`."""

import itertools
import os
import signal
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import ROOT
from PIL import Image
from scipy.stats import chisquare
from sklearn.neighbors import KNeighborsClassifier

from demo import table
from demo.codes import Mixture, shuffle
from demo.judges import DigitReader, Judge, scans
from demo.pictures import load_digits, load_emoji, write_image_folder
from dlc.data.images import IMAGENET_MEAN, IMAGENET_STD, normalize, to_uint8
from dlc.nets.vae import decode, encode
from dlc.weights.networks import load_encoder, load_vae


@pytest.fixture(scope="module")
def splits():
    images, _, labels, heldout = load_digits()
    return [(images[some], np.array(labels, int)[some]) for some in (~heldout, heldout)]


@pytest.mark.slow
def test_image_folder_is_the_split(splits, tmp_path):
    assert write_image_folder(tmp_path, "digits") == 1797
    paths = {name: sorted((tmp_path / name).glob("*/*.png")) for name in ("train", "heldout")}
    assert [len(paths[name]) for name in ("train", "heldout")] == [1437, 360]
    assert not {path.name for path in paths["train"]} & {path.name for path in paths["heldout"]}
    for digit in range(10):
        folder = np.stack([np.array(Image.open(path)) for path in paths["heldout"] if path.parent.name == str(digit)])
        np.testing.assert_array_equal(folder, splits[1][0][splits[1][1] == digit])


def test_emoji_are_whole():
    images, names, groups, heldout = load_emoji()
    assert images.shape == (1558, 64, 64, 3) and len(set(names)) == len({image.tobytes() for image in images}) == 1558
    assert sum(path.stat().st_size for path in (ROOT / "assets/emoji").iterdir()) < 2.6e6
    assert (images[:, [0, -1]] > 250).mean() > 0.8
    assert heldout.sum() == 195 and {*np.array(groups)[heldout]} == {*groups} and len({*groups}) == 8


@pytest.mark.slow
def test_vae_keeps_the_digits_legible(splits):
    images, labels = (values[:90] for values in splits[1])
    vae = load_vae(str(ROOT / "assets/digits-vae"))
    with torch.inference_mode():
        latents = encode(vae, normalize(torch.from_numpy(images)))
        reconstructions = to_uint8(decode(vae, latents)).numpy()
    assert latents.shape == (90, 4, 8, 8)
    assert 0.8 < latents.std() < 1.2
    read = DigitReader(*splits[0])
    assert (read(images) == labels).mean() > 0.98
    assert (read(reconstructions) == labels).mean() > 0.97


@pytest.mark.slow
def test_codes_say_which_digit_it_is(splits):
    assert sum(path.stat().st_size for path in ROOT.glob("assets/digits-*/*")) < 4e6
    encoder = load_encoder(ROOT / "assets/digits-sem")
    with torch.inference_mode():
        pixels = [normalize(torch.from_numpy(images), IMAGENET_MEAN, IMAGENET_STD) for images, _ in splits]
        codes = [torch.cat([encoder.codes(part) for part in one.split(360)]).numpy() for one in pixels]
    nearest = KNeighborsClassifier(1, metric="hamming").fit(codes[0], splits[0][1])
    assert nearest.score(codes[1], splits[1][1]) > 0.95
    assert all(len(np.unique(position)) >= encoder.V // 2 for position in codes[0].T)  # no dead positions


# ---------------------------------------------------------------------- the table


def test_shuffled_codes_keep_only_how_often_tokens_are():
    codes = np.random.default_rng(0).integers(0, 16, (360, 32)).astype(np.uint8)
    shuffled = shuffle(codes)
    assert shuffled.dtype == codes.dtype and (np.sort(shuffled, axis=0) == np.sort(codes, axis=0)).all()
    assert abs((shuffled == codes).mean() - 1 / 16) < 0.01
    assert (np.argsort(shuffled[:, 0], kind="stable") != np.argsort(shuffled[:, 1], kind="stable")).any()


class Demo:
    """What demo.table.Demo knows, of made-up digits: three held-out ones of each kind."""

    folder, what = ROOT / "nowhere", "digits"
    labels = np.repeat(np.arange(10), 3)
    codes = np.arange(30)[:, None].repeat(4, axis=1)
    images = np.zeros((30, 64, 64, 3), np.uint8)

    def samples(self, name):
        if name == "samples":
            raise FileNotFoundError(name)
        return np.zeros((40, 64, 64, 3), np.uint8)


def test_rows_whose_files_are_missing(monkeypatch, capsys):
    def judge(name, images, codes, labels):
        numbers = dict(frechet_distance=1.5, code_agreement=1, chance=0.25) if labels is not None else {}
        calls.append(name)
        numbers |= {key: value + calls.count(name) for key, value in numbers.items() if name == "two seeds"}
        return dict(name=name, images=len(images), **numbers)

    calls, digits = [], table.ROWS["digits"]
    rows = {name: digits[name] for name in ("real held-out images", "samples from their codes")}
    rows |= {"two seeds": lambda demo: [(demo.images, demo.codes, demo.labels)] * 2}
    monkeypatch.setattr(table, "Demo", lambda folder: Demo())
    monkeypatch.setattr(table, "ROWS", dict(digits={**rows, "bare": lambda demo: (demo.images, None, None)}))
    monkeypatch.setattr(table, "Judge", lambda demo: judge)
    rows = table.measure("nowhere")
    assert [row["name"] for row in rows] == ["real held-out images", "two seeds", "bare"]
    assert (rows[1]["frechet_distance"], rows[1]["frechet_distance_error"], rows[1]["sets"]) == (3.0, 0.5, 2)
    assert "skipped: samples from their codes: samples is missing" in capsys.readouterr().out
    lines = [line.split() for line in table.table_of(rows).splitlines()]
    assert lines[1][-4:] == ["30", "1.500", "1.000", "0.250"] and lines[3] == ["bare", "30", "-", "-", "-"]
    assert lines[2][3:6] == ["3.000", "±", "0.500"]


def test_judge(splits):
    manifest = SimpleNamespace(encoder=ROOT / "assets/digits-sem")
    real = {"train": (splits[0][0], None, splits[0][1])}.get
    judge = Judge(SimpleNamespace(what="digits", features=SimpleNamespace(V=16, manifest=manifest), real=real))
    images, labels = splits[1]
    codes = judge.read_code(torch.from_numpy(images[:40]))["codes"].numpy()
    numbers = judge("some", images[:40], codes, labels[:40])
    assert numbers["code_agreement"] == 1 and numbers["read_as_asked"] > 0.9 and numbers["images"] == 40
    train = scans(splits[0][0])
    values, vectors = np.linalg.eigh(np.cov(train, rowvar=False))
    a, b = ((rows - train.mean(axis=0)) @ vectors[:, -20:] for rows in (train, scans(images[:40])))
    root = scipy.linalg.sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False)).real
    distance = np.square(b.mean(axis=0)).sum() + np.trace(np.cov(a, rowvar=False) + np.cov(b, rowvar=False) - 2 * root)
    assert numbers["frechet_distance"] == pytest.approx(distance, abs=1e-4)


def test_mixture_is_a_distribution_and_better():
    rng = np.random.default_rng(0)
    cluster = rng.integers(0, 2, (500, 1))
    codes = np.where(rng.random((500, 3)) < 0.8, cluster * 2, rng.integers(0, 4, (500, 3)))
    every = np.array(list(itertools.product(range(4), repeat=3)))
    mixture, independent = Mixture(codes, 4, 6), Mixture(codes, 4, 1)
    shares = np.stack([(codes == value).mean(axis=0) for value in range(4)], axis=1)  # (L, V)
    np.testing.assert_allclose(np.exp(independent.log_p[0]), shares, atol=1e-3)
    p = np.exp(-3 * mixture.nats(every))
    assert p.sum() == pytest.approx(1)
    assert mixture.nats(codes).mean() < independent.nats(codes).mean() - 0.1
    drawn = mixture.draw(5000) @ [16, 4, 1]
    seen = np.bincount(drawn, minlength=64)
    often = p > 1e-3
    assert chisquare([*seen[often], seen[~often].sum()], [*(5000 * p[often]), 5000 * p[~often].sum()]).pvalue > 1e-3


def test_ctrl_c_ends_the_demo(tmp_path):
    """Also where the stage that it reaches ends well, as a training does after its checkpoint."""
    head = (ROOT / "demo.sh").read_text().partition("model=")[0]
    first = """'trap "exit 0" INT; echo ready; while :; do sleep 0.1; done'"""
    (tmp_path / "demo.sh").write_text(f"{head}stage first bash -c {first}; stage second echo")
    (tmp_path / "setup.sh").write_text('set -euo pipefail; cd "$(dirname "${BASH_SOURCE[0]}")"')
    command = ["bash", tmp_path / "demo.sh"]
    restored = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=restored
    ) as demo:
        for line in demo.stdout:
            if line == "ready\n":
                os.killpg(demo.pid, signal.SIGINT)
        assert demo.wait(20) == 130 and "second" not in line
