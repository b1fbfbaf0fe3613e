"""Training resumed, killed, asked to stop, changed: in processes forked from one that has everything imported."""

import importlib.util
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

from diffusion import create_diffusion
from dlc.data import Features, FeatureWriter, Manifest
from dlc.machine.noise import Stream, integers, normal, uniform
from dlc.training.batches import TrainingBatches
from dlc.training.metrics_file import draw_losses
from dlc.weights.load import load_model
from dlc.weights.meta import read_meta, run_checkpoints
from models import DiT_models


@pytest.mark.slow
@pytest.mark.parametrize("processes, accumulation", [(1, 4), (2, 2)])
def test_stopped_in_an_epoch_and_between_lines(processes, accumulation, trained, tmp_path):
    """10 steps; or 5, which ends within the third epoch and between two lines of the log, and 5 more."""
    flags = ("--log-every", 3, "--grad-accum", accumulation, "--grad-clip", 1)
    trained("whole", "--max-steps", 10, *flags, processes=processes)
    assert "nothing to do" not in trained("parts", "--max-steps", 5, *flags, processes=processes)
    assert "steps 5 to 10" in trained("parts", "--max-steps", 10, *flags, processes=processes)
    assert [line["step"] for line in metrics(tmp_path / "parts")] == [3, 6, 9]
    assert same_run(tmp_path / "whole", tmp_path / "parts", 10)


@pytest.mark.slow
def test_parts_and_processes_train_alike(trained, tmp_path):
    trained("one", "--max-steps", 6)
    said = trained("two", "--max-steps", 6, "--grad-accum", 2, "--num-workers", 1, processes=2)
    assert "batch: 2 x 2 processes on cpu x 2 micro-batches = 8" in said
    trained("parts", "--max-steps", 6, "--grad-accum", 4)
    trained("changed", "--max-steps", 3, "--log-every", 2, processes=2)
    trained("changed", "--max-steps", 6, "--log-every", 2)
    losses = {name: [line["loss"] for line in metrics(tmp_path / name)] for name in ("one", "two", "parts", "changed")}
    # products of fewer rows round otherwise
    np.testing.assert_allclose(losses["two"], losses["one"], rtol=1e-4)
    np.testing.assert_allclose(losses["parts"], losses["one"], rtol=1e-4)
    np.testing.assert_allclose(losses["changed"], np.reshape(losses["one"], (3, 2)).mean(axis=1), rtol=1e-4)
    assert alike(*(tensors(tmp_path / name / "checkpoints/0000006") for name in ("two", "one")))


KILLS = (
    "killed_in_a_line,2",
    "signalled,group:SIGKILL,checkpoints/,2",  # before a checkpoint gets its name
    "killed_syncing,ema.safetensors,1",
    "killed_syncing,checkpoints,2",  # after it got its name, before older ones are removed
    "signalled,group:SIGKILL,0000002.tmp,1",  # between two of those
)


@pytest.mark.slow
@pytest.mark.parametrize("processes, kills", [(1, KILLS), (2, KILLS[1:4:2])])
def test_killed_at_named_points(processes, kills, trained, train, tmp_path):
    """One launch after the other, with a checkpoint at each step; the end is that of a run left alone."""
    flags = ("--max-steps", 7, "--ckpt-every", 1, "--ckpt-total-limit", 3, "--num-workers", 1)
    for fault in kills:
        train("run", *flags, processes=processes, fault=fault).dies()
    trained("run", *flags, processes=processes)
    trained("whole", *flags, processes=processes)
    assert same_run(tmp_path / "whole", tmp_path / "run", 7)
    assert {path.name for path in (tmp_path / "run/checkpoints").iterdir()} == {"0000005", "0000006", "0000007"}


