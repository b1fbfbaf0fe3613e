"""evaluate.py: numbers, inputs, references, processes. A small network is in Inception's place."""

import json
import re
import zipfile
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_networks
import torch
from conftest import ROOT, launch, refusal
from PIL import Image
from tiny_networks import pixels, record_of, save_folder, tiny_dinov2

from dlc.data.images import center_crop
from dlc.machine.files import DirectoryLock
from dlc.sampling.pictures import write_npz
from evaluation.feature_networks import NETWORKS
from evaluation.metrics import METRICS, FeatureStatistics, Metric, frechet_distance, inception_score, precision_recall
from evaluation.report import write_metrics
from evaluation.sets import open_images

NUMBER = r"-?[\d.]+"


def content_of(name="samples.metrics.json"):
    return json.loads(Path(name).read_text())


def numbers_in(name="samples.metrics.json"):
    return content_of(name)["metrics"]


def by_hand(samples, reference):
    """FID, sFID, IS, precision and recall of arrays of images, in one pass each."""
    network = tiny_networks.TinyInception("tiny.bin", torch.device("cpu"))
    sets = [network(torch.from_numpy(one)) for one in (reference, samples)]
    fid, sfid = (frechet_distance(*(FeatureStatistics.of(one[key]) for one in sets)) for key in ("pool", "spatial"))
    precision, recall = precision_recall(sets[0]["pool"], sets[1]["pool"])
    score = inception_score(network.probabilities(sets[1]["pool"]))
    return dict(fid=fid, sfid=sfid, inception_score=score, precision=precision, recall=recall)


def test_table_file_and_line(evaluate, evaluation_place):
    said = evaluate("samples.npz", "--reference", "reference.npz")
    content = content_of()
    wanted = by_hand(pixels(40), pixels(50, seed=1))
    assert content["metrics"] == pytest.approx(wanted, rel=1e-5)
    for name, key in (("FID", "fid"), ("sFID", "sfid"), ("IS", "inception_score"), ("recall", "recall")):
        assert float(re.search(rf" {name} +({NUMBER})\n", said)[1]) == pytest.approx(wanted[key], abs=1e-4)
    assert re.search(
        rf"to paste: FID {NUMBER}, sFID {NUMBER}, IS {NUMBER}, precision {NUMBER}, recall {NUMBER}: 40 samples of "
        r"16 x 16 against reference.npz \(50 images\); ADM's definitions in PyTorch; inception 0{8}\n",
        said,
    )
    assert content["samples"]["count"] == 40 and content["reference"]["count"] == 50
    assert len(content["samples"]["sha256"]) == 64 != content["reference"]["sha256"]
    assert content["networks"]["inception"]["file"] == str(evaluation_place / "tiny.bin")
    assert content["versions"].keys() >= {"torch", "numpy", "Pillow"} and content["definitions"]["split_size"] == 5000
    # the Inception Score needs no reference
    said = evaluate("samples.npz", "--metrics", "is", "--reference", "nowhere.npz")
    assert numbers_in() == dict(inception_score=content["metrics"]["inception_score"])
    assert set(content_of()["reference"].values()) == {None}
    assert "warning: --reference is not used: no metric compares with it" in said
    assert re.search(rf"to paste: IS {NUMBER}: 40 samples of 16 x 16; ADM's definitions in PyTorch; inception 0", said)


class Colours(tiny_networks.TinyInception):
    name, files, outputs, digest = "colours", ("colours.bin",), dict(pool=3), "c" * 64

    def __init__(self, path, device):
        self.path, self.notes = path, ()

    def __call__(self, images):
        return dict(pool=images.float().mean(dim=(1, 2)))


def test_a_metric_is_a_row_and_so_is_a_network(evaluate, evaluation_place, monkeypatch):
    def largest(pair):
        return dict(largest=float(pair.samples.max()), largest_std=0.25)

    monkeypatch.setitem(METRICS, "largest", Metric("largest feature", 2, "samples", largest, paper="Nobody 2026"))
    monkeypatch.setitem(NETWORKS, "colours", Colours)
    flags = ("--features", "colours", "--colours", "tiny.bin", "--metrics", "largest", "precision")
    said = evaluate("samples.npz", "--reference", "reference.npz", *flags)
    wanted = pixels(40).mean(axis=(1, 2)).max()
    assert numbers_in()["largest"] == pytest.approx(wanted, rel=1e-5)
    assert f"largest feature  {wanted:>12.4f} ± 0.25000\n" in said
    assert f", largest feature {wanted:.2f}: 40 samples" in said
    assert "ADM's definitions in PyTorch, largest feature as in Nobody 2026; colours cccccccc\n" in said
    # the FID is that of Inception, whatever --features says
    said = evaluate("samples.npz", "--reference", "reference.npz", *flags, "fid")
    assert "largest feature as in Nobody 2026, precision and largest feature of colours's features; " in said
    assert numbers_in().keys() == {"fid", "precision", "largest", "largest_std"}
    evaluate("samples.npz", *flags[:-1])  # of the samples alone: it needs no reference
    assert numbers_in() == dict(largest=pytest.approx(wanted, rel=1e-5), largest_std=0.25)


