"""The Gaussian diffusion process: forward noising, training losses, ancestral and DDIM sampling, likelihood bounds.

Notation: Ho et al. 2020 (DDPM, arXiv 2006.11239), Nichol & Dhariwal 2021 (arXiv 2102.09672), Song et al. 2020 (DDIM,
arXiv 2010.02502). x_t = sqrt(alphas_cumprod_t) x_0 + sqrt(1 - alphas_cumprod_t) eps.
"""
import collections
import math
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace

import torch

from .likelihoods import discretized_gaussian_log_likelihood, mean_flat, normal_kl


class GaussianDiffusion:
    """A diffusion process over the kept times of a noise schedule.

    Args:
        betas: (steps,) float64, the full schedule.
        timesteps: ascending times to keep. The kept process has the same alphas_cumprod at those times, so its betas
            are 1 - alphas_cumprod / (alphas_cumprod of the kept time before).
        predict: what the model's first C channels mean: "eps" or "x_start".
        variance: "learned_range" (C more channels say where log sigma^2 lies between its bounds), "fixed_small" (the
            posterior's) or "fixed_large" (beta).
        loss: "mse", "rescaled_mse", "kl" or "rescaled_kl"; see `training_losses`.

    Attributes: num_timesteps; timestep_map (list of int); betas and alphas_cumprod of the kept process, float64 on the
    CPU. In every method t (N,) counts kept steps, 0..num_timesteps-1, while the model receives timestep_map[t], and
    randomness comes from `noise` or `randn_like` where a caller wants to hold it.
    """

    def __init__(self, betas: torch.Tensor, timesteps: Sequence[int], *, predict: str = "eps",
                 variance: str = "learned_range", loss: str = "mse"):
        assert predict in ("eps", "x_start"), predict
        assert variance in ("learned_range", "fixed_small", "fixed_large"), variance
        assert loss in ("mse", "rescaled_mse", "kl", "rescaled_kl"), loss
        self.predict, self.variance, self.loss = predict, variance, loss
        self.timestep_map = list(timesteps)
        self.num_timesteps = len(self.timestep_map)

        one = torch.ones(1, dtype=torch.float64)
        self.alphas_cumprod = torch.cumprod(1 - betas, 0)[self.timestep_map]
        previous = torch.cat([one, self.alphas_cumprod[:-1]])
        self.betas = 1 - self.alphas_cumprod / previous

        # q(x_{t-1} | x_t, x_0): DDPM equations 6 and 7. Its variance is 0 at t = 0, so the log takes that of t = 1.
        posterior_variance = self.betas * (1 - previous) / (1 - self.alphas_cumprod)
        posterior_log_variance = torch.cat([posterior_variance[1:2], posterior_variance[1:]]).log()
        if self.num_timesteps == 1:
            posterior_log_variance = self.betas.log()
        self._tables = dict(
            alphas_cumprod=self.alphas_cumprod,
            alphas_cumprod_previous=previous,
            alphas_cumprod_next=torch.cat([self.alphas_cumprod[1:], 0 * one]),
            sqrt_alphas_cumprod=self.alphas_cumprod.sqrt(),
            sqrt_one_minus_alphas_cumprod=(1 - self.alphas_cumprod).sqrt(),
            log_one_minus_alphas_cumprod=(1 - self.alphas_cumprod).log(),
            sqrt_recip_alphas_cumprod=(1 / self.alphas_cumprod).sqrt(),
            sqrt_recipm1_alphas_cumprod=(1 / self.alphas_cumprod - 1).sqrt(),
            posterior_coefficient_x_start=self.betas * previous.sqrt() / (1 - self.alphas_cumprod),
            posterior_coefficient_x_t=(1 - previous) * (1 - self.betas).sqrt() / (1 - self.alphas_cumprod),
            posterior_log_variance=posterior_log_variance,
            log_betas=self.betas.log(),
            # at t = 0 the posterior's of t = 1: ADM's choice, kept for equal likelihoods
            fixed_large_log_variance=torch.cat([posterior_log_variance[:1], self.betas[1:].log()]))
        self._on = {}       # by device: the model's times (T,) int64, and the tables (tables, T) float32

    def _tables_on(self, device):
        if device not in self._on:
            self._on[device] = (torch.tensor(self.timestep_map, device=device),
                                torch.stack([*self._tables.values()]).float().to(device))
        return self._on[device]

    def _at(self, t, like):
        """The tables at steps t (N,), by name: (N, 1, ...) float32 each, which broadcast to `like`."""
        values = self._tables_on(t.device)[1][:, t].view(len(self._tables), -1, *[1] * (like.ndim - 1))
        return SimpleNamespace(**dict(zip(self._tables, values)))

    def _call_model(self, model, x, t, model_kwargs):
        return model(x, self._tables_on(t.device)[0][t], **(model_kwargs or {})).float()

    @property
    def model_arguments(self) -> dict[str, bool]:
        """What a model's constructor is to be told: whether it predicts the variance as well, if not as by default."""
        return {} if self.variance == "learned_range" else dict(learn_sigma=False)

    @property
    def last_time(self) -> int:
        """The largest time that the model is told."""
        return self.timestep_map[-1]

    def training_times(self, u: torch.Tensor) -> torch.Tensor:
        """Steps t (N,) int64, evenly distributed, from uniforms u (N,) float64 in [0, 1)."""
        return (u * self.num_timesteps).long()

    def target(self, x_start: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What the model's first C channels are to be at steps t (N,), of x_start's shape."""
        return x_start if self.predict == "x_start" else noise

    # ------------------------------------------------------------------ forward process

    def q_sample(self, x_start: torch.Tensor, t: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """x_t from x_0 (N, ...) at steps t (N,): DDPM equation 4."""
        noise = torch.randn_like(x_start) if noise is None else noise
        at = self._at(t, x_start)
        return at.sqrt_alphas_cumprod * x_start + at.sqrt_one_minus_alphas_cumprod * noise

    def q_posterior_mean_variance(self, x_start: torch.Tensor, x_t: torch.Tensor,
                                  t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance of q(x_{t-1} | x_t, x_0)."""
        at = self._at(t, x_t)
        mean = at.posterior_coefficient_x_start * x_start + at.posterior_coefficient_x_t * x_t
        return mean, at.posterior_log_variance

    # ------------------------------------------------------------------ reverse process

    def p_mean_variance(self, model: Callable, x: torch.Tensor, t: torch.Tensor, clip_denoised: bool = True,
                        denoised_fn: Callable | None = None,
                        model_kwargs: dict | None = None) -> dict[str, torch.Tensor]:
        """The model's p(x_{t-1} | x_t), and the x_0 that it predicts.

        Args:
            clip_denoised: clamp that x_0 to [-1, 1]. For pixels; latents want False.
            denoised_fn: applied to that x_0 before the clamp.

        Returns a dict: mean, variance, log_variance, pred_xstart, each of x's shape.
        """
        output, at = self._call_model(model, x, t, model_kwargs), self._at(t, x)
        if self.variance == "learned_range":
            output, fraction = output.chunk(2, dim=1)
            # improved DDPM, equation 15: v in [-1, 1] between the posterior's log-variance and that of beta
            fraction = (fraction + 1) / 2
            log_variance = fraction * at.log_betas + (1 - fraction) * at.posterior_log_variance
        else:
            fixed = at.fixed_large_log_variance if self.variance == "fixed_large" else at.posterior_log_variance
            log_variance = fixed.expand(x.shape)
        assert output.shape == x.shape, f"model output {tuple(output.shape)} for x {tuple(x.shape)}"

        x_start = output
        if self.predict == "eps":
            x_start = at.sqrt_recip_alphas_cumprod * x - at.sqrt_recipm1_alphas_cumprod * output
        if denoised_fn is not None:
            x_start = denoised_fn(x_start)
        if clip_denoised:
            x_start = x_start.clamp(-1, 1)
        mean, _ = self.q_posterior_mean_variance(x_start, x, t)
        return dict(mean=mean, variance=log_variance.exp(), log_variance=log_variance, pred_xstart=x_start)

    def _eps_from_x_start(self, x_t, t, x_start):
        at = self._at(t, x_t)
        return (at.sqrt_recip_alphas_cumprod * x_t - x_start) / at.sqrt_recipm1_alphas_cumprod

    def p_sample(self, model: Callable, x: torch.Tensor, t: torch.Tensor, *,
                 randn_like: Callable = torch.randn_like, **options) -> dict[str, torch.Tensor]:
        """One ancestral step x_t -> x_{t-1}. Draws one standard normal, also at t = 0, where its weight is 0.

        options: of `p_mean_variance`, here and in all methods below. Returns a dict: sample, pred_xstart.
        """
        out = self.p_mean_variance(model, x, t, **options)
        last = (t == 0).view(-1, *[1] * (x.ndim - 1))
        noise = randn_like(x).masked_fill(last, 0)
        return dict(sample=out["mean"] + torch.exp(0.5 * out["log_variance"]) * noise,
                    pred_xstart=out["pred_xstart"])

    def ddim_sample(self, model: Callable, x: torch.Tensor, t: torch.Tensor, *, eta: float = 0.0,
                    randn_like: Callable = torch.randn_like, **options) -> dict[str, torch.Tensor]:
        """One DDIM step x_t -> x_{t-1} (DDIM equation 12); eta 0 is deterministic and draws nothing, eta 1 is DDPM.

        Returns a dict: sample, pred_xstart.
        """
        x_start, at = self.p_mean_variance(model, x, t, **options)["pred_xstart"], self._at(t, x)
        alpha, previous = at.alphas_cumprod, at.alphas_cumprod_previous
        sigma = eta * ((1 - previous) / (1 - alpha) * (1 - alpha / previous)).sqrt()
        eps = self._eps_from_x_start(x, t, x_start)
        sample = x_start * previous.sqrt() + (1 - previous - sigma ** 2).sqrt() * eps
        if eta > 0:
            sample = sample + sigma * randn_like(x)      # sigma is 0 at t = 0
        return dict(sample=sample, pred_xstart=x_start)

    def ddim_reverse_sample(self, model: Callable, x: torch.Tensor, t: torch.Tensor,
                            **options) -> dict[str, torch.Tensor]:
        """One step x_t -> x_{t+1} of the deterministic DDIM path run backwards. Returns a dict: sample, pred_xstart."""
        x_start = self.p_mean_variance(model, x, t, **options)["pred_xstart"]
        eps, following = self._eps_from_x_start(x, t, x_start), self._at(t, x).alphas_cumprod_next
        return dict(sample=x_start * following.sqrt() + (1 - following).sqrt() * eps, pred_xstart=x_start)

    # ------------------------------------------------------------------ loops

    def p_sample_loop_progressive(self, model: Callable, shape: Sequence[int], noise: torch.Tensor | None = None, *,
                                  device: torch.device | str | None = None, progress: bool = False,
                                  randn_like: Callable = torch.randn_like, take_step: Callable | None = None,
                                  **options) -> Iterator[dict[str, torch.Tensor]]:
        """Sampling from x_T (N, ...), a generator of each step's dict: sample, pred_xstart.

        With a fixed global seed the draws are those of the reference implementations: x_T, then one normal of x's shape
        per step.

        Args:
            noise: x_T; None draws it.
            device: of the samples [that of noise, or else of the model].
            progress: show a bar.
            take_step: (model, x, t, randn_like=..., **options) to a step's dict [p_sample].
        """
        if device is None:
            device = noise.device if noise is not None else next(model.parameters()).device
        x = randn_like(torch.empty(shape, device=device)) if noise is None else noise.to(device)
        steps = range(self.num_timesteps - 1, -1, -1)
        if progress:
            from tqdm.auto import tqdm
            steps = tqdm(steps, desc="denoising", unit="step")
        for i in steps:
            t = torch.full((shape[0],), i, device=device)
            with torch.no_grad():
                out = (take_step or self.p_sample)(model, x, t, randn_like=randn_like, **options)
            yield out
            x = out["sample"]

    def ddim_sample_loop_progressive(self, *args, **options) -> Iterator[dict[str, torch.Tensor]]:
        """`p_sample_loop_progressive` by the steps of `ddim_sample`, which takes eta as well."""
        return self.p_sample_loop_progressive(*args, take_step=self.ddim_sample, **options)

    def p_sample_loop(self, *args, **options) -> torch.Tensor:
        """The last sample of `p_sample_loop_progressive`, same arguments: x_0 (N, ...)."""
        return collections.deque(self.p_sample_loop_progressive(*args, **options), maxlen=1).pop()["sample"]

    def ddim_sample_loop(self, *args, **options) -> torch.Tensor:
        """The last sample of `ddim_sample_loop_progressive`, same arguments: x_0 (N, ...)."""
        return self.p_sample_loop(*args, take_step=self.ddim_sample, **options)

    # ------------------------------------------------------------------ losses

    def _variational_bound_terms(self, model, x_start, x_t, t, **options):
        """One term of the variational bound, in bits per dimension: (N,), with the x_0 that the model predicts.

        KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t > 0, and -log p(x_0 | x_1) at t = 0.
        """
        true_mean, true_log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        out = self.p_mean_variance(model, x_t, t, **options)
        kl = mean_flat(normal_kl(true_mean, true_log_variance, out["mean"], out["log_variance"]))
        nll = -mean_flat(discretized_gaussian_log_likelihood(x_start, out["mean"], 0.5 * out["log_variance"]))
        return torch.where(t == 0, nll, kl) / math.log(2), out["pred_xstart"]

    def training_losses(self, model: Callable, x_start: torch.Tensor, t: torch.Tensor, model_kwargs: dict | None = None,
                        noise: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """The loss of each sample at steps t (N,).

        "mse": squared error of the prediction, and with a learned variance plus the bound of the variance alone (the
        mean detached), weighted by steps/1000 in "rescaled_mse", by 1 in "mse". "kl": the bound of both, in bits per
        dimension; "rescaled_kl": the same times the number of steps, an estimate of the whole sum.

        Returns a dict of (N,): loss, and for the MSE losses mse, and with a learned variance vb.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise)
        if self.loss in ("kl", "rescaled_kl"):
            bound, _ = self._variational_bound_terms(model, x_start, x_t, t, clip_denoised=False,
                                                     model_kwargs=model_kwargs)
            return dict(loss=bound * (self.num_timesteps if self.loss == "rescaled_kl" else 1))

        output, learned = self._call_model(model, x_t, t, model_kwargs), self.variance == "learned_range"
        prediction, *fraction = output.chunk(2, dim=1) if learned else [output]
        mse = mean_flat((self.target(x_start, noise, t) - prediction) ** 2)
        if not learned:
            return dict(loss=mse, mse=mse)
        frozen_mean = torch.cat([prediction.detach(), *fraction], dim=1)
        vb, _ = self._variational_bound_terms(lambda *_: frozen_mean, x_start, x_t, t, clip_denoised=False)
        if self.loss == "rescaled_mse":
            vb = vb * (self.num_timesteps / 1000)
        return dict(loss=mse + vb, mse=mse, vb=vb)

    @torch.no_grad()
    def calc_bpd_loop(self, model: Callable, x_start: torch.Tensor, clip_denoised: bool = True,
                      model_kwargs: dict | None = None, *, randn_like: Callable = torch.randn_like,
                      **options) -> dict[str, torch.Tensor]:
        """The variational bound on -log p(x_0), term by term, in bits per dimension.

        Returns a dict: total_bpd (N,), prior_bpd (N,), and, with steps from the last to the first, vb (N, steps),
        xstart_mse (N, steps), mse (N, steps) of eps.
        """
        vb, xstart_mse, mse = [], [], []
        for i in reversed(range(self.num_timesteps)):
            t = torch.full((x_start.shape[0],), i, device=x_start.device)
            noise = randn_like(x_start)
            x_t = self.q_sample(x_start, t, noise)
            bound, pred_xstart = self._variational_bound_terms(model, x_start, x_t, t, clip_denoised=clip_denoised,
                                                               model_kwargs=model_kwargs, **options)
            vb.append(bound)
            xstart_mse.append(mean_flat((pred_xstart - x_start) ** 2))
            mse.append(mean_flat((self._eps_from_x_start(x_t, t, pred_xstart) - noise) ** 2))
        vb, xstart_mse, mse = (torch.stack(terms, dim=1) for terms in (vb, xstart_mse, mse))

        # the prior term: KL(q(x_T | x_0) || N(0, 1)), a constant near 0 that no model can change
        at, zero = self._at(torch.full_like(t, self.num_timesteps - 1), x_start), torch.zeros_like(x_start)
        prior = normal_kl(at.sqrt_alphas_cumprod * x_start, at.log_one_minus_alphas_cumprod, zero, zero)
        prior_bpd = mean_flat(prior) / math.log(2)
        return dict(total_bpd=vb.sum(dim=1) + prior_bpd, prior_bpd=prior_bpd, vb=vb, xstart_mse=xstart_mse, mse=mse)