@pytest.mark.slow
@pytest.mark.parametrize("processes, to, name", [(1, "group:", "SIGTERM"), (2, "", "SIGUSR2")])
def test_asked_to_stop(processes, to, name, trained, tmp_path):
    flags = ("--max-steps", 14, "--log-every", 5, "--ckpt-every", 4, "--num-workers", 1)
    fault = f"signalled_at_step,{to}{name},4,{processes - 1}"
    said = trained("asked", *flags, processes=processes, fault=fault)
    step = read_meta(run_checkpoints(tmp_path / "asked")[-1]).step
    assert f"stopped by {name} after step {step}; the same command continues" in said and 4 <= step < 14
    trained("asked", *flags, processes=processes)
    trained("whole", *flags, processes=processes)
    assert same_run(tmp_path / "whole", tmp_path / "asked", 14)


@pytest.mark.slow
def test_stop_after(trained, tmp_path):
    """A chain of launches that each end in time, with a checkpoint."""
    for said in ("stopped by --stop-after after step 1; the same command continues", "continued from"):
        assert said in trained("run", "--max-steps", 2, "--stop-after", 0)
    assert [path.name for path in run_checkpoints(tmp_path / "run")] == ["0000001", "0000002"]


@pytest.mark.slow
def test_a_disk_that_is_full(trained, train, tmp_path):
    trained("run", "--max-steps", 1)
    run = train("run", "--max-steps", 2, fault="limited,FSIZE,1000000")
    assert not run.wait() and run.ranks[0].exitcode == 2 and "Traceback" not in run.said()
    assert re.search(r"cannot write checkpoint .*0000002 \(File too large\): .*; run the same command", run.said())
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["0000001"]
    assert "steps 1 to 2" in trained("run", "--max-steps", 2)


@pytest.mark.slow
def test_changes_are_refused_unless_allowed(trained, refused, features, tmp_path):
    trained("run", "--max-steps", 3)
    other = ("--global-batch-size", 4, "--global-seed", 1, "--max-steps", 5)
    changes = "global_batch_size 8 there, 4 here; global_seed 0 there, 1 here"
    assert f"{changes}; give another --results-dir, or --allow-change" in refused("run", *other)
    said = trained("run", *other, "--allow-change", "--grad-clip", 1)
    assert "warning: changed since: global_batch_size 8 there, 4 here" in said
    assert "; grad_clip 0.0 there, 1.0 here" in said  # which needs no leave
    assert read_meta(tmp_path / "run/checkpoints/0000005").place == 3 * 8 + 2 * 4
    assert metrics(tmp_path / "run")[-1]["epoch"] == 32 / 14
    rows = Features(features)
    batches = TrainingBatches(rows, {}, seed=1, global_batch=4, first_step=3, first_index=24)
    assert batches[4]["indices"].tolist() == [28, 29, 30, 31]
    line = refused("run", "--model", "DiTSEM-Ti/2", "--allow-change")
    assert "model 'DiTSEM-Ti/4' there, 'DiTSEM-Ti/2' here; give another --results-dir" in line


@pytest.mark.slow
def test_code_init_is_part_of_a_run(trained, refused, tmp_path):
    first = trained("dlc", "--max-steps", 1, "--code-init", "dlc", "--lr", 0)
    assert "code_init=dlc" in first
    table = tensors(tmp_path / "dlc/checkpoints/0000001")["model/sem_embedder.embedding_table"]
    assert table.std().item() == pytest.approx(192**-0.5, rel=0.02) and (table[:, V] == table[0, V]).all()
    assert "code_init 'dlc' there, 'unit' here; give another --results-dir" in refused("dlc", "--max-steps", 2)


