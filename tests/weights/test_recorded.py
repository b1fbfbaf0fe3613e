"""What a changed model or optimizer holds comes back from its checkpoint, or is refused before a step."""

import math
import re

import numpy as np
import pytest
import torch
from conftest import refusal

from diffusion.process_table import create_process
from dlc.weights.checkpoint import begin_groups, load_checkpoint, save_checkpoint, unrecordable
from dlc.weights.load import filled, read_own
from dlc.weights.meta import ModelConfig, RunMeta, config_of, plain
from models import DiTSEM, Recorded, build_model

SIZES = dict(input_size=8, patch_size=4, hidden_size=16, depth=1, num_heads=2, L=4, V=8)


@pytest.fixture(autouse=True)
def _families(monkeypatch):
    monkeypatch.setattr(Recorded, "families", dict(Recorded.families))


def changed(code=lambda model: None):
    class Changed(DiTSEM):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            code(self)

    return Changed(**SIZES)


def test_a_model_that_fixes_its_bases_arguments_is_built_from_its_own():
    class Middle(DiTSEM):
        def __init__(self, depth, L=4):
            super().__init__(input_size=8, hidden_size=16, depth=2 * depth, num_heads=2, L=L, V=8)

    class Outer(Middle):
        def __init__(self, scale=2.0, **kwargs):
            super().__init__(**kwargs)

    model = Outer(depth=1)
    assert model.config == dict(family="Outer", arguments=dict(scale=2.0, depth=1, L=4))
    assert len(build_model(model.config).blocks) == 2
    config_of("outer", model)


@pytest.mark.parametrize("value", [{1: "rope"}, {"a": [{2: 3}]}, {1, 2}, math.nan, torch.bfloat16])
def test_an_argument_that_json_would_change_is_refused(value):
    refusal(plain, dict(plan=value), "the argument", words="^the argument plan is a ")
    assert plain(dict(plan=(1, (2, 3))), "the argument") == dict(plan=[1, [2, 3]])


@pytest.mark.parametrize("value", [torch.tensor([0, -math.inf]), torch.ones(2) * 1j])
def test_a_buffer_that_no_checkpoint_holds_is_refused_before_the_first_step(value):
    model = changed(lambda model: model.register_buffer("mask", value))
    refusal(config_of, "changed", model, words="mask .* register it with persistent=False")


def hold_everything(model):
    model.one, model.other = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    model.other.weight = model.one.weight  # tied
    model.register_buffer("count", torch.arange(3))
    model.register_buffer("mask", torch.ones(2, 3, dtype=torch.bool).t())
    model.turned = torch.nn.Parameter(torch.randn(2, 3).t())
    scale = model.one.weight.std().item()  # reads a weight, which the meta device does not have
    model.register_buffer("scale", torch.tensor(scale), persistent=False)


def test_tied_turned_and_whole_number_tensors_come_back(tmp_path):
    model = changed(hold_everything)
    config = config_of("changed", model, create_process("gaussian", timestep_respacing=""))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parts = dict(optimizers=[optimizer])
    path = save_checkpoint(tmp_path, config, RunMeta(step=1), model=model, ema=model, **parts)
    other = changed(hold_everything)
    load_checkpoint(path, model=other, ema=changed(hold_everything), **parts)
    loaded = filled(config, read_own(path, path)[0], path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]) and torch.equal(value, loaded.state_dict()[name])
    assert other.other.weight is other.one.weight and not loaded.scale.is_meta


def test_a_run_of_before_an_argument_with_a_default_is_the_same_run():
    now = config_of("changed", DiTSEM(**SIZES), create_process("gaussian", timestep_respacing=""))
    before = {name: value for name, value in now.arguments.items() if name != "code_init"}
    before = type(now)(model="changed", family="DiTSEM", arguments=before, process=now.process)
    assert before.completed().differences(now) == ""
    other = config_of("changed", DiTSEM(**SIZES, code_init="dlc"), create_process("gaussian", timestep_respacing=""))
    assert "code_init 'unit' there, 'dlc' here" in before.completed().differences(other)


class Counting(torch.optim.Optimizer):
    """Keeps what it needs in its groups, in a state of no parameter, and in whole numbers, as some hand-written do."""

    def __init__(self, parameters, lr, decay=0.0):
        super().__init__(parameters, dict(lr=lr, decay=decay, k=0))

    def step(self):
        self.state["all"] = self.state.get("all", 0) + 1
        for group in self.param_groups:
            group["k"] += 1
            for one in group["params"]:
                self.state[one]["order"] = torch.arange(3)


def test_what_an_optimizer_changes_of_its_groups_comes_back_and_other_values_are_of_this_launch(tmp_path):
    model = changed()
    config = config_of("changed", model)
    optimizer, other = Counting(model.parameters(), 0.1), Counting(model.parameters(), 0.2, decay=0.5)
    begin_groups(optimizer)
    begin_groups(other)
    optimizer.step()
    optimizer.step()
    path = save_checkpoint(tmp_path, config, RunMeta(step=2), model=model, ema=model, optimizers=[optimizer])
    load_checkpoint(path, model=model, ema=model, optimizers=[other])
    assert other.state["all"] == 2 and other.state[next(model.parameters())]["order"].tolist() == [0, 1, 2]
    assert {name: other.param_groups[0][name] for name in ("lr", "decay", "k")} == dict(lr=0.2, decay=0.5, k=2)


def test_a_state_that_is_not_read_again_is_named():
    assert unrecordable(dict(state={0: dict(step=torch.ones(1), old=[torch.ones(2, dtype=torch.int64)])})) == ""
    assert re.search("float64", unrecordable(dict(state={0: dict(step=np.float64(1))})))
    assert "function" in unrecordable(dict(groups=[dict(rule=lambda: 0)]))


@pytest.mark.parametrize("process", [dict(process="gaussian"), dict(process=3, arguments={}), dict(arguments={}), {}])
def test_a_record_of_a_process_that_is_none_is_refused(process):
    values = dict(model="a", family="DiT", arguments={}, process=process, format="dlc-dit", format_version=1)
    with pytest.raises(ValueError, match="config.json: process is .*, wanted an object of process"):
        ModelConfig.from_json(values, "config.json")
