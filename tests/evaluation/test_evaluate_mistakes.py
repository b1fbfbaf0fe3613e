"""evaluate.py: the warnings, and one line for each mistake. A small network is in Inception's place."""

import json
import re
import sys

import numpy as np
import pytest
from PIL import Image
from tiny_networks import pixels, record_of, save_folder

import evaluate
from evaluation import notes, sets
from evaluation.reference import Reference


def counted(samples, width=2048, reference=None, count=10_000, metrics=("fid",)):
    stored = Reference("r.npz", statistics=dict(pool=None)) if reference is None else reference
    return notes.of_counts(samples, width, stored, count, metrics)


def test_warnings_of_counts():
    assert counted(50_000, metrics=("fid", "precision")) == []
    (line,) = counted(1000)
    assert "1,000 samples are too few for a Frechet distance: the covariance of 2,048 features" in line
    (line,) = counted(10_000)
    assert line == "10,000 samples: published numbers use 50,000, and fewer give a larger distance"
    assert counted(1000, width=0, metrics=("is",)) == ["1,000 samples: published numbers use 50,000"]
    assert counted(50_000, width=0, reference=Reference("r.npz"), metrics=("kid",)) == []
    (line,) = counted(50_000, reference=Reference("r.npz"))
    assert "the reference is 10,000 images of r.npz and the samples are 50,000" in line and "mu and sigma" in line
    (line,) = counted(50_000, count=1000, metrics=("fid", "recall"))
    assert line == "recall: 1,000 reference images; published numbers use 10,000"


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(), None),
        (dict(cfg_channels=3), "guides? 3 latent|covers 3 latent channels.*DiTSEM-XL/2 guide all of them"),
        (dict(model="DiT-XL/2"), r"covers 4 latent channels.*DiT-XL/2 guide 3 \(--cfg-channels 3\)"),
        (dict(model="DiT-XL/2", cfg_channels=3), None),
        (dict(model="DiT-XL/2", cfg_scale=1), None),
        (dict(weights="raw"), "raw weights: published ones from the EMA weights"),
        (dict(weights="as in the file"), "does not say whether the weights are the EMA weights"),
        (dict(model="unheard of", cfg_scale="much"), None),
        (dict(model=[{}], cfg_scale=[], cfg_channels=None, weights={}), None),
    ],
)
def test_warnings_of_settings(changes, words):
    lines = notes.of_record(record_of(40, **changes))
    assert len(lines) == bool(words) and (not words or re.search(words, lines[0])), lines


def test_warnings_of_images(evaluate, evaluation_place):
    """JPEG files, twins, one colour, another resolution; and settings of samples.json come through the script."""
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
    assert "warning: the samples were brought to 16 x 16 pixels before they were compared" in said
    warnings = json.loads((evaluation_place / "jpegs.metrics.json").read_text())["warnings"]
    assert all(f"warning: {line}" in said for line in warnings) and len(warnings) >= 2


@pytest.fixture
def mistake(evaluation_place, error_of):
    """One line of complaint of evaluate.py."""
    return lambda *flags: error_of("evaluate", *flags)


def test_mistaken_flags(mistake):
    assert "the following arguments are required: SAMPLES" in mistake("--reference", "reference.npz")
    assert "--reference is missing" in mistake("samples.npz")
    common = ("samples.npz", "--reference", "reference.npz")
    for flags, words in (
        (("--metrics", "psnr"), "invalid choice: 'psnr'"),
        (("--features", "clip"), "invalid choice: 'clip'"),
        (("--crop", 8, "--resize", 8), "--crop and --resize exclude each other"),
        (("--crop", 8), "--crop and --resize are for folders, and neither"),
        (("--output", "no/where.json"), "--output no/where.json: there is no such folder"),
        (("--dinov2", "vit.pth"), "--dinov2: no features of dinov2 are wanted: leave it out, or ask for some"),
        (("--inception", "tiny.bin", "--metrics", "fd_dinov2"), "--inception: no features of inception are wanted"),
        (("--metrics", "fid", "--pr-precision", "float32"), "--pr-precision float32 applies to precision and recall"),
        (("--inception", "nowhere.pth"), "--inception nowhere.pth does not exist"),
        (("--features", "dinov2"), "no weights of dinov2 (HF_HUB_OFFLINE is set): fetch https://"),
    ):
        assert words in mistake(*common, *flags)
    assert "nowhere/x.npz does not exist" in mistake("nowhere/x.npz", *common[1:])


@pytest.mark.parametrize(
    "arrays, words",
    [
        (dict(images=pixels(3)), "bad.npz has no arr_0, which holds the images: its keys are images"),
        (dict(arr_0=pixels(3).transpose(0, 3, 1, 2)), r"channels first, shape \(3, 3, 16, 16\).*transpose it"),
        (dict(arr_0=pixels(3) / np.float32(255)), r"arr_0 is float32, wanted uint8 \(N, H, W, 3\), values 0 to 255"),
        (dict(arr_0=pixels(3)[..., 0]), r"arr_0 is grey, shape \(3, 16, 16\).*repeat the channel"),
        (dict(arr_0=pixels(3)[..., :1]), r"arr_0 is grey, shape \(3, 16, 16, 1\)"),
        (dict(arr_0=pixels(3)[:0]), r"arr_0 is empty, shape \(0, 16, 16, 3\)"),
        (dict(arr_0=np.array([{}], object)), "bad.npz: arr_0 is of pickled objects"),
        (dict(arr_0=np.zeros(5, np.uint8)), r"arr_0 has shape \(5,\)"),
    ],
)
def test_samples_that_are_none(mistake, arrays, words):
    np.savez("bad.npz", **arrays)
    assert re.search(words, mistake("bad.npz", "--reference", "reference.npz"))
    if "arr_0" in arrays:
        assert re.search(words, mistake("samples.npz", "--reference", "bad.npz"))


