"""A flow from training to samples: the same scripts, by the row of its process."""

import json
import shutil

import pytest
from conftest import IMAGE_SIZE, launch, sample_folder
from PIL import Image
from training_runs import alike, metrics, same_run, tensors, train_command

pytestmark = pytest.mark.slow
FLAGS = ("--objective", "flow", "--time-distribution", "lognormal", "--max-steps", 4, "--ckpt-every", 2)


def test_from_training_to_samples(features, tmp_path, error_of):
    whole, part, two = (tmp_path / name for name in ("whole", "part", "two"))
    flags = (*FLAGS, "--sample-every", 4)
    launch(train_command(1, features, whole, *flags), tmp_path)
    config = json.loads((whole / "checkpoints/0000004/config.json").read_text())
    arguments = dict(time_distribution="lognormal", time_mean=0.0, time_std=1.0, time_scale=1.0)
    assert config["process"] == dict(process="flow", arguments=arguments)
    assert config["arguments"]["learn_sigma"] is False
    assert Image.open(whole / "previews/0000004.png").width > 8 * IMAGE_SIZE
    line = metrics(whole)[-1]
    assert "mse" not in line and len(line["loss_by_quarter_of_t"]) == 4 and 1 < line["loss"] < 4

    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints/0000004")
    launch(train_command(1, features, part, *flags), tmp_path)
    assert same_run(whole, part, 4)
    launch(train_command(2, features, two, *FLAGS), tmp_path)
    assert alike(tensors(two / "checkpoints/0000004"), tensors(whole / "checkpoints/0000004"))
    common = ("--features-path", features, "--model", "DiTSEM-Ti/4", "--results-dir", whole, "--global-batch-size", 8)
    for changed, message in (
        (("--objective", "ddpm"), "process 'flow' there, 'gaussian' here"),
        (("--objective", "flow"), "process time_distribution 'lognormal' there, 'uniform' here"),
    ):
        assert message in error_of("train_diffusion", *common, *changed)

    sampling = ("--ckpt", whole, "--no-ema", "--dlc-dir", features, "--num-fid-samples", 3, "--sample-dir", "samples")
    for flags, message in (
        (("--sampler", "ddpm"), "--sampler ddpm does not draw from a model that was trained on the process flow"),
        (("--sampler", "ddim"), "): euler or heun or sde does"),
        (("--eta", 0.5), "--eta 0.5: --sampler euler has none, ddim has"),
        (("--t-max", 430), "--t-max 430: DiTSEM-Ti/4 was trained on the process flow, whose times are 0 to 1"),
    ):
        assert message in error_of("sample_ddp_computed_dlc", *sampling, *flags)
    flags = ("--num-sampling-steps", 3, "--time-shift", 2, "--t-max", 0.7)
    launch(("forked", 1, "sample_ddp_computed_dlc.py", *sampling, *flags), tmp_path)
    record = json.loads((sample_folder(tmp_path / "samples") / "samples.json").read_text())
    known = dict(sampler="euler", num_sampling_steps=3, time_shift=2.0, eta=None, t_min=0, t_max=0.7)
    assert {name: record[name] for name in known} == known
