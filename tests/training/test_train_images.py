"""Training on a folder of images: what it trains on is what extraction would have stored."""

import json
import shutil

import numpy as np
import pytest
import torch
from accelerate import PartialState
from conftest import IMAGE_SIZE, assert_codes, encoder_logits, launch, save_images
from training_runs import metrics, train_command, train_flags

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
    """train(…, processes=N): such a run, ended; gives what it said."""
    return lambda name, *flags, processes=1, check=True, **options: (
        launch(("forked", processes, "train_diffusion.py", *flags_of(name, *flags, **options)), tmp_path, check).stdout
    )


@pytest.mark.slow
@pytest.mark.parametrize("model", ["DiTSEM-Ti/4", "DiTCONT-Ti/4"])
def test_same_losses_as_on_features(model, train, flags_of, error_of, both_data, tmp_path):
    """Begun by one process and continued by two."""
    vectors = np.random.default_rng(0).normal(size=(14, 5)).astype(np.float16)
    np.save(tmp_path / "vectors.npy", vectors)
    flags = ("--max-steps", 5, *(("--condition-path", tmp_path) if model.startswith("DiTCONT") else ()))
    command = train_command(1, both_data / "features", tmp_path / "on_features", "--model", model, *flags)
    launch(command, tmp_path)
    flags += ("--flip", "none")
    said = train("run", *flags, "--max-steps", 3, "--sample-every", 3, model=model)
    assert "data: 14 images of " in said and ", 1.8 steps per epoch" in said
    assert (tmp_path / "run/previews/0000003.png").is_file()
    train("run", *flags, "--grad-accum", 2, "--num-workers", 1, model=model, processes=2)
    one, other = ([line["loss"] for line in metrics(tmp_path / name)] for name in ("run", "on_features"))
    np.testing.assert_allclose(one, other, rtol=1e-4)
    np.save(tmp_path / "vectors.npy", vectors + 1)
    if model.startswith("DiTCONT"):
        line = error_of("train_diffusion", *flags_of("run", *flags, model=model))
        assert "first_vectors_sha256" in line and "--allow-change" in line


def test_flips_are_drawn_anew_in_each_epoch(folder, tiny_models):
    """Of crops and of the views for patch tokens alike, never of those for codes; whatever the processes."""
    images = Images(PartialState(cpu=True), folder, image_size=32, vae=tiny_models[0], encoder=tiny_models[1])
    arrays, seen = dict(labels=images.labels, codes=None, tokens=None), {}
    batches = ImageBatches(images, arrays, seed=0, global_batch=14)
    parts = [ImageBatches(images, arrays, seed=0, global_batch=14, rank=rank, world_size=2) for rank in (0, 1)]
    for epoch in range(4):
        batch, halves = batches[epoch], [part[epoch] for part in parts]
        for name, whole in batch.items():
            assert torch.equal(whole, torch.cat([half[name] for half in halves])), name
        assert torch.equal(batch["tokens"], batch["images"])  # of one size here
        flips = integers(0, Stream.TRAIN_FLIP, batch["indices"], 2).tolist()
        rows = batches.rows(batch["indices"].numpy())
        for row, crop, view, label, flip in zip(rows, batch["images"], batch["codes"], batch["labels"], flips):
            there = np.array(center_crop(load_rgb(images.views.source.path(row)), 32))
            np.testing.assert_array_equal(crop, there[:, ::-1] if flip else there)
            np.testing.assert_array_equal(view, there)
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
    whole, both = encode(crops, dict(labels=places, codes=views))
    assert whole.shape == (8, 8, 8, 8) and not whole.requires_grad and both["labels"] is places
    monkeypatch.setattr("dlc.nets.pixels.ENCODED_AT_ONCE", 3)
    in_parts, codes = encode(crops, views)
    torch.testing.assert_close(in_parts, whole, atol=1e-5, rtol=1e-5)
    for found in (both["codes"], codes):
        assert_codes(found, logits)
    for one, two in zip(encode(crops[:7], views[:7]), (in_parts, codes)):  # which share the parts' size, and the bits
        assert torch.equal(one, two[:7])


