"""sample_latents: guidance where it acts, every sampler against its definition, precision, and what may not matter."""
import math

import pytest
import torch
from conftest import L, V

from diffusion import create_diffusion
from dlc.sampling import latents as sampling
from dlc.noise import Stream, normal
from dlc.runtime import PRECISIONS
from dlc.sampling.decoder import Decoder
from dlc.sampling.latents import CudaGraphs, DPMSolver, create_sampler, lower_precision, sample_latents
from dlc.vae import load_vae
from models import DiT_models

SHAPE, INDICES = (4, 8, 8), torch.tensor([5, 0, 9])
# Of latents drawn in batches of other sizes: the first step, at time 999, divides eps and its rounding by 0.006.
CLOSE = dict(atol=2e-3, rtol=2e-3)
MODELS = [("DiTSEM-Ti/4", dict(L=L, V=V)), ("DiT-Ti/4", dict(num_classes=9)), ("DiTCONT-Ti/4", dict(in_dim=5))]


def random_model(name, **keywords):
    torch.manual_seed(0)
    model = DiT_models[name](input_size=8, **keywords).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    y = {"DiTSEM": torch.randint(0, V, (3, L)), "DiT": torch.tensor([0, 4, 8]), "DiTCONT": torch.randn(3, 5)}
    return model, y[name.split("-")[0]]


def full_computation(model, y, loop, draws, **cfg):
    """Both halves at every step, by the diffusion's own loop, with the samples' own noise."""
    draws = iter(draws)
    return loop(
        model.forward_with_cfg, (6, *SHAPE), clip_denoised=False, device="cpu",
        model_kwargs=dict(y=torch.cat([y, model.null_condition(3)]), **cfg),
        randn_like=lambda x: normal(0, Stream.SAMPLE_NOISE, INDICES, SHAPE, next(draws)).repeat(2, 1, 1, 1))[:3]


@pytest.mark.parametrize("channels", [None, 3, 4])
@pytest.mark.parametrize("name, keywords", MODELS)
def test_guidance_only_where_it_acts(name, keywords, channels):
    """At times outside t_min..t_max, and always at scale 1, the conditional half alone runs; the result is the same."""
    model, y = random_model(name, **keywords)
    rows, diffusion = [], create_diffusion("10")
    model.blocks[0].register_forward_hook(lambda module, inputs, output: rows.append(len(output)))

    def sample(**options):
        rows.clear()
        return sample_latents(model, create_sampler("ddpm", 10), y, 0, INDICES, SHAPE, channels=channels, **options)

    guided = sum(200 <= t <= 500 for t in diffusion.timestep_map)
    assert 0 < guided < 10
    part = sample(cfg_scale=2.0, t_min=200, t_max=500)
    assert sorted(rows) == [3] * (10 - guided) + [6] * guided
    full = full_computation(model, y, diffusion.p_sample_loop, [0, *range(10, 0, -1)], cfg_scale=2.0, t_min=200,
                            t_max=500, channels=channels)
    torch.testing.assert_close(part, full, **CLOSE)

    plain = sample(cfg_scale=1.0)
    assert rows == [3] * 10
    assert (part - plain).abs().max() > 1e-2
    torch.testing.assert_close(sample(cfg_scale=1 + 1e-6), plain, **CLOSE)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_is_the_diffusions(eta):
    model, y = random_model(MODELS[0][0], **MODELS[0][1])
    diffusion = create_diffusion("7")
    ours = sample_latents(model, create_sampler("ddim", 7, eta), y, 0, INDICES, SHAPE, 1.5)
    full = full_computation(
        model, y, lambda *args, **kwargs: diffusion.ddim_sample_loop(*args, eta=eta, **kwargs), [0, *range(7, 0, -1)],
        cfg_scale=1.5)
    torch.testing.assert_close(ours, full, **CLOSE)


def solve(sampler, x, std):
    """From x to samples of N(0, std^2), whose eps is known at every time."""
    alphas_cumprod = create_diffusion("").alphas_cumprod.tolist()
    generator = torch.Generator().manual_seed(0)
    for number, time in enumerate(sampler.times):
        alpha = alphas_cumprod[time]
        variance = alpha * std**2 + 1 - alpha
        expected = math.sqrt(alpha) * std**2 / variance * x             # E[x_0 | x_t]
        output = torch.cat([math.sqrt(1 - alpha) / variance * x, torch.zeros_like(x)], dim=1)
        x, x_start = sampler.step(number, x, output, lambda: torch.randn(x.shape, generator=generator))
        torch.testing.assert_close(x_start, expected, atol=1e-3, rtol=1e-3)
    return x


def test_samplers_on_a_distribution_that_is_known():
    """The deterministic ones follow the probability flow, which scales x; the ancestral one has the right variance."""
    std = 0.5
    x = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(1))
    error = {(name, steps): float(((solve(create_sampler(name, steps), x, std) / (std * x)) - 1).abs().median())
             for name, steps in (("ddim", 250), ("ddim", 25), ("dpmsolver++", 25), ("dpmsolver++", 10))}
    assert error["dpmsolver++", 25] < 0.03 and error["ddim", 250] < 0.02
    assert error["dpmsolver++", 25] < error["ddim", 25] / 3
    assert error["dpmsolver++", 25] < error["dpmsolver++", 10] / 5      # second order: by 2.5 squared
    assert abs(solve(create_sampler("ddpm", 250), x, std).std() / std - 1) < 0.03


