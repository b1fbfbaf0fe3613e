"""DLCPrior: SEDD's values, positions, classes, precision."""

import torch
from conftest import golden, refusal

from prior import DLCPrior

L, V, N = 6, 5, 4


def random_prior(**options):
    """A prior of random weights, none of them zero as at the start."""
    torch.manual_seed(0)
    model = DLCPrior(**{**dict(L=L, V=V, hidden_size=16, depth=2, num_heads=2, cond_dim=8), **options}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def inputs():
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(V + 1, (N, L), generator=generator)
    return codes, torch.rand(N, generator=generator) + 0.1


@torch.no_grad()
def test_golden():
    values, weights = golden("sedd")
    model = DLCPrior(6, 7, 32, 2, 2, cond_dim=16)
    model.load_state_dict(weights)
    out = model.eval()(values["model/x"], values["model/sigma"])
    assert (out - values["model/out"]).abs().max() < 1e-5
    masked = values["model/x"] == 7
    assert (out[masked][:, :7].log_softmax(dim=1) - values["model/logp"][masked]).abs().max() < 1e-5


@torch.no_grad()
def test_positions_of_an_unshared_prior_have_their_own_tables():
    model, (codes, sigma) = random_prior(shared_embedding=False), inputs()
    codes[:, 0], codes[:, 1] = 2, 3
    before = model(codes, sigma)
    model.vocab_embed.embedding[1, 2] += 1
    assert torch.equal(model(codes, sigma), before)
    model.vocab_embed.embedding[0, 2] += 1
    assert not torch.equal(model(codes, sigma), before)


@torch.no_grad()
def test_classes():
    model, (codes, sigma) = random_prior(num_classes=3), inputs()
    y, drop = torch.tensor([0, 1, 2, 0]), torch.tensor([False, True, False, True])
    none, classes, dropped = model(codes, sigma), model(codes, sigma, y), model(codes, sigma, y, drop)
    assert torch.equal(none[drop], dropped[drop]) and torch.equal(classes[~drop], dropped[~drop])
    assert not torch.allclose(none, classes, atol=1e-3)
    assert torch.equal(model(codes, sigma, model.null_condition(N)), none)
    refusal(random_prior(), codes, sigma, y, words="this prior has no classes")


@torch.no_grad()
def test_scores_are_float32_under_autocast():
    model, (codes, sigma) = random_prior(shared_embedding=False), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(codes, sigma)
    assert out.dtype == torch.float32 and not torch.equal(out, out.bfloat16().float())
    assert 0 < (out - model(codes, sigma)).abs().max() < 0.3
