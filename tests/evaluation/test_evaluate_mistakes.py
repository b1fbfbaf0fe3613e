"""evaluate.py: the warnings, and one line for each mistake. A small network is in Inception's place."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tiny_networks import pixels, record_of, save_folder

from evaluation import notes, sets
from evaluation.measuring import Measured
from evaluation.reference import Reference

COMPARE, MAKE = "samples.npz --reference reference.npz", "make-reference reference.npz"


def of_images(count, **stored):
    return Reference("r.npz", SimpleNamespace(count=count), stored)


PUBLISHED = of_images(10_000, pool=0)


@pytest.mark.parametrize(
    "samples, width, reference, metrics, line",
    [
        (50_000, 2048, PUBLISHED, ("fid", "precision"), ""),
        (1000, 2048, PUBLISHED, ("fid",), "1,000 samples are too few for a Frechet distance: the covariance of"),
        (10_000, 2048, PUBLISHED, ("fid",), "10,000 samples: published numbers use 50,000, and fewer give a"),
        (50_000, 2048, of_images(10_000), ("fid",), "the reference is 10,000 images of r.npz and the samples are"),
        (50_000, 2048, of_images(1000, pool=0), ("fid", "recall"), "recall: 1,000 reference images; published numbers"),
    ],
)
def test_warnings_of_counts(samples, width, reference, metrics, line):
    found = notes.of_counts(samples, width, reference, metrics)
    assert len(found) == bool(line) and all(re.match(line, one) for one in found), found


def test_a_set_compared_with_itself():
    samples = Measured(5, digest="a")
    for stored, digest, said in ((None, "a", True), ("a", "", True), (None, "", False), ("b", "b", False)):
        lines = notes.of_pixels(samples, Reference("r.npz", sha256=stored), Measured(5, digest=digest))
        assert lines == ["the samples and r.npz are the same images: a set has no distance from itself"] * said


@pytest.mark.parametrize(
    "changes, line",
    [
        (dict(), ""),
        (dict(cfg_channels=3), "guidance covers 3 latent channels.*DiTSEM-XL/2 guide all of them"),
        (dict(model="DiT-XL/2"), r"guidance covers 4 latent channels.*DiT-XL/2 guide 3 \(--cfg-channels 3\)"),
        (dict(model="DiT-XL/2", cfg_scale=1), ""),
        (dict(weights="raw"), "the samples were drawn from the raw weights: published ones from the EMA weights"),
        (dict(weights="as in the file"), "samples.json does not say whether the weights are the EMA weights"),
        (dict(model=[{}], cfg_scale=[], cfg_channels=None, weights={}), ""),
    ],
)
def test_warnings_of_settings(changes, line):
    found = notes.of_record(record_of(40, **changes))
    assert len(found) == bool(line) and all(re.match(line, one) for one in found), found


def test_warnings_of_images(evaluate, evaluation_place):
    arrays = pixels(40)
    arrays[7], arrays[8] = arrays[3], 200
    save_folder(evaluation_place / "set", arrays)
    (evaluation_place / "set/samples.json").write_text(json.dumps(record_of(40, weights="raw")))
    said = evaluate("set", "--reference", "reference.npz", "--metrics", "fid")
    assert "warning: 1 samples equal an earlier one (3 = 7)" in said
    assert "warning: 1 samples have one colour (8)" in said and "warning: the samples were drawn from the raw" in said
    save_folder(evaluation_place / "jpegs", pixels(20, size=32), "jpg")
    said = evaluate("jpegs", "--reference", "reference.npz", "--metrics", "fid")
    assert "warning: 20 of the samples are JPEG files, whose compression changes the features" in said
    assert "warning: the reference has 16 x 16 pixels, the samples have 32 x 32" in said
    said = evaluate("jpegs", "--reference", "reference.npz", "--metrics", "fid", "--crop", 16)
    assert "JPEG" not in said and "the reference has" not in said
    warnings = json.loads((evaluation_place / "jpegs.metrics.json").read_text())["warnings"]
    assert all(f"warning: {line}" in said for line in warnings)
    assert "the samples were brought to 16 x 16 pixels before they were compared" in warnings


@pytest.fixture
def mistake(evaluation_place, error_of):
    """One line of complaint of evaluate.py, called with words."""
    return lambda words: error_of("evaluate", *words.split())


@pytest.mark.parametrize(
    "command, words",
    [
        ("--reference reference.npz", "the following arguments are required: SAMPLES"),
        ("samples.npz", "--reference is missing"),
        ("nowhere/x.npz --reference reference.npz", "nowhere/x.npz does not exist"),
        ("tiny.bin --reference reference.npz", "SAMPLES tiny.bin is not a folder, an archive (.zip, .tar)"),
        ("empty --reference reference.npz", "SAMPLES empty has no images (.jpg"),
        (f"{MAKE} out.txt --image-size 16", "reference: error: out.txt does not end in .npz\n"),
        (f"{MAKE} out.npz --image-size 8", "has images of 16 x 16 pixels, not --image-size"),
        (f"{MAKE} no/out.npz --image-size 16", "no/out.npz: there is no such folder"),
        (f"{MAKE} empty.npz --image-size 16", "empty.npz is a folder: name a file"),
        (f"{COMPARE} --metrics psnr", "invalid choice: 'psnr'"),
        (f"{COMPARE} --crop 8 --resize 8", "--crop and --resize exclude each other"),
        (f"{COMPARE} --crop 8", "--crop and --resize do not apply to .npz"),
        (f"{COMPARE} --dinov2 vit.pth", "--dinov2: no features of dinov2 are wanted: leave it out, or ask for some"),
        (f"{COMPARE} --metrics fid --pr-precision float32", "--pr-precision float32 applies to precision and recall"),
        (f"{COMPARE} --inception nowhere.pth", "--inception nowhere.pth does not exist"),
        (f"{COMPARE} --features dinov2", "no weights of dinov2 (HF_HUB_OFFLINE is set): fetch https://"),
    ],
)
def test_mistaken_commands(mistake, evaluation_place, command, words):
    for name in ("empty", "empty.npz"):
        (evaluation_place / name).mkdir()
    assert words in mistake(command) and not list(evaluation_place.glob("o*"))


POOL = dict(mu=np.zeros(12), sigma=np.eye(12))


@pytest.mark.parametrize(
    "arrays, flags, words",
    [
        (dict(arr_0=pixels(3).transpose(0, 3, 1, 2)), "", "arr_0 is uint8 (3, 3, 16, 16), wanted"),
        (dict(arr_0=pixels(3) / np.float32(255)), "", "arr_0 is float32 (3, 16, 16, 3), wanted uint8"),
        (dict(arr_0=pixels(3)[..., 0]), "", "arr_0 is uint8 (3, 16, 16), wanted"),
        (dict(arr_0=pixels(3)[:0]), "", "arr_0 is uint8 (0, 16, 16, 3), wanted"),
        (dict(arr_0=np.array([{}], object)), "", "bad.npz: arr_0 is not a whole .npy (values of type object)"),
        (dict(arr_0=pixels(1)), "--metrics fid", "--metrics fid needs at least 2 images in each set, and there are 1"),
        # of references alone
        (dict(other=np.zeros(3)), "", "bad.npz has neither arr_0 nor mu and sigma: its keys are other"),
        (dict(mu=np.zeros(12)), "", "bad.npz has mu but no sigma"),
        (dict(mu=np.zeros(64), sigma=np.eye(64), arr_0=pixels(9)), "", "of 64 features, and inception's pool features"),
        (dict(POOL, mu=np.full(12, np.nan)), "", "mu, sigma: the mean or the covariance holds values that are NaN"),
        (dict(POOL, mu=np.zeros(12, complex)), "", "mu has type complex128, wanted real numbers"),
        (dict(POOL, network_sha256="0" * 64), "--metrics fid", "was made with other weights of inception (00000000…)"),
        (POOL, "", "mu, sigma of inception alone, too little for sfid, precision, recall: give --metrics fid is, or"),
        (POOL, "--metrics fid fd_dinov2", "too little for fd_dinov2: give --metrics fid, or a reference with arr_0"),
        (dict(POOL, mu=np.zeros(2**24)), "", "mu inflates from"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_arrays_that_are_none(mistake, arrays, flags, words):
    np.savez_compressed("bad.npz", **arrays)
    if "arr_0" in arrays and "mu" not in arrays:
        assert words in mistake(f"bad.npz --reference reference.npz {flags}")
    assert words in mistake(f"samples.npz --reference bad.npz {flags}")


def test_damaged_files(mistake, evaluation_place):
    whole = (evaluation_place / "samples.npz").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1  # one bit of one image: found at the end, by the checksum
    for content in (whole[: len(whole) // 2], whole[:-30], b"", b"PK\x03\x04 and more", flipped):
        (evaluation_place / "bad.npz").write_bytes(content)
        said = mistake("bad.npz --reference reference.npz")
        assert "bad.npz is not a whole .npz: cut off" in said and ("Bad CRC-32" in said) == (content is flipped)


def test_damaged_folders(mistake, evaluation_place, monkeypatch):
    folder, flags = save_folder(evaluation_place / "set", pixels(5)), "set --reference reference.npz"
    (folder / "samples.json").write_text(json.dumps(record_of(6)))
    assert "set has 5 images, and its samples.json says 6: run the sampling command again" in mistake(flags)
    assert "SAMPLES . is a folder of sets of samples: name one of them, such as set" in mistake(
        flags.replace("set", ".")
    )
    (folder / "samples.json").unlink()
    monkeypatch.setattr(sets, "CHECKED_FIRST", 2)
    Image.fromarray(pixels(1, 20)[0]).save(folder / "000002.png")
    assert "different sizes (000000.png 16 x 16, 000002.png 20 x 20)" in mistake(flags)
    (folder / "000002.png").write_bytes(b"no image")
    assert "000002.png cannot be read" in mistake(flags)
