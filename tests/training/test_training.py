"""Training resumed, killed, asked to stop, changed: in processes forked from one that has everything imported."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from accelerate.utils import LoggerType
from conftest import ROOT, V, launch
from PIL import Image
from training_runs import alike, metrics, same_run, tensors, train_command

from dlc.data import Features, FeatureWriter, Manifest
from dlc.training.batches import TrainingBatches
from dlc.weights.meta import read_meta, run_checkpoints
from models import DiT_models

pytestmark = pytest.mark.slow


def test_processes_train_alike(trained, tmp_path):
    """Also where two begin, between two lines of the log, and one goes on."""
    trained("one", "--max-steps", 6)
    said = trained("two", "--max-steps", 3, "--log-every", 2, "--grad-accum", 2, "--num-workers", 1, processes=2)
    assert "batch: 2 x 2 processes on cpu x 2 micro-batches = 8" in said
    assert "steps 3 to 6" in trained("two", "--max-steps", 6, "--log-every", 2)
    one, two = ([line["loss"] for line in metrics(tmp_path / name)] for name in ("one", "two"))
    # products of fewer rows round otherwise
    np.testing.assert_allclose(two, np.reshape(one, (3, 2)).mean(axis=1), rtol=1e-4)
    assert alike(*(tensors(tmp_path / name / "checkpoints/0000006") for name in ("two", "one")))


KILLS = (
    "killed_in_a_line,2",
    "signalled,group:SIGKILL,checkpoints/,2",  # before a checkpoint gets its name
    "killed_syncing,ema.safetensors,1",
    "killed_syncing,checkpoints,2",  # after it got its name, before older ones are removed
    "signalled,group:SIGKILL,0000002.tmp,1",  # between two of those
)


@pytest.mark.parametrize("processes, kills", [(1, KILLS[::2]), (2, KILLS[1::2])])
def test_killed_at_named_points(processes, kills, trained, train, tmp_path):
    """One launch after the other, with a checkpoint at each step; the end is that of a run left alone."""
    flags = ("--max-steps", 7, "--ckpt-every", 1, "--ckpt-total-limit", 3, "--num-workers", 1)
    flags += ("--log-every", processes, "--grad-accum", 2, "--grad-clip", 1)
    for fault in kills:
        train("run", *flags, processes=processes, fault=fault).dies()
    trained("run", *flags, processes=processes)
    trained("whole", *flags, processes=processes)
    assert same_run(tmp_path / "whole", tmp_path / "run", 7)
    assert {path.name for path in (tmp_path / "run/checkpoints").iterdir()} == {"0000005", "0000006", "0000007"}


def test_a_disk_that_is_full(trained, train, tmp_path):
    run = train("run", "--max-steps", 1, fault="limited,FSIZE,1000000")
    assert not run.wait() and run.ranks[0].exitcode == 2 and "Traceback" not in run.said()
    words = r"cannot write checkpoint .*0000001 \(File too large\): .*; what is done is kept: run the same command"
    assert re.search(words, run.said())
    assert not run_checkpoints(tmp_path / "run")
    assert "steps 0 to 1" in trained("run", "--max-steps", 1)


def test_changes_are_refused_unless_allowed(trained, refused, features, tmp_path):
    begun = ("--code-init", "dlc")
    assert "code_init=dlc" in trained("run", "--max-steps", 3, *begun, "--lr", 0)
    table = tensors(tmp_path / "run/checkpoints/0000003")["model/sem_embedder.embedding_table"]
    assert table.std().item() == pytest.approx(192**-0.5, rel=0.02) and (table[:, V] == table[0, V]).all()
    other = (*begun, "--global-batch-size", 4, "--global-seed", 1, "--max-steps", 5)
    changes = "global_batch_size 8 there, 4 here; global_seed 0 there, 1 here"
    assert f"{changes}; give another --results-dir, or --allow-change" in refused("run", *other)
    said = trained("run", *other, "--allow-change", "--grad-clip", 1)
    assert "warning: changed since: global_batch_size 8 there, 4 here" in said
    assert "; grad_clip 0.0 there, 1.0 here" in said  # which needs no leave
    assert read_meta(tmp_path / "run/checkpoints/0000005").place == 3 * 8 + 2 * 4
    assert metrics(tmp_path / "run")[-1]["epoch"] == 32 / 14
    batches = TrainingBatches(Features(features), {}, seed=1, global_batch=4, first_step=3, first_index=24)
    assert batches[4]["indices"].tolist() == [28, 29, 30, 31]
    assert "code_init 'dlc' there, 'unit' here; give another --results-dir" in refused("run", "--allow-change")


def test_ema_warms_up(trained, tmp_path):
    """The first steps' decay is (1 + step) / (10 + step), whatever checkpoints and stops by --stop-after."""
    flags = ("--max-steps", 4, "--ema-warmup")
    trained("run", *flags, "--ckpt-every", 1)
    assert "stopped by --stop-after after step 1; the same command" in trained("rarely", *flags, "--stop-after", 0)
    trained("rarely", *flags)
    left = read_meta(tmp_path / "run/checkpoints/0000004").ema_start
    assert left == pytest.approx(2 / 11 * 3 / 12 * 4 / 13 * 5 / 14)
    assert read_meta(tmp_path / "rarely/checkpoints/0000004").ema_start == left
    assert same_run(tmp_path / "run", tmp_path / "rarely", 4)
    checkpoints = [tensors(path) for path in run_checkpoints(tmp_path / "run")]
    key = "t_embedder.mlp.0.weight"
    for step, (before, now) in enumerate(zip(checkpoints, checkpoints[1:]), 2):
        decay = min(0.9, (1 + step) / (10 + step))
        torch.testing.assert_close(now[f"ema/{key}"], decay * before[f"ema/{key}"] + (1 - decay) * now[f"model/{key}"])


