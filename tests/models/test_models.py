import pytest
import torch
from conftest import golden, refusal

import models
from models import DiT, DiT_models, DiTCONT, DiTSEM, modulate
from prior import DLCPrior

SMALL = dict(input_size=8, hidden_size=32, depth=2, num_heads=2)


def scrambled(model):
    """The model with nothing left at its zero initialisation."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.mark.parametrize(
    "name, build", [("dit", lambda: DiT(num_classes=7, **SMALL)), ("ditsem", lambda: DiTSEM(L=3, V=4, **SMALL))]
)
def test_agrees_with_reference(name, build):
    values, weights = golden(name)
    model = build().eval()
    torch.testing.assert_close(model.pos_embed, weights["pos_embed"], atol=1e-6, rtol=0)
    model.load_state_dict(weights)
    with torch.no_grad():
        out = model(values["x"], values["t"], values["y"])
        guided = model.forward_with_cfg(values["xc"], values["tc"], values["yc"], float(values["cfg_scale"]))
        torch.testing.assert_close(out, values["out"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(guided, values["out_cfg"], atol=1e-5, rtol=1e-5)
        if "soft" in values:
            soft = model(values["x"], values["t"], values["soft"])
            torch.testing.assert_close(soft, values["out_soft"], atol=1e-5, rtol=1e-5)


CONDITIONS = {
    DiT: (dict(num_classes=7), lambda n: torch.randint(0, 7, (n,))),
    DiTSEM: (dict(L=5, V=9), lambda n: torch.randint(0, 9, (n, 5))),
    DiTCONT: (dict(in_dim=6), lambda n: torch.randn(n, 6)),
}


@pytest.fixture(params=CONDITIONS, ids=lambda family: family.__name__)
def family(request):
    keywords, conditions = CONDITIONS[request.param]
    torch.manual_seed(0)
    return request.param(**SMALL, **keywords), conditions


def test_output_is_exactly_zero_at_initialisation(family):
    model, conditions = family
    out = model(torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), conditions(3))
    assert out.shape == (3, 8, 8, 8) and (out == 0).all()


def test_guided_channels():
    """DiT guides three of four by default, DiTSEM all; no sample beyond t_max is guided."""
    x, t = torch.randn(2, 4, 8, 8).repeat(2, 1, 1, 1), torch.tensor([5, 700]).repeat(2)
    for model, y, guided in (
        (DiT(num_classes=7, **SMALL), torch.tensor([1, 2, 7, 7]), 3),
        (DiTSEM(L=2, V=3, **SMALL), torch.tensor([[0, 1], [2, 0], [3, 3], [3, 3]]), 4),
    ):
        scrambled(model)
        with torch.no_grad():
            conditional, null = model(x, t, y).chunk(2)
            for channels in (None, 3, 4):
                out = model.forward_with_cfg(x, t, y, 3.0, channels=channels, t_max=500)[:2]
                wanted, count = conditional.clone(), channels or guided
                wanted[0, :count] = (null + 3 * (conditional - null))[0, :count]
                torch.testing.assert_close(out, wanted, atol=1e-4, rtol=1e-4)


def test_condition_dropout_at_0_and_1(family):
    model, conditions = family
    scrambled(model)
    x, t, y = torch.randn(4, 4, 8, 8), torch.arange(4), conditions(4)
    with torch.no_grad():
        conditional = model(x, t, y)
        null = model(x, t, model.null_condition(4).to(y.dtype))
        assert (conditional - null).abs().amax(dim=(1, 2, 3)).min() > 1e-3
        model.train()
        model.class_dropout_prob = 0.0
        torch.testing.assert_close(model(x, t, y), conditional)
        model.class_dropout_prob = 1.0
        torch.testing.assert_close(model(x, t, y), null)
        drop = torch.tensor([True, False, True, False])
        mixed = torch.where(drop.view(-1, 1, 1, 1), null, conditional)
        torch.testing.assert_close(model(x, t, y, drop=drop), mixed)
        model.eval()
        torch.testing.assert_close(model(x, t, y), conditional)


def test_what_stays_float32_under_autocast():
    """Norms, the residual stream, the sum of timestep and code embedding; products alone are in 16 bits."""
    model, dtypes = scrambled(DiTSEM(L=3, V=4, **SMALL)), {}

    def watch(name):
        def hook(module, inputs, output):
            dtypes.setdefault(name, set()).update([inputs[0].dtype, output.dtype])

        return hook

    strides = []
    for block in model.blocks:
        block.register_forward_hook(watch("residual stream"))
        block.register_forward_pre_hook(lambda module, inputs: strides.append(inputs[0].is_contiguous()))
        block.adaLN_modulation[0].register_forward_hook(watch("condition"))
        block.norm1.register_forward_hook(watch("norm"))
        block.attn.qkv.register_forward_hook(watch("products"))
    model.final_layer.norm_final.register_forward_hook(watch("norm"))
    model.t_embedder.mlp[2].register_forward_hook(watch("time"))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.randint(0, 4, (2, 3)))
    assert torch.bfloat16 in dtypes.pop("products")
    assert dtypes.keys() == {"residual stream", "condition", "norm", "time"}
    assert all(seen == {torch.float32} for seen in dtypes.values()), dtypes
    # as the patch embedding gives it, the stream would stay channel-first, and slow each LayerNorm
    assert strides == [True] * len(model.blocks)
    x, shift, scale = torch.randn(2, 3, 8), torch.randn(2, 8).bfloat16(), 1e-3 * torch.randn(2, 8).bfloat16()
    exact = x * (1 + scale.float().unsqueeze(1)) + shift.float().unsqueeze(1)
    assert torch.equal(modulate(x, shift, scale), exact)  # in bfloat16, 1 + scale would be 1


@pytest.mark.parametrize("name", ["DiTSEM", "DLCPrior"])
def test_activation_checkpointing_changes_memory_not_results(name, monkeypatch):
    calls, gradients, recompute, codes = [], [], models.checkpoint, torch.randint(0, 4, (2, 3))
    monkeypatch.setattr(models, "checkpoint", lambda *args, **kwargs: calls.append(1) or recompute(*args, **kwargs))
    model, inputs = DiTSEM(L=3, V=4, **SMALL), (torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), codes, codes[:, 0] < 0)
    if name == "DLCPrior":
        model, inputs = DLCPrior(3, 4, 16, 2, 2, dropout=0.3), (codes, torch.tensor([0.1, 0.2]))
    scrambled(model).train()
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(1)  # of the dropout
        model(*inputs).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert len(calls) == len(model.blocks)  # off by default, then once a block
    torch.testing.assert_close(*gradients)
    model.eval()(*inputs)
    assert len(calls) == len(model.blocks)  # never in eval


@pytest.mark.slow
def test_names_and_sizes():
    assert len(DiT_models) == 45
    refusal(DiT, input_size=9, patch_size=2, words="not a multiple of the patch size")
    papers = {"DiT-XL/2": 675, "DiT-L/2": 458, "DiT-B/2": 130, "DiT-S/2": 33}  # millions
    for name in (*papers, *(name for name in DiT_models if "-Ti/" in name or name.endswith("XL/2"))):
        with torch.device("meta"):
            model = DiT_models[name](input_size=32)
        assert model.x_embedder.num_patches == (32 // int(name.split("/")[1])) ** 2
        count = round(sum(parameter.numel() for parameter in model.parameters()) / 1e6)
        assert papers.get(name, count) == count


def test_starts_of_the_code_table():
    """ "unit": N(0, 1). "dlc": N(0, 1/D), and one null row for all positions. Nothing else differs."""

    def start(code_init):
        torch.manual_seed(0)
        return DiTSEM(L=16, V=64, code_init=code_init, **SMALL).state_dict()

    unit, dlc = start("unit"), start("dlc")
    assert unit.keys() == dlc.keys()
    key = "sem_embedder.embedding_table"
    assert all(torch.equal(unit[name], dlc[name]) for name in unit if name != key)
    assert unit[key].std().item() == pytest.approx(1, rel=0.02)
    assert dlc[key].std().item() == pytest.approx(32**-0.5, rel=0.02)
    assert (dlc[key][:, 64] == dlc[key][0, 64]).all() and not (unit[key][:, 64] == unit[key][0, 64]).all()
    assert not (dlc[key][:, 63] == dlc[key][0, 63]).all()
