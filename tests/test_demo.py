"""The digits demo's parts: its images, and the assets that assets/build_digits.py made. The whole is `bash demo.sh`."""

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from demo.digits import DigitReader, load_split, write_image_folder
from dlc.encoder import load_encoder
from dlc.images import IMAGENET_MEAN, IMAGENET_STD, normalize, to_uint8
from dlc.vae import decode, encode, load_vae


@pytest.fixture(scope="module")
def splits():
    return load_split("train"), load_split("heldout")


def test_image_folder_is_the_split(splits, tmp_path):
    write_image_folder(tmp_path)
    paths = {name: sorted((tmp_path / name).glob("*/*.png")) for name in ("train", "heldout")}
    assert [len(paths[name]) for name in ("train", "heldout")] == [1437, 360]
    assert not {path.name for path in paths["train"]} & {path.name for path in paths["heldout"]}
    for digit in range(10):
        folder = np.stack([np.array(Image.open(path)) for path in paths["heldout"] if path.parent.name == str(digit)])
        np.testing.assert_array_equal(folder, splits[1][0][splits[1][1] == digit])


@pytest.mark.slow
def test_vae_keeps_the_digits_legible(splits):
    images, labels = splits[1]
    vae = load_vae(str(ROOT / "assets/digits-vae"))
    with torch.inference_mode():
        latents = encode(vae, normalize(torch.from_numpy(images)))
        reconstructions = to_uint8(decode(vae, latents)).numpy()
    assert latents.shape == (360, 4, 8, 8)
    assert 0.8 < latents.std() < 1.2
    read = DigitReader()
    assert (read(images) == labels).mean() > 0.98
    assert (read(reconstructions) == labels).mean() > 0.97


def test_codes_say_which_digit_it_is(splits):
    encoder = load_encoder(ROOT / "assets/digits-sem")
    with torch.inference_mode():
        codes = [
            torch.cat(
                [
                    encoder.codes(normalize(torch.from_numpy(part), IMAGENET_MEAN, IMAGENET_STD))
                    for part in np.array_split(images, 4)
                ]
            ).numpy()
            for images, _ in splits
        ]
    nearest = KNeighborsClassifier(1, metric="hamming").fit(codes[0], splits[0][1])
    assert nearest.score(codes[1], splits[1][1]) > 0.95
    assert all(len(np.unique(position)) >= encoder.V // 2 for position in codes[0].T)  # no dead positions


def test_assets_are_small():
    size = sum(
        path.stat().st_size for folder in ("digits-vae", "digits-sem") for path in (ROOT / "assets" / folder).iterdir()
    )
    assert size < 4e6
