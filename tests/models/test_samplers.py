"""sample_latents: guidance where it acts, every sampler against its definition, precision, and what may not matter."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from conftest import L, V, refusal

from diffusion import create_diffusion, named_betas
from diffusion.process_table import create_process
from diffusion.samplers import SAMPLERS, DPMSolver, HeunSampler
from dlc.machine.noise import Stream, normal
from dlc.machine.processes import PRECISIONS
from dlc.sampling.latents import (
    CudaGraphs,
    LinearGELU,
    check_conditions,
    create_sampler,
    fuse_gelu,
    lower_precision,
    sample_latents,
)
from dlc.sampling.pictures import Decoder
from dlc.weights.networks import load_vae
from models import DiT, DiTCONT, DiTSEM

SHAPE, INDICES = (4, 8, 8), torch.tensor([5, 0, 9])
# Of latents drawn in batches of other sizes: the first step, at time 999, divides eps and its rounding by 0.006.
CLOSE = dict(atol=2e-3, rtol=2e-3)
MODELS = [(DiTSEM, dict(L=L, V=V)), (DiT, dict(num_classes=9)), (DiTCONT, dict(in_dim=5))]


def random_model(family=DiTSEM, keywords=MODELS[0][1]):
    """And conditions for three samples."""
    torch.manual_seed(0)
    model = family(input_size=8, patch_size=4, hidden_size=96, depth=3, num_heads=3, **keywords).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.07)
    y = {DiTSEM: torch.randint(0, V, (3, L)), DiT: torch.tensor([0, 4, 8]), DiTCONT: torch.randn(3, 5)}
    return model, y[family]


def draw(model, sampler, y, indices=INDICES, **options):
    return sample_latents(model, sampler, y=y, seed=0, indices=indices, **options)


def full_computation(model, y, loop, draws, **cfg):
    """Both halves at every step, by the diffusion's own loop, with the samples' own noise."""
    draws = iter(draws)
    return loop(
        model.forward_with_cfg,
        (6, *SHAPE),
        clip_denoised=False,
        device="cpu",
        model_kwargs=dict(y=torch.cat([y, model.null_condition(3)]), **cfg),
        randn_like=lambda x: normal(0, Stream.SAMPLE_NOISE, INDICES, SHAPE, next(draws)).repeat(2, 1, 1, 1),
    )[:3]


@pytest.mark.parametrize("kind, channels", [(0, 3), (1, None), (2, None)])
def test_guidance_only_where_it_acts(kind, channels):
    """At times outside t_min..t_max, and always at scale 1, the conditional half alone runs; the result is the same."""
    model, y = random_model(*MODELS[kind])
    rows, diffusion, interval = [], create_diffusion("6"), dict(cfg_scale=2.0, t_min=200, t_max=500)
    model.blocks[0].register_forward_hook(lambda module, inputs, output: rows.append(len(output)))

    def sample(**options):
        rows.clear()
        return draw(model, create_sampler("ddpm", 6), y, cfg_channels=channels, **options)

    guided = sum(200 <= t <= 500 for t in diffusion.timestep_map)
    assert 0 < guided < 6
    part = sample(**interval)
    assert sorted(rows) == [3] * (6 - guided) + [6] * guided
    full = full_computation(model, y, diffusion.p_sample_loop, [0, *range(6, 0, -1)], **interval, channels=channels)
    torch.testing.assert_close(part, full, **CLOSE)

    plain = sample(cfg_scale=1.0)
    assert rows == [3] * 6
    assert (part - plain).abs().max() > 1e-2
    torch.testing.assert_close(sample(cfg_scale=1 + 1e-6), plain, **CLOSE)


def test_conditions_of_any_type_and_order():
    """A mask has no range, labels are told apart from codes by name, and 8 bits hold no null token of 256."""
    null = dict(codes=torch.full((1, L), V), labels=torch.tensor([9]), mask=torch.zeros(1, L, dtype=torch.bool))
    y = dict(mask=torch.ones(2, L, dtype=torch.bool), labels=torch.tensor([8, 0]), codes=torch.full((2, L), V - 1))
    check_conditions(y, null)
    refusal(check_conditions, dict(y, labels=torch.tensor([9, 0])), null, words=r"condition 9 is outside 0\.\.8")
    model, y = random_model(DiTSEM, dict(L=L, V=256))
    y = y.clamp(max=255)
    drawn = (draw(model, create_sampler("ddim", 2), one, cfg_scale=1.5) for one in (y, y.to(torch.uint8)))
    assert torch.equal(*drawn)
    # a label or token one beyond the model's is its null row: the image would be an unconditional one
    for value in (256, -1):
        y[1, 0] = value
        refusal(draw, model, create_sampler("ddim", 2), y, words=rf"condition {value} is outside 0\.\.255")


@pytest.mark.parametrize("name, learn_sigma", [("ddim", True), ("ddpm", False)])
def test_steps_are_the_diffusions(name, learn_sigma):
    model, y = random_model(DiTSEM, dict(L=L, V=V, learn_sigma=learn_sigma))
    diffusion, eta = create_diffusion("7", learn_sigma=learn_sigma), {"eta": 0.7} if name == "ddim" else {}
    loop = partial(diffusion.ddim_sample_loop, **eta) if eta else diffusion.p_sample_loop
    full = full_computation(model, y, loop, [0, *range(7, 0, -1)], cfg_scale=1.5)
    torch.testing.assert_close(draw(model, create_sampler(name, 7, **eta), y, cfg_scale=1.5), full, **CLOSE)


LOG_SIGMA = np.log((1 / create_diffusion("").alphas_cumprod - 1).numpy()) / 2  # at the whole times


@pytest.mark.parametrize(
    "process, name, steps, error",
    [
        *(("gaussian", *row) for row in (("ddpm", 250, 0.03), ("ddim", 250, 0.02), ("dpmsolver++", 25, 0.03))),
        *(("gaussian", "heun", 40, 0.02), ("flow", "euler", 400, 0.01), ("flow", "heun", 100, 0.01)),
        ("flow", "sde", 400, 0.04),
    ],
)
def test_samplers_on_a_distribution_that_is_known(process, name, steps, error):
    """N(0, std^2), whose noise and x_0 are known at every time; each sampler asks for the times that it says."""
    std, generator, sampler = (
        0.5,
        torch.Generator().manual_seed(1),
        create_sampler(name, steps, create_process(process)),
    )
    asked, expected, number = [], [], 0

    def predict(x, time, since=None):
        alpha = 1 / (1 + math.exp(2 * np.interp(time, np.arange(1000), LOG_SIGMA)))
        signal, noise = (1 - time, time) if process == "flow" else (math.sqrt(alpha), math.sqrt(1 - alpha))
        variance = signal**2 * std**2 + noise**2
        asked.append(time)
        expected.append(signal * std**2 / variance * x)  # E[x_0 | x_t]
        eps = noise / variance * x
        return eps - expected[-1] if process == "flow" else torch.cat([eps, torch.zeros_like(x)], dim=1)

    x = torch.randn(1, 4, 64, 64, generator=generator)
    for drawn, x_start in sampler(predict, x, lambda step: torch.randn(x.shape, generator=generator)):
        assert drawn.shape == x.shape
        torch.testing.assert_close(x_start, expected[number].float(), atol=1e-3, rtol=1e-3)  # of its first evaluation
        number = len(expected)
    assert asked == sampler.times == sorted(asked, reverse=True) and sampler.num_steps == steps
    assert abs(drawn.std() / std - 1) < error
    assert name in ("ddpm", "sde") or ((drawn / (std * x)) - 1).abs().median() < error  # the flow of probability


def nonlinear(x, time):
    """A made-up model output: eps, and the variance's channels."""
    return torch.cat([torch.tanh(1.3 * x) * (1 + 1e-3 * time) + 0.1 * torch.sin(3 * x), x], dim=1)


