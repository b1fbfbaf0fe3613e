"""Checkpoints: which is the newest whole one, what it records, and what comes back of a changed model or optimizer."""

import contextlib
import errno
import json
import math
import os
import shutil
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import fails, refusal
from tiny_weights import assert_same

from diffusion.process_table import create_process
from dlc.sampling.opening import open_sampler
from dlc.weights.checkpoint import begin_groups, load_checkpoint, save_checkpoint, unrecordable
from dlc.weights.info import info
from dlc.weights.load import filled, load_model, load_pretrained, newest_in, read_own
from dlc.weights.meta import (
    RunMeta,
    config_of,
    newest_checkpoint,
    newest_of_run,
    plain,
    read_config,
    read_meta,
    resume_point,
    run_checkpoints,
)
from models import DiT_models, DiTSEM, Recorded, build_model

SIZES = dict(input_size=8, patch_size=4, hidden_size=16, depth=1, num_heads=2, L=4, V=8)


GAUSSIAN = create_process("gaussian", timestep_respacing="")


def tiny(name="DiTSEM-Ti/8", **sizes):
    return DiT_models[name](input_size=8, **(sizes or dict(L=3, V=4)))


def config(model, name="DiTSEM-Ti/8"):
    return config_of(name, model, GAUSSIAN)


def meta_of(step, **values):
    """The meta of a run of training."""
    settings = dict(image_size=64, features_count=14, latents="sample", global_batch_size=8, global_seed=0)
    notes = dict(precision="fp32", lr=1e-4, versions={"torch": "2.6"})
    return RunMeta.of_run({**settings, **values}, notes, step=step, place=8 * step, logged=step, skipped=0)


def save(run_dir, model, step=1, name="DiTSEM-Ti/8", optimizers=(), **values):
    parts = dict(model=model, ema=model, optimizers=optimizers)
    return save_checkpoint(run_dir, config(model, name), meta_of(step, **values), **parts)


def adamw(model):
    return [torch.optim.AdamW(model.parameters())]


def test_another_optimizer_or_model_is_no_damage(tmp_path):
    model = tiny()
    path, sgd = save(tmp_path, model, optimizers=adamw(model)), [torch.optim.SGD(model.parameters(), lr=0.1)]
    words = "holds the state of AdamW of .* trains with SGD of .* give another"
    first = refusal(load_checkpoint, path, model=model, ema=model, optimizers=sgd, words=words)
    model.new, words = torch.nn.Linear(2, 2), "belongs to another model: model.safetensors lacks new.bias"
    second = refusal(load_checkpoint, path, model=model, ema=model, optimizers=adamw(model), words=words)
    assert "damaged" not in first + second and "remove" not in first + second


def test_only_whole_checkpoints_count(tmp_path):
    model = tiny()
    for step in (1, 2):
        save(tmp_path / "a", model, step)
    (tmp_path / "a/checkpoints/0000003.tmp").mkdir()
    assert [path.name for path in run_checkpoints(tmp_path / "a")] == ["0000001", "0000002"]
    assert newest_checkpoint(tmp_path / "a", "DiTSEM-Ti/8").name == "0000002"
    save(tmp_path / "b", tiny("DiT-Ti/8", num_classes=3), name="DiT-Ti/8")
    assert newest_checkpoint(tmp_path, "DiTSEM-Ti/8") == tmp_path / "a/checkpoints/0000002"
    refusal(newest_checkpoint, tmp_path, "DiT-S/2", words="no checkpoint of DiT-S/2 .*some of DiT-Ti/8, DiTSEM-Ti/8")


@pytest.mark.skipif(sys.platform == "darwin", reason="its disks take only UTF-8")
def test_names_that_are_no_utf8(tmp_path):
    """What safetensors and torch do not open by its name is not damaged."""
    model, run = tiny(), tmp_path / os.fsdecode(b"caf\xe9 {}%")
    path = save(run, model, optimizers=adamw(model))
    assert newest_of_run(run) == path == newest_checkpoint(run, "DiTSEM-Ti/8")
    load_checkpoint(path, model=model, ema=model, optimizers=adamw(model))
    assert load_model(run)[2].step == 1
    torch.save(model.state_dict(), run / "weights.pt")
    assert load_model(run / "weights.pt")[1] == "DiTSEM-Ti/8"


