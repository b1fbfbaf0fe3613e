import math

import pytest
import torch
from conftest import close, golden, refusal

from diffusion import GaussianDiffusion, create_diffusion, named_betas, spaced_timesteps
from models import DiTSEM

VALUES, _ = golden("diffusion")


def toy_network(x, t):
    return torch.tanh(torch.einsum("oc,nchw->nohw", VALUES["W"], x) + 0.2 * t.view(-1, 1, 1, 1) / 1000)


# ---------------------------------------------------------------------- reference values


def test_schedule_and_forward_process_agree_with_reference():
    diffusion = create_diffusion("")
    assert diffusion.betas.dtype == torch.float64
    close(diffusion.betas, VALUES["betas"], 1e-12)
    close(diffusion.alphas_cumprod, VALUES["alphas_cumprod"], 1e-12)
    close(diffusion.q_sample(VALUES["x0"], VALUES["t"], VALUES["noise"]), VALUES["q_sample"])


def test_losses_agree_with_reference():
    values, weights = golden("ditsem")
    model = DiTSEM(input_size=8, hidden_size=32, depth=2, num_heads=2, L=3, V=4).eval()
    model.load_state_dict(weights)
    diffusion = create_diffusion("")
    losses = diffusion.training_losses(toy_network, VALUES["x0"], VALUES["t"], noise=VALUES["noise"])
    with torch.no_grad():
        of_model = diffusion.training_losses(
            model, values["x"], values["t"], dict(y=values["y"]), noise=values["noise"]
        )
    for name in ("loss", "mse", "vb"):
        close(losses[name], VALUES[f"loss_{name}"])
        close(of_model[name], values[name])


def test_samplers_agree_with_reference():
    diffusion = create_diffusion("12")
    torch.manual_seed(5)
    close(diffusion.p_sample_loop(toy_network, (2, 4, 4, 4), VALUES["z"], clip_denoised=False), VALUES["ddpm12_seed5"])
    close(diffusion.ddim_sample_loop(toy_network, (2, 4, 4, 4), VALUES["z"], clip_denoised=False), VALUES["ddim12"])


# ---------------------------------------------------------------------- closed forms


def test_cosine_schedule_is_the_squared_cosine():
    betas = named_betas("squaredcos_cap_v2", 1000)
    time = torch.arange(1, 1001, dtype=torch.float64) / 1000
    cosine = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    close(torch.cumprod(1 - betas, 0)[:990], cosine[:990], 1e-9)
    assert betas.max() == 0.999


def test_respacing():
    """It keeps the marginals, and the reference's times."""
    full = create_diffusion("")
    for respacing in ("", "7", "250", "ddim50", "10,15,20"):
        kept = create_diffusion(respacing)
        close(kept.alphas_cumprod, full.alphas_cumprod[kept.timestep_map], 1e-12)
        close(torch.cumprod(1 - kept.betas, 0), kept.alphas_cumprod, 1e-12)
        if f"timesteps_{respacing}" in VALUES:
            assert kept.timestep_map == VALUES[f"timesteps_{respacing}"].tolist()
    assert spaced_timesteps(10, "10") == list(range(10))
    assert spaced_timesteps(10, "ddim5") == [0, 2, 4, 6, 8]
    assert spaced_timesteps(10, [2, 1]) == [0, 4, 5]


def test_what_does_not_exist_is_refused():
    for respacing in ("1001", "0", "ddim300", "ten", "600,1", "ddim"):
        refusal(create_diffusion, respacing, words="respacing")
    refusal(create_diffusion, "", noise_schedule="sine", words="'sine' does not exist")


def exact_network(x_start):
    """The network that knows x_0: eps exactly, and the variance at its lower bound."""

    def network(x, t):
        alphas = create_diffusion("").alphas_cumprod[t].view(-1, 1, 1, 1).float()
        eps = (x - alphas.sqrt() * x_start) / (1 - alphas).sqrt()
        return torch.cat([eps, -torch.ones_like(eps)], dim=1)

    return network


