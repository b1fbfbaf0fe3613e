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
from training_runs import metrics, train_flags

import train_prior
from dlc.machine.processes import asked_precision
from train_diffusion import argument_parser

VARIANTS = sorted(path.stem for path in (ROOT / "train_options").glob("train_*.py"))
RECIPES = sorted(path.name for path in (ROOT / "train_options").glob("*.sh"))


@pytest.fixture(scope="module")
def flags_of(both_data, tiny_models):
    """flags_of(variant, results): what a variant is launched with, on images or on features."""

    def flags(variant, results, *more):
        asked, images = options(variant), ("--data-path", both_data / "images", "--image-size", IMAGE_SIZE)
        if asked["reads"] == "images":
            more += (*images, "--vae", tiny_models[0], "--encoder", tiny_models[1], "--flip", "none")
        if asked["align"]:
            more += ("--align-block", 2)  # of 6
        features = both_data / "features" if asked["reads"] == "features" else None
        return train_flags(features, results, "--max-steps", 2, *more)

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


@pytest.mark.slow
def test_variants_train_alike(flags_of, monkeypatch, tmp_path):
    """The losses are those of the first, to what 16 bits are worth, and the rounding of images in other batches."""
    losses = {}
    for name, precision in (("original", "fp32"), ("repa", "bf16"), ("tf32_disabled", "fp32"), ("amp", "bf16")):
        flags, root = flags_of(f"train_{name}", tmp_path / name), tmp_path / name
        if name == "amp":  # by its path
            monkeypatch.delenv("PYTHONPATH")
            said = launch(("python", 1, f"train_options/train_{name}.py", *flags), tmp_path).stdout
        else:
            run = Run(f"train_options.train_{name}", flags, tmp_path / f"{name}.txt")
            assert run.wait(), run.said()
            said = run.said()
        losses[name] = [line["loss"] - 0.5 * line.get("align", 0) for line in metrics(root)]
        asked, written = options(f"train_{name}"), json.loads((root / "args.json").read_text())
        assert all(written[key] == asked[key] for key in ("precision", "tf32", "checkpoint_activations"))
        assert f"precision: {precision}" in said
        assert ("14 images" if asked["reads"] == "images" else "14 rows") in said
        bound = 1e-2 if precision == "bf16" else 1e-4
        np.testing.assert_allclose(losses[name], losses["original"], rtol=bound)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, environment, said",
    [
        ("", "", "compiled: 0 blocks; checkpointing: False; TF32: True, True"),
        ("--compile --checkpoint-activations --no-tf32", "", "6 blocks; checkpointing: True; TF32: False, False"),
        ("", "ACCELERATE_DYNAMO_BACKEND", "compiled: 6 blocks"),  # no flag says otherwise
        ("--no-compile", "ACCELERATE_DYNAMO_BACKEND FSDP_ACTIVATION_CHECKPOINTING", "0 blocks; checkpointing: False"),
    ],
)
def test_flags_reach_what_they_are_of(flags, environment, said, flags_of, tmp_path):
    """And the launcher's environment never overrides one."""
    variables = {name: "inductor" if "DYNAMO" in name else "true" for name in environment.split()}
    if environment:
        variables |= dict(ACCELERATE_USE_FSDP="true", ACCELERATE_USE_CPU="true")
    flags = flags_of("train_fast", tmp_path / "run", *flags.split())
    run = Run("train_diffusion", flags, tmp_path / "said.txt", environment=variables, fault="spying")
    assert run.wait() and said in run.said(), run.said()


def test_precisions(monkeypatch):
    assert asked_precision("amp") == "bf16" and asked_precision() == "fp32"
    by_launcher = dict(no={None: "fp32", "fp32": "fp32", "amp": "bf16", "fp16": "fp16"}, bf16={"bf16": "bf16"})
    for launchers, wanted in dict(by_launcher, fp16={None: "fp16", "amp": "fp16"}).items():
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launchers)
        assert {flag: asked_precision(flag) for flag in wanted} == wanted
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    refusal(asked_precision, "amp", words="--mixed_precision fp8: this trains in fp16, bf16")


def test_what_contradicts_a_variant(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    for variant, launchers, message in (
        ("train_baseline", "fp16", "the launcher's --mixed_precision fp16 contradicts --precision fp32"),
        ("train_amp", "no", "this trains on images: give --data-path"),
    ):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launchers)
        status, _, error = call(f"train_options.{variant}")
        assert status == 2 and message in error and error.count("\n") == 1 and not any(tmp_path.iterdir())


# ---------------------------------------------------------------------- recipes


def said_by_recipe(name, folder, stand_ins, *flags, **variables):
    """What a recipe prints where these programs, a script of bash each, are found before all others."""
    for program, text in dict(stand_ins, scontrol="echo 127.0.0.1").items():
        (folder / program).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / program).chmod(0o755)
    path = f"{folder}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    slurm = dict(SLURM_JOB_NODELIST="here", SLURM_NTASKS="2", SLURM_NTASKS_PER_NODE="2", SLURM_CPUS_PER_TASK="1")
    command = ["bash", ROOT / "train_options" / name, *map(str, flags)]
    environment = {**os.environ, **slurm, "PATH": path, **variables}
    return subprocess.run(command, cwd=ROOT, text=True, env=environment, stdout=subprocess.PIPE, check=True).stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_recipes_give_flags_that_exist(name, tmp_path):
    asked = '[ "$1 $2" = "--cpus-per-task=1 --kill-on-bad-exit=1" ] && shift 2'
    programs = dict.fromkeys(("accelerate", "python"), 'printf "%s\\n" "$@"')
    programs["srun"] = f'{asked}\nSLURM_PROCID=0 SLURM_LOCALID=0 exec "$@"'
    words = said_by_recipe(name, tmp_path, programs, "--max-steps", 5).splitlines()
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
    programs = dict(srun='shift 2; for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@"; done')
    programs["python"] = f"echo {' '.join(f'${name}' for name in names.split())}"
    said = said_by_recipe("slurm_multinode.sh", tmp_path, programs, MASTER_PORT="1234")
    assert said.splitlines() == [f"127.0.0.1 1234 2 2 1 {rank} {rank}" for rank in (0, 1)]
