"""An fp16 step that the scaler skips changes nothing and is counted, on the device, as the unfused way did it."""

import math
from copy import deepcopy

import pytest
import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dlc.training.update import SkippedSteps, update_ema

STEPS, OVERFLOWING = 12, (1, 4, 6, 7, 8, 12)
SETTINGS = dict(lr=1e-2, weight_decay=0.1)
SCALER = dict(device="cpu", init_scale=2.0**10, growth_interval=2)  # grows, too, within the steps


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.GELU(), torch.nn.Linear(7, 3))


def losses(model):
    """The loss of each step, infinite in some of them."""
    generator = torch.Generator().manual_seed(1)
    for step in range(1, STEPS + 1):
        loss = model(torch.randn(4, 5, generator=generator)).square().mean()
        yield step, loss * math.inf if step in OVERFLOWING else loss


def clip(scaler, optimizer, model):
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)


def trained(clipped, on_device):
    """Weights, EMA, AdamW's state, the scaler's scales, and what was counted at each step.

    on_device: as `SkippedSteps` does it; otherwise as the CPU would, by unfused kernels and a look at each step.
    """
    model, scaler = network(), torch.amp.GradScaler(**SCALER)
    ema, kernel = deepcopy(model), dict(fused=True) if on_device else dict(foreach=False)
    optimizer = torch.optim.AdamW(model.parameters(), **kernel, **SETTINGS)
    skips = SkippedSteps([optimizer], scaler, torch.device("cpu"))
    averages, weights = list(ema.parameters()), list(model.parameters())
    scales, counted, since_line, in_a_row, longest = [], [], 0, 0, 0
    for step, loss in losses(model):
        before = deepcopy([model.state_dict(), ema.state_dict(), optimizer.state_dict()["state"]])
        scaler.scale(loss).backward()
        if clipped:
            clip(scaler, optimizer, model)
        skipped = step in OVERFLOWING
        if on_device:
            skips.step()
            with torch.no_grad():
                update_ema(averages, weights, 0.9, skips.last)
            counted.append(skips.read())
        else:
            scaler.step(optimizer)
            scaler.update()
            if not skipped:
                with torch.no_grad():
                    get_ema_multi_avg_fn(0.9)(averages, weights, None)
            since_line, in_a_row = since_line + skipped, (in_a_row + 1) * skipped
            longest = max(longest, in_a_row)
            counted.append((since_line, in_a_row, longest))
        optimizer.zero_grad()
        if skipped and step > 1:  # the first one makes AdamW's zeros
            now = [model.state_dict(), ema.state_dict(), optimizer.state_dict()["state"]]
            torch.testing.assert_close(now, before, rtol=0, atol=0)
        scales.append(scaler.get_scale())
    return [model.state_dict(), ema.state_dict(), optimizer.state_dict()["state"]], scales, counted


@pytest.mark.parametrize("clipped", [False, True])
def test_as_the_cpu_would_decide(clipped):
    """A skipped step changes nothing, to the bit; the others are, to rounding, those of the unfused way."""
    (states, scales, counted), (unfused, *others) = trained(clipped, True), trained(clipped, False)
    torch.testing.assert_close(states, unfused, rtol=1e-5, atol=1e-7)
    assert [scales, counted] == others
    assert counted[-1] == (6, 1, 3) and states[2][0]["step"] == STEPS - len(OVERFLOWING)
    assert scales[0] == 2.0**9 and max(scales) > min(scales)


needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 brought Muon")


def adamw(first, second):
    return [torch.optim.AdamW([first, second], fused=True)]


def sgd_and_muon(first, second):
    return [torch.optim.SGD([first], lr=0.1), torch.optim.Muon([second])]


@pytest.mark.parametrize("build", [adamw, pytest.param(sgd_and_muon, marks=needs_muon)])
def test_counting_goes_on_from_a_checkpoint_and_from_a_line(build):
    weights = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3, 3))]
    optimizers, scaler = build(*weights), torch.amp.GradScaler("cpu")
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
