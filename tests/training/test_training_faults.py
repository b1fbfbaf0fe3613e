"""Training on disks and machines that fail: one line that says what happened and what is kept, and the way on."""

import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refusal
from safetensors.torch import load_file, save_file
from training_runs import metrics

from dlc.training.run import WRITTEN
from dlc.weights.meta import newest_checkpoint, newest_of_run, run_checkpoints

pytestmark = pytest.mark.slow


def the_error(process):
    errors = [line for line in process.said().splitlines() if "error: " in line]
    assert len(errors) == 1 and "Traceback" not in process.said(), process.said()
    assert process.ranks[0].exitcode == 2
    return errors[0]


# ---------------------------------------------------------------------- two launches, copies


def test_two_launches_in_one_folder(train, refused, tmp_path, monkeypatch):
    first = train("run", "--max-steps", 3, "--ckpt-every", 2, fault="signalled,SIGSTOP,checkpoints/,1")
    while not (tmp_path / "run/checkpoints/0000002.tmp/meta.json").exists():
        assert not first.wait(0.01), first.said()
    monkeypatch.setattr("dlc.machine.files.LOCK_PATIENCE", 0.1)
    words = f"another process is writing to {tmp_path}/run: wait for it, or give another path"
    assert words in refused("run", "--max-steps", 6)
    second = train("run", "--max-steps", 6)
    second.wait(1)
    os.kill(first.ranks[0].pid, signal.SIGCONT)
    assert first.wait(), first.said()
    assert second.wait() and "steps 3 to 6" in second.said(), second.said()
    assert [line["step"] for line in metrics(tmp_path / "run")] == [*range(1, 7)]
    assert not (tmp_path / "run/.lock").exists()


# ---------------------------------------------------------------------- damage


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-100])


def with_nan(path):
    save_file({name: tensor * np.nan for name, tensor in load_file(path).items()}, path)


def without_groups(path):
    torch.save({**(state := torch.load(path)), "optimizers": [dict(state["optimizers"][0], param_groups=None)]}, path)


def with_infinite_moment(path):
    (state := torch.load(path))["optimizers"][0]["state"][0]["exp_avg"].fill_(np.inf)
    torch.save(state, path)


def test_a_damaged_newest_checkpoint(trained, refused, error_of, tmp_path):
    """It is named and, where the files' frames tell of the damage, the whole one before it. Sampling wants only the
    weights."""
    trained("run", "--max-steps", 3, "--ckpt-every", 1)
    *others, three = run_checkpoints(tmp_path / "run")
    for file, harm, reason in (
        ("model.safetensors", cut_short, "model.safetensors cannot be read .* cut off"),
        ("optimizer.pt", cut_short, "optimizer.pt cannot be read .* cut off"),
        ("meta.json", lambda path: path.write_bytes(b"\0" * 500), "meta.json is not readable JSON"),
        ("config.json", lambda path: path.unlink(), "config.json is missing"),
        ("ema.safetensors", with_nan, "NaN"),
        ("optimizer.pt", with_infinite_moment, "tensor exp_avg has"),
        ("optimizer.pt", without_groups, "optimizer.pt"),
    ):
        content = (three / file).read_bytes()
        harm(three / file)
        line = refused("run", "--max-steps", 4)
        assert re.search(rf"checkpoint {three} is damaged \(.*{reason}.*\): remove it", line), line
        assert "cut off" not in reason or line.endswith("the newest whole one before it is 0000002\n")
        (three / file).write_bytes(content)
    for path in (*others, three):
        (path / "optimizer.pt").unlink()
        (path / "model.safetensors").unlink()
    refusal(newest_of_run, tmp_path / "run", words="there is no whole one before it")
    refusal(newest_checkpoint, tmp_path / "run", "DiTSEM-Ti/4", use_ema=False, words="model.safetensors is missing")
    assert newest_checkpoint(tmp_path / "run", "DiTSEM-Ti/4") == three
    (three / "ema.safetensors").write_bytes(b"")
    line = error_of("sample_ddp_computed_dlc", "--model", "DiTSEM-Ti/4", "--results-dir", "run")
    assert re.search("error: checkpoint .*0000003 is damaged .* whole one before it is 0000002$", line, re.M)


