"""Masked diffusion over tokens: SEDD's values, the bound, and samplers against an enumerated distribution."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from conftest import golden, refusal
from scipy.stats import chisquare

from diffusion.masked import MaskedDiffusion, mean_bound, stratified_times
from diffusion.masked_samplers import CODE_SAMPLERS, CodeSampler
from diffusion.process_table import create_process
from dlc.machine.noise import Stream, uniforms
from dlc.sampling.latents import create_sampler
from dlc.sampling.prior_draw import sample_codes

# ---------------------------------------------------------------------- SEDD's values


@pytest.fixture(scope="module")
def sedd():
    return golden("sedd")[0]


def toy_network(sedd):
    """The golden's network: log probabilities, a function of the tokens that are there, in float64."""

    def model(x_t, sigma):
        there = torch.nn.functional.one_hot(x_t, 6).double()
        return (sedd["b"] + torch.einsum("blv,lvmw->bmw", there, sedd["W"]) / 2).log_softmax(dim=2)

    return model


def test_noise_and_losses_are_sedds(sedd):
    """Its score entropy is the cross-entropy where the score sums to 1 / (e^sigma - 1), and larger for another score by
    (r - 1 - log r) / t per place."""
    diffusion, t = MaskedDiffusion(5), sedd["t"]
    assert (diffusion.sigma(t) - sedd["sigma"]).abs().max() < 1e-12
    assert (diffusion.mask_probability(t) - sedd["mask_prob"]).abs().max() < 1e-12
    assert torch.equal(diffusion.corrupt(sedd["x0"], t, sedd["u"]), sedd["xt"])
    assert torch.equal(diffusion.told(t), sedd["sigma"].float())
    assert torch.equal(MaskedDiffusion(5, time_conditioning=False).told(t), torch.zeros(5))
    terms = diffusion.training_losses(toy_network(sedd), sedd["x0"], t, sedd["xt"])
    for name in ("loss_masked", "loss_sedd"):
        assert (terms["loss"] - sedd[name]).abs().max() < 1e-12 * 40
    assert torch.allclose(terms["nats"], terms["loss"] / 4)

    scores = sedd["raw"] - sedd["sigma"].expm1().log().view(-1, 1, 1)
    scores = torch.where((sedd["xt"] == 5).unsqueeze(2), scores, 1e4).requires_grad_()  # large where nothing is masked

    def raw(x_t, sigma):
        return scores

    of_both = sedd["x0"], t, sedd["xt"]
    full = MaskedDiffusion(5, score_entropy=True).training_losses(raw, *of_both)
    assert (full["loss"] - sedd["loss_sedd_raw"]).abs().max() < 1e-12 * 50
    assert torch.autograd.grad(full["loss"].sum(), scores)[0].isfinite().all()
    masked, r = diffusion.training_losses(raw, *of_both), sedd["raw"].exp().sum(dim=2)
    excess = ((r - 1 - r.log()) * (sedd["xt"] == 5)).sum(dim=1) / t
    assert (full["loss"] - masked["loss"] - excess).abs().max() < 1e-12 * 50 and excess.min() > 0
    assert torch.equal(full["nats"], masked["nats"])


@pytest.mark.parametrize("step", ["analytic", "denoise", "corrector"])
def test_steps_are_sedds(sedd, step):
    """How much SEDD's analytic step, its last one, to time 0, and the DLC project's corrector reveal, and what."""
    n, masked = torch.ones(5, dtype=torch.float64), sedd["xt"] == 5
    t, s, eta = dict(
        analytic=(sedd["t"], sedd["t_next"], 0.0),
        denoise=(sedd["t"], 0 * n, 0.0),
        corrector=(sedd["corrector_t"] * n, (sedd["corrector_t"] - sedd["corrector_step"]) * n, sedd["corrector_eta"]),
    )[step]
    weights = sedd[f"step_{step}"]
    revealed = weights[..., :5].sum(dim=2) / (weights.sum(dim=2) if step != "denoise" else 1)
    expected = MaskedDiffusion.reveal_probability(t, s, eta).view(-1, 1).expand(masked.shape)
    assert (revealed - expected)[masked].abs().max() < 1e-12
    for kind, logp in (("", sedd["logp"]), ("_raw", sedd["raw"].log_softmax(dim=2))):
        if f"step_{step}{kind}" in sedd:  # of a score that is not normalised, the tokens' shares are SEDD's
            shares = sedd[f"step_{step}{kind}"][..., :5]
            shares = shares / shares.sum(dim=2, keepdim=True)
            assert (shares - logp.exp())[masked].abs().max() < 1e-12


# ---------------------------------------------------------------------- loss and bound


def all_orders(L):
    """Uniform numbers (L!, L) of every order of L places."""
    return (torch.tensor(list(itertools.permutations(range(L)))).double() + 0.5) / L