def test_dinov2_beside_inception_and_alone(evaluate, evaluation_place):
    tiny_dinov2(evaluation_place / "vit.pth", depth=1)
    np.savez("few.npz", arr_0=pixels(9))
    common = ("samples.npz", "--reference", "few.npz", "--dinov2", "vit.pth")
    said = evaluate(*common, "--metrics", "fid", "fd_dinov2", "--output", "both.json")
    both = numbers_in("both.json")
    assert both.keys() == {"fid", "fd_dinov2"} and re.search(rf"to paste: FID {NUMBER}, FD-DINOv2 {NUMBER}: 40", said)
    assert "warning: vit.pth is no ViT-L/14, by which FD-DINOv2 is defined" in said
    (evaluation_place / "tiny.bin").unlink()  # Inception is not wanted
    said = evaluate(*common, "--features", "dinov2")
    alone = numbers_in()
    assert alone.keys() == {"fd_dinov2", "precision", "recall"} and alone["fd_dinov2"] == both["fd_dinov2"]
    assert "40 samples are too few for a Frechet distance: the covariance of 64 features" in said
    assert re.search(r"\(9 images\); ADM's .*, FD-DINOv2 as in Stein et al. 2023; dinov2 [0-9a-f]{8}\n", said)


@pytest.mark.slow
def test_processes_give_equal_numbers(evaluation_place, evaluate):
    np.savez("samples.npz", arr_0=pixels(10))
    evaluate("samples.npz", "--reference", "reference.npz")
    flags = ("samples.npz", "--reference", "reference.npz", "--output", "many.json")
    launch(("forked", 3, "tiny_networks.py", *flags), evaluation_place)
    alone, many = content_of(), content_of("many.json")
    assert many["processes"] == 3 and many["samples"] == alone["samples"]
    assert many["metrics"] == pytest.approx(alone["metrics"], rel=1e-9)
    exact = ("inception_score", "precision", "recall")
    assert [many["metrics"][key] for key in exact] == [alone["metrics"][key] for key in exact]


def test_a_folder_is_its_npz(evaluate, evaluation_place):
    """And no statistics are taken out of the samples' .npz, as ADM's evaluator does."""
    save_folder(evaluation_place / "samples/set", pixels(40))
    (evaluation_place / "samples/set/samples.json").write_text(json.dumps(record_of(40)))
    write_npz(evaluation_place / "samples/set.npz", evaluation_place / "samples/set", 40)
    np.savez_compressed(evaluation_place / "packed.npz", arr_0=pixels(40), mu=np.zeros(12), sigma=np.eye(12))
    found, said = [], []
    for path, file in (("samples/set", "samples/set"), ("samples/set.npz", "samples/set"), ("packed.npz", "packed")):
        said.append(evaluate(path, "--reference", "reference.npz", "--metrics", "fid"))
        found.append(content_of(f"{file}.metrics.json"))
        Path(f"{file}.metrics.json").unlink()
    assert found[0]["metrics"] == found[1]["metrics"] == found[2]["metrics"]
    assert len({one["samples"]["sha256"] for one in found}) == 1
    settings = found[0]["samples"]["settings"]
    assert settings == found[1]["samples"]["settings"] and settings["cfg_scale"] == 1.5 and "labels" not in settings
    assert said[0].endswith("; DiTSEM-XL/2, step 7, ema weights, ddpm 250 steps, cfg 1.5, seed 3\n")
    assert found[2]["samples"]["settings"] is None and "cfg 1.5" not in said[2]
    assert "packed.npz: not used: mu, sigma; the numbers are those of arr_0" in said[2]


