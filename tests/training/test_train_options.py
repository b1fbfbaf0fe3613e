"""The files of train_options/: each variant, the launch recipes, and the flags they set."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from accelerate.commands.launch import launch_command_parser
from conftest import IMAGE_SIZE, ROOT, launch, refusal
from forked import Run
from training_runs import metrics, train_command

import train_prior
from dlc.machine.processes import asked_precision
from train_diffusion import argument_parser

VARIANTS = sorted(path.stem for path in (ROOT / "train_options").glob("train_*.py"))
RECIPES = sorted(path.name for path in (ROOT / "train_options").glob("*.sh"))


@pytest.fixture(scope="module")
def flags_of(both_data, tiny_models):
    """flags_of(variant, results): what a variant is launched with, on images or on features."""

    def flags(variant, results, *more):
        command = list(train_command(1, both_data / "features", results, "--max-steps", 2, *more)[3:])
        if "images" in options(variant)["reads"]:
            at = command.index("--features-path")
            networks = ("--vae", tiny_models[0], "--encoder", tiny_models[1], "--flip", "none")
            command[at : at + 2] = ["--data-path", both_data / "images", "--image-size", IMAGE_SIZE, *networks]
        if options(variant)["align"]:
            command += ["--align-block", 2]  # of 6
        return list(map(str, command))

    return flags


def options(variant):
    """A variant's options, with what the rest are by default, and whether it reads images or features."""
    args = vars(argument_parser(**importlib.import_module(f"train_options.{variant}").OPTIONS).parse_args([]))
    return dict(args, reads="features" if args["features_path"] else "images")


def test_each_variant_differs_in_one_option():
    every = {name: options(name) for name in VARIANTS}
    names = "amp baseline fast features original repa tf32_disabled"
    assert VARIANTS == [f"train_{name}" for name in names.split()]
    assert every["train_fast"] == dict(vars(argument_parser().parse_args([])), precision="amp", reads="features")
    for name, other, changed in (
        ("baseline", "original", {"checkpoint_activations"}),
        ("amp", "baseline", {"precision"}),
        ("features", "baseline", {"features_path", "reads"}),
        ("repa", "amp", {"align"}),
        ("tf32_disabled", "features", {"tf32"}),
    ):
        one, two = every[f"train_{name}"], every[f"train_{other}"]
        assert one.keys() == two.keys() and {key for key in one if one[key] != two[key]} == changed


@pytest.fixture(scope="module")
def runs(flags_of, tmp_path_factory):
    """Each variant's few steps: what it said, and its losses."""
    root = tmp_path_factory.mktemp("runs")
    said, losses = {}, {}
    for name in VARIANTS:
        run = Run(f"train_options.{name}", flags_of(name, root / name), root / f"{name}.txt")
        assert run.wait(), run.said()
        lines = metrics(root / name)
        said[name], losses[name] = run.said(), [line["loss"] - 0.5 * line.get("align", 0) for line in lines]
        written = json.loads((root / name / "args.json").read_text())
        assert all(written[key] == options(name)[key] for key in ("precision", "tf32", "checkpoint_activations"))
    return said, losses


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains_alike(name, runs):
    """The losses are those of the first, to what 16 bits are worth, and the rounding of images in other batches."""
    said, losses = runs
    precision = {"train_amp": "bf16", "train_fast": "bf16", "train_repa": "bf16"}.get(name, "fp32")
    assert f"precision: {precision}" in said[name]
    assert ("14 images" if options(name)["reads"] == "images" else "14 rows") in said[name]
    np.testing.assert_allclose(losses[name], losses["train_original"], rtol=1e-2 if precision == "bf16" else 1e-4)


@pytest.mark.slow
def test_flags_reach_what_they_are_of(flags_of, tmp_path):
    for flags, said in (
        ((), "compiled: 0 blocks; checkpointing: False; TF32: True, True"),
        (
            ("--compile", "--checkpoint-activations", "--no-tf32"),
            "compiled: 6 blocks; checkpointing: True; TF32: False, False",
        ),
    ):
        flags = ["spying", "train_diffusion", *flags_of("train_fast", tmp_path / str(len(flags)), *flags)]
        run = Run("faulty", flags, tmp_path / "said.txt")
        assert run.wait() and said in run.said(), run.said()


@pytest.mark.slow
def test_launched_by_path(flags_of, monkeypatch, tmp_path):
    monkeypatch.delenv("PYTHONPATH")
    command = ("python", 1, "train_options/train_amp.py", *flags_of("train_amp", tmp_path / "run"))
    result = launch(command, tmp_path)
    assert "precision: bf16" in result.stdout and len(metrics(tmp_path / "run")) == 2