@pytest.mark.slow
def test_a_checkpoint_says_what_it_was_trained_on(train, flags_of, error_of, said_by, folder, tiny_models, tmp_path):
    train("codes", "--max-steps", 1)
    checkpoint = tmp_path / "codes/checkpoints/0000001"
    meta = json.loads((checkpoint / "meta.json").read_text())
    compared = meta["compared"]
    assert (meta["data_path"], meta["vae"]) == (str(folder), str(tiny_models[0])) and meta["encoder_sha256"]
    assert (compared["latents"], compared["flip"]) == ("images", "random") and compared["listing_sha256"]
    assert any(f"data_path {folder}" in line for line in info(checkpoint))

    sample = ("sample_ddp_computed_dlc", "--ckpt", checkpoint, "--no-ema", "--num-fid-samples", 2)
    sample += ("--num-sampling-steps", 2)
    assert "name codes with --dlc-dir" in error_of(*sample)
    np.save(tmp_path / "codes.npy", np.zeros((2, 6), int))
    assert "done: 2 images" in said_by(*sample, "--dlc-dir", "codes.npy")

    shutil.copytree(folder, tmp_path / "others")
    (tmp_path / "others/cat/3.png").rename(tmp_path / "others/cat/3b.png")
    line = error_of("train_diffusion", *flags_of("codes", "--max-steps", 2, data=tmp_path / "others"))
    words = "here (the names of the images); give another --results-dir, or --allow-change"
    assert "listing_sha256" in line and words in line
    line = error_of("train_diffusion", *flags_of("codes", "--flip", "none", "--max-steps", 2))
    assert "flip 'random' there, 'none' here" in line


@pytest.mark.slow
def test_an_image_that_cannot_be_read(train, images, tmp_path):
    """What was trained before it is kept."""
    flags = ("--max-steps", 15, "--global-batch-size", 2, "--global-seed", 1, "--num-workers", 1)
    said = train("kept", *flags, data=images, check=False, processes=2)
    words = f"step 6: cannot read '{images}/dog/1_broken.jpg' (UnidentifiedImageError: cannot identify image"
    assert words in said and said.count("error:") == 1 and "Traceback" not in said
    assert [path.name for path in (tmp_path / "kept/checkpoints").iterdir()] == ["0000005"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, flags, message",
    [
        ("DiT-Ti/4", "--encoder x", "--encoder is for DiTSEM models and for --align, not DiT-Ti/4"),
        ("DiTCONT-Ti/4", "", "DiTCONT-Ti/4 is trained on vectors"),
        ("DiTSEM-Ti/4", "--image-size 60", "--image-size 60 is not a multiple of 8"),
        ("DiTSEM-Ti/4", "--image-size 48", "are 6 wide, not a multiple of DiTSEM-Ti/4's patch 4: take DiTSEM-Ti/2"),
        ("DiTSEM-Ti/4", "--image-size 56", "7 wide, not a multiple of DiTSEM-Ti/4's patch 4: take another --im"),
        ("DiTSEM-Ti/4", "--L 7", "L 6 there, 7 here; leave out the flag"),
        ("DiT-Ti/4", "--L 7", "--encoder-backbone describe an --encoder"),
        ("DiTSEM-Ti/4", "--num-classes 3", "--num-classes does not go with --data-path"),
        ("DiTSEM-Ti/4", "--features-path other", "not allowed with argument"),
        ("DiT-Ti/4", "--align repa --align-block 2", "--align with --data-path needs an --encoder"),
    ],
)
def test_flags(model, flags, message, flags_of, error_of, tmp_path):
    assert message in error_of("train_diffusion", *flags_of("x", *flags.split(), model=model))
    assert not (tmp_path / "x").exists()


def test_codes_need_an_encoder(folder, error_of):
    needed = error_of("train_diffusion", "--data-path", folder, "--model", "DiTSEM-Ti/4")
    assert "DiTSEM-Ti/4 is trained on codes: with --data-path it needs an --encoder" in needed
    inside = error_of("train_diffusion", "--data-path", folder, "--results-dir", folder / "results")
    assert "results lies in --data-path" in inside and not (folder / "results").exists()
