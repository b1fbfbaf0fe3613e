"""An fp16 step that the scaler skips changes nothing and is counted, on the device, as the unfused way did it."""

import math
from copy import deepcopy

import pytest
import torch

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
