"""Training on disks and machines that fail: one line that says what happened and what is kept, and the way on."""

import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import launch, refusal
from safetensors.torch import load_file, save_file
from training_runs import metrics, metrics_lines, same_run

from dlc.weights.meta import newest_checkpoint, newest_of_run, run_checkpoints


def the_error(process):
    errors = [line for line in process.said().splitlines() if "error: " in line]
    assert len(errors) == 1 and "Traceback" not in process.said(), process.said()
    assert process.ranks[0].exitcode == 2
    return errors[0]


def wait_for_lines(process, run, count=1):
    while metrics_lines(run) < count:
        assert not process.wait(0.01), process.said()


# ---------------------------------------------------------------------- two launches, copies


@pytest.mark.slow
def test_two_launches_in_one_folder(trained, train, tmp_path):
    first = train("run", "--max-steps", 3, "--ckpt-every", 2, fault="signalled,SIGSTOP,checkpoints/,1")
    while not (tmp_path / "run/checkpoints/0000002.tmp/meta.json").exists():
        assert not first.wait(0.01), first.said()
    refused = train("run", "--max-steps", 6, fault="impatient")
    assert not refused.wait()
    assert f"another process is writing to {tmp_path}/run: wait for it, or give another path" in the_error(refused)
    second = train("run", "--max-steps", 6)
    second.wait(1)
    os.kill(first.ranks[0].pid, signal.SIGCONT)
    assert first.wait(), first.said()
    assert second.wait() and "steps 3 to 6" in second.said(), second.said()
    trained("alone", "--max-steps", 6)
    assert same_run(tmp_path / "run", tmp_path / "alone", 6) and not (tmp_path / "run/.lock").exists()


# ---------------------------------------------------------------------- damage


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-100])


def edited(edit):
    def harm(path):
        state = torch.load(path)
        edit(state["optimizers"][0])
        torch.save(state, path)

    return harm


def with_nan(path):
    save_file({name: tensor * np.nan for name, tensor in load_file(path).items()}, path)


@pytest.fixture
def run_of_three(trained, tmp_path):
    trained("run", "--max-steps", 3, "--ckpt-every", 1)
    return run_checkpoints(tmp_path / "run")


@pytest.mark.slow
def test_a_damaged_newest_checkpoint(run_of_three, refused, tmp_path):
    """Training names it and, where the files' frames tell of the damage, the whole one before it."""
    one, two, three = run_of_three
    for file, harm, reason in (
        ("model.safetensors", cut_short, "model.safetensors is cut short"),
        ("optimizer.pt", cut_short, "optimizer.pt is cut short"),
        ("meta.json", lambda path: path.write_bytes(b"\0" * 500), "meta.json is not readable JSON"),
        ("config.json", lambda path: path.unlink(), "config.json is missing"),
        ("ema.safetensors", with_nan, "NaN"),
        ("optimizer.pt", lambda path: torch.save([1], path), "optimizer.pt"),
        ("optimizer.pt", edited(lambda one: one["state"][0]["exp_avg"].fill_(np.nan)), "of parameter 0"),
        ("optimizer.pt", edited(lambda one: one.pop("param_groups")), "optimizer.pt"),
    ):
        content = (three / file).read_bytes()
        harm(three / file)
        line = refused("run", "--max-steps", 4)
        assert re.search(rf"checkpoint {three} is damaged \(.*{reason}.*\): remove it", line), line
        assert "is cut short" not in reason or line.endswith("the newest whole one before it is 0000002\n")
        (three / file).write_bytes(content)
    cut_short(three / "optimizer.pt")
    shutil.rmtree(two)
    shutil.rmtree(one)
    refusal(newest_of_run, tmp_path / "run", words="there is no whole one before it")