# ---------------------------------------------------------------------- full disks, killed readers


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_disk_that_fills_at_a_line_of_the_log(trained, train, tmp_path):
    """A checkpoint is tried, one line says what happened, and the same command goes on."""
    flags, written = ("--max-steps", 10, "--log-every", 4), [tmp_path / "run" / one for one in WRITTEN[1:3]]
    (tmp_path / "run").mkdir()
    for path in written:
        path.symlink_to("/dev/full")
    process = train("run", *flags, processes=2)
    assert not process.wait()
    error, words = the_error(process), r"cannot write .*metrics.jsonl \(.*No space left on device\): make room"
    assert re.search(rf"{words}; what is done is kept: run the same command again$", error), error
    assert process.said().count("log.txt (") == 1  # a warning; the log ends nothing
    (kept,) = run_checkpoints(tmp_path / "run")
    assert kept.name in ("0000004", "0000005", "0000006")
    for path in written:
        path.unlink()
    assert f"continued from {kept}" in trained("run", *flags)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [8]


# ---------------------------------------------------------------------- stops and waiting


def test_a_stop_cuts_a_preview_off(trained, tmp_path):
    """Nothing of it is left."""
    flags = ("--max-steps", 4, "--sample-every", 2)
    assert "stopped by SIGTERM after step 3" in trained("run", *flags, fault="signalled_looking,SIGTERM,10")
    assert not (tmp_path / "run/previews").exists()
    trained("run", *flags)
    assert [path.name for path in (tmp_path / "run/previews").iterdir()] == ["0000004.png"]


def test_a_process_that_waits_says_where(train):
    """Of two processes one is never started."""
    run = train("run", processes=2, fault="said_soon")
    run.ranks[1].kill()
    words = r"rank 0 still waits for all 2 processes to meet at 127.0.0.1:\d+: was every one started"
    deadline = time.time() + 60
    while not (run.output.exists() and re.search(words, run.said())):
        assert time.time() < deadline, run.said()
        time.sleep(0.1)
    run.end()


# ---------------------------------------------------------------------- the launcher's configuration


@pytest.mark.parametrize(
    "variable, message",
    [
        ("ACCELERATE_USE_DEEPSPEED=true", "asks for DeepSpeed: shard with FSDP"),
        ("ACCELERATE_USE_MEGATRON_LM=true", "asks for Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG=true", "asks for other parallelism: use --multi_gpu"),
        ("FSDP_OFFLOAD_PARAMS=true", "leave out fsdp_offload_params"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4", "4 gradient accumulation steps, --grad-accum for 1"),
        ("WORLD_SIZE=x", "cannot start the process group from WORLD_SIZE"),
        ("ACCELERATE_DYNAMO_BACKEND=cudagraphs", "the dynamo backend cudagraphs"),
    ],
)
def test_what_cannot_be_honoured(variable, message, refused, monkeypatch, tmp_path):
    monkeypatch.setenv(*variable.split("="))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", str("FSDP" in variable))
    assert message in refused("run") and not (tmp_path / "run").exists()


# ---------------------------------------------------------------------- broken features


def test_a_broken_file_among_lone_ones(train, features, tmp_path):
    for kind in ("features", "sem", "labels"):
        folder = tmp_path / f"lone/imagenet64_{kind}"
        folder.mkdir(parents=True)
        files = sorted((features / folder.name).glob("*.npy"))
        for index, row in enumerate(np.concatenate([np.load(file) for file in files])):
            np.save(folder / f"{index}.npy", row[None])
    broken = tmp_path / "lone/imagenet64_features/7.npy"
    broken.write_bytes(b"\x93NUMPY")
    process = train("run", "--features-path", tmp_path / "lone", "--V", 300, "--max-steps", 9)
    assert not process.wait() and re.search(rf"error: step \d+: .*{broken}", the_error(process))
