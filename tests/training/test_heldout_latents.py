"""The loss on rows that a diffusion model is not trained on: which rows, what it is, and that a run resumes with it."""

import numpy as np
import pytest
import torch
from conftest import launch, tiny_vae
from PIL import Image
from training_runs import metrics, same_run, train_command

from diffusion.process_table import create_process
from dlc.data import Features
from dlc.training.batches import TrainingBatches
from dlc.training.code_batches import split_rows
from dlc.training.heldout import SEED
from dlc.training.heldout_latents import TIMES
from dlc.training.preview import rows_to_show
from dlc.weights.load import load_model
from train_diffusion import losses_of

pytestmark = pytest.mark.slow


def test_what_is_held_out_is_measured_and_not_trained_on(features, tmp_path):
    """Stopped and resumed, and by two processes, it is the same; the best weights are kept; the loss is by definition
    that of the EMA at fixed times and noise."""
    flags = ("--holdout", 0.3, "--eval-every", 2, "--ckpt-every", 2)

    def train(results, steps, processes=1, *more):
        command = train_command(processes, features, tmp_path / results, *flags, launcher="forked")
        return launch((*command, "--max-steps", steps, *more), tmp_path).stdout

    train("parts", 2)
    train("parts", 4)
    assert "1 held out" in train("one", 2, 1, "--holdout", 0.05)
    said = train("whole", 4)
    assert same_run(tmp_path / "whole", tmp_path / "parts", 4)
    assert "data: 10 rows" in said and "4 held out" in said and "held-out loss: lowest at step" in said
    measured = [line for line in metrics(tmp_path / "whole") if "heldout_loss" in line]
    assert [line["step"] for line in measured] == [2, 4] and measured[0]["heldout_error"] > 0
    (best,) = (tmp_path / "whole/best").iterdir()
    assert int(best.name) == min(measured, key=lambda line: line["heldout_loss"])["step"]
    assert Image.open(tmp_path / "whole/loss.png").size == (800, 400)

    model, data, (only, rows) = load_model(best)[0], Features(features), split_rows(14, 0.3)
    latents = torch.from_numpy(data.latents.gather(rows))
    codes = torch.from_numpy(data.codes.gather(rows).astype(np.int64))
    settings, losses = dict(seed=SEED, dropout=0.0, draw_latents=data.latent_kind == "moments"), []
    with torch.no_grad():
        for time in range(TIMES):
            indices = torch.arange(4) * TIMES + time
            terms, _ = losses_of(model, create_process("gaussian"), indices, latents, codes, **settings)
            losses.append(terms["loss"])
    expected = min(line["heldout_loss"] for line in measured)
    assert torch.stack(losses).mean().item() == pytest.approx(expected, rel=1e-4)
    batches = TrainingBatches(data, {}, only=only, seed=0, global_batch=10)
    assert sorted(batches.rows(np.arange(10, 20))) == only.tolist() and batches.rows_per_epoch == 10
    shown = rows_to_show(batches, torch.device("cpu"))["latents"].numpy()  # spread over those that are trained on
    np.testing.assert_array_equal(shown, data.latents.gather(only[[0, 1, 2, 3, 5, 6, 7, 9]]))

    train("two", 4, 2)
    for one, other in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "two")):
        for key in {"loss", "heldout_loss"} & one.keys():
            assert one[key] == pytest.approx(other[key], rel=2e-4)


def test_samples_are_measured(features, tiny_models, tmp_path, monkeypatch):
    """Frechet distance and agreement are logged, the same by two processes, and training is what it is without them."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # which has no weights of Inception: the encoder is taken

    def train(results, processes, *flags, **options):
        command = train_command(processes, features, tmp_path / results, "--max-steps", 2, launcher="forked")
        return launch((*command, *flags), tmp_path, **options).stdout

    flags = ("--holdout", 0.3, "--eval-samples", 5, "--eval-every", 2)
    assert "step 2: 5 samples, Frechet distance" in train("one", 1, *flags, "--vae", tiny_models[0])
    tiny_vae(4, scaling_factor=0.5).save_pretrained(tmp_path / "vae")
    said = train("another", 1, *flags, "--vae", tmp_path / "vae", check=False)
    assert "vae has scaling factor 0.5, the features" in said
    train("two", 2, *flags)
    train("without", 1, *flags[:2])
    (one,), (two,) = ([line for line in metrics(tmp_path / name) if "samples" in line] for name in ("one", "two"))
    assert (one["step"], one["samples"], one["features"]) == (2, 5, "encoder") and 0 <= one["code_agreement"] <= 1
    assert one["frechet_distance"] > 0 and one["frechet_distance"] == pytest.approx(two["frechet_distance"], rel=0.01)
    losses = [[line["loss"] for line in metrics(tmp_path / name) if "loss" in line] for name in ("one", "without")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("processes, look, left", [(1, 3, ()), (1, 30, ("heldout_loss",)), (2, 62, ("heldout_loss",))])
def test_a_stop_cuts_a_measurement_off(processes, look, left, features, tmp_path, monkeypatch):
    """Within a batch, wherever it is; nothing of it is left, and the same command ends as a run without a stop."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    flags = ("--holdout", 0.3, "--eval-samples", 5, "--eval-every", 2, "--max-steps", 3, "--ckpt-every", 3)

    def train(results, fault=None):
        command = train_command(processes, features, tmp_path / results, *flags, launcher="forked")
        return launch(command, tmp_path, fault=fault).stdout

    said = train("parts", f"signalled_looking,SIGTERM,{look},{processes - 1}")
    assert "step 2: a stop cut a measurement off" in said and "stopped by SIGTERM after step 2" in said
    measured = [line for line in metrics(tmp_path / "parts") if "loss" not in line]
    assert tuple(key for line in measured for key in ("heldout_loss", "samples") if key in line) == left
    train("parts")
    train("whole")
    assert same_run(tmp_path / "whole", tmp_path / "parts", 3)
    assert [path.name for path in (tmp_path / "parts/best").iterdir()] == [
        path.name for path in (tmp_path / "whole/best").iterdir()
    ]