def test_several_runs_of_a_model_are_listed(tmp_path):
    """The last written is not taken for the one that is meant: a trial of few steps may be."""
    for run, step in ((".", 7), ("a", 4000), ("b", 3), ("in/c", 5), ("in/d", 6)):
        save(tmp_path / run, tiny(), step)
    runs = rf"{tmp_path} \(step 7\), {tmp_path}/a \(step 4,000\), {tmp_path}/b \(step 3\); name one of them"
    words = f"3 runs under {tmp_path} have a checkpoint of DiTSEM-Ti/8: {runs}"
    refusal(newest_checkpoint, tmp_path, "DiTSEM-Ti/8", words=words)
    assert newest_checkpoint(tmp_path / "a", "DiTSEM-Ti/8").name == "0004000"
    words = f"2 runs under {tmp_path}/in have a checkpoint: {tmp_path}/in/c .step 5., {tmp_path}/in/d .step 6.; name"
    for load in (load_model, info, lambda path: load_pretrained(path, tiny())):
        refusal(load, tmp_path / "in", words=words)
    shutil.rmtree(tmp_path / "in/d")
    assert load_model(tmp_path / "in")[2].step == 5 and load_model(tmp_path)[2].step == 7
    assert newest_in(tmp_path / "in", ["config.json"]) == tmp_path / "in/c/checkpoints/0000005"


def test_a_folder_that_cannot_be_listed_is_not_empty(monkeypatch, tmp_path):
    """Nobody is told to train anew, nor is another run taken, because a run may not be read."""
    for run in "ab":
        save(tmp_path / run, tiny())
    (tmp_path / "a/best").mkdir()
    (tmp_path / "lost+found").mkdir()
    for closed in ("a", "a/checkpoints", "a/best"):
        beginnings = (str(tmp_path / closed), str(tmp_path / "lost+found"))
        with monkeypatch.context() as patch:
            fails(patch, "os.listdir", errno.EACCES, lambda path=".", closed=beginnings: str(path).startswith(closed))
            with pytest.raises(OSError, match=rf"cannot list {tmp_path}/{closed}.* \(Permission denied\)"):
                newest_checkpoint(tmp_path, "DiTSEM-Ti/8")
            assert newest_checkpoint(tmp_path / "b", "DiTSEM-Ti/8").name == "0000001"


def test_records_are_readable_and_read_back(tmp_path):
    path = save(tmp_path, tiny(), features_path="features", my_option=[1, "a"])
    written = json.loads((path / "meta.json").read_text())
    assert written["step"] == 1 and written["noted"]["lr"] == 1e-4 and written["compared"]["my_option"] == [1, "a"]
    assert written["features_path"] == "features" and "data_path" not in written
    assert read_meta(path) == meta_of(1, features_path="features", my_option=[1, "a"])
    described = json.loads((path / "config.json").read_text())
    assert described["family"] == "DiTSEM" and described["arguments"]["L"] == 3
    assert described["process"]["process"] == "gaussian" and read_config(path) == config(tiny())
    for change, words in (
        (dict(family="Nobody"), "there is no family of models called 'Nobody'"),
        (dict(arguments=dict(wings=2)), "cannot be built from its config.json: .*wings"),
        (dict(arguments=dict(L=3, V=4, depth=10**9)), "tensors for 1000000000 blocks"),
        (dict(arguments=dict(L=3, V=4, depth=1, input_size=2**19)), "does not fit the DiTSEM-Ti/8"),
        (dict(family=3), "config.json: family is 3, wanted text"),
        (dict(arguments=[]), "config.json: arguments is"),
        *((dict(process=value), "config.json: process is") for value in ("x", {}, dict(process="gaussian"))),
        *((dict(process=dict(value, arguments={})), "config.json: process is") for value in ({}, dict(process=3))),
    ):
        (path / "config.json").write_text(json.dumps({**described, **change}))
        refusal(load_model, path, words=words)


def test_resume_point(tmp_path):
    model, settings = tiny(), dict(global_seed=0)
    begin = RunMeta(step=0, place=0, logged=0, skipped=0, ema_start=1.0)
    assert resume_point(tmp_path, config(model), settings, False) == (None, begin, "")
    path = save(tmp_path, model, 2)
    assert resume_point(tmp_path, config(model), settings, False) == (path, meta_of(2), "")
    for other, given, allowed, words in (
        (tiny(L=5, V=4), settings, True, "another run: L 3 there, 5 here; give another"),
        (model, dict(global_seed=1), False, "another run: global_seed 0 there, 1 here; .*--allow-change"),
        (model, dict(new=3), False, "another run: new None there, 3 here"),
    ):
        refusal(resume_point, tmp_path, config(other), given, allowed, words=words)
    assert resume_point(tmp_path, config(model), dict(global_seed=1), True)[2] == "global_seed 0 there, 1 here"


def test_a_state_that_a_crash_left_empty_or_zero_is_damage(tmp_path):
    save(tmp_path, tiny(), 1)
    path = save(tmp_path, tiny(), 2)
    for content in (b"", bytes(1000)):
        (path / "optimizer.pt").write_bytes(content)
        words = r"0000002 is damaged \(optimizer.pt cannot be .*remove it; the newest whole one before it is 0000001"
        refusal(resume_point, tmp_path, config(tiny()), {}, True, words=words)


