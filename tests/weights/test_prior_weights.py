"""Weights of priors: SEDD's published folder and training file, our runs, and what is refused."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import golden, refusal
from tiny_weights import assert_same, save_folder

from diffusion.process_table import create_process
from dlc.weights.checkpoint import save_checkpoint
from dlc.weights.info import info
from dlc.weights.load import load_model, load_prior, process_of
from dlc.weights.meta import RunMeta, config_of
from prior import DLCPrior, DLCPrior_models


@pytest.fixture
def sedd():
    """Config, state dict, inputs and output of the golden, and its parameters' order."""
    values, weights = golden("sedd")
    values = {key.removeprefix("model/"): value for key, value in values.items()}
    return values["config"], weights, values, values["parameter_order"]


def output(model, values):
    with torch.no_grad():
        return model(values["x"], values["sigma"])


def test_sedd_folder(sedd, tmp_path):
    config, weights, values, _ = sedd
    model, meta = load_prior(save_folder(tmp_path / "plain", config, weights))
    assert (output(model, values) - values["out"]).abs().max() < 1e-5 and not model.training
    assert meta.model == "DLCPrior-2x32" and (model.L, model.V, model.shared_embedding) == (6, 7, True)
    assert model.scale_by_sigma and meta.weights == "as in the file"
    assert process_of(meta).told(torch.ones(1)) > 6
    prefixed = {f"model.{name}": tensor for name, tensor in weights.items() if name != "rotary_emb.inv_freq"}
    other, _ = load_prior(save_folder(tmp_path / "prefixed", config, prefixed))
    assert torch.equal(output(other, values), output(model, values))
    config["model"]["scale_by_sigma"] = False
    unscaled = output(load_prior(save_folder(tmp_path / "unscaled", config, weights))[0], values)
    shift = values["sigma"].expm1().log() + np.log(7)
    there = torch.nn.functional.one_hot(values["x"], 8).bool()
    assert torch.allclose((unscaled - shift.view(-1, 1, 1)).masked_fill(there, 0), values["out"], atol=1e-5)


def test_sedd_training_file(sedd, tmp_path):
    _, weights, values, order = sedd
    file = dict(
        model={f"module.{name}": weights[name] + 1 for name in sorted(weights)},
        ema=dict(decay=0.9999, num_updates=7, shadow_params=[weights[name] for name in order]),
        optimizer={},
        step=12,
    )
    file["model"]["module.rotary_emb.inv_freq"] -= 1
    torch.save(file, tmp_path / "checkpoint.pth")
    model, meta = load_prior(tmp_path / "checkpoint.pth")
    assert (output(model, values) - values["out"]).abs().max() < 1e-5
    assert (meta.step, meta.weights) == (12, "ema") and "training checkpoint of SEDD" in meta.layout
    raw, meta = load_prior(tmp_path / "checkpoint.pth", ema=False)
    assert meta.weights == "raw" and torch.equal(raw.pos_embed, weights["pos_embed"] + 1)
    ema = file["ema"]["shadow_params"]
    for change, words in (
        (dict(ema=dict(shadow_params=ema[:-1])), "has no list of 31 EMA tensors"),
        (dict(ema=dict(shadow_params=ema[::-1])), "has EMA weights in another order than its"),
        (dict(ema=dict(shadow_params={})), "has no list of 31 EMA tensors"),
        (dict(model={**file["model"], "module.pos_embed": 3}), ".*pos_embed is a int"),
        (dict(model=None), "is not a prior over codes .SEDD.: no tensor in it"),
    ):
        torch.save({**file, **change}, tmp_path / "broken.pth")
        refusal(load_prior, tmp_path / "broken.pth", words=f"broken.pth:? ?{words}")


