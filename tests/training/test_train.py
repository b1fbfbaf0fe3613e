"""train_diffusion.py and train.py through their launchers."""

import itertools
import json
import re
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import IMAGE_SIZE, change_json, launch
from grids import grid_cells
from PIL import Image
from training_runs import metrics, tensors, train_command

from dlc.data import Features, kind_dir
from dlc.machine.noise import Stream, normal
from dlc.training.batches import TrainingBatches, draw_posterior
from dlc.training.metrics_file import draw_losses, read_metrics
from dlc.training.run_flags import checkpoint_steps, steps_of_run
from train_diffusion import argument_parser


@pytest.fixture(scope="module")
def run(features, tmp_path_factory):
    """Six steps by one process, a checkpoint at each, a preview at the fourth."""
    results = tmp_path_factory.mktemp("run") / "results"
    flags = ("--max-steps", 6, "--ckpt-every", 1, "--sample-every", 4)
    return results, launch(train_command(1, features, results, *flags, launcher="accelerate"), results.parent)


@pytest.mark.slow
def test_what_a_run_leaves(run, features):
    results, result = run
    assert result.stdout.count("warning: fp16 needs a GPU; this run uses float32") == 1
    assert json.loads((results / "args.json").read_text())["max_steps"] == 6
    lines = metrics(results)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["epoch"] == 6 * 8 / 14
    assert "L=6, V=300" in (results / "log.txt").read_text()
    assert sorted(path.name for path in (results / "checkpoints").iterdir()) == [f"{step:07d}" for step in range(1, 7)]
    assert len(grid_cells(results / "previews/0000004.png", IMAGE_SIZE, 8)) == 2
    meta = json.loads((results / "checkpoints/0000006/meta.json").read_text())
    config = json.loads((results / "checkpoints/0000006/config.json").read_text())
    assert (meta["step"], meta["features_path"], config["model"]) == (6, str(features), "DiTSEM-Ti/4")
    assert (config["arguments"]["L"], config["arguments"]["V"], config["process"]["process"]) == (6, 300, "gaussian")


@pytest.mark.slow
def test_defaults_leave_a_checkpoint_and_a_preview(workplace):
    """At the end of a short run, and the log's first lines say when there would be others."""
    for run in ("results", "results_dit"):
        assert (workplace / run / "checkpoints/0000003").is_dir()
        assert len(grid_cells(workplace / run / "previews/0000003.png", IMAGE_SIZE, 8, captions="dit" in run)) == 2
        text = (workplace / run / "log.txt").read_text()
        assert "run: steps 0 to 3 (0.9 epochs)" in text and "checkpoints: at step 250, every 250 steps" in text


@pytest.mark.slow
def test_a_vae_that_cannot_be_loaded(features, error_of, tmp_path):
    copy = shutil.copytree(features, tmp_path / "copy")
    change_json(copy / "manifest.json", vae="nowhere/vae")
    flags = ("--max-steps", 1, "--features-path", copy, "--sample-every")
    assert "nowhere/vae" in error_of("train_diffusion", "--model", "DiTSEM-Ti/4", *flags, 5)
    command = list(train_command(1, copy, tmp_path / "run", *flags[:2]))
    at = command.index("--sample-every")
    said = launch(command[:at] + command[at + 2 :], tmp_path).stdout
    assert "warning: there will be no previews (--vae nowhere/vae" in said
    assert (tmp_path / "run/checkpoints/0000001").is_dir() and not (tmp_path / "run/previews").exists()


@pytest.mark.parametrize(
    "rows, flags, last, checkpoints",
    [
        (1_281_167, (), 7_006_383, (250, 50_000)),
        (3_786, (), 20_705, (250, 2_000)),
        (500, (), 20_000, (250, 2_000)),
        (500, ("--epochs", "1400"), 2_735, (250, 300)),
        (500, ("--max-steps", "300"), 300, (250, 250)),
        (500, ("--max-steps", "300", "--epochs", "10"), 20, (250, 250)),
        (500, ("--max-steps", "9000000", "--ckpt-every", "7"), 9_000_000, (7, 7)),
    ],
)
def test_defaults_follow_the_data(rows, flags, last, checkpoints):
    args = argument_parser().parse_args(flags)
    batches = TrainingBatches(types.SimpleNamespace(count=rows), {}, seed=0, global_batch=256)
    assert steps_of_run(args, batches) == last and checkpoint_steps(args, last) == checkpoints