def test_begun_with_other_weights(trained, refused, tmp_path):
    other = DiT_models["DiTSEM-Ti/4"](input_size=8, L=6, V=9).state_dict()
    other["extra"] = other.pop("t_embedder.mlp.0.bias")
    torch.save(other, tmp_path / "other.pt")
    said = trained("run", "--max-steps", 1, "--lr", 0, "--pretrained-path", tmp_path / "other.pt")
    assert "sem_embedder.embedding_table not taken: (6, 10, 192) there, (6, 301, 192) here" in said
    assert "left out: extra" in said and "new: sem_embedder" not in said and "t_embedder.mlp.0.bias" in said
    assert read_meta(tmp_path / "run/checkpoints/0000001").ema_start == 0
    ours = tensors(tmp_path / "run/checkpoints/0000001")
    for key in other.keys() - {"extra", "sem_embedder.embedding_table"}:
        assert torch.equal(ours[f"model/{key}"], other[key]) and torch.equal(ours[f"ema/{key}"], other[key]), key
    assert "nowhere does not exist" in refused("other", "--pretrained-path", "nowhere")


def test_steps_that_the_scaler_skips(train, tmp_path):
    run = train("run", "--max-steps", 9, "--max-nonfinite", 3, "--ckpt-every", 2, fault="skipping")
    assert not run.wait()
    assert "step 7: 3 steps in a row without a finite gradient; stopped. The last good checkpoint: " in run.said()
    assert [line["skipped_steps"] for line in metrics(tmp_path / "run")] == [0, 0, 1, 0, 1, 1, 1]
    assert [line["loss"] is None for line in metrics(tmp_path / "run")] == [False, False, True, False, True, True, True]
    assert [path.name for path in run_checkpoints(tmp_path / "run")] == ["0000002", "0000004"]  # 6 was put off


def test_skipped_steps_of_two_processes_and_of_a_resumed_run(trained, tmp_path):
    flags = ("--log-every", 4, "--ckpt-every", 2, "--grad-clip", 1)
    trained("two", "--max-steps", 9, *flags, processes=2, fault="skipping")
    trained("parts", "--max-steps", 5, *flags, fault="skipping")
    trained("parts", "--max-steps", 9, *flags, fault="skipping")
    kept = run_checkpoints(tmp_path / "parts")
    assert [path.name for path in kept] == ["0000002", "0000004", "0000005", "0000008", "0000009"]
    four, five, last = (tensors(kept[place]) for place in (1, 2, 4))
    assert all(torch.equal(five[key], value) for key, value in four.items())  # its last step is skipped
    assert {value.item() for key, value in last.items() if key.endswith("step")} == {5.0}
    assert alike(last, tensors(tmp_path / "two/checkpoints/0000009"))
    one, two = metrics(tmp_path / "parts"), metrics(tmp_path / "two")
    assert [line["skipped_steps"] for line in one] == [line["skipped_steps"] for line in two] == [1, 3]
    assert [line["scaler_scale"] for line in one] == [line["scaler_scale"] for line in two] == [2.0**15, 2.0**12]
    for first, second in zip(one, two):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-4)