@pytest.mark.slow
def test_first_step_by_hand(trained, features, tmp_path):
    trained("run", "--max-steps", 1, "--grad-clip", 0.5, "--grad-accum", 2)
    torch.manual_seed(0)
    model = DiT_models["DiTSEM-Ti/4"](input_size=8, L=6, V=300)
    rows = Features(features)
    batch = TrainingBatches(rows, dict(codes=rows.codes), seed=0, global_batch=8)[0]
    places, x, y = batch["indices"], batch["latents"], batch["codes"]
    t = integers(0, Stream.TRAIN_TIMESTEP, places, 1000)
    condition = dict(y=y, drop=uniform(0, Stream.TRAIN_DROP, places) < 0.1)
    noise = normal(0, Stream.TRAIN_NOISE, places, (4, 8, 8))
    terms = create_diffusion("").training_losses(model, x.float(), t, condition, noise)
    terms["loss"].mean().backward()
    norm = torch.stack([weight.grad.norm() for weight in model.parameters()]).norm().item()
    line = metrics(tmp_path / "run")[0]
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert line["skipped_steps"] == 0 and line["scaler_scale"] is None
    for quarter, mse in enumerate(line["mse_by_quarter_of_t"]):
        of_quarter = terms["mse"][(t >= 250 * quarter) & (t < 250 * (quarter + 1))]
        assert mse == (pytest.approx(of_quarter.mean().item(), rel=1e-5) if len(of_quarter) else None)
    state = tensors(tmp_path / "run/checkpoints/0000001")
    moments = torch.stack([value.norm() for key, value in state.items() if key.endswith("exp_avg")]).norm().item()
    assert moments == pytest.approx(0.1 * min(norm, 0.5), rel=1e-4)


@pytest.mark.slow
def test_ema_warms_up(trained, tmp_path):
    """The first steps' decay is (1 + step) / (10 + step), whatever checkpoints and stops."""
    trained("run", "--max-steps", 4, "--ckpt-every", 1, "--ema-warmup")
    trained("rarely", "--max-steps", 2, "--ema-warmup")
    trained("rarely", "--max-steps", 4, "--ema-warmup")
    for name in ("run", "rarely"):
        left = read_meta(tmp_path / name / "checkpoints/0000004").ema_start
        assert left == pytest.approx(2 / 11 * 3 / 12 * 4 / 13 * 5 / 14)
    assert same_run(tmp_path / "run", tmp_path / "rarely", 4)
    checkpoints = [tensors(path) for path in run_checkpoints(tmp_path / "run")]
    key = "t_embedder.mlp.0.weight"
    for step, (before, now) in enumerate(zip(checkpoints, checkpoints[1:]), 2):
        decay = min(0.9, (1 + step) / (10 + step))
        torch.testing.assert_close(now[f"ema/{key}"], decay * before[f"ema/{key}"] + (1 - decay) * now[f"model/{key}"])


@pytest.mark.slow
def test_begun_with_other_weights(trained, refused, tmp_path):
    trained("first", "--max-steps", 1)
    first = tmp_path / "first/checkpoints/0000001"
    said = trained("second", "--max-steps", 1, "--lr", 0, "--pretrained-path", first)
    assert f"tensors from {first}" in said and "not taken" not in said
    assert read_meta(tmp_path / "second/checkpoints/0000001").ema_start == 0
    for key, value in tensors(tmp_path / "second/checkpoints/0000001").items():
        if key.startswith(("model/", "ema/")):
            assert torch.equal(value, tensors(first)[f"ema/{key.split('/')[1]}"]), key
    torch.manual_seed(0)
    other = DiT_models["DiTSEM-Ti/4"](input_size=8, L=6, V=9).state_dict()
    other["extra"] = other.pop("t_embedder.mlp.0.bias")
    torch.save(other, tmp_path / "other.pt")
    said = trained("third", "--max-steps", 1, "--pretrained-path", tmp_path / "other.pt")
    assert "sem_embedder.embedding_table not taken: (6, 10, 192) there, (6, 301, 192) here" in said
    assert "left out: extra" in said and "new: sem_embedder" not in said and "t_embedder.mlp.0.bias" in said
    (tmp_path / "junk.pt").write_bytes(b"junk")
    assert "junk.pt cannot be read as weights" in refused("fourth", "--pretrained-path", tmp_path / "junk.pt")