@pytest.mark.slow
@pytest.mark.parametrize("free, inodes", [(50_000_000, 10**6), (10**9, 5)])
def test_a_disk_without_room_for_a_checkpoint(free, inodes, features, error_of, monkeypatch):
    """Is seen before the first step: raw weights, EMA and AdamW's two moments; seven files."""
    disk = types.SimpleNamespace(f_blocks=1, f_bavail=free, f_frsize=1, f_files=10**6, f_favail=inodes)
    monkeypatch.setattr("os.statvfs", lambda path: disk)
    flags = ("--features-path", features, "--model", "DiTSEM-Ti/4", "--sample-every", 0, "--num-workers", 0)
    error = error_of("train_diffusion", *flags)
    assert "a checkpoint takes about 0.073 GB and a few inodes" in error and f"{inodes:,} inodes: make room" in error
    assert not (Path("results") / "metrics.jsonl").exists()


@pytest.mark.slow
def test_ema_is_its_closed_form(run):
    results, _ = run
    checkpoints = [tensors(results / f"checkpoints/{step:07d}") for step in range(1, 7)]
    for key in ("blocks.0.attn.qkv.weight", "sem_embedder.embedding_table", "t_embedder.mlp.0.bias"):
        ema, weights = ([one[f"{name}/{key}"] for one in checkpoints] for name in ("ema", "model"))
        for before, now, weight in zip(ema, ema[1:], weights[1:]):
            torch.testing.assert_close(now, 0.9 * before + 0.1 * weight, atol=1e-6, rtol=1e-5)
        assert now.dtype == torch.float32 and not torch.equal(now, weight)


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_the_run(features, tmp_path):
    copy, results = tmp_path / "copy", tmp_path / "results"
    shutil.copytree(features, copy)
    launch(train_command(1, features, results, "--max-steps", 1), tmp_path)
    for path in kind_dir(copy, IMAGE_SIZE, "features").iterdir():
        np.save(path, np.full_like(np.load(path), np.nan))
    flags = ("--max-steps", 3, "--log-every", 100, "--ckpt-every", 2)
    result = launch(train_command(1, copy, results, *flags), tmp_path, check=False)
    assert result.returncode == 1
    assert f"step 2: the loss is nan; stopped. The last good checkpoint: {results}/checkpoints/0000001" in result.stdout
    assert [path.name for path in (results / "checkpoints").iterdir()] == ["0000001"]
    assert metrics(results)[-1]["loss"] is None


@pytest.mark.slow
def test_every_row_once_an_epoch(features):
    rows, streams = Features(features), []
    codes = dict(codes=rows.codes)
    for world_size in (1, 2, 4):
        settings = dict(seed=0, global_batch=8, world_size=world_size)
        parts = [TrainingBatches(rows, codes, **settings, rank=rank) for rank in range(world_size)]
        stream = []
        for step, part in itertools.product(range(7), parts):
            stream += list(part.rows(np.arange(part.local_batch) + step * 8 + part.rank * part.local_batch))
        assert len(stream) == 4 * 14
        for epoch in range(4):
            assert sorted(stream[epoch * 14 : (epoch + 1) * 14]) == list(range(14))
        streams.append(stream)
    assert streams[0] == streams[1] == streams[2]
    # a batch in the middle, without those before it
    batch = TrainingBatches(rows, codes, seed=0, global_batch=8, rank=1, world_size=4)[3]
    assert batch["indices"].tolist() == [26, 27]
    np.testing.assert_array_equal(batch["latents"], rows.latents.gather(np.array(stream[26:28])))
    np.testing.assert_array_equal(batch["codes"], rows.codes.gather(np.array(stream[26:28])))


def test_moments_are_drawn_anew_in_each_epoch():
    moments = torch.stack([torch.full((8, 8, 8), 2.0), torch.zeros(8, 8, 8)]).repeat(3, 1, 1, 1)
    places = torch.tensor([0, 1, 14, 15, 28, 29])  # rows 0 and 1 in three epochs of 14
    x = draw_posterior(moments, 0, places)
    assert x.shape == (6, 4, 8, 8)
    torch.testing.assert_close(x[::2], 2 + 2 * normal(0, Stream.TRAIN_POSTERIOR, places[::2], (4, 8, 8)))
    assert (x[1::2] == 0).all() and not torch.equal(x[0], x[2]) and not torch.equal(x[2], x[4])


def test_metrics_that_are_not_finite(tmp_path, capsys):
    lines = ['{"step": 1, "loss": 0.5}', '{"step": 2, "loss": 1e400}', '{"step": 3, "loss": NaN}']
    lines.append(f'{{"step": {10**30}, "loss": 0.25}}')
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    found = read_metrics(tmp_path / "metrics.jsonl")
    assert found == [dict(step=1, loss=0.5)]
    assert re.fullmatch("warning: .*metrics.jsonl: 3 damaged lines.*\n", capsys.readouterr().err)
    draw_losses(found, tmp_path / "loss.png")
    assert Image.open(tmp_path / "loss.png").size == (800, 400)
    draw_losses([*found, dict(step=1, heldout_nats=2.5, independent_nats=3.0)], tmp_path / "loss.png")
    assert Image.open(tmp_path / "loss.png").size == (800, 800)