@pytest.mark.parametrize(
    "every, words", [(2, "step 4: there are weights that are not finite"), (3, "step 6: the loss is nan")]
)
def test_weights_and_losses_that_are_not_finite(every, words, train, tmp_path):
    """A gradient may be NaN though the loss is not: no checkpoint holds what AdamW makes of it."""
    flags = ("--max-steps", 9, "--ckpt-every", every, "--log-every", 9, "--ckpt-total-limit", 1)
    run = train("run", *flags, fault="nan_gradients,4")
    assert not run.wait() and run.ranks[0].exitcode == 1 and "Traceback" not in run.said()
    assert f"{words}; stopped. The last good checkpoint: {tmp_path}/run/checkpoints/000000{every}" in run.said()
    assert [path.name for path in run_checkpoints(tmp_path / "run")] == [f"000000{every}"]
    assert (metrics(tmp_path / "run")[-1]["loss"] is None) == (every == 3)


def test_loss_curve_is_the_committed_one(tmp_path):
    """20 steps on made-up features. A change that moves it changes what is trained, and must say so."""
    manifest = Manifest(image_size=64, latents="sample", dtype="float32", L=4, V=8, classes=["a"], images=40)
    writer = FeatureWriter(tmp_path / "features", manifest)
    writer.start()
    generator = np.random.Generator(np.random.Philox(0))
    latents = generator.standard_normal((40, 4, 8, 8)).astype(np.float32)
    rows = dict(labels=np.zeros(40, int), sem=generator.integers(0, 8, (40, 4)).astype(np.uint8))
    writer.write(0, dict(rows, features=latents, path=np.full(40, "a/0.png")), [])
    writer.finish(1)
    launch(train_command(1, "features", "run", "--max-steps", 20), tmp_path)
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    np.testing.assert_allclose(losses, json.loads((ROOT / "tests/assets/loss_curve.json").read_text()), rtol=1e-4)
    assert Image.open(tmp_path / "run/loss.png").size == (800, 400)


def test_tensorboard(trained, tmp_path):
    """The numbers of metrics.jsonl; what a killed launch wrote after its checkpoint is hidden by the next one."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ("--ckpt-every", 2, "--report-to", "tensorboard")
    trained("run", "--max-steps", 3, *flags, processes=2)
    shutil.rmtree(tmp_path / "run/checkpoints/0000003")
    trained("run", "--max-steps", 5, *flags)
    first, second = sorted((tmp_path / "run").rglob("events.out.tfevents*"))
    (reported := EventAccumulator(str(first.parent))).Reload()
    scalars = [(scalar.step, scalar.value) for scalar in reported.Scalars("loss")]
    np.testing.assert_allclose(scalars, [(line["step"], line["loss"]) for line in metrics(tmp_path / "run")], rtol=1e-6)
    assert len(scalars) == 5 and first.parent == second.parent


def test_wandb_that_does_not_start(refused, monkeypatch, tmp_path):
    (tmp_path / "wandb.py").write_text("def init(**_):\n    raise RuntimeError('No API key configured.')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.WANDB])
    words = "wandb does not start (No API key configured.); run wandb login, or set WANDB_MODE=offline"
    assert words in refused("run", "--report-to", "wandb")


def test_sharded(trained, features, tmp_path):
    """FSDP by the configuration file that is shipped, on two CPU processes: the losses of one process; its checkpoints
    load as any other, are continued whole and sharded, and previews are drawn."""
    flags = ("--grad-clip", 1, "--max-steps")
    command = train_command(2, features, tmp_path / "sharded", *flags, 3, "--grad-accum", 2, launcher="fsdp")
    result = launch(command, tmp_path, check=False)
    if "no attribute 'record_event'" in result.stderr:
        pytest.skip("this torch has no FSDP on the CPU")
    assert result.returncode == 0, result.stderr
    assert "precision: fp32, sharded (FSDP)" in result.stdout
    assert "steps 3 to 4" in trained("sharded", *flags, 4)
    sharded = dict(processes=2, environment=dict(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2"))
    assert "sharded (FSDP)" in trained("sharded", *flags, 6, "--sample-every", 6, **sharded)
    trained("one", *flags, 6, "--sample-every", 6)
    for key in ("loss", "grad_norm"):
        two, one = ([line[key] for line in metrics(tmp_path / name)] for name in ("sharded", "one"))
        np.testing.assert_allclose(two, one, rtol=1e-4)
    shards, one = (tensors(tmp_path / f"{name}/checkpoints/0000006") for name in ("sharded", "one"))
    assert shards.keys() == one.keys() and alike(shards, one)
    pictures = [Image.open(tmp_path / f"{name}/previews/0000006.png") for name in ("sharded", "one")]
    two, one = (np.array(picture).astype(int) for picture in pictures)
    assert np.abs(two - one).max() <= 3
    # gathered in 16 bits
    assert "precision: bf16, sharded (FSDP)" in trained("bf16", *flags, 1, "--precision", "bf16", **sharded)
    first, exact = (metrics(tmp_path / name)[0]["loss"] for name in ("bf16", "one"))
    assert exact != first == pytest.approx(exact, rel=1e-2)