@pytest.mark.slow
def test_sampling_wants_the_weights_alone(run_of_three, tmp_path):
    for path in run_of_three:
        (path / "optimizer.pt").unlink()
        (path / "model.safetensors").unlink()
    three = run_of_three[-1]
    assert newest_checkpoint(tmp_path / "run", "DiTSEM-Ti/4") == three
    refusal(newest_checkpoint, tmp_path / "run", "DiTSEM-Ti/4", use_ema=False, words="model.safetensors is missing")
    cut_short(three / "ema.safetensors")
    command = ("forked", 1, "sample_ddp_computed_dlc.py", "--model", "DiTSEM-Ti/4", "--results-dir", "run")
    result = launch(command, tmp_path, check=False)
    assert result.returncode == 2 and "Traceback" not in result.stderr and not (tmp_path / "samples").exists()
    assert re.search("error: checkpoint .*0000003 is damaged .* whole one before it is 0000002$", result.stderr, re.M)


# ---------------------------------------------------------------------- full disks, killed readers


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_disk_that_fills_at_a_line_of_the_log(trained, train, tmp_path):
    """A checkpoint is tried, one line says what happened, and the same command goes on to the same end."""
    flags, processes = ("--max-steps", 10, "--log-every", 4), 2
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").symlink_to("/dev/full")
    (tmp_path / "run/log.txt").symlink_to("/dev/full")
    process = train("run", *flags, processes=processes)
    assert not process.wait()
    error = the_error(process)
    assert re.search(
        r"cannot write .*metrics.jsonl \(.*No space left on device\): make room; run the same "
        r"command again; what is done is kept: .*run/checkpoints/000000[456]$",
        error,
    ), error
    assert process.said().count("log.txt (") == 1  # a warning; the log ends nothing
    for name in ("metrics.jsonl", "log.txt"):
        (tmp_path / "run" / name).unlink()
    trained("run", *flags, processes=processes)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [8]
    trained("alone", *flags, processes=processes)
    (tmp_path / "run/metrics.jsonl").write_bytes((tmp_path / "alone/metrics.jsonl").read_bytes())
    assert same_run(tmp_path / "run", tmp_path / "alone", 10)


@pytest.mark.slow
def test_a_reader_killed_by_the_kernel(train, trained, tmp_path):
    flags, processes = ("--max-steps", 16, "--num-workers", 2, "--ckpt-every", 3), 2
    process = train("run", *flags, processes=processes, fault="small_pipes+signalled,readers:SIGKILL,checkpoints/,1")
    assert not process.wait()
    words = "a data reader was killed, by the kernel .* lower --num-workers; .*; what is done is kept: .*/checkpoints"
    assert re.search(words, the_error(process))
    step = int(run_checkpoints(tmp_path / "run")[-1].name)
    assert 3 <= step < 16 and metrics_lines(tmp_path / "run") == step
    trained("run", *flags, processes=processes)
    trained("alone", *flags, processes=processes)
    assert same_run(tmp_path / "run", tmp_path / "alone", 16)


# ---------------------------------------------------------------------- signals and waiting


@pytest.mark.slow
def test_a_second_signal_ends_a_process_that_hangs(train, tmp_path):
    """Rank 0 hangs in a collective, since the other was stopped: the first signal waits for a step, the second not."""
    process = train("run", "--max-steps", 5000, processes=2)
    wait_for_lines(process, tmp_path / "run")
    first, other = process.ranks
    os.kill(other.pid, signal.SIGSTOP)
    try:
        time.sleep(1)
        os.kill(first.pid, signal.SIGINT)
        first.join(2.5)  # longer than an echo
        assert first.is_alive()
        os.kill(first.pid, signal.SIGINT)
        first.join(5)
    finally:
        other.kill()
        other.join()
    assert first.exitcode == 130 and "ended at once by a second SIGINT" in process.said()
    assert "Traceback" not in process.said()


@pytest.mark.slow
def test_a_stop_cuts_a_preview_off(trained, tmp_path):
    """Nothing of it is left."""
    flags = ("--max-steps", 4, "--sample-every", 2)
    assert "stopped by SIGTERM after step 3" in trained("run", *flags, fault="signalled_looking,SIGTERM,10")
    assert not (tmp_path / "run/previews").exists()
    trained("run", *flags)
    trained("alone", *flags)
    assert same_run(tmp_path / "run", tmp_path / "alone", 4)
    assert [path.name for path in (tmp_path / "run/previews").iterdir()] == ["0000004.png"]


