"""Mistakes at training: one line on standard error that names them, and exit status 2, before any work."""

import re
import shutil

import numpy as np
import pytest
from conftest import IMAGE_SIZE, V

from dlc.data import kind_dir

pytestmark = pytest.mark.slow


def test_features_path(error_of, features, tmp_path):
    assert "features path nowhere does not exist" in error_of("train_diffusion", "--features-path", "nowhere")
    assert "has no features" in error_of("train_diffusion", "--features-path", tmp_path)
    half = tmp_path / "half"
    shutil.copytree(features, half)
    (half / "manifest.json").unlink()
    assert "half-written" in error_of("train_diffusion", "--features-path", half)
    (half / "progress").mkdir()
    assert "half-written" in error_of("train_diffusion", "--features-path", half)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    "model, kind, value, message",
    [
        ("DiTSEM-Ti/2", "sem", V, rf"imagenet64_sem/000002.npy, row 1: value {V} outside 0..{V - 1}"),
        ("DiT-Ti/2", "labels", 2, r"imagenet64_labels/000002.npy, row 1: value 2 outside 0..1"),
    ],
)
def test_values_outside_their_range(error_of, features, tmp_path, model, kind, value, message):
    copy = tmp_path / "copy"
    shutil.copytree(features, copy)
    path = kind_dir(copy, IMAGE_SIZE, kind) / "000002.npy"
    array = np.load(path)
    array[1] = value
    np.save(path, array)
    assert re.search(message, error_of("train_diffusion", "--features-path", copy, "--model", model))


def test_training_flags(error_of, features, tmp_path):
    def error(*flags):
        return error_of("train_diffusion", "--features-path", features, *flags)

    assert "invalid choice: 'DiTSEM-XXL/2'" in error("--model", "DiTSEM-XXL/2")
    assert "DiTCONT-S/2 is trained on vectors: give --condition-path" in error("--model", "DiTCONT-S/2")
    assert "argument --global-batch-size: 0: must be at least 1" in error("--global-batch-size", 0)
    assert "argument --lr: -1: must be at least 0" in error("--lr", "-1")
    (tmp_path / "file").write_text("")
    assert "file" in error("--results-dir", tmp_path / "file", "--model", "DiTSEM-Ti/2")
    assert "--V 7" in error("--V", 7)
    assert "--vae decodes previews" in error("--vae", "ema", "--sample-every", 0)


@pytest.mark.parametrize(
    "vectors, message",
    [
        (np.where(np.arange(14)[:, None] == 9, np.nan, np.zeros((14, 3))), r"0.npy, row 9: values that are not finite"),
        (np.zeros((14, 0)), "0.npy has vectors of no numbers"),
        (np.zeros((14, 3), int), "0.npy has values of type int64, wanted floats"),
        (np.zeros((13, 3)), "has 13 rows, the data 14"),
    ],
    ids=["NaN", "no width", "integers", "rows"],
)
def test_vectors_to_train_on(error_of, features, tmp_path, vectors, message):
    (tmp_path / "vectors").mkdir()
    np.save(tmp_path / "vectors/0.npy", vectors)
    flags = ("--model", "DiTCONT-Ti/2", "--features-path", features, "--condition-path", tmp_path / "vectors")
    assert re.search(message, error_of("train_diffusion", *flags))
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("name", ["args.json", "log.txt", "loss.png", "best/mine/kept", "previews/0000001.png"])
def test_results_of_another_program(name, error_of, features, tmp_path):
    file = tmp_path / "results" / name
    file.parent.mkdir(parents=True)
    file.write_text('{"lr": 1}')
    flags, first = ("--features-path", features, "--model", "DiTSEM-Ti/2"), name.partition("/")[0]
    assert f"results holds {first} of another program: give another --results" in error_of("train_diffusion", *flags)
    assert file.read_text() == '{"lr": 1}'


def test_results_in_a_folder_that_is_read_or_another_commands(error_of, features, tmp_path):
    flags = ("--features-path", features, "--model", "DiTSEM-Ti/2", "--results-dir")
    assert "is read by this command" in error_of("train_diffusion", *flags, features)
    for name, what in (("manifest.json", "features"), ("codes.json", "a prior's codes"), ("samples.json", "samples")):
        (tmp_path / name).write_text("{}")
        assert f"{tmp_path} holds {what} ({name}): name another folder" in error_of("train_diffusion", *flags, tmp_path)
        (tmp_path / name).unlink()
