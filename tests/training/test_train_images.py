"""Training on a folder of images: what it trains on is what extraction would have stored."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from accelerate import PartialState
from conftest import IMAGE_SIZE, assert_codes, encoder_logits, launch, save_images
from forked import Run
from training_runs import metrics, same_run, train_command, train_flags

from dlc.data.images import center_crop, load_rgb
from dlc.machine.noise import Stream, integers
from dlc.nets.pixels import PixelEncoder
from dlc.training.image_batches import ImageBatches, Images
from dlc.weights.info import info


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """14 images in 2 classes, all of them readable."""
    save_images(path := tmp_path_factory.mktemp("images"))
    return path


@pytest.fixture
def flags_of(folder, tiny_models, tmp_path):
    """flags_of(name, flags…, model=…, data=…): of a run on the folder into that one of tmp_path."""

    def flags(name, *more, model="DiTSEM-Ti/4", data=folder):
        images = ("--data-path", data, "--image-size", IMAGE_SIZE, "--vae", tiny_models[0])
        encoder = ("--encoder", tiny_models[1]) if model.startswith("DiTSEM") else ()
        return train_flags(None, tmp_path / name, "--model", model, *images, *more, *encoder)

    return flags


@pytest.fixture
def train(flags_of, tmp_path):
    """train(…, processes=N): such a run, ended well or, with fails=True, not; gives what it said."""

    def run(name, *flags, processes=1, fails=False, **options):
        process = Run("train_diffusion", flags_of(name, *flags, **options), tmp_path / f"{name}.txt", processes)
        assert process.wait() != fails, process.said()
        assert "Traceback" not in process.said()
        return process.said()

    return run


def losses(run):
    return [line["loss"] for line in metrics(run)]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["DiTSEM-Ti/4", "DiT-Ti/4", "DiTCONT-Ti/4"])
def test_same_losses_as_on_features(model, train, both_data, tmp_path):
    np.save(tmp_path / "vectors.npy", np.random.default_rng(0).normal(size=(14, 5)).astype(np.float32))
    conditions = ("--condition-path", tmp_path) if model.startswith("DiTCONT") else ()
    flags = ("--model", model, "--max-steps", 5, *conditions)
    launch(train_command(1, both_data / "features", tmp_path / "on_features", *flags), tmp_path)
    flags = ("--flip", "none", "--max-steps", 5, *conditions)
    said = train("one", *flags, model=model)
    assert "data: 14 images of " in said and ", 1.8 steps per epoch" in said
    np.testing.assert_allclose(losses(tmp_path / "one"), losses(tmp_path / "on_features"), rtol=1e-4)
    if model != "DiTSEM-Ti/4":
        return
    train("two", *flags, "--grad-accum", 2, "--num-workers", 1, processes=2)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "on_features"), rtol=1e-4)
    train("stopped", *flags, "--max-steps", 3, "--sample-every", 3)
    train("stopped", *flags)
    assert same_run(tmp_path / "one", tmp_path / "stopped", 5)
    assert (tmp_path / "stopped/previews/0000003.png").is_file()


def test_flips_are_drawn_anew_in_each_epoch(folder, tiny_models):
    images = Images(PartialState(cpu=True), folder, image_size=IMAGE_SIZE, vae=tiny_models[0])
    labels = dict(labels=images.labels)
    batches = ImageBatches(images, labels, seed=0, global_batch=14)
    parts = [ImageBatches(images, labels, seed=0, global_batch=14, rank=rank, world_size=2) for rank in (0, 1)]
    seen = {}
    for epoch in range(4):
        batch, halves = batches[epoch], [part[epoch] for part in parts]
        for name, whole in batch.items():
            assert torch.equal(whole, torch.cat([half[name] for half in halves])), name
        flips = integers(0, Stream.TRAIN_FLIP, batch["indices"], 2).tolist()
        rows = batches.rows(batch["indices"].numpy())
        for row, crop, label, flip in zip(rows, batch["images"], batch["labels"], flips):
            there = np.array(center_crop(load_rgb(images.views.source.path(row)), IMAGE_SIZE))
            np.testing.assert_array_equal(crop, there[:, ::-1] if flip else there)
            assert label == row // 7
            seen.setdefault(row, set()).add(flip)
    assert sum(flips == {0, 1} for flips in seen.values()) > 7


def test_encoded_in_parts(folder, tiny_models, monkeypatch):
    """Which bounds the memory, and changes nothing but the rounding."""
    images = Images(PartialState(cpu=True), folder, image_size=IMAGE_SIZE, vae=tiny_models[0], encoder=tiny_models[1])
    batches = ImageBatches(images, dict(codes=None), seed=0, global_batch=8)
    places, crops, views = (batches[0][name] for name in ("indices", "images", "codes"))
    logits = encoder_logits(tiny_models[1], [images.views.source.path(row) for row in batches.rows(places.numpy())])
    encode = PixelEncoder(images.vae, images.encoder, torch.device("cpu"))
    moments, codes = encode(crops, views)
    assert moments.shape == (8, 8, 8, 8) and codes.shape == (8, 6) and not moments.requires_grad
    assert_codes(codes, logits)
    both = encode(crops, dict(labels=places, codes=views))[1]
    assert torch.equal(both["codes"], codes) and both["labels"] is places
    monkeypatch.setattr("dlc.nets.pixels.ENCODED_AT_ONCE", 3)
    sizes, encode_batch = [], encode.vae.encode
    monkeypatch.setattr(encode.vae, "encode", lambda batch: sizes.append(len(batch)) or encode_batch(batch))
    in_parts, codes = encode(crops, views)
    torch.testing.assert_close(in_parts, moments, atol=1e-5, rtol=1e-5)
    assert_codes(codes, logits)
    assert sizes == [3, 3, 3]  # of 8 images
    for n in (7, 9):  # which share the parts' size, and so the bits
        more = torch.cat([crops, crops])[:n], torch.cat([views, views])[:n]
        for one, two in zip(encode(*more), (in_parts, codes)):
            assert torch.equal(one[:8], two[:n])


@pytest.mark.slow
def test_a_checkpoint_says_what_it_was_trained_on(train, flags_of, error_of, folder, tiny_models, tmp_path):
    train("labels", "--max-steps", 1, model="DiT-Ti/4")
    train("codes", "--max-steps", 1)
    meta = json.loads((tmp_path / "codes/checkpoints/0000001/meta.json").read_text())
    compared = meta["compared"]
    assert (meta["data_path"], meta["vae"]) == (str(folder), str(tiny_models[0])) and meta["encoder_sha256"]
    assert (compared["latents"], compared["flip"]) == ("images", "random") and compared["listing_sha256"]
    assert any(f"data_path {folder}" in line for line in info(tmp_path / "codes/checkpoints/0000001"))

    def sample(script, model, run, *flags):
        flags = ("--model", model, "--results-dir", run, "--num-fid-samples", 2, "--num-sampling-steps", 2, *flags)
        return launch(("forked", 1, script, *flags), tmp_path, check=False).stdout

    assert "done: 2 images" in sample("sample_ddp.py", "DiT-Ti/4", "labels")
    assert "name codes with --dlc-dir" in sample("sample_ddp_computed_dlc.py", "DiTSEM-Ti/4", "codes")
    np.save(tmp_path / "codes.npy", np.zeros((2, 6), int))
    said = sample("sample_ddp_computed_dlc.py", "DiTSEM-Ti/4", "codes", "--dlc-dir", "codes.npy")
    assert "done: 2 images" in said

    shutil.copytree(folder, tmp_path / "others")
    (tmp_path / "others/cat/3.png").rename(tmp_path / "others/cat/3b.png")
    line = error_of("train_diffusion", *flags_of("codes", "--max-steps", 2, data=tmp_path / "others"))
    assert (
        "listing_sha256" in line
        and "here (the names of the images); give another --results-dir, or --allow-change" in line
    )
    line = error_of("train_diffusion", *flags_of("codes", "--flip", "none", "--max-steps", 2))
    assert "flip 'random' there, 'none' here" in line
    assert "steps 1 to 2" in train("codes", "--max-steps", 2, "--allow-change", data=tmp_path / "others")


@pytest.mark.slow
def test_an_image_that_cannot_be_read(train, images, tmp_path):
    for processes in (1, 2):  # what was trained before it is kept
        flags = ("--max-steps", 15, "--global-batch-size", processes, "--global-seed", 1)
        flags += ("--num-workers", processes - 1)
        said = train(f"kept{processes}", *flags, data=images, fails=True, processes=processes)
        assert f"cannot read '{images}/dog/1_broken.jpg' (UnidentifiedImageError: cannot identify image" in said
        step = int(re.search(r"step (\d+): cannot read", said)[1])
        assert step == 1 + 10 // processes and said.count("error:") == 1
        kept = [path.name for path in (tmp_path / f"kept{processes}/checkpoints").iterdir()]
        assert kept == [f"{step - 1:07d}"]
    broken = shutil.copytree(images, tmp_path / "broken")
    (broken / "cat/2.png").write_text("not an image either")
    said = train("both", "--max-steps", 1, "--global-batch-size", 15, data=broken, fails=True)
    assert "1_broken.jpg' (" in said and said.count("error:") == 1  # the others may be cut off


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, flags, message",
    [
        ("DiT-Ti/4", ("--encoder", "x"), "--encoder is for DiTSEM models and for --align, not DiT-Ti/4"),
        ("DiTCONT-Ti/4", (), "DiTCONT-Ti/4 is trained on vectors"),
        ("DiTSEM-Ti/4", ("--image-size", 60), "--image-size 60 is not a multiple of 8"),
        (
            "DiTSEM-Ti/4",
            ("--image-size", 48),
            "are 6 wide, not a multiple of DiTSEM-Ti/4's patch 4: take DiTSEM-Ti/2 or a",
        ),
        ("DiTSEM-Ti/4", ("--image-size", 56), "are 7 wide, not a multiple of DiTSEM-Ti/4's patch 4: take another --im"),
        ("DiTSEM-Ti/4", ("--L", 7), "L 6 there, 7 here; leave out the flag"),
        ("DiT-Ti/4", ("--L", 7), "--encoder-backbone describe an --encoder"),
        ("DiTSEM-Ti/4", ("--num-classes", 3), "--num-classes does not go with --data-path"),
        ("DiTSEM-Ti/4", ("--features-path", "other"), "not allowed with argument"),
    ],
)
def test_flags(model, flags, message, flags_of, error_of, tmp_path):
    assert message in error_of("train_diffusion", *flags_of("x", *flags, model=model))
    assert not (tmp_path / "x").exists()


def test_codes_need_an_encoder(folder, error_of):
    needed = error_of("train_diffusion", "--data-path", folder, "--model", "DiTSEM-Ti/4")
    assert "DiTSEM-Ti/4 is trained on codes: with --data-path it needs an --encoder" in needed
    inside = error_of("train_diffusion", "--data-path", folder, "--results-dir", folder / "results")
    assert "results lies in --data-path" in inside and not (folder / "results").exists()
