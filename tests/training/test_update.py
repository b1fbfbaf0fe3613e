"""What a step adds to: the count of steps that the fp16 scaler skips, which change nothing, and the sums of losses."""

import math
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch

from dlc.machine.cli import ArgumentParser
from dlc.training.losses import Losses
from dlc.training.run import Run
from dlc.training.update import SkippedSteps

BUILDERS = dict(adamw=lambda first, second: [torch.optim.AdamW([first, second], fused=True)])
if hasattr(torch.optim, "Muon"):
    BUILDERS["muon"] = lambda first, second: [torch.optim.SGD([first], lr=0.1), torch.optim.Muon([second])]


@pytest.mark.parametrize("name", BUILDERS)
def test_counting_goes_on_from_a_checkpoint_and_from_a_line(name):
    weights = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3, 3))]
    optimizers, scaler = BUILDERS[name](*weights), torch.amp.GradScaler("cpu")
    skips = SkippedSteps(optimizers, scaler, torch.device("cpu"), since_line=2)
    assert skips.last is None and skips.read() == (2, 0, 0)
    for factor, expected in ((math.nan, (3, 1, 1)), (math.inf, (4, 2, 2)), (1, (4, 0, 2))):
        before = deepcopy(weights)
        scaler.scale(sum((factor * weight).sum() for weight in weights)).backward()
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        skips.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        assert all(torch.equal(*pair) == (factor != 1) for pair in zip(before, weights))
        assert skips.read() == expected and skips.last.item() == (factor != 1)
    skips.begin_line()
    assert skips.read() == (0, 0, 2)


def test_a_loss_may_get_another_term_between_launches_but_not_within_one(capsys):
    run, said = Run.__new__(Run), []
    run.parser, run.args = ArgumentParser(""), SimpleNamespace(grad_accum=1)
    run.logger = SimpleNamespace(info=said.append)
    run.accelerator = SimpleNamespace(backward=lambda loss: None)
    run.losses, run.step_sums, run.rates = Losses("images"), None, []
    run.losses.resume(["loss", "mse"], torch.full((10,), 7.0))
    terms, t = (
        dict(mse=torch.tensor([1.0, 3]), loss=torch.tensor([5.0, 5]), more=torch.tensor([4.0, 4])),
        torch.arange(2),
    )
    run.backward(terms, t, 8)
    assert "the terms loss, mse, more, no longer loss, mse: the next line" in said[0]
    means = run.losses.means(run.step_sums)
    assert (means["loss"], means["mse"], means["more"], means["mse_by_quarter_of_t"][0]) == (5, 2, 4, 2)
    with pytest.raises(SystemExit):
        run.backward(dict(loss=terms["loss"], mse=terms["mse"]), t, 8)
    assert "let it return each of them at every step" in capsys.readouterr().err