@pytest.mark.slow
def test_a_process_that_waits_says_where(train):
    """Of two processes one is never started."""
    run = train("run", processes=2, fault="said_soon")
    lone, never = run.ranks
    never.kill()
    deadline = time.time() + 60
    while time.time() < deadline and not (run.output.exists() and "still waits" in run.said()):
        time.sleep(0.1)
    assert re.search(
        r"rank 0 still waits for all 2 processes to meet at 127.0.0.1:\d+: was every one started", run.said()
    )
    for rank in (lone, never):
        rank.kill()
        rank.join()


# ---------------------------------------------------------------------- the launcher's configuration


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment, message",
    [
        (dict(ACCELERATE_USE_DEEPSPEED="true"), "asks for DeepSpeed: shard with FSDP"),
        (dict(ACCELERATE_USE_MEGATRON_LM="true"), "asks for Megatron-LM"),
        (dict(ACCELERATE_USE_PARALLELISM_CONFIG="true"), "asks for other parallelism: use --multi_gpu"),
        (dict(ACCELERATE_USE_FSDP="true", FSDP_OFFLOAD_PARAMS="true"), "leave out fsdp_offload_params"),
        (dict(ACCELERATE_FP8_BACKEND="TE"), "(ACCELERATE_FP8_BACKEND) asks for 8-bit training"),
        (dict(ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4"), "4 gradient accumulation steps, --grad-accum for 1"),
        (dict(WORLD_SIZE="x"), "cannot start the process group from WORLD_SIZE"),
        (dict(ACCELERATE_MIXED_PRECISION="fp8"), "--mixed_precision fp8: this trains in fp16, bf16"),
        (dict(ACCELERATE_DYNAMO_BACKEND="cudagraphs"), "the dynamo backend cudagraphs"),
    ],
    ids=str,
)
def test_what_cannot_be_honoured(environment, message, refused, monkeypatch, tmp_path):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert message in refused("run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_environment_never_overrides_a_flag(trained, tmp_path):
    """With dynamo and FSDP's activation checkpointing on, nothing is compiled and losses are the same."""
    environment = dict(
        ACCELERATE_DYNAMO_BACKEND="INDUCTOR",
        ACCELERATE_USE_FSDP="true",
        FSDP_ACTIVATION_CHECKPOINTING="true",
        ACCELERATE_USE_CPU="true",
    )
    said = trained("run", "--max-steps", 2, "--no-compile", environment=environment, fault="spying")
    assert "compiled: 0 blocks; checkpointing: False" in said
    trained("alone", "--max-steps", 2)
    assert same_run(tmp_path / "run", tmp_path / "alone", 2)
    environment = dict(ACCELERATE_DYNAMO_BACKEND="inductor")
    said = trained("compiled", "--max-steps", 1, environment=environment, fault="spying")
    assert "compiled: 6 blocks" in said  # no flag says otherwise


# ---------------------------------------------------------------------- broken features


@pytest.mark.slow
@pytest.mark.parametrize("workers, content", [(0, b"\x93NUMPY"), (1, np.zeros((1, 4, 4, 4), np.float16))])
def test_a_broken_file_among_lone_ones(workers, content, train, features, tmp_path):
    for kind in ("features", "sem", "labels"):
        folder = tmp_path / f"lone/imagenet64_{kind}"
        folder.mkdir(parents=True)
        files = sorted((features / folder.name).glob("*.npy"))
        for index, row in enumerate(np.concatenate([np.load(file) for file in files])):
            np.save(folder / f"{index}.npy", row[None])
    broken = tmp_path / "lone/imagenet64_features/7.npy"
    broken.write_bytes(content) if isinstance(content, bytes) else np.save(broken, content)
    flags = ("--features-path", tmp_path / "lone", "--V", 300, "--max-steps", 9, "--num-workers", workers)
    process = train("run", *flags)
    assert not process.wait() and re.search(rf"error: step \d+: .*{broken}", the_error(process))
