"""Mistakes at training: one line on standard error that names them, and exit status 2, before any work."""

import shutil

import numpy as np
import pytest
from conftest import IMAGE_SIZE, V, change_json

from dlc.data import kind_dir

pytestmark = pytest.mark.slow


@pytest.fixture
def mistake(error_of, features, tmp_path):
    """mistake(flags…, path=…): the line by which a run on features is refused, of which nothing is left."""

    def call(*flags, path=features):
        error = error_of("train_diffusion", "--model", "DiTSEM-Ti/4", "--features-path", path, *flags)
        assert not (tmp_path / "results/checkpoints").exists()
        return error

    return call


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--model DiTCONT-S/2", "DiTCONT-S/2 is trained on vectors: give --condition-path"),
        ("--global-batch-size 0", "argument --global-batch-size: 0: must be at least 1"),
        ("--vae ema --sample-every 0", "--vae decodes previews"),
        ("--features-path nowhere", "features path nowhere does not exist"),
        ("--features-path .", "has no features"),
        ("--model DiT-Ti/4 --code-init dlc", "--code-init dlc is for DiTSEM models, not DiT-Ti/4"),
        ("--time-scale 1000", "--time-scale 1000.0 goes with --objective flow, not ddpm"),
        ("--holdout 0.1 --heldout-path .", "--holdout does not go with --heldout-path"),
        ("--eval-samples 1", "--eval-samples 1: a Frechet distance needs at least 2 samples"),
        ("--eval-every 5", "--eval-every measures on what is held out, but --holdout is 0"),
        ("--train-only head", "--train-only goes with --intermediate-head"),
        ("--intermediate-head 6", "an intermediate head lies after block 1 to 5, not 6"),
        ("--align-weight 0.5", "--align-weight goes with --align"),
        ("--align-until 5", "--align-until goes with --align"),
        ("--align repa", "--align-block 8: DiTSEM-Ti/4 has 6 blocks"),
        ("--align repa --align-block 2", "holds no patch tokens: extract with --store-tokens"),
        (
            "--align repa --align-block 2 --intermediate-head 2 --train-only head --pretrained-path x",
            "--align trains the blocks, which --train-only head leaves as they are",
        ),
        *((f"{flag} 64", f"{flag} goes with --data-path") for flag in ("--image-size", "--encoder", "--L")),
    ],
)
def test_flags(mistake, flags, message):
    assert message in mistake(*flags.split())


def test_features_that_are_not_whole_or_do_not_fit(mistake, features, tmp_path):
    copy = shutil.copytree(features, tmp_path / "copy")
    for model, kind, value in (("DiTSEM-Ti/2", "sem", V), ("DiT-Ti/2", "labels", 2)):
        path = kind_dir(copy, IMAGE_SIZE, kind) / "000002.npy"
        array = np.load(path)
        array[1] = value
        np.save(path, array)
        message = f"imagenet64_{kind}/000002.npy, row 1: value {value} outside 0..{value - 1}"
        assert message in mistake("--model", model, path=copy)
    assert "000002.npy, row 1: value" in mistake("--heldout-path", copy)
    change_json(copy / "manifest.json", vae_sha256="f" * 64)
    assert "does not fit --features-path: vae_sha256" in mistake("--heldout-path", copy)
    (copy / "manifest.json").unlink()
    assert "half-written" in mistake(path=copy)


def test_vectors_to_train_on(mistake, tmp_path):
    (tmp_path / "vectors").mkdir()
    with_nan = np.where(np.arange(14)[:, None] == 9, np.nan, np.zeros((14, 3)))
    for vectors, message in (
        (with_nan, "0.npy, row 9: values that are not finite"),
        (np.zeros((14, 3), int), "0.npy has values of type int64, wanted floats"),
        (np.zeros((13, 3)), "has 13 rows, the data 14"),
    ):
        np.save(tmp_path / "vectors/0.npy", vectors)
        assert message in mistake("--model", "DiTCONT-Ti/2", "--condition-path", tmp_path / "vectors")


@pytest.mark.parametrize("name", ["args.json", "log.txt", "best/mine/kept"])
def test_results_of_another_program(name, mistake, tmp_path):
    file = tmp_path / "results" / name
    file.parent.mkdir(parents=True)
    file.write_text('{"lr": 1}')
    assert f"results holds {name.partition('/')[0]} of another program: give another --results" in mistake()
    assert file.read_text() == '{"lr": 1}'


def test_results_in_a_folder_that_is_read_or_another_commands(mistake, features, tmp_path):
    assert "is read by this command" in mistake("--results-dir", features)
    for name, what in (("manifest.json", "features"), ("codes.json", "a prior's codes"), ("samples.json", "samples")):
        (tmp_path / name).write_text("{}")
        assert f"{tmp_path} holds {what} ({name}): name another folder" in mistake("--results-dir", tmp_path)
        (tmp_path / name).unlink()
