"""Gaussian diffusion: schedules, respacing, losses and samplers, apart from any model, file or rank.

    diffusion = create_diffusion("250")                          # 250 of the 1000 steps
    samples = diffusion.p_sample_loop(model, shape, clip_denoised=False, model_kwargs=dict(y=y), device="cuda")
    losses = create_diffusion("").training_losses(model, x_start, t, dict(y=y))["loss"]

`model` is any callable (x, t, **model_kwargs) -> (N, C or 2C, ...); t are times of the full process. The samplers that
--sampler names are in samplers.py.
"""
from .gaussian import GaussianDiffusion
from .schedules import named_betas, spaced_timesteps

__all__ = ["GaussianDiffusion", "create_diffusion", "named_betas", "spaced_timesteps"]


def create_diffusion(timestep_respacing: str | list[int] | None = "", noise_schedule: str = "linear",
                     use_kl: bool = False, sigma_small: bool = False, predict_xstart: bool = False,
                     learn_sigma: bool = True, rescale_learned_sigmas: bool = False,
                     diffusion_steps: int = 1000) -> GaussianDiffusion:
    """A diffusion process; the options have the names that ADM and DiT give them.

    Args:
        timestep_respacing: which steps to keep: "" or None for all; "250"; "ddim50" (fixed stride); "10,15,20"
            (steps in each of three equal sections); or a list of such counts.
        noise_schedule: "linear" (Ho et al. 2020) or "squaredcos_cap_v2" (Nichol & Dhariwal 2021).
        use_kl: train on the rescaled variational bound instead of the mean squared error.
        sigma_small: without learn_sigma, use the posterior variance instead of beta.
        predict_xstart: the model predicts x_0 instead of eps.
        learn_sigma: the model also predicts the variance (twice the channels).
        rescale_learned_sigmas: with learn_sigma, weight the variance's bound by steps/1000 in the loss.
        diffusion_steps: length of the full process.

    Raises ValueError for a respacing or a schedule that does not exist.
    """
    if learn_sigma:
        variance = "learned_range"
    else:
        variance = "fixed_small" if sigma_small else "fixed_large"
    loss = "rescaled_kl" if use_kl else "rescaled_mse" if rescale_learned_sigmas else "mse"
    return GaussianDiffusion(
        named_betas(noise_schedule, diffusion_steps),
        spaced_timesteps(diffusion_steps, timestep_respacing or [diffusion_steps]),
        predict="x_start" if predict_xstart else "eps", variance=variance, loss=loss)