@pytest.mark.slow
def test_steps_that_the_scaler_skips(train, tmp_path):
    run = train("run", "--max-steps", 9, "--max-nonfinite", 3, "--ckpt-every", 2, fault="skipping")
    assert not run.wait()
    assert "step 7: 3 steps in a row without a finite gradient; stopped. The last good checkpoint: " in run.said()
    assert [line["skipped_steps"] for line in metrics(tmp_path / "run")] == [0, 0, 1, 0, 1, 1, 1]
    assert [line["loss"] is None for line in metrics(tmp_path / "run")] == [False, False, True, False, True, True, True]
    assert [path.name for path in run_checkpoints(tmp_path / "run")] == ["0000002", "0000004"]  # 6 was put off
    run = train("every", "--max-steps", 4, "--ckpt-every", 1, fault="skipping")
    assert run.wait(), run.said()
    assert [path.name for path in run_checkpoints(tmp_path / "every")] == ["0000001", "0000002", "0000004"]
    run = train("last", "--max-steps", 3, "--ckpt-every", 1, fault="skipping")
    assert run.wait(), run.said()
    two, three = (tensors(path) for path in run_checkpoints(tmp_path / "last")[-2:])
    assert all(torch.equal(two[key], three[key]) for key in two if key.startswith("ema/"))


@pytest.mark.slow
def test_skipped_steps_of_two_processes_and_of_a_resumed_run(trained, tmp_path):
    flags = ("--log-every", 4, "--ckpt-every", 2, "--grad-clip", 1)
    trained("one", "--max-steps", 9, *flags, fault="skipping")
    trained("two", "--max-steps", 9, *flags, processes=2, fault="skipping")
    trained("parts", "--max-steps", 5, *flags, fault="skipping")
    trained("parts", "--max-steps", 9, *flags, fault="skipping")
    assert same_run(tmp_path / "one", tmp_path / "parts", 9)
    assert [path.name for path in run_checkpoints(tmp_path / "one")] == ["0000002", "0000004", "0000008", "0000009"]
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [line["skipped_steps"] for line in one] == [line["skipped_steps"] for line in two] == [1, 3]
    assert [line["scaler_scale"] for line in one] == [line["scaler_scale"] for line in two] == [2.0**15, 2.0**12]
    for first, second in zip(one, two):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-4)
    state = tensors(tmp_path / "one/checkpoints/0000009")
    assert {value.item() for key, value in state.items() if key.endswith("step")} == {5.0}


@pytest.mark.slow
def test_weights_that_are_not_finite(train, tmp_path):
    """A gradient may be NaN though the loss is not: no checkpoint holds what AdamW makes of it."""
    run = train(
        "run", "--max-steps", 9, "--ckpt-every", 2, "--log-every", 9, "--ckpt-total-limit", 1, fault="nan_gradients,4"
    )
    assert not run.wait() and "Traceback" not in run.said()
    assert re.search("step 4: .*stopped. The last good checkpoint: .*/0000002", run.said())
    assert [path.name for path in run_checkpoints(tmp_path / "run")] == ["0000002"]


@pytest.mark.slow
def test_vectors_as_conditions(trained, refused, tmp_path):
    vectors = np.random.default_rng(0).normal(size=(14, 5)).astype(np.float16)
    (tmp_path / "vectors").mkdir()
    for name, part in (("0.npy", vectors[:9]), ("1.npy", vectors[9:])):
        np.save(tmp_path / "vectors" / name, part)
    flags = ("--model", "DiTCONT-Ti/4", "--condition-path", tmp_path / "vectors")
    assert "in_dim=5" in trained("run", "--max-steps", 4, "--sample-every", 4, *flags)
    assert (tmp_path / "run/previews/0000004.png").is_file()
    trained("two", "--max-steps", 2, *flags)
    trained("two", "--max-steps", 4, *flags)
    assert same_run(tmp_path / "two", tmp_path / "run", 4)
    np.save(tmp_path / "vectors/0.npy", vectors[:9] + 1)
    line = refused("run", "--max-steps", 6, *flags)
    assert "first_vectors_sha256" in line and "--allow-change" in line


@pytest.mark.slow
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