def test_samplers_draw_from_the_process_that_was_trained():
    names = "num_sampling_steps eta time_shift t_min t_max guide_t_min guide_t_max cfg_channels progressive".split()
    args = types.SimpleNamespace(**dict.fromkeys(names), sampler="ddim", model="DiTSEM-Ti/8")
    args.num_sampling_steps = 3
    for arguments, fits in ((dict(use_kl=True), True), (dict(noise_schedule="squaredcos_cap_v2"), False)):
        meta = RunMeta(process=create_process("gaussian", timestep_respacing="", **arguments).config)
        with contextlib.nullcontext() if fits else pytest.raises(ValueError, match="--sampler ddim does not draw from"):
            assert open_sampler(args, tiny(), meta).num_steps == 3


# ---------------------------------------------------------------------- changed models and optimizers


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

    class Fixing(DiTSEM):  # one of its base's arguments, and passes the others on
        def __init__(self, **kwargs):
            super().__init__(depth=1, **kwargs)

    class FixingMore(Fixing):
        def __init__(self, **kwargs):
            super().__init__(L=3, **kwargs)

    for one in (Fixing, FixingMore):
        model = one(input_size=8, hidden_size=16, num_heads=2, V=8)
        assert "depth" not in model.config["arguments"] and build_model(model.config).config == model.config
    model = Outer(depth=1)
    assert model.config == dict(family="Outer", arguments=dict(scale=2.0, depth=1, L=4))
    assert len(build_model(model.config).blocks) == 2
    config_of("outer", model)


def test_what_cannot_be_recorded_is_named():
    for value in ({1: "rope"}, {"a": [{2: 3}]}, {1, 2}, math.nan, torch.bfloat16):
        refusal(plain, dict(plan=value), "the argument", words="^the argument plan is a ")
    assert plain(dict(plan=(1, (2, 3))), "the argument") == dict(plan=[1, [2, 3]])
    for value in (torch.tensor([0, -math.inf]), torch.ones(2) * 1j):
        model = changed(lambda model, value=value: model.register_buffer("mask", value))
        refusal(config_of, "changed", model, words="mask .* register it with persistent=False")
    refusal(RunMeta.of_run, dict(when=1j), {}, words="the setting when is a complex")
    model = changed()
    model.config["arguments"]["depth"] = 2
    refusal(config_of, "changed", model, words="is not what its recorded arguments build")
    model.config["arguments"]["act"] = torch.nn.GELU
    refusal(config_of, "changed", model, words="changed's argument act is a type, which a checkpoint cannot record")
    assert unrecordable(dict(state={0: dict(step=torch.ones(1), old=[torch.ones(2, dtype=torch.int64)])})) == ""
    assert "float64" in unrecordable(dict(state={0: dict(step=np.float64(1))}))
    assert "function" in unrecordable(dict(groups=[dict(rule=lambda: 0)]))


def hold_everything(model):
    model.one, model.other = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    model.other.weight = model.one.weight  # tied
    model.register_buffer("count", torch.arange(3))
    model.register_buffer("mask", torch.ones(2, 3, dtype=torch.bool).t())
    model.turned = torch.nn.Parameter(torch.randn(2, 3).t())
    scale = model.one.weight.std().item()  # reads a weight, which the meta device does not have
    model.register_buffer("scale", torch.tensor(scale), persistent=False)


def test_tied_turned_and_whole_number_tensors_come_back(tmp_path):
    model, other = changed(hold_everything), changed(hold_everything)
    path = save(tmp_path, model, name="changed")
    load_checkpoint(path, model=other, ema=changed(hold_everything), optimizers=[])
    loaded = filled(config(model), read_own(path, path)[0], path)
    assert_same(other.eval(), model)
    assert_same(loaded, model)
    assert other.other.weight is other.one.weight and not loaded.scale.is_meta


def test_a_run_of_before_an_argument_with_a_default_is_the_same_run():
    now, other = config(DiTSEM(**SIZES)), config(DiTSEM(**SIZES, code_init="dlc"))
    before = {name: value for name, value in now.arguments.items() if name != "code_init"}
    before = replace(now, arguments=before)
    assert before.completed().differences(now) == ""
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
    optimizer, other = Counting(model.parameters(), 0.1), Counting(model.parameters(), 0.2, decay=0.5)
    begin_groups(optimizer)
    begin_groups(other)
    optimizer.step()
    optimizer.step()
    path = save(tmp_path, model, optimizers=[optimizer])
    load_checkpoint(path, model=model, ema=model, optimizers=[other])
    assert other.state["all"] == 2 and other.state[next(model.parameters())]["order"].tolist() == [0, 1, 2]
    assert {name: other.param_groups[0][name] for name in ("lr", "decay", "k")} == dict(lr=0.2, decay=0.5, k=2)