@pytest.mark.parametrize("steps", [2, 15, 99])
def test_dpm_solver_is_that_of_diffusers(steps):
    """x and x_0 after each step. Theirs computes the schedule's part in float32, ours in float64."""
    from diffusers import DPMSolverMultistepScheduler

    reference = DPMSolverMultistepScheduler(trained_betas=named_betas("linear", 1000).numpy())
    reference.set_timesteps(steps)
    ours, theirs = DPMSolver(steps), torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(2))
    assert ours.times == reference.timesteps.tolist()
    for time, outputs in zip(reference.timesteps, ours(nonlinear, theirs, None)):
        theirs = reference.step(nonlinear(theirs, time)[:, :4], time, theirs, return_dict=False)[0]
        for output, expected in zip(outputs, (theirs, reference.model_outputs[-1])):
            assert (output - expected).abs().max() < 1e-5 * expected.abs().max()


def test_heun_is_algorithm_1_of_edm():
    """Written out in EDM's own terms, a denoiser D(y; sigma) on y = x / sqrt(alphas_cumprod), and its schedule."""
    sampler, levels = HeunSampler(6), np.exp(LOG_SIGMA)
    low, high, rho = levels[0], levels[-1], 7
    sigmas = [*((high ** (1 / rho) + i / 5 * (low ** (1 / rho) - high ** (1 / rho))) ** rho for i in range(6)), 0.0]

    def denoiser(y, sigma):
        time = float(np.interp(math.log(sigma), LOG_SIGMA, np.arange(1000)))
        return y - sigma * nonlinear(y / math.sqrt(1 + sigma**2), time)[:, :4]

    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y = x * math.sqrt(1 + sigmas[0] ** 2)
    for sigma, following in zip(sigmas, sigmas[1:]):
        slope = (y - denoiser(y, sigma)) / sigma
        ahead = y + (following - sigma) * slope
        if following:
            slope = (slope + (ahead - denoiser(ahead, following)) / following) / 2
        y = y + (following - sigma) * slope
    *_, (last, x_start) = sampler(nonlinear, x, None)
    torch.testing.assert_close(last, y, atol=1e-8, rtol=1e-6)
    assert torch.equal(last, x_start)
    assert sampler.times[:3:2] == [999, sampler.times[1]] and sampler.times[-2:] == [0, 0] and len(sampler.times) == 11


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sample_belongs_to_its_index(name):
    """Drawn in another batch, after another, with all steps seen, or with times that are not announced: the same."""
    model, y = random_model()
    sampler, seen = create_sampler(name, 6), []
    both = draw(model, sampler, y, cfg_scale=1.5)
    sampler.times = [] if name == "heun" else sampler.times  # a solver may choose them as it goes
    options = dict(indices=INDICES[1:2], cfg_scale=1.5, on_step=lambda number, x, x_start: seen.append(x_start))
    alone = draw(model, sampler, y[1:2], **options)
    torch.testing.assert_close(both[1:2], alone, **CLOSE)
    assert len(seen) == sampler.num_steps == 6
    if name != "ddpm":
        torch.testing.assert_close(seen[-1], alone, atol=0.2, rtol=0.1)
    model = DiTSEM(input_size=8, patch_size=4, hidden_size=24, depth=1, num_heads=2, L=L, V=V, learn_sigma=False).eval()
    x = draw(model, create_sampler(name, 4), y, cfg_scale=2.0)
    assert x.shape == (3, *SHAPE) and x.isfinite().all()