def test_loss_weights():
    torch.manual_seed(0)
    x_start, noise, t = torch.randn(4, 4, 4, 4), torch.randn(4, 4, 4, 4), torch.tensor([0, 3, 20, 49])
    losses = {}
    for loss in ("mse", "rescaled_mse", "kl", "rescaled_kl"):
        diffusion = GaussianDiffusion(named_betas("linear", 1000), range(0, 1000, 20), loss=loss)
        losses[loss] = diffusion.training_losses(toy_network, x_start, t, noise=noise)
    close(losses["mse"]["loss"], losses["mse"]["mse"] + losses["mse"]["vb"])
    close(losses["rescaled_mse"]["vb"], losses["mse"]["vb"] * 50 / 1000)
    close(losses["rescaled_kl"]["loss"], losses["kl"]["loss"] * 50)
    # the bound itself is the same number, with the mean detached or not
    close(losses["kl"]["loss"], losses["mse"]["vb"])


def test_variance_bound_leaves_the_mean_alone():
    output = torch.randn(2, 8, 4, 4, requires_grad=True)
    losses = create_diffusion("").training_losses(lambda x, t: output, torch.randn(2, 4, 4, 4), torch.tensor([4, 800]))
    losses["vb"].sum().backward()
    assert (output.grad[:, :4] == 0).all() and (output.grad[:, 4:] != 0).any()


@pytest.mark.parametrize("small", [False, True])
def test_fixed_variances(small):
    diffusion = create_diffusion("", learn_sigma=False, sigma_small=small)
    x, t = torch.randn(2, 4, 4, 4), torch.tensor([0, 600])
    out = diffusion.p_mean_variance(lambda x, t: torch.zeros_like(x), x, t)
    previous = torch.cat([torch.ones(1), diffusion.alphas_cumprod[:-1]])
    posterior = diffusion.betas * (1 - previous) / (1 - diffusion.alphas_cumprod)
    expected = torch.stack([posterior[1], posterior[600] if small else diffusion.betas[600]]).float()
    close(out["variance"], expected.view(2, 1, 1, 1).expand_as(x))
    assert set(diffusion.training_losses(lambda x, t: torch.zeros_like(x), x, t)) == {"mse", "loss"}


def test_predicting_x_start():
    diffusion = create_diffusion("5", predict_xstart=True, learn_sigma=False)
    x_start = torch.rand(2, 4, 4, 4) * 2 - 1
    close(diffusion.p_sample_loop(lambda x, t: x_start, x_start.shape, device="cpu"), x_start, 1e-4)
    losses = diffusion.training_losses(lambda x, t: torch.zeros_like(x), x_start, torch.tensor([0, 4]))
    close(losses["loss"], x_start.square().mean(dim=(1, 2, 3)))
    out = diffusion.p_mean_variance(lambda x, t: x_start, x_start, torch.tensor([1, 3]), denoised_fn=lambda x: 2 * x)
    close(out["pred_xstart"], (2 * x_start).clamp(-1, 1))


def test_ddim_with_an_exact_network():
    """Encoding x_t to x_{t+1} and decoding it again comes back to x_t; at eta 1 a step has the posterior's variance."""
    diffusion, x_start, t = create_diffusion("100"), torch.rand(1, 3, 4, 4) * 2 - 1, torch.tensor([40])
    network, x = exact_network(x_start), diffusion.q_sample(x_start, t)
    up = diffusion.ddim_reverse_sample(network, x, t)["sample"]
    close(diffusion.ddim_sample(network, up, t + 1)["sample"], x, 1e-4)
    noises = torch.zeros_like, torch.ones_like
    low, high = (diffusion.ddim_sample(network, x, t, eta=1.0, randn_like=one)["sample"] for one in noises)
    close((high - low).square(), diffusion.p_mean_variance(network, x, t)["variance"])


def test_likelihood_of_a_network_that_knows_x_start():
    diffusion = create_diffusion("20")
    torch.manual_seed(0)
    x_start = torch.randint(0, 256, (2, 3, 8, 8)) / 127.5 - 1
    out = diffusion.calc_bpd_loop(exact_network(x_start), x_start)
    assert out["vb"].shape == out["mse"].shape == out["xstart_mse"].shape == (2, 20)
    close(out["vb"][:, :-1], torch.zeros(2, 19), 1e-3)  # steps run from the last to the first
    close(out["mse"], torch.zeros(2, 20), 1e-4)
    close(out["total_bpd"], out["prior_bpd"] + out["vb"].sum(dim=1))
    # the prior term in closed form
    alpha = diffusion.alphas_cumprod[-1]
    prior = 0.5 * (-(1 - alpha).log() - alpha + alpha * x_start.double() ** 2).mean(dim=(1, 2, 3)) / math.log(2)
    close(out["prior_bpd"], prior.float())