@pytest.mark.parametrize("shared", [True, False])
def test_our_checkpoints(shared, tmp_path):
    torch.manual_seed(0)
    sizes = dict(L=5, V=6, shared_embedding=shared, scale_by_sigma=False, num_classes=3)
    model, ema = DLCPrior_models["DLCPrior-Ti"](**sizes), DLCPrior_models["DLCPrior-Ti"](**sizes)
    meta = RunMeta.of_run(dict(holdout=0.01), {}, step=3, place=24, logged=0, skipped=0)
    process = create_process("masked", V=6, masking="counted", time_conditioning=False)
    config = config_of("DLCPrior-Ti", model, process)
    save_checkpoint(tmp_path, config, meta, model=model, ema=ema, optimizers=[torch.optim.AdamW(model.parameters())])
    for use_ema, wanted in ((True, ema), (False, model)):
        loaded, read = load_prior(tmp_path, use_ema)
        assert_same(loaded, wanted)
        assert loaded.scale_by_sigma is False and loaded.num_classes == 3
        alone, kind = load_prior(tmp_path / f"checkpoints/0000003/{read.weights.replace('raw', 'model')}.safetensors")
        assert torch.equal(alone.pos_embed, loaded.pos_embed) and replace(kind, layout=read.layout) == read
    averages = tmp_path / "checkpoints/0000003/ema.safetensors"
    refusal(load_prior, averages, ema=False, words="ema.safetensors has no raw weights: leave out --no-ema")
    shutil.copy(averages, tmp_path)
    assert "taken to be told the noise level" in load_prior(tmp_path / "ema.safetensors")[1].layout
    assert (read.holdout, read.weights) == (0.01, "raw")
    assert process_of(read).told(torch.ones(2)).tolist() == [0, 0] and process_of(read).masking == "counted"
    refusal(load_model, tmp_path, words="a prior over codes, no diffusion transformer")
    lines = info(tmp_path)
    tables = "one table for all positions" if shared else "a table per position"
    assert f"DLCPrior-Ti, 0.3 M parameters, prior over codes of L 5, V 6, {tables}, 3 classes, not told" in lines[0]
    assert "EMA weights, step 3" in lines[1]


NAME, FREQUENCIES = "blocks.1.mlp.0.weight", "rotary_emb.inv_freq"


def test_refusals_name_tensor_or_key(sedd, tmp_path):
    config, weights, _, _ = sedd
    for number, (changes, model, tensors, words) in enumerate(
        (
            ({}, {}, {NAME: None}, f"lacks {NAME}"),
            ({}, {}, {NAME: torch.zeros(3, 4)}, f"has other shapes: {NAME}"),
            ({}, {}, {"pos_embed": torch.zeros(6)}, "no pos_embed of 2 dimensions"),
            ({}, {}, {FREQUENCIES: torch.zeros(7)}, "does not fit width 32"),
            (dict(graph=dict(type="uniform")), {}, {}, "says graph.type 'uniform'"),
            (dict(tokens=9), {}, {}, "that its tensors contradict: V 9 there, 7 here"),
            ({}, dict(n_heads=4), {}, "num_heads 4 there"),
            ({}, dict(n_heads=None), {FREQUENCIES: None}, "does not tell its number of heads"),
            ({}, {}, {"y_embedder.embedding_table.weight": torch.zeros(3, 32)}, "says 3 classes, .* 3 rows.*null"),
        )
    ):
        tensors = {name: value for name, value in {**weights, **tensors}.items() if value is not None}
        values = {**config, **changes, "num_classes": 3, "model": {**config["model"], **model}}
        path = save_folder(tmp_path / f"{number}", values, tensors)
        assert str(path) in refusal(load_prior, path, words=words)


def test_sizes():
    with torch.device("meta"):
        counts = [
            sum(weight.numel() for weight in DLCPrior_models[name](L=L, V=V).parameters())
            for name, L, V in (("DLCPrior-S", 512, 256), ("DLCPrior-S", 32, 4096), ("DLCPrior-M", 512, 256))
        ]
    assert [round(count / 1e6, 1) for count in counts] == [93.2, 98.7, 322.5]
    refusal(DLCPrior, 3, 3, 30, 1, 4, words="width 30 is not a multiple of twice the 4 heads")