def test_samples_that_are_not_finite_are_not_written(tiny_models, tmp_path):
    decoder = Decoder(load_vae(tiny_models[0]), tmp_path)
    latents = torch.zeros(3, *SHAPE)
    assert decoder.images(latents).shape == (3, 64, 64, 3)
    latents[1, 0, 0, 0] = math.nan
    refusal(decoder, [0, 1, 2], latents, words="not finite numbers: try --precision bf16 or fp32")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_weights_in_16_bits_give_what_autocast_gives(precision):
    class Float32(torch.nn.Linear):
        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float())

    model, y = random_model()
    model.blocks[1].mlp.fc2.__class__ = Float32

    def sample():
        with torch.autocast("cpu", PRECISIONS[precision]):
            return draw(model, create_sampler("ddpm", 4), y, cfg_scale=1.5)

    exact = draw(model, create_sampler("ddpm", 4), y, cfg_scale=1.5)
    autocast = sample()
    lower_precision(model, precision)
    assert torch.equal(sample(), autocast)
    assert {parameter.dtype for parameter in model.blocks[0].parameters()} == {PRECISIONS[precision]}
    assert model.blocks[1].mlp.fc2.weight.dtype == torch.float32
    assert {parameter.dtype for parameter in model.sem_embedder.parameters()} == {torch.float32}
    assert 0 < (exact - autocast).abs().mean() < 0.1 * exact.std()
    fuse_gelu(model)  # as on a GPU
    assert all(type(block.mlp.fc1) is LinearGELU for block in model.blocks)
    assert (sample() - autocast).abs().mean() < (exact - autocast).abs().mean()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", list(PRECISIONS))
def test_cuda_graphs_give_the_same(precision):
    model, y = random_model()
    lower_precision(model, precision)
    model.cuda()
    plain, graphs = model.denoise, CudaGraphs(model.denoise)

    def sample(name, denoise, y):
        model.denoise = denoise
        with torch.autocast("cuda", PRECISIONS[precision], enabled=precision != "fp32"):
            options = dict(indices=INDICES.cuda(), cfg_scale=1.5, t_max=500)
            return draw(model, create_sampler(name, 6), y.cuda(), **options)

    for name, codes in (("ddpm", y), ("heun", y.flip(0))):  # Heun's keeps one output while it asks for the next
        torch.testing.assert_close(sample(name, graphs, codes), sample(name, plain, codes), **CLOSE)
    assert len(graphs.recorded) == 2
