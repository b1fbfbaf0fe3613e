"""Mistakes at sampling: one line on standard error that names them, and exit status 2, before any work."""

import re
import shutil

import numpy as np
import pytest
from conftest import IMAGE_SIZE, L, V, save_checkpoint

from dlc.data import kind_dir

pytestmark = pytest.mark.slow


@pytest.fixture
def sample_error(error_of, features, tiny_models, tmp_path):
    checkpoint = save_checkpoint(tmp_path / "results/checkpoints/0000001", vae=tiny_models[0], features_path=features)

    def call(*flags, ckpt=checkpoint, script="sample_ddp_computed_dlc"):
        error = error_of(script, "--model", "DiTSEM-Ti/4", "--ckpt", ckpt, *flags)
        assert not (tmp_path / "samples").exists()
        return error

    return call


def test_flags(sample_error, tmp_path):
    vectors = save_checkpoint(tmp_path / "vectors", "DiTCONT-Ti/4", dict(in_dim=3))
    of_vectors = f"--model DiTCONT-Ti/4 --ckpt {vectors}"
    for flags, message in (
        ("--num-fid-samples 0", "argument --num-fid-samples: 0: must be at least 1"),
        ("--cfg-scale nan", "argument --cfg-scale: nan: must be at least 1"),
        ("--num-sampling-steps 1001", "argument --num-sampling-steps: 1001: must be 1 to 1000"),
        ("--eta 0.5", "--eta 0.5: --sampler ddpm has none, ddim has"),
        ("--results-dir elsewhere", "--ckpt names one: give one of them"),
        ("--sampler dpmsolver++ --num-sampling-steps 1000", "--sampler dpmsolver++ has 2 to 999"),
        ("--t-min 500 --t-max 400", "--t-min 500 is above --t-max 400"),
        ("--t-max 1000", "--t-max 1000: DiTSEM-Ti/4 was trained on the process gaussian, whose times are 0 to 999"),
        ("--progressive 8 --num-sampling-steps 4", "--progressive 8: there are 4 steps"),
        ("--image-size 256", "--image-size 256: the checkpoint was trained on 64-pixel images"),
        ("--model DiT-S/2", "not conditioned on codes or vectors: draw from it with sample_ddp.py"),
        ("--condition-path vectors", "--condition-path is for models conditioned on vectors"),
        ("--model DiTSEM-Ti/2", "holds a DiTSEM-Ti/4, not a DiTSEM-Ti/2"),
        ("--ckpt nowhere.pt", "--ckpt nowhere.pt does not exist"),
        ("--dlc-dir nowhere", "code source nowhere does not exist"),
        (of_vectors, "DiTCONT-Ti/4 is conditioned on vectors: name them with --condition-path"),
        (f"{of_vectors} --dlc-dir x", "--dlc-dir is for models conditioned on codes"),
        (f"{of_vectors} --prior-class 1", "--prior-class is for models conditioned on codes"),
        (f"{of_vectors} --condition-path nowhere", "--condition-path nowhere does not exist"),
    ):
        assert message in sample_error(*flags.split()), flags


def test_sources(sample_error, error_of, features, tiny_models, tmp_path):
    other = save_checkpoint(tmp_path / "other", sizes=dict(L=L + 1, V=V))
    words = f"have L={L}, but those of the checkpoint's model have L={L + 1}"
    assert words in sample_error("--dlc-dir", features, ckpt=other)
    assert "does not say which features it was trained on" in sample_error(ckpt=other)
    small = save_checkpoint(tmp_path / "small", sizes=dict(L=L, V=2))
    words = r"imagenet64_sem/0.*npy, row \d: value \d+ outside 0..1"
    assert re.search(words, sample_error("--dlc-dir", kind_dir(features, IMAGE_SIZE, "sem"), ckpt=small))
    stranger = save_checkpoint(tmp_path / "stranger", vae=tiny_models[0], encoder_sha256="0")
    assert "come from another encoder" in sample_error("--dlc-dir", features, ckpt=stranger)
    np.savez(tmp_path / "codes.npz", np.zeros((3, L), int))
    assert "codes.npz is not a readable .npy" in sample_error("--sem-dir", tmp_path / "codes.npz")
    labels = sample_error(script="sample_ddp")
    assert "not conditioned on labels: draw from it with sample_ddp_computed_dlc.py" in labels
    assert "(there are some of DiTSEM-Ti/4)" in error_of("sample_ddp_computed_dlc", "--model", "DiTSEM-S/2")
    shutil.rmtree(tmp_path / "results")
    assert "no checkpoint of DiTSEM-XL/2 under --results-dir results" in error_of("sample_ddp_computed_dlc")