def test_bound_is_the_enumerated_one(sedd):
    """By every k and every order; and by times: the mean loss of counted masking over one time of each L-th."""
    diffusion, model, orders = MaskedDiffusion(5), toy_network(sedd), all_orders(4)
    for x0, nats in zip(sedd["x0"], sedd["bound_nats"]):
        x0 = x0.expand(24, 4)
        bounds = diffusion.code_bounds(model, x0, orders)
        assert abs(bounds.mean() - nats) < 1e-12 * 10
        counted = MaskedDiffusion(5, masking="counted")
        times = (torch.arange(4).double() + 0.5) / 4
        losses = [
            counted.training_losses(model, x0, time.expand(24), counted.corrupt(x0, time.expand(24), orders))["loss"]
            for time in times
        ]
        assert abs(torch.stack(losses).mean() - nats) < 1e-12 * 10
    assert mean_bound(bounds, 4) == pytest.approx((nats.item() / 4, bounds.std().item() / 4 / 24**0.5))


def test_bound_of_few_levels_is_unbiased(sedd):
    diffusion, model, n = MaskedDiffusion(5), toy_network(sedd), 4000
    torch.manual_seed(0)
    x0, u, shift = sedd["x0"][0].expand(n, 4), torch.rand(n, 4).double(), torch.rand(n).double()
    nats, error = mean_bound(diffusion.code_bounds(model, x0, u, levels=2, shift=shift), 4)
    assert abs(nats - sedd["bound_nats"][0].item() / 4) < 4 * error


def test_counted_masking_masks_so_many():
    diffusion = MaskedDiffusion(9, masking="counted")
    x_t = diffusion.corrupt(torch.zeros(3, 8, dtype=torch.long), torch.tensor([1e-3, 0.5, 1.0]), torch.rand(3, 8))
    assert (x_t == 9).sum(dim=1).tolist() == [1, 4, 8]
    times = stratified_times(torch.tensor(0.3), torch.arange(8), 8)  # one of each 8th
    assert sorted((8 * times).long().tolist()) == list(range(8)) and times.min() >= 1e-3
    refusal(MaskedDiffusion, 9, masking="x", words="masking x: must be one of independent, counted")
    untold = dict(time_conditioning=False, score_entropy=True)
    refusal(MaskedDiffusion, 9, **untold, words="needs a model that is told the noise level")


# ---------------------------------------------------------------------- samplers: an enumerated distribution

L = V = 3
N = 20_000


