"""Flow matching: against REPA's and SiT's own code, and against closed forms."""

import argparse
import math

import pytest
import torch
from conftest import close, golden, refusal

from diffusion.flow import FLOW_OPTIONS, EulerSampler, Flow, HeunFlowSampler, SDESampler, score
from diffusion.options import Option, uses_of
from diffusion.process_table import PROCESSES, ProcessRow, create_process
from dlc.machine.cli import add_option
from dlc.sampling.latents import create_sampler
from models import DiT

TOY, REPA, SIT = (
    {key.partition("/")[2]: value for key, value in golden("flow")[0].items() if key.startswith(whose)}
    for whose in ("toy/", "repa/", "sit/")
)
NULL = 1000


def toy_network(x, t, y):
    bias = torch.where(y == NULL, 0.0, 0.3 * torch.sin(y + 1.0)).view(-1, 1, 1, 1)
    return torch.tanh(torch.einsum("oc,nchw->nohw", TOY["W"], x) + 0.2 * t.view(-1, 1, 1, 1) + bias)


def drawn(sampler, network, y, z, noise=None, cfg_scale=1.0, low=0.0, high=1.0):
    """The last x of a sampler. network(x, t, y); y None is the null condition."""

    def predict(x, time, since=None):
        t = sampler.told(torch.full((len(x),), time))
        v = torch.cat([network(x, t, y), x], dim=1)  # of a network that predicts a variance as well
        if cfg_scale == 1 or not low <= (time if since is None else since) <= high:
            return v
        null = torch.cat([network(x, t, torch.full_like(y, NULL)), x], dim=1)
        return null + cfg_scale * (v - null)

    with torch.no_grad():
        *_, (x, _) = sampler(predict, z, noise and noise.__getitem__)
    return x


# ---------------------------------------------------------------------- reference values


def test_interpolant_loss_and_score_agree_with_reference():
    flow, (x, n, t) = Flow(), (TOY[name] for name in "xnt")
    close(flow.q_sample(x, t, n), TOY["x_t"])
    close(flow.training_losses(toy_network, x, t, dict(y=TOY["y"]), n)["loss"], TOY["loss"])
    v = toy_network(TOY["x_t"], t, TOY["y"])
    close(score(TOY["x_t"], t.view(-1, 1, 1, 1), v), TOY["score"])
    uniforms = torch.special.ndtr(TOY["normals"].double())
    close(Flow("lognormal").training_times(uniforms), TOY["t_lognormal"])
    # SiT's time runs the other way
    close(flow.q_sample(SIT["plan_data"], 1 - SIT["plan_t"], SIT["plan_noise"]), SIT["plan_x_t"])


@pytest.mark.parametrize(
    "name, sampler", [("euler10", EulerSampler), ("heun10", HeunFlowSampler), ("sde12", SDESampler)]
)
def test_samplers_agree_with_reference(name, sampler):
    args = sampler(int(name[-2:]), Flow()), toy_network, TOY["y"], TOY["z"], list(TOY["sde_noise"])
    close(drawn(*args), TOY[name])
    low = dict(low=0.2) if name == "euler10" else {}
    close(drawn(*args, cfg_scale=1.5, high=0.7, **low), TOY[f"{name}_cfg"])


def test_loss_of_repas_network_agrees_with_reference():
    model = DiT(8, 2, hidden_size=32, depth=3, num_heads=2, num_classes=7, learn_sigma=False).eval()
    weights = {key[2:]: value for key, value in REPA.items() if key.startswith("w/") and "projectors" not in key}
    model.load_state_dict(weights)
    data, noise, t = (REPA[f"loss_{name}"] for name in ("data", "noise", "t"))
    with torch.no_grad():
        losses = Flow().training_losses(model, data, t, dict(y=REPA["y"]), noise)
    close(losses["loss"], REPA["denoising_loss"])


# ---------------------------------------------------------------------- closed forms


def test_one_step_is_the_prediction_of_x_start_and_times_are_shifted():
    x, v = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    for name in ("euler", "heun"):
        ((last, x_start),) = create_sampler(name, 1, create_process("flow"))(lambda x, time: v, x, None)
        assert torch.equal(last, x_start)
        close(last, x - v)
    shifted = create_sampler("euler", 4, create_process("flow", time_scale=1000.0), time_shift=3.0)
    assert shifted.times == pytest.approx([1, 0.9, 0.75, 0.5]) and shifted.told(torch.tensor(0.5)) == 500


def test_training_times():
    u = torch.tensor([0, 0.25, 0.5, 1 - 2**-32], dtype=torch.float64)
    uniform = Flow().training_times(u)
    assert uniform.dtype == torch.float32 and uniform.tolist() == [0, 0.25, 0.5, 1 - 2**-24]
    times = Flow("lognormal", time_mean=-0.4, time_std=2.0).training_times(u)
    assert times[0] == 0 and times[2] == pytest.approx(1 / (1 + math.exp(0.4))) and 0.99 < times[3] < 1


def test_arguments_that_do_not_exist():
    for arguments, message in (
        (dict(time_distribution="cosine"), "time distribution cosine: must be one of uniform, lognormal"),
        (dict(time_std=0.0), "time mean 0.0, std 0.0 and scale 1.0: the mean is finite, std above 0"),
        (dict(time_std=2.0), "time mean 0.0 and std 2.0 go with the time distribution lognormal"),
        (dict(time_scale="1"), "process flow: "),
        (dict(time_scale=1.5), "scale 1.5: the mean is finite, std above 0, and the scale a whole number"),
        (dict(shift=1), "process flow: "),
    ):
        refusal(create_process, "flow", **arguments, words=message)
    words = "--num-sampling-steps 1001: --sampler euler has 1 to 1000"
    refusal(create_sampler, "euler", 1001, create_process("flow"), words=words)


class Own(Flow):
    """A process of a researcher's, which passes its base's arguments on."""

    def __init__(self, gamma=2.0, time_std=0.5, **kwargs):
        super().__init__("lognormal", time_std=time_std, **kwargs)


def test_a_process_that_passes_arguments_on_is_built_from_its_record(monkeypatch):
    monkeypatch.setitem(PROCESSES, "own", ProcessRow(Own))
    process = create_process("own", time_scale=1000.0)
    assert process.config == dict(process="own", arguments=dict(gamma=2.0, time_std=0.5, time_scale=1000.0))
    again = create_process("own", **process.config["arguments"])
    assert again.config == process.config and again.time_scale == 1000
    refusal(create_process, "own", shift=1, words="process own: .*'shift'")


def test_an_option_that_two_processes_have_is_one_flag(capsys):
    own = dict(time_std=Option("of sigma", high=99), time_scale=FLOW_OPTIONS["time_scale"])
    parser = argparse.ArgumentParser(formatter_class=argparse.RawTextHelpFormatter)
    for name, uses in uses_of([("flow", Flow, FLOW_OPTIONS), ("own", Own, own)]).items():
        add_option(parser.add_argument, name, uses, "of {}: ")
    assert parser.parse_args(["--time-std", "50"]).time_std == 50
    said = parser.format_help()
    assert "of flow: set the standard deviation of that normal [1.0]; of own: of sigma [0.5]" in said
    assert "of flow, own: give the model" in said and said.count("--time-scale TIME_SCALE") == 2
    with pytest.raises(SystemExit):
        parser.parse_args(["--time-std", "100"])
