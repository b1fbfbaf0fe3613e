"""evaluate.py: the warnings, and one line for each mistake. A small network is in Inception's place."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from test_evaluation_networks import tiny_dinov2
from tiny_networks import pixels, record_of, save_folder

import evaluate
from evaluation import comparison, notes, sets
from evaluation.reference import Reference, open_reference

#################################################################################
#                                   Warnings                                    #
#################################################################################


def counted(samples, width=2048, reference=None, count=10_000, metrics=("fid",)):
    stored = Reference("r.npz", statistics=dict(pool=None)) if reference is None else reference
    return notes.of_counts(samples, width, stored, count, metrics)


def test_warnings_of_counts():
    assert counted(50_000, metrics=("fid", "precision")) == []
    (line,) = counted(1000)
    assert "1,000 samples are too few for a Frechet distance: the covariance of 2,048 features" in line
    (line,) = counted(10_000)
    assert line == "10,000 samples: published numbers are of 50,000, and fewer give a larger distance"
    assert counted(1000, width=0, metrics=("is",)) == ["1,000 samples: published numbers are of 50,000"]
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
        (dict(weights="raw"), "raw weights: published ones are of the EMA weights"),
        (dict(weights="as in the file"), "does not say whether the weights are EMA's"),
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
    assert "warning: 1 samples are of one colour (8)" in said and "warning: the samples are of the raw weights" in said
    save_folder(evaluation_place / "jpegs", pixels(20, size=32), "jpg")
    said = evaluate("jpegs", "--reference", "reference.npz", "--metrics", "fid")
    assert "warning: 20 of the samples are JPEG files, whose compression changes the features" in said
    assert "warning: the reference is of 16 x 16 pixels, the samples of 32 x 32" in said
    said = evaluate("jpegs", "--reference", "reference.npz", "--metrics", "fid", "--crop", 16)
    assert "JPEG" not in said and "the reference is of" not in said
    assert "warning: the samples were brought to 16 x 16 pixels before they were compared" in said
    warnings = json.loads((evaluation_place / "jpegs.metrics.json").read_text())["warnings"]
    assert all(f"warning: {line}" in said for line in warnings) and len(warnings) >= 2


def test_samples_sorted_by_class_are_noticed():
    """Made-up certain classes, 10,000 of 100: sorted, the score of the splits falls; shuffled, it does not."""
    classes = np.arange(10_000) % 100
    probs = torch.full((10_000, 100), 0.1 / 99)
    for order, warned in ((np.sort(classes), True), (np.random.default_rng(0).permutation(classes), False)):
        rows = probs.clone()
        rows[torch.arange(10_000), torch.from_numpy(order)] = 0.9
        one = comparison.Comparison.__new__(comparison.Comparison)
        one.metrics, one.needs, one.main, one.networks, one.seed = ("is",), {"probabilities"}, "file", {}, 0
        one.measured = comparison.Measured(0)
        result = one.numbers(comparison.Measured(10_000), rows)
        assert any("sorted by class" in line for line in result.warnings) == warned
        lower = result.values["inception_score"] < 0.9 * result.values["inception_score_shuffled"]
        assert lower == warned


#################################################################################
#                                  Bad input                                    #
#################################################################################


@pytest.fixture
def mistake(evaluation_place, error_of):
    """One line of complaint of evaluate.py."""
    return lambda *flags: error_of("evaluate", *flags)


def test_mistaken_flags(mistake):
    assert "SAMPLES is missing" in mistake("--reference", "reference.npz")
    assert "--reference is missing" in mistake("samples.npz")
    assert "invalid choice: 'psnr'" in mistake("samples.npz", "--metrics", "psnr")
    common = ("samples.npz", "--reference", "reference.npz")
    assert "--crop and --resize exclude each other" in mistake(*common, "--crop", 8, "--resize", 8)
    assert "--crop and --resize are for folders, and neither" in mistake(*common, "--crop", 8)
    assert "--features clip is none of inception, dinov2, and no .npz" in mistake(*common, "--features", "clip")
    assert "--output no/where.json: there is no such folder" in mistake(*common, "--output", "no/where.json")
    assert "--metrics sfid needs spatial features, and --features dinov2 has none" in (
        tiny_dinov2("vit.pth", depth=1)
        and mistake(*common, "--features", "dinov2", "--dinov2", "vit.pth", "--metrics", "sfid")
    )
    for flags, words in (
        (("--dinov2", "vit.pth"), "--dinov2: no features of dinov2 are wanted: leave it out, or ask for some"),
        (("--inception", "tiny.bin", "--metrics", "fd_dinov2"), "--inception: no features of inception are wanted"),
        (("--metrics", "fid", "--pr-precision", "float32"), "--pr-precision float32 is of precision and recall"),
        (("--features", "reference.npz", "--batch-size", 3), "--batch-size is of networks, and --features"),
    ):
        assert words in mistake(*common, *flags)
    assert "nowhere/x.npz does not exist" in mistake("nowhere/x.npz", *common[1:])
    assert "--inception nowhere.pth does not exist" in mistake(*common, "--inception", "nowhere.pth")
    assert "no weights of dinov2 (HF_HUB_OFFLINE is set): fetch https://" in mistake(*common, "--features", "dinov2")


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
    assert "mu is of type complex128, wanted real numbers" in complain(mu=np.zeros(12, complex), sigma=np.eye(12))
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


def test_features_that_are_none(mistake):
    good = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)

    def complain(*flags, **arrays):
        np.savez("features.npz", **arrays)
        return mistake("--features", "features.npz", *flags)

    assert "--features nowhere.npz does not exist" in mistake("--features", "nowhere.npz")
    assert "has no array samples (N, D): its keys are pool" in complain(pool=good)
    assert "has no array reference (M, D): add it, or give --reference" in complain(samples=good)
    bad = good.copy()
    bad[4, 2] = np.nan
    assert "features.npz: samples hold values that are NaN or infinite" in complain(samples=bad, reference=good)
    assert "features.npz: reference are of type int64, wanted floats" in complain(
        samples=good, reference=np.zeros((9, 4), int)
    )
    assert "the features have 3 dimensions in the reference, 4 in the samples" in complain(
        samples=good, reference=good[:, :3]
    )
    assert "probs have rows that do not sum to 1" in complain(samples=good, reference=good, probs=good)
    assert "probs has 3 rows, samples 9" in complain(samples=good, reference=good, probs=np.full((3, 2), 0.5))
    assert "--metrics is needs probabilities, which --features features.npz does not hold" in complain(
        "--metrics", "is", samples=good, reference=good
    )
    assert "--metrics sfid needs spatial, which --features features.npz does not hold" in complain(
        "--metrics", "sfid", samples=good, reference=good, samples_spatial=good
    )
    assert "features.npz is of 9 samples, and SAMPLES are 40" in complain("samples.npz", samples=good, reference=good)


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
    assert "is of 16 x 16 pixels, not --image-size" in complain("reference.npz", "out.npz", "--image-size", 8)
    assert "no/out.npz: there is no such folder" in complain("reference.npz", "no/out.npz", "--image-size", 16)
    assert "--dinov2: no features of dinov2" in complain("reference.npz", "o.npz", "--image-size", 16, "--dinov2", "x")
    (evaluation_place / "folder.npz").mkdir()
    assert "folder.npz is a folder: name a file" in complain("reference.npz", "folder.npz", "--image-size", 16)
    assert not list(evaluation_place.glob("o*"))


def test_open_reference_gives_what_the_file_says(evaluate, evaluation_place):
    evaluate("make-reference", "reference.npz", "made.npz", "--image-size", 16)
    found = open_reference("made.npz")
    assert (found.network, found.count, found.images.count) == ("inception", 50, 50)
    assert found.stored("dinov2") is None and found.stored("inception").dim == 12
    assert found.stored("inception", "spatial").dim == 6 and len(found.statistics_sha256()) == 64