def enumerated(seed=0):
    """A distribution (3, 3, 3) over codes, and the log conditionals of each place for every masked code, (64, L, V)."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(V, V, V, dtype=torch.float64, generator=generator) ** 3
    p /= p.sum()
    table = torch.zeros(64, L, V, dtype=torch.float64)
    for number, code in enumerate(itertools.product(range(V + 1), repeat=L)):
        given = p[tuple(slice(None) if token == V else slice(token, token + 1) for token in code)]
        for place in range(L):
            if code[place] == V:
                table[number, place] = given.sum(dim=[other for other in range(L) if other != place])
    return p, (table / table.sum(dim=2, keepdim=True).clamp(min=1e-300)).log()


P, CONDITIONALS = enumerated()


PROCESS = create_process("masked", V=V)


def predict(codes, t):
    return CONDITIONALS[codes @ torch.tensor([16, 4, 1])]


def draw(sampler, codes):
    """All items of a sampler: (calls, n, L)."""
    noise = partial(uniforms, 0, Stream.SAMPLE_CODE, torch.arange(len(codes)), L)
    return torch.stack([*sampler(predict, codes, noise)])


@pytest.mark.parametrize(
    "name, options, exact",
    [
        ("first-hitting", {}, True),
        ("analytic", dict(steps=4096), True),
        ("corrector", dict(steps=2048, eta=0.002), True),
        ("analytic", dict(steps=4), False),  # Tweedie's few steps draw several tokens at once
        ("first-hitting", dict(steps=2), False),
        ("confidence", dict(steps=3), False),  # easy tokens first
    ],
)
def test_sampled_distribution_is_the_enumerated_one(name, options, exact):
    sampler = create_sampler(name, process=PROCESS, **options)
    calls = draw(sampler, torch.full((N, L), V))
    assert len(calls) <= sampler.most_calls(L)
    counts = torch.bincount(calls[-1] @ torch.tensor([9, 3, 1]), minlength=V**L)
    p_value = chisquare(counts.numpy(), P.flatten().numpy() * N).pvalue
    assert p_value > 1e-3 if exact else p_value < 1e-9


def test_analytic_sampler_in_many_steps_is_first_hitting():
    """To the code: both reveal a token when its own uniform time has come."""
    samplers = (create_sampler(name, steps, PROCESS) for name, steps in (("first-hitting", None), ("analytic", 2**16)))
    few, many = (draw(sampler, torch.full((1000, L), V)) for sampler in samplers)
    assert torch.equal(few[-1], many[-1]) and len(few) == len(many) == L


@pytest.mark.parametrize("name", CODE_SAMPLERS)
def test_tokens_stay(name):
    """Given ones to the bit; drawn ones until they are masked again, which only the corrector does."""
    given = torch.randint(V + 1, (500, L), generator=torch.Generator().manual_seed(1))
    given[:9] = torch.tensor([[0, 1, 2]] * 9)  # rows with nothing to draw
    calls = draw(create_sampler(name, 64, PROCESS), given)
    known = given < V
    assert (calls[:, known] == given[known]).all() and calls[-1].max() < V and calls.min() >= 0
    changed = (calls[1:] != calls[:-1]) & (calls[:-1] != V)
    assert not changed.any() or name == "corrector"


# ---------------------------------------------------------------------- tokens


def test_tokens_are_drawn_by_temperature_and_top_p(monkeypatch):
    logits = torch.tensor([0.5, 0.3, 0.2, 0.0]).log().expand(2000, 2, 4)
    u = (torch.arange(4000).view(2000, 2) + 0.5) / 4000

    def draw(*options):
        return CodeSampler(None, PROCESS, *options).draw(logits, u)

    shares = {
        options: (torch.bincount(draw(*options)[0].flatten(), minlength=4) / 4000).tolist()
        for options in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.6), (0.0, 1.0), (1.0, 0.0))
    }
    assert shares[1.0, 1.0] == pytest.approx([0.5, 0.3, 0.2, 0], abs=1e-3)
    assert shares[0.5, 1.0] == pytest.approx([0.25 / 0.38, 0.09 / 0.38, 0.04 / 0.38, 0], abs=1e-3)
    assert shares[1.0, 0.6] == pytest.approx([0.625, 0.375, 0, 0], abs=1e-3)  # the two that reach 0.6 together
    assert shares[0.0, 1.0] == shares[1.0, 0.0] == [1, 0, 0, 0]
    tokens, logp = draw()
    assert torch.allclose(logp.exp(), torch.tensor([0.5, 0.3, 0.2, 0.0]).double()[tokens], atol=1e-7)
    monkeypatch.setattr("diffusion.masked_samplers.AT_ONCE", 35)  # not all at once
    assert all(map(torch.equal, (tokens, logp), draw()))


# ---------------------------------------------------------------------- the engine


class Table(torch.nn.Module):
    """A prior by class: class 0 has another distribution than the null class, 1, which has the enumerated one."""

    L = V = 3

    def __init__(self):
        super().__init__()
        self.tables = torch.stack([enumerated(1)[1], CONDITIONALS])

    def null_condition(self, n):
        return torch.ones(n, dtype=torch.long)

    def forward(self, codes, sigma, y=None):
        y = self.null_condition(len(codes)) if y is None else y
        out = self.tables[y, codes @ torch.tensor([16, 4, 1])]
        return torch.nn.functional.pad(out, (0, 1), value=9.0)  # the mask's own score, which must not count


def test_guidance_is_of_log_probabilities():
    """The last of three tokens, with the others given: p0^(1 - w) p_y^w."""
    given = dict(seed=0, indices=torch.arange(N), y=torch.zeros(N, dtype=torch.long), cfg_scale=2.0)
    given["codes"] = torch.tensor([1, 2, V]).expand(N, L)
    of_class, of_none = (table[1 * 16 + 2 * 4 + 3, 2] for table in Table().tables)
    wanted = (of_none + 2 * (of_class - of_none)).softmax(dim=0)
    drawing = Table(), PROCESS, create_sampler(process=PROCESS)
    codes = sample_codes(*drawing, **given)
    counts = torch.bincount(codes[:, 2], minlength=V)
    assert chisquare(counts.numpy(), wanted.numpy() * N).pvalue > 1e-3
    given["y"][5] = 1  # the null class
    refusal(sample_codes, *drawing, **given, words=r"condition 1 is outside 0\.\.0")


@pytest.mark.parametrize("name", CODE_SAMPLERS)
def test_codes_belong_to_samples(name):
    def codes(*indices, seed=0):
        sampler, indices = create_sampler(name, 8, PROCESS), torch.tensor(indices)
        return sample_codes(Table(), PROCESS, sampler, seed=seed, indices=indices)

    whole = codes(*range(40))
    assert torch.equal(whole, torch.cat([codes(*part) for part in np.array_split(range(40), 6)]))
    assert torch.equal(whole[[30, 3]], codes(30, 3)) and not torch.equal(whole, codes(*range(40), seed=1))