def test_image_folder_with_adms_crop(evaluation_place):
    sizes = [(40, 30), (31, 64), (33, 33), (90, 50)]
    arrays = [np.random.default_rng(i).integers(0, 256, (h, w, 3), dtype=np.uint8) for i, (w, h) in enumerate(sizes)]
    for name, array in zip(("b/1.png", "a/2.png", "b/3.png", "a/deep/0.png"), arrays):
        (evaluation_place / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(evaluation_place / "folder" / name)
    found = open_images(evaluation_place / "folder", "--reference", crop=16)
    batches = list(found.batches(0, found.count, 3))
    assert found.size == (16, 16) and [len(batch) for batch in batches] == [3, 1]
    ordered = [arrays[1], arrays[3], arrays[0], arrays[2]]
    wanted = np.stack([np.asarray(center_crop(Image.fromarray(array), 16)) for array in ordered])
    assert (np.concatenate(batches) == wanted).all()
    resized = np.concatenate(list(open_images(evaluation_place / "folder", "--reference", resize=8).batches(0, 4, 4)))
    wanted = [np.asarray(Image.fromarray(array).resize((8, 8), Image.Resampling.BICUBIC)) for array in ordered]
    assert (resized == np.stack(wanted)).all()
    refusal(
        open_images, evaluation_place / "folder", "--reference", words="sizes .*33 x 33, b/1.png 40 x 30.: give --c"
    )


def test_any_part_of_a_set(evaluation_place, monkeypatch):
    """Also a part in the midst. An .npz is streamed: no read is larger than a batch."""
    array = pixels(150, 64, seed=4)
    np.savez_compressed("packed.npz", labels=np.arange(150), arr_0=array)
    save_folder(evaluation_place / "folder", array)
    largest, read = [], zipfile.ZipExtFile.read
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda stream, n=-1: largest.append(n) or read(stream, n))
    for name in ("packed.npz", "folder"):
        one = open_images(name, "SAMPLES")
        assert (np.concatenate(list(one.batches(11, 25, 6))) == array[11:25]).all()
        for indices in ([], [3, 63, 64, 149]):
            found = list(one.chosen(indices))
            assert len(found) == len(indices) and all(np.array_equal(*pair) for pair in zip(found, array[indices]))
    assert 0 < max(largest) < array.nbytes and min(largest) > 0


def test_make_reference_and_every_metric(evaluate, evaluation_place):
    flags = ("samples.npz", "--reference")
    evaluate(*flags, "reference.npz")
    direct = numbers_in()
    evaluate("make-reference", "reference.npz", "made.npz", "--image-size", 16, "--num-images", 20)
    rows = np.linspace(0, 49, 20).round().astype(int)
    with np.load("made.npz") as made:
        shapes = {key: made[key].shape for key in made.files if made[key].dtype == np.float64}
        assert shapes == dict(mu=(12,), sigma=(12, 12), mu_s=(6,), sigma_s=(6, 6)) and int(made["count"]) == 50
        assert (made["arr_0"] == pixels(50, seed=1)[rows]).all() and made["arr_0"].dtype == np.uint8
        keys = set(made.files)
    metrics = ("--metrics", *(one for one in METRICS if one != "fd_dinov2"), "--output", "more.json")
    said, content = evaluate(*flags, "made.npz", *metrics), content_of("more.json")
    wanted = {**by_hand(pixels(40), pixels(50, seed=1)[rows]), "fid": direct["fid"], "sfid": direct["sfid"]}
    assert {key: content["metrics"][key] for key in wanted} == pytest.approx(wanted, rel=1e-6)
    assert content["metrics"].keys() > {"kid", "density", "coverage"}
    assert re.search(rf"KID +{NUMBER}\n", said) and "kid_std" not in content["metrics"]  # one subset holds all images
    assert "against made.npz (its stored statistics of 50 images and 20 images)" in said
    assert "PyTorch, KID as in Binkowski et al. 2018, density and coverage as in Naeem et al. 2020; inception 0" in said
    assert "warning: 40 samples: published numbers use 50,000, and fewer give a larger distance\n" in said
    keys |= {key for part in ("metrics", "samples", "reference", "definitions") for key in content[part]}
    text = (ROOT / "docs/formats.md").read_text()
    described = set(re.findall(r"`(\w+)`", text[text.index("### SAMPLES.metrics.json") :]))
    assert keys | content.keys() | content["networks"]["inception"].keys() <= described
    evaluate("make-reference", "reference.npz", "alone.npz", "--image-size", 16, "--num-images", 0)
    said = evaluate(*flags, "alone.npz", "--metrics", "fid")
    assert "(its stored statistics of 50 images)" in said and numbers_in()["fid"] == pytest.approx(direct["fid"])


def test_two_evaluations_that_end_at_once_keep_both_numbers(tmp_path):
    """The second one reads what is there once the first has written."""
    samples = SimpleNamespace(record=None, path=tmp_path / "samples.npz", count=2, size=(8, 8))
    path, of_images = tmp_path / "samples.metrics.json", SimpleNamespace(digest="0", twins=())
    first = DirectoryLock(tmp_path, f".{path.name}.lock")
    first.acquire()
    second = Thread(target=write_metrics, args=(path, samples, of_images, dict(agreement=1)))
    second.start()
    second.join(0.2)
    assert not path.exists()
    path.write_text(json.dumps(dict(samples=dict(sha256="0"), fid=1)))
    first.release()
    second.join()
    assert content_of(path).keys() >= {"fid", "agreement"}
    assert [one.name for one in tmp_path.iterdir()] == [path.name]  # and no lock
