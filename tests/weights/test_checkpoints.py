import contextlib
import errno
import json
import os
import sys
import types

import pytest
import torch
from conftest import change_json, fails, refusal

from diffusion.process_table import create_process
from dlc.sampling.opening import open_sampler
from dlc.weights.checkpoint import load_checkpoint, save_checkpoint
from dlc.weights.info import info
from dlc.weights.load import load_model, load_pretrained, newest_in
from dlc.weights.meta import (
    RunMeta,
    config_of,
    newest_checkpoint,
    newest_of_run,
    read_config,
    read_meta,
    resume_point,
    run_checkpoints,
)
from models import DiT_models


def tiny(name="DiTSEM-Ti/8", seed=0, **sizes):
    torch.manual_seed(seed)
    return DiT_models[name](input_size=8, **(sizes or dict(L=3, V=4)))


def config(model, name="DiTSEM-Ti/8"):
    return config_of(name, model, create_process("gaussian", timestep_respacing=""))


def meta_of(step, **values):
    """The meta of a run of training."""
    settings = dict(image_size=64, features_count=14, latents="sample", global_batch_size=8, global_seed=0)
    notes = dict(precision="fp32", lr=1e-4, versions={"torch": "2.6"})
    return RunMeta.of_run({**settings, **values}, notes, step=step, place=8 * step, logged=step, skipped=0)


def save(run_dir, model, step=1, name="DiTSEM-Ti/8", ema=None, optimizers=(), **values):
    meta = meta_of(step, **values)
    return save_checkpoint(
        run_dir, config(model, name), meta, model=model, ema=ema or model, optimizers=list(optimizers)
    )


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
    (tmp_path / "a/checkpoints/0000003.tmp/meta.json").write_text("{}")
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
    for run, step in ((".", 7), ("a", 4000), ("b", 3)):
        save(tmp_path / run, tiny(), step)
    runs = rf"{tmp_path} \(step 7\), {tmp_path}/a \(step 4,000\), {tmp_path}/b \(step 3\); name one of them"
    with pytest.raises(ValueError, match=f"3 runs under {tmp_path} have a checkpoint of DiTSEM-Ti/8: {runs}"):
        newest_checkpoint(tmp_path, "DiTSEM-Ti/8")
    assert newest_checkpoint(tmp_path / "a", "DiTSEM-Ti/8").name == "0004000"
    runs = [tmp_path / name for name in ("in/a", "in/b", "one/c")]
    for step, run in enumerate(runs, 5):
        save(run, tiny(), step)
    both = rf"2 runs under {tmp_path}/in have a checkpoint: {runs[0]} \(step 5\), {runs[1]} \(step 6\); name one"
    for load in (load_model, info, lambda path: load_pretrained(path, tiny())):
        refusal(load, tmp_path / "in", words=both)
    assert load_model(tmp_path / "one")[2].step == 7 == load_model(tmp_path)[2].step
    assert newest_in(tmp_path / "one", ["config.json"]) == runs[2] / "checkpoints/0000007"
    assert newest_in("owner/name", ["config.json"]) == "owner/name"


@pytest.mark.parametrize("closed", ["a", "a/checkpoints", "a/best"])
def test_a_folder_that_cannot_be_listed_is_not_empty(closed, monkeypatch, tmp_path):
    """Nobody is told to train anew, nor is another run taken, because a run may not be read."""
    for run in "ab":
        save(tmp_path / run, tiny())
    (tmp_path / "a/best").mkdir()
    (tmp_path / "lost+found").mkdir()
    beginnings = (str(tmp_path / closed), str(tmp_path / "lost+found"))
    fails(monkeypatch, "os.listdir", errno.EACCES, lambda path=".": str(path).startswith(beginnings))
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


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(family="Nobody"), "there is no family of models called 'Nobody'"),
        (dict(arguments=dict(wings=2)), "cannot be built from its config.json: .*wings"),
        (dict(arguments=dict(L=3, V=4, depth=10**9)), "tensors for 1000000000 blocks"),
        (dict(arguments=dict(L=3, V=4, depth=1, input_size=2**19)), "does not fit the DiTSEM-Ti/8"),
        (dict(arguments=dict(L=3, V=4, hidden_size="wide")), "cannot be built from its config.json"),
        (dict(family=3), "config.json: family is 3, wanted text"),
        (dict(arguments=[]), "config.json: arguments is"),
        (dict(process="x"), "config.json: process is"),
    ],
)
def test_configs_that_do_not_describe_the_weights(tmp_path, change, message):
    path = save(tmp_path, tiny())
    change_json(path / "config.json", **change)
    refusal(load_model, path, words=message)


def test_what_cannot_be_recorded_is_named():
    model = tiny()
    model.config["arguments"]["act"] = torch.nn.GELU
    refusal(config, model, words="DiTSEM-Ti/8's argument act is a type, which a checkpoint cannot record")
    refusal(RunMeta.of_run, dict(when=1j), {}, words="the setting when is a complex")
    model = tiny()
    model.config["arguments"]["depth"] = 2
    refusal(config, model, words="is not what its recorded arguments build")


def test_resume_point(tmp_path):
    model, settings = tiny(), dict(global_seed=0)
    begin = RunMeta(step=0, place=0, logged=0, skipped=0, ema_start=1.0)
    assert resume_point(tmp_path, config(model), settings, False) == (None, begin, "")
    path = save(tmp_path, model, 2)
    assert resume_point(tmp_path, config(model), settings, False) == (path, meta_of(2), "")
    with pytest.raises(ValueError, match="another run: L 3 there, 5 here; give another"):
        resume_point(tmp_path, config(tiny(L=5, V=4)), settings, True)
    with pytest.raises(ValueError, match="another run: global_seed 0 there, 1 here; .*--allow-change"):
        resume_point(tmp_path, config(model), dict(global_seed=1), False)
    assert resume_point(tmp_path, config(model), dict(global_seed=1), True)[2] == "global_seed 0 there, 1 here"
    refusal(resume_point, tmp_path, config(model), dict(new=3), False, words="another run: new None there, 3 here")


def test_samplers_draw_from_the_process_that_was_trained():
    for arguments, fits in (
        (dict(), True),
        (dict(use_kl=True), True),
        (dict(noise_schedule="squaredcos_cap_v2"), False),
    ):
        process = create_process("gaussian", timestep_respacing="", **arguments)
        args = types.SimpleNamespace(
            **dict(sampler="ddim", num_sampling_steps=3, eta=None, time_shift=None, t_min=None, t_max=None),
            **dict(progressive=None, model="DiTSEM-Ti/8"),
        )
        meta = RunMeta(process=config_of("DiTSEM-Ti/8", tiny(), process).process)
        with contextlib.nullcontext() if fits else pytest.raises(ValueError, match="--sampler ddim does not draw from"):
            assert open_sampler(args, tiny(), meta).num_steps == 3