def test_noise_drawn_for_several_steps_at_once_is_that_of_each(monkeypatch):
    model, y = random_model(MODELS[0][0], **MODELS[0][1])

    def sample(numbers):
        monkeypatch.setattr(sampling, "NOISE_AT_ONCE", numbers)
        return sample_latents(model, create_sampler("ddpm", 7), y, 0, INDICES, SHAPE, 1.5)

    one = sample(1)
    for numbers in (3 * 256 * 3, 10**6):                    # 3 steps at once, and all; logarithms of longer rows
        torch.testing.assert_close(sample(numbers), one, **CLOSE)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpmsolver++"])
def test_a_sample_belongs_to_its_index(name):
    """Drawn in another batch, after another, or with all steps seen: the same; and each sampler ends near x_0."""
    model, y = random_model(MODELS[0][0], **MODELS[0][1])
    sampler, seen = create_sampler(name, 6), []
    both = sample_latents(model, sampler, y, 0, INDICES, SHAPE, 1.5)
    alone = sample_latents(model, sampler, y[1:2], 0, INDICES[1:2], SHAPE, 1.5,
                           on_step=lambda number, x, x_start: seen.append(x_start))
    torch.testing.assert_close(both[1:2], alone, **CLOSE)
    assert len(seen) == len(sampler.times) == 6
    assert sampler.times == sorted(sampler.times, reverse=True) and sampler.times[0] == 999
    if name != "ddpm":
        torch.testing.assert_close(seen[-1], alone, atol=0.2, rtol=0.1)


def test_samples_that_are_not_finite_are_not_written(tiny_models, tmp_path):
    decoder = Decoder(load_vae(tiny_models[0]), tmp_path)
    latents = torch.zeros(3, *SHAPE)
    assert decoder.images(latents).shape == (3, 64, 64, 3)
    latents[1, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="not finite numbers: try --precision bf16 or fp32"):
        decoder([0, 1, 2], latents)
    assert not list(tmp_path.iterdir())


def test_decoding_does_not_depend_on_which_are_wanted(tiny_models, tmp_path):
    decoder = Decoder(load_vae(tiny_models[0]), tmp_path)
    latents = torch.randn(37, *SHAPE, generator=torch.Generator().manual_seed(0))
    for decoder.on_gpu in (False, True):                                    # one at a time, and 16
        everything = decoder.images(latents)
        for wanted in (torch.tensor([3, 17, 20, 36]), torch.tensor([36])):
            assert (decoder.images(latents, wanted) == everything[wanted]).all()


def test_default_steps_and_what_is_refused():
    assert [len(create_sampler(name).times) for name in ("ddpm", "ddim", "dpmsolver++")] == [250, 50, 25]
    for arguments, message in ((("ddpm", 10, 0.5), "--eta 0.5: --sampler ddpm has none"),
                               (("dpmsolver++", 1000), "at most 999")):
        with pytest.raises(ValueError, match=message):
            create_sampler(*arguments)
    assert len(set(DPMSolver(999).times)) == 999


def test_a_model_without_sigma():
    torch.manual_seed(0)
    model = DiT_models["DiTSEM-Ti/4"](input_size=8, L=L, V=V, learn_sigma=False).eval()
    for name in ("ddpm", "ddim", "dpmsolver++"):
        sampler = create_sampler(name, 4, learn_sigma=False)
        x = sample_latents(model, sampler, torch.zeros(3, L, dtype=torch.long), 0, INDICES, SHAPE, 2.0)
        assert x.shape == (3, *SHAPE) and x.isfinite().all()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_weights_in_16_bits_give_what_autocast_gives(precision):
    model, y = random_model(MODELS[0][0], **MODELS[0][1])

    def sample():
        with torch.autocast("cpu", PRECISIONS[precision]):
            return sample_latents(model, create_sampler("ddpm", 4), y, 0, INDICES, SHAPE, 1.5)

    exact = sample_latents(model, create_sampler("ddpm", 4), y, 0, INDICES, SHAPE, 1.5)
    autocast = sample()
    lower_precision(model, precision)
    assert torch.equal(sample(), autocast)
    assert {parameter.dtype for parameter in model.blocks.parameters()} == {PRECISIONS[precision]}
    assert {parameter.dtype for parameter in model.sem_embedder.parameters()} == {torch.float32}
    assert 0 < (exact - autocast).abs().mean() < 0.1 * exact.std()


@pytest.mark.slow
def test_compiled_blocks_are_those_that_run_under_guidance():
    """Compiled, the guided and the unguided steps give what they gave, and no step runs the eager block."""
    model, y = random_model(MODELS[0][0], **MODELS[0][1])
    options = dict(cfg_scale=1.5, t_max=500)
    eager = sample_latents(model, create_sampler("ddpm", 6), y, 0, INDICES, SHAPE, **options)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for block in model.blocks:
        block.compile(dynamic=False)
    compiled = sample_latents(model, create_sampler("ddpm", 6), y, 0, INDICES, SHAPE, **options)
    torch.testing.assert_close(compiled, eager, **CLOSE)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]      # N rows, and 2N


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", list(PRECISIONS))
def test_cuda_graphs_give_the_same(precision):
    model, y = random_model(MODELS[0][0], **MODELS[0][1])
    lower_precision(model, precision)
    model.cuda()
    graphs = CudaGraphs(model.denoise)

    def sample(denoise, y):
        with torch.autocast("cuda", PRECISIONS[precision], enabled=precision != "fp32"):
            return sample_latents(model, create_sampler("ddpm", 6), y.cuda(), 0, INDICES.cuda(), SHAPE, 1.5,
                                  t_max=500, denoise=denoise)

    for codes in (y, y.flip(0)):
        torch.testing.assert_close(sample(graphs, codes), sample(None, codes), **CLOSE)
    assert len(graphs.recorded) == 2