def test_picture_of_the_losses(tmp_path):
    draw_losses([dict(step=1, loss=None)], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    draw_losses([dict(step=step, loss=1 / step) for step in range(1, 100)], tmp_path / "loss.png")
    # what is added to the process's own loss is not drawn
    draw_losses([dict(step=step, loss=-1.0, mse=1 / step, vb=0.0) for step in range(1, 100)], tmp_path / "own.png")
    assert (tmp_path / "own.png").read_bytes() == (tmp_path / "loss.png").read_bytes()
    picture = np.array(Image.open(tmp_path / "loss.png"))
    rows, columns = ((picture[..., 2] > 150) & (picture[..., 0] < 100)).nonzero()  # blue
    assert rows[columns.argmin()] < 40 and rows[columns.argmax()] > 320  # falls, over the whole width
    assert columns.max() - columns.min() > 600


@pytest.mark.slow
def test_tensorboard(trained, tmp_path):
    """The numbers of metrics.jsonl; what a killed launch wrote after its checkpoint is hidden by the next one."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ("--ckpt-every", 2, "--report-to", "tensorboard")
    trained("run", "--max-steps", 3, *flags, processes=2)
    shutil.rmtree(tmp_path / "run/checkpoints/0000003")
    trained("run", "--max-steps", 5, *flags)
    first, second = sorted((tmp_path / "run").rglob("events.out.tfevents*"))
    assert first.parent == second.parent
    reported = EventAccumulator(str(first.parent))
    reported.Reload()
    assert [scalar.step for scalar in reported.Scalars("loss")] == [1, 2, 3, 4, 5]
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    np.testing.assert_allclose([scalar.value for scalar in reported.Scalars("loss")], losses, rtol=1e-6)


@pytest.mark.slow
def test_wandb_that_does_not_start(refused, monkeypatch, tmp_path):
    if not importlib.util.find_spec("wandb"):
        assert "--report-to wandb needs its package: pip install wandb" in refused("run", "--report-to", "wandb")
    (tmp_path / "wandb.py").write_text("def init(**_):\n    raise RuntimeError('No API key configured.')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.WANDB])
    error = refused("run", "--report-to", "wandb")
    assert "wandb does not start (No API key configured.); run wandb login, or set WANDB_MODE=offline" in error


@pytest.mark.slow
def test_sharded(trained, features, tmp_path):
    """FSDP by the configuration file that is shipped, on two CPU processes: the losses of one process; its checkpoints
    load as any other, are continued sharded and whole, and previews are drawn."""

    flags = ("--grad-clip", 1, "--max-steps")
    command = train_command(2, features, tmp_path / "sharded", *flags, 3, "--grad-accum", 2, launcher="fsdp")
    result = launch(command, tmp_path, check=False)
    if "no attribute 'record_event'" in result.stderr:
        pytest.skip("this torch has no FSDP on the CPU")
    assert result.returncode == 0, result.stderr
    assert "precision: fp32, sharded (FSDP)" in result.stdout
    sharded = dict(processes=2, environment=dict(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2"))
    assert "sharded (FSDP)" in trained("sharded", *flags, 6, "--sample-every", 6, **sharded)
    trained("one", *flags, 6, "--sample-every", 6)
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose(
            [line[key] for line in metrics(tmp_path / "sharded")],
            [line[key] for line in metrics(tmp_path / "one")],
            rtol=1e-4,
        )
    shards, one = (tensors(tmp_path / f"{name}/checkpoints/0000006") for name in ("sharded", "one"))
    assert shards.keys() == one.keys() and alike(shards, one)
    assert load_model(tmp_path / "sharded/checkpoints/0000006")[1] == "DiTSEM-Ti/4"
    pictures = [Image.open(tmp_path / f"{name}/previews/0000006.png") for name in ("sharded", "one")]
    two, one = (np.array(picture).astype(int) for picture in pictures)
    assert np.abs(two - one).max() <= 3
    assert "steps 6 to 7" in trained("sharded", *flags, 7)
    for name, more in (("sharded bf16", sharded), ("one bf16", {})):  # gathered in 16 bits, summed in float32
        trained(name, *flags, 2, "--precision", "bf16", **more)
    two, one = ([line["loss"] for line in metrics(tmp_path / name)] for name in ("sharded bf16", "one bf16"))
    np.testing.assert_allclose(two, one, rtol=2e-3)