def test_files_and_folders_that_are_none(mistake, evaluation_place):
    whole = (evaluation_place / "samples.npz").read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-30], b"", b"PK\x03\x04 and more"):
        (evaluation_place / "bad.npz").write_bytes(content)
        assert re.search("bad.npz is not a whole .npz: cut off", mistake("bad.npz", "--reference", "reference.npz"))
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1  # one bit of one image: found at the end, by the checksum
    (evaluation_place / "bad.npz").write_bytes(damaged)
    assert "bad.npz is not a whole .npz: cut off or damaged (Bad CRC-32" in mistake(
        "bad.npz", "--reference", "reference.npz"
    )
    assert "nowhere.npz does not exist" in mistake("nowhere.npz", "--reference", "reference.npz")
    assert "SAMPLES tiny.bin is neither an .npz nor a folder" in mistake("tiny.bin", "--reference", "reference.npz")
    (evaluation_place / "empty").mkdir()
    assert "no images: SAMPLES folder empty has no class folders" in mistake("empty", "--reference", "reference.npz")
    save_folder(evaluation_place / "set", pixels(5))
    (evaluation_place / "set/samples.json").write_text(json.dumps(record_of(6)))
    assert "set has 5 images, and its samples.json says 6: run the sampling command again" in mistake(
        "set", "--reference", "reference.npz"
    )
    (evaluation_place / "set/samples.json").unlink()
    (evaluation_place / "set/000002.png").write_bytes(b"no image")
    assert "000002.png cannot be read" in mistake("set", "--reference", "reference.npz")


def test_mixed_sizes_beyond_the_first_images(mistake, evaluation_place):
    """More images than are looked at before the work: found when it is read."""
    save_folder(evaluation_place / "set", pixels(100))
    Image.fromarray(pixels(1, 20)[0]).save(evaluation_place / "set/000002.png")
    assert sets.CHECKED_FIRST < 100
    assert "different sizes (000000.png 16 x 16, 000002.png 20 x 20)" in mistake("set", "--reference", "reference.npz")


def test_references_that_are_none(mistake):
    def complain(*flags, **arrays):
        np.savez("bad.npz", **arrays)
        return mistake("samples.npz", "--reference", "bad.npz", *flags)

    assert "bad.npz has neither arr_0 nor mu and sigma: its keys are other" in complain(other=np.zeros(3))
    assert "bad.npz has mu but no sigma" in complain(mu=np.zeros(12))
    assert "statistics of 64 features, and inception's pool features are 12" in complain(
        mu=np.zeros(64), sigma=np.eye(64), arr_0=pixels(9)
    )
    assert "mu, sigma: the mean or the covariance holds values that are NaN" in complain(
        mu=np.full(12, np.nan), sigma=np.eye(12)
    )
    assert "mu has type complex128, wanted real numbers" in complain(mu=np.zeros(12, complex), sigma=np.eye(12))
    statistics = dict(mu=np.zeros(12), sigma=np.eye(12))
    assert "count has shape (2,), wanted ()" in complain(**statistics, count=np.zeros(2))
    assert "network is no text" in complain(**statistics, network=np.zeros(2))
    np.savez_compressed("bomb.npz", mu=np.zeros(2**24), sigma=np.eye(12))
    assert "mu inflates from" in mistake("samples.npz", "--reference", "bomb.npz")
    assert "holds statistics alone, and precision, recall need its images" in complain(
        **statistics, mu_s=np.zeros(6), sigma_s=np.eye(6)
    )
    assert (
        "no images, and no statistics of inception's spatial features: its statistics are inception's pool"
        in complain("--metrics", "sfid", **statistics)
    )
    assert "--metrics precision needs at least 4 images in each set, and there are 3 reference images" in complain(
        arr_0=pixels(3)
    )
    assert "--metrics fid needs at least 2 images in each set, and there are 1 reference images" in complain(
        "--metrics", "fid", arr_0=pixels(1)
    )


def test_make_reference_mistakes(evaluation_place, monkeypatch, capsys):
    def complain(*flags):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "make-reference", *map(str, flags)])
        with pytest.raises(SystemExit) as stopped:
            evaluate.main()
        assert stopped.value.code == 2
        return capsys.readouterr().err

    assert complain("reference.npz", "out.txt", "--image-size", 16) == (
        "evaluate.py make-reference: error: out.txt does not end in .npz\n"
    )
    assert "has images of 16 x 16 pixels, not --image-size" in complain("reference.npz", "out.npz", "--image-size", 8)
    assert "no/out.npz: there is no such folder" in complain("reference.npz", "no/out.npz", "--image-size", 16)
    assert "--dinov2: no features of dinov2" in complain("reference.npz", "o.npz", "--image-size", 16, "--dinov2", "x")
    (evaluation_place / "folder.npz").mkdir()
    assert "folder.npz is a folder: name a file" in complain("reference.npz", "folder.npz", "--image-size", 16)
    assert not list(evaluation_place.glob("o*"))