def test_precisions(monkeypatch):
    for launchers, flag, wanted in (
        ("no", None, "fp32"),
        ("no", "fp32", "fp32"),
        ("no", "amp", "bf16"),
        ("no", "fp16", "fp16"),
        ("fp16", None, "fp16"),
        ("fp16", "amp", "fp16"),
        ("bf16", "bf16", "bf16"),
    ):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launchers)
        assert asked_precision(flag) == wanted
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    refusal(asked_precision, "amp", words="--mixed_precision fp8: this trains in fp16, bf16")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    assert asked_precision("amp") == "bf16" and asked_precision() == "fp32"


@pytest.mark.parametrize(
    "variant, launchers, message",
    [
        ("train_baseline", "fp16", "the launcher's --mixed_precision fp16 contradicts --precision fp32"),
        ("train_amp", "no", "this trains on images: give --data-path"),
    ],
)
def test_what_contradicts_a_variant(variant, launchers, message, tmp_path, monkeypatch, call):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launchers)
    monkeypatch.chdir(tmp_path)
    status, _, error = call(f"train_options.{variant}")
    assert status == 2 and message in error and error.count("\n") == 1 and not any(tmp_path.iterdir())


# ---------------------------------------------------------------------- recipes


def stand_in(folder, name, text):
    """A program of that name."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
    (folder / name).chmod(0o755)


def run_recipe(name, programs, *flags, **variables):
    """Run a recipe with these programs before all others, from the root."""
    path = f"{programs}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    slurm = dict(SLURM_JOB_NODELIST="here", SLURM_NTASKS="2", SLURM_NTASKS_PER_NODE="2", SLURM_CPUS_PER_TASK="1")
    return subprocess.run(
        ["bash", ROOT / "train_options" / name, *map(str, flags)],
        cwd=ROOT,
        text=True,
        timeout=300,
        env={**os.environ, **slurm, "PATH": path, **variables},
        capture_output=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_recipes_give_flags_that_exist(name, tmp_path):
    text = (ROOT / "train_options" / name).read_text()
    assert subprocess.run(["bash", "-n", ROOT / "train_options" / name]).returncode == 0
    assert "What it should reach: " in text
    assert "Source: " in text and "In how long: " in text or "as dlc512_4gpu.sh" in text
    stand_in(tmp_path, "scontrol", "echo 127.0.0.1")
    asked = '[ "$1 $2" = "--cpus-per-task=1 --kill-on-bad-exit=1" ] && shift 2'
    stand_in(tmp_path, "srun", f'{asked}\nSLURM_PROCID=0 SLURM_LOCALID=0 exec "$@"')
    for program in ("accelerate", "python"):
        stand_in(tmp_path, program, 'printf "%s\\n" "$@"')
    result = run_recipe(name, tmp_path, "--max-steps", 5)
    assert result.returncode == 0, result.stderr
    words = result.stdout.splitlines()
    if words[0] == "launch":
        launched = launch_command_parser().parse_args(words[1:])
        sharded = (launched.config_file or "").endswith("train_options/fsdp.yaml")
        assert sharded == (name == "dit_xl2_400k.sh")
        assert (launched.multi_gpu or sharded) == (int(launched.num_processes) > 1)
        assert launched.mixed_precision in ("fp16", "bf16")
    is_prior = name == "dlc_prior_4gpu.sh"
    script = next(i for i, word in enumerate(words) if word.endswith(("train_diffusion.py", "train_prior.py")))
    args = (train_prior.argument_parser if is_prior else argument_parser)().parse_args(words[script + 1 :])
    if is_prior:
        assert (args.model, args.global_batch_size, args.lr, args.warmup_steps) == ("DLCPrior-M", 512, 3e-4, 2500)
        return
    assert name != "slurm_multinode.sh" or args.num_workers == 1  # a reader for each of the task's cores
    assert (args.global_batch_size, args.lr, args.ema_decay, args.max_steps) == (256, 1e-4, 0.9999, 5)
    assert args.model == ("DiT-XL/2" if name == "dit_xl2_400k.sh" else "DiTSEM-XL/2")


@pytest.mark.slow
def test_slurm_gives_each_task_its_place(tmp_path):
    """Of two tasks, as a stand-in for srun starts them: the variables by which processes form a group."""
    names = "MASTER_ADDR MASTER_PORT WORLD_SIZE LOCAL_WORLD_SIZE TORCHINDUCTOR_COMPILE_THREADS RANK LOCAL_RANK"
    stand_in(tmp_path, "scontrol", "echo 127.0.0.1")
    stand_in(tmp_path, "srun", 'shift 2; for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@"; done')
    stand_in(tmp_path, "python", f"echo {' '.join(f'${name}' for name in names.split())}")
    result = run_recipe("slurm_multinode.sh", tmp_path, MASTER_PORT="1234")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f"127.0.0.1 1234 2 2 1 {rank} {rank}" for rank in (0, 1)]
