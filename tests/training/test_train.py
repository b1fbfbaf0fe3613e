"""train_diffusion.py and train.py through their launchers."""

import json
import math
import re
import shutil
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import IMAGE_SIZE, change_json, launch, sample_folder
from grids import grid_cells
from PIL import Image
from training_runs import metrics, tensors, train_command

from diffusion.process_table import create_process
from dlc.data import Features
from dlc.machine.cli import ArgumentParser
from dlc.machine.noise import Stream, integers, normal, uniforms
from dlc.training.batches import TrainingBatches, draw_posterior
from dlc.training.log import Losses
from dlc.training.metrics_file import draw_losses, read_metrics
from dlc.training.run import Run
from dlc.training.run_flags import checkpoint_steps, steps_of_run
from dlc.training.update import SkippedSteps
from dlc.weights.meta import run_checkpoints
from models import DiT_models
from train_diffusion import argument_parser


@pytest.mark.slow
def test_what_a_run_leaves(features, tmp_path):
    """Its first step and its EMA are computed by hand."""
    results, flags = tmp_path / "results", ("--max-steps", 3, "--ckpt-every", 1, "--sample-every", 2)
    flags += ("--grad-clip", 0.5, "--grad-accum", 2)
    result = launch(train_command(1, features, results, *flags, launcher="accelerate"), tmp_path)
    assert result.stdout.count("warning: fp16 needs a GPU; this run uses float32") == 1
    assert json.loads((results / "args.json").read_text())["max_steps"] == 3
    lines = metrics(results)
    assert [line["step"] for line in lines] == [1, 2, 3] and lines[-1]["epoch"] == 3 * 8 / 14
    assert "L=6, V=300" in (results / "log.txt").read_text()
    assert len(grid_cells(results / "previews/0000002.png", IMAGE_SIZE, 8)) == 2
    checkpoints = run_checkpoints(results)
    assert [path.name for path in checkpoints] == ["0000001", "0000002", "0000003"]
    meta, config = (json.loads((checkpoints[-1] / f"{name}.json").read_text()) for name in ("meta", "config"))
    assert (meta["step"], meta["features_path"], config["model"]) == (3, str(features), "DiTSEM-Ti/4")
    assert (config["arguments"]["L"], config["arguments"]["V"], config["process"]["process"]) == (6, 300, "gaussian")
    one, two, three = map(tensors, checkpoints)
    for key in ("blocks.0.attn.qkv.weight", "sem_embedder.embedding_table", "t_embedder.mlp.0.bias"):
        ema, weight = three[f"ema/{key}"], three[f"model/{key}"]
        torch.testing.assert_close(ema, 0.9 * two[f"ema/{key}"] + 0.1 * weight, atol=1e-6, rtol=1e-5)
        assert ema.dtype == torch.float32 and not torch.equal(ema, weight)

    torch.manual_seed(0)
    model, rows = DiT_models["DiTSEM-Ti/4"](input_size=8, L=6, V=300), Features(features)
    batch = TrainingBatches(rows, dict(latents=rows.latents, codes=rows.codes), seed=0, global_batch=8)[0]
    places, x, t = batch["indices"], batch["latents"].float(), integers(0, Stream.TRAIN_TIMESTEP, torch.arange(8), 1000)
    condition = dict(y=batch["codes"], drop=uniforms(0, Stream.TRAIN_DROP, places, 1)[:, 0] < 0.1)
    noise = normal(0, Stream.TRAIN_NOISE, places, (4, 8, 8))
    terms = create_process("gaussian").training_losses(model, x, t, condition, noise)
    terms["loss"].mean().backward()
    norm = torch.stack([weight.grad.norm() for weight in model.parameters()]).norm().item()
    assert lines[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert lines[0]["skipped_steps"] == 0 and lines[0]["scaler_scale"] is None
    for quarter, mse in enumerate(lines[0]["mse_by_quarter_of_t"]):
        of_quarter = terms["mse"][(t >= 250 * quarter) & (t < 250 * (quarter + 1))]
        assert mse == (pytest.approx(of_quarter.mean().item(), rel=1e-5) if len(of_quarter) else None)
    moments = torch.stack([value.norm() for key, value in one.items() if key.endswith("exp_avg")]).norm().item()
    assert moments == pytest.approx(0.1 * min(norm, 0.5), rel=1e-4)


@pytest.mark.slow
def test_a_vae_that_cannot_be_loaded(features, error_of, tmp_path):
    copy = shutil.copytree(features, tmp_path / "copy")
    change_json(copy / "manifest.json", vae="nowhere/vae")
    flags = ("--model", "DiTSEM-Ti/4", "--features-path", copy, "--global-batch-size", 4, "--max-steps", 1)
    assert "nowhere/vae" in error_of("train_diffusion", *flags, "--sample-every", 5)
    said = launch(("forked", 1, "train_diffusion.py", *flags, "--results-dir", "run"), tmp_path).stdout
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
    batches = TrainingBatches(SimpleNamespace(count=rows), {}, seed=0, global_batch=256)
    assert steps_of_run(args, batches) == last and checkpoint_steps(args, last) == checkpoints


@pytest.mark.slow
def test_a_disk_without_room_for_a_checkpoint(refused, monkeypatch, tmp_path):
    """Is seen before the first step: raw weights, EMA and AdamW's two moments; seven files."""
    for free, inodes in ((50_000_000, 10**6), (10**9, 5)):
        disk = SimpleNamespace(f_blocks=1, f_bavail=free, f_frsize=1, f_files=10**6, f_favail=inodes)
        monkeypatch.setattr("os.statvfs", lambda path, disk=disk: disk)
        words = f"checkpoint takes about 0.073 GB and a few inodes, .* and {inodes:,} inodes: make room"
        assert re.search(words, refused("run"))
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.slow
def test_a_flow_from_training_to_samples(trained, refused, tmp_path, features, error_of, said_by):
    run, flags = tmp_path / "run", ("--objective", "flow", "--time-distribution", "lognormal", "--max-steps", 4)
    trained("run", *flags, "--sample-every", 4)
    config = json.loads((run / "checkpoints/0000004/config.json").read_text())
    arguments = dict(time_distribution="lognormal", time_mean=0.0, time_std=1.0, time_scale=1.0)
    assert config["process"] == dict(process="flow", arguments=arguments)
    assert config["arguments"]["learn_sigma"] is False
    assert len(grid_cells(run / "previews/0000004.png", IMAGE_SIZE, 8)) == 2
    line = metrics(run)[-1]
    assert "mse" not in line and len(line["loss_by_quarter_of_t"]) == 4 and 1 < line["loss"] < 4
    assert "process 'flow' there, 'gaussian' here" in refused("run", "--objective", "ddpm")
    words = "process time_distribution 'lognormal' there, 'uniform' here"
    assert words in refused("run", "--objective", "flow")

    sampling = ("--ckpt", run, "--no-ema", "--dlc-dir", features, "--num-fid-samples", 3, "--sample-dir", "samples")
    for flags, message in (
        (("--sampler", "ddpm"), "--sampler ddpm does not draw .* the process flow.*: euler or heun or sde does"),
        (("--eta", 0.5), "--eta 0.5: --sampler euler has none: leave it out"),
        (("--t-max", 430), "--t-max 430: DiTSEM-Ti/4 was trained on the process flow, whose times are 0 to 1"),
    ):
        assert re.search(message, error_of("sample_ddp_computed_dlc", *sampling, *flags))
    said_by("sample_ddp_computed_dlc", *sampling, "--num-sampling-steps", 3, "--time-shift", 2, "--t-max", 0.7)
    record = json.loads((sample_folder(tmp_path / "samples") / "samples.json").read_text())
    known = dict(sampler="euler", num_sampling_steps=3, time_shift=2.0, eta=None, t_min=0, t_max=0.7)
    assert {name: record[name] for name in known} == known


# ---------------------------------------------------------------------- batches


def test_every_row_once_an_epoch():
    rows = SimpleNamespace(count=14, gather=lambda rows: 100 + rows)
    settings, streams = dict(arrays=dict(codes=rows), seed=0, global_batch=8), []
    for world_size in (1, 2, 4):
        parts = [TrainingBatches(rows, **settings, rank=rank, world_size=world_size) for rank in range(world_size)]
        streams.append([row - 100 for step in range(7) for part in parts for row in part[step]["codes"].tolist()])
    assert streams[0] == streams[1] == streams[2] and len(streams[0]) == 4 * 14
    for epoch in range(4):
        assert sorted(streams[0][epoch * 14 : (epoch + 1) * 14]) == list(range(14))
    assert parts[1][3]["indices"].tolist() == [26, 27]  # in the middle, without those before it


def test_moments_are_drawn_anew_in_each_epoch():
    moments = torch.stack([torch.full((8, 8, 8), 2.0), torch.zeros(8, 8, 8)]).repeat(3, 1, 1, 1)
    places = torch.tensor([0, 1, 14, 15, 28, 29])  # rows 0 and 1 in three epochs of 14
    x = draw_posterior(moments, 0, places)
    assert x.shape == (6, 4, 8, 8)
    torch.testing.assert_close(x[::2], 2 + 2 * normal(0, Stream.TRAIN_POSTERIOR, places[::2], (4, 8, 8)))
    assert (x[1::2] == 0).all() and not torch.equal(x[0], x[2]) and not torch.equal(x[2], x[4])


# ---------------------------------------------------------------------- the log


def test_skips_are_counted_of_all_optimizers():
    """A fused one or another, on from a checkpoint, and anew from a line of the log."""
    weights, scaler = [torch.nn.Parameter(torch.ones(3, 3)) for _ in range(2)], torch.amp.GradScaler("cpu")
    optimizers = [torch.optim.SGD(weights[:1], lr=0.1), torch.optim.AdamW(weights[1:], fused=True)]
    skips = SkippedSteps(optimizers, scaler, torch.device("cpu"), since_line=2)
    assert skips.last is None and skips.read() == (2, 0, 0)
    for place, factor, expected in ((0, math.nan, (3, 1, 1)), (1, math.inf, (4, 2, 2)), (0, 1, (4, 0, 2))):
        before = deepcopy(weights)
        scaler.scale((factor * weights[place]).sum() + weights[1 - place].sum()).backward()
        skips.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        assert torch.equal(before[place], weights[place]) == (factor != 1)
        assert skips.read() == expected and skips.last.item() == (factor != 1)
    skips.begin_line()
    assert skips.read() == (0, 0, 2)


def test_a_loss_may_get_another_term_between_launches_but_not_within_one(capsys):
    run, said = Run.__new__(Run), []
    run.parser, run.args = ArgumentParser(""), SimpleNamespace(grad_accum=1)
    run.logger, run.accelerator = (SimpleNamespace(info=said.append), SimpleNamespace(backward=lambda loss: None))
    run.losses, run.step_sums, run.rates = Losses("images"), None, []
    run.losses.names, run.losses.values = ("loss", "mse"), torch.full((10,), 7.0)
    terms = {name: torch.tensor(values) for name, values in dict(mse=[1.0, 3], loss=[5.0, 5], more=[4.0, 4]).items()}
    run.backward(terms, torch.arange(2), 8)
    assert "the terms loss, mse, more, no longer loss, mse: the next line" in said[0]
    means = run.losses.means(run.step_sums)
    assert (means["loss"], means["mse"], means["more"], means["mse_by_quarter_of_t"][0]) == (5, 2, 4, 2)
    with pytest.raises(SystemExit):
        run.backward(dict(loss=terms["loss"], mse=terms["mse"]), torch.arange(2), 8)
    assert "let it return each of them at every step" in capsys.readouterr().err


def test_picture_of_the_losses(tmp_path, capsys):
    def drawn(lines):
        draw_losses(lines, tmp_path / "loss.png")
        return np.array(Image.open(tmp_path / "loss.png"))

    draw_losses([dict(step=1, loss=None)], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    picture = drawn([dict(step=step, loss=1 / step) for step in range(1, 100)])
    # what is added to the process's own loss is not drawn
    assert (drawn([dict(step=step, loss=-1.0, mse=1 / step, vb=0.0) for step in range(1, 100)]) == picture).all()
    rows, columns = ((picture[..., 2] > 150) & (picture[..., 0] < 100)).nonzero()  # blue
    assert rows[columns.argmin()] < 40 and rows[columns.argmax()] > 320  # falls, over the whole width
    assert columns.max() - columns.min() > 600
    assert drawn([dict(step=1, loss=0.5), dict(step=1, heldout_nats=2.5, independent_nats=3.0)]).shape[:2] == (800, 800)
    # of a file that is damaged, the lines that are not
    lines = ['{"step": 1, "loss": 0.5}', '{"step": 2, "loss": 1e400}', '{"step": 3, "loss": NaN}']
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, f'{{"step": {10**30}, "loss": 0.25}}', ""]))
    assert read_metrics(tmp_path / "metrics.jsonl") == [dict(step=1, loss=0.5)]
    assert re.fullmatch("warning: .*metrics.jsonl: 3 damaged lines.*\n", capsys.readouterr().err)
