"""The loss on rows that a diffusion model is not trained on: which rows, what it is, and that a run resumes with it."""

import numpy as np
import pytest
import torch
from conftest import tiny_vae
from training_runs import metrics, same_run

from diffusion.process_table import create_process
from dlc.data import Features
from dlc.training.batches import TrainingBatches
from dlc.training.heldout import SEED, TIMES
from dlc.training.split import split_rows
from dlc.weights.load import load_model
from train_diffusion import losses_of

pytestmark = pytest.mark.slow


def test_what_is_held_out_is_measured_and_not_trained_on(trained, features, tmp_path):
    """Stopped and resumed it is the same; the best weights are kept; the loss is by definition that of the EMA at fixed
    times and noise."""
    flags = ("--holdout", 0.3, "--eval-every", 2, "--ckpt-every", 2, "--max-steps")
    trained("parts", *flags, 2)
    trained("parts", *flags, 4)
    said = trained("whole", *flags, 4)
    assert same_run(tmp_path / "whole", tmp_path / "parts", 4)
    assert "data: 10 rows" in said and "4 held out" in said and "held-out loss: lowest at step" in said
    measured = [line for line in metrics(tmp_path / "whole") if "heldout_loss" in line]
    assert [line["step"] for line in measured] == [2, 4] and measured[0]["heldout_error"] > 0
    (best,) = (tmp_path / "whole/best").iterdir()
    lowest = min(measured, key=lambda line: line["heldout_loss"])
    assert int(best.name) == lowest["step"]

    model, data, (only, rows) = load_model(best)[0], Features(features), split_rows(14, 0.3)
    latents = torch.from_numpy(data.latents.gather(rows))
    codes = torch.from_numpy(data.codes.gather(rows).astype(np.int64))
    settings, losses = dict(seed=SEED, dropout=0.0, draw_latents=data.latent_kind == "moments"), []
    with torch.no_grad():
        for time in range(TIMES):
            indices = torch.arange(4) * TIMES + time
            losses.append(losses_of(model, create_process("gaussian"), indices, latents, codes, **settings)[0]["loss"])
    assert torch.stack(losses).mean().item() == pytest.approx(lowest["heldout_loss"], rel=1e-4)
    batches = TrainingBatches(data, dict(latents=data.latents), only=only, seed=0, global_batch=10)
    assert sorted(batches.rows(np.arange(10, 20))) == only.tolist() and batches.rows_per_epoch == 10
    shown = batches.shown(8, torch.device("cpu"))["latents"].numpy()  # spread over those that are trained on
    np.testing.assert_array_equal(shown, data.latents.gather(only[[0, 1, 2, 3, 5, 6, 7, 9]]))


def test_samples_are_measured(trained, refused, tiny_models, tmp_path, monkeypatch):
    """Frechet distance and agreement are logged, the same by two processes, and training is what it is without them."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # which has no weights of Inception: the encoder is taken
    flags = ("--max-steps", 2, "--holdout", 0.3, "--eval-every", 2)
    samples = ("--eval-samples", 5, "--vae")
    assert "step 2: 5 samples, Frechet distance" in trained("one", *flags, *samples, tiny_models[0])
    trained("two", *flags, *samples, tiny_models[0], processes=2)
    trained("without", *flags)
    tiny_vae(4, scaling_factor=0.5).save_pretrained(tmp_path / "vae")
    assert "vae has scaling factor 0.5, the features" in refused("another", *flags, *samples, tmp_path / "vae")
    of_one, of_two, without = ([*metrics(tmp_path / name)] for name in ("one", "two", "without"))
    (one,), (two,) = ([line for line in lines if "samples" in line] for lines in (of_one, of_two))
    assert (one["step"], one["samples"], one["features"]) == (2, 5, "encoder") and 0 <= one["code_agreement"] <= 1
    assert one["frechet_distance"] > 0 and one["frechet_distance"] == pytest.approx(two["frechet_distance"], rel=0.01)
    for key in ("loss", "heldout_loss"):
        one, two, alone = ([line[key] for line in lines if key in line] for lines in (of_one, of_two, without))
        assert one == alone == pytest.approx(two, rel=2e-4)


@pytest.mark.parametrize("processes, look, left", [(1, 3, set()), (2, 62, {"heldout_loss"})])
def test_a_stop_cuts_a_measurement_off(processes, look, left, trained, tmp_path, monkeypatch):
    """Within a batch, wherever it is, by a signal to a process and its readers; nothing of it is left, and the same
    command ends as a run without a stop."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    flags = ("--holdout", 0.3, "--eval-samples", 5, "--eval-every", 2, "--max-steps", 3, "--ckpt-every", 3)
    flags += ("--num-workers", 1)
    fault = f"signalled_looking,group:SIGUSR2,{look},{processes - 1}"
    said = trained("parts", *flags, processes=processes, fault=fault)
    assert (
        "step 2: a stop cut off a measurement" in said
        and "stopped by SIGUSR2 after step 2; the same command continues" in said
    )
    assert {key for line in metrics(tmp_path / "parts") for key in ("heldout_loss", "samples") if key in line} == left
    if processes == 1:  # and again where the same command makes it first
        assert "stopped by SIGUSR2 after step 2; the same" in trained("parts", *flags, fault=fault)
    trained("parts", *flags, processes=processes)
    trained("whole", *flags, processes=processes)
    assert same_run(tmp_path / "whole", tmp_path / "parts", 3)
    best = [[path.name for path in (tmp_path / run / "best").iterdir()] for run in ("parts", "whole")]
    assert best[0] == best[1]
