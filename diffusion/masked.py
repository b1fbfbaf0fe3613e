"""Masked (absorbing-state) diffusion over tokens: noise, loss, bound and reverse steps, apart from any model.

    diffusion = MaskedDiffusion(V=256)
    x_t = diffusion.corrupt(x0, t, u)                            # tokens (N, L), of which some are V, the mask
    loss = diffusion.training_losses(model, x0, t, x_t)["loss"]  # (N,) nats per code
    nats, error = mean_bound(diffusion.code_bounds(model, x0, u), L)        # per token

`model(x_t, sigma, **model_kwargs)` gives log scores (N, L, V+1), up to a constant per place the log probabilities of
the clean token there. t runs from 0 (clean) to 1 (all masked).

Score entropy and process: Lou et al. 2024, arXiv 2310.16834 (SEDD). That its score is a distribution over clean tokens
times a known number: Ou et al. 2024, arXiv 2406.03736 (RADD), theorem 1. The loss as weighted cross-entropy: Sahoo et
al. 2024, arXiv 2406.07524 (MDLM), and RADD. Samplers are in masked_samplers.py.
"""
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

MASKINGS = ("independent", "counted")


def stratified_times(u: torch.Tensor, place: torch.Tensor, batch: int, low: float = 1e-3) -> torch.Tensor:
    """Times in [low, 1], one from each of `batch` equal parts, so that the mean loss of a batch varies less.

    Args:
        u: (N,) or () uniform, the same number for all samples of a batch.
        place: (N,) each sample's number in its batch, 0 to batch - 1.
    """
    return low + (1 - low) * ((u + place / batch) % 1)


class MaskedDiffusion:
    """The process whose token is masked at time t with probability (1 - eps) t, independently: log-linear noise.

    Args:
        V: tokens per position; the mask is token V.
        eps: share of tokens that is never masked; SEDD's 1e-3.
        masking: "independent" as above, or "counted": exactly ceil(t L) places, which has the same mean loss for
            uniform t, and less variance.
        time_conditioning: tell the model sigma(t). False: tell it 0; it can count the masks (MDLM, RADD).
        score_entropy: train on SEDD's loss in full, which also asks the score to be normalised, as SEDD's own samplers
            need it: the score is then used as it is. Without it only the softmax over clean tokens is trained.
    """

    def __init__(self, V: int, eps: float = 1e-3, masking: str = "independent", time_conditioning: bool = True,
                 score_entropy: bool = False):
        if masking not in MASKINGS:
            raise ValueError(f"masking {masking}: must be one of {', '.join(MASKINGS)}")
        if score_entropy and not time_conditioning:
            raise ValueError("the score entropy needs a model that is told the noise level")
        self.V, self.eps, self.mask, self.masking = V, eps, V, masking
        self.time_conditioning, self.score_entropy = time_conditioning, score_entropy

    # ------------------------------------------------------------------ noise

    def mask_probability(self, t: torch.Tensor) -> torch.Tensor:
        """lambda(t) = 1 - e^-sigma(t) = (1 - eps) t."""
        return (1 - self.eps) * t

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """Total noise at time t (SEDD, log-linear): -log(1 - (1 - eps) t)."""
        return -torch.log1p(-self.mask_probability(t))

    def told(self, t: torch.Tensor) -> torch.Tensor:
        """What the model is told of times t (N,): sigma(t) in float32, or zeros."""
        return (self.sigma(t) if self.time_conditioning else torch.zeros_like(t)).float()

    def masked_count(self, t: torch.Tensor, L: int) -> torch.Tensor:
        """ceil(t L), from 1 to L: how many places "counted" masking masks, (N,) int64."""
        return (t * L).ceil().long().clamp(1, L)

    def corrupt(self, x0: torch.Tensor, t: torch.Tensor, u: torch.Tensor | None = None) -> torch.Tensor:
        """Mask tokens of x0 (N, L) at times t (N,) by uniform numbers u (N, L) [torch's]; the smallest are masked."""
        u = torch.rand(x0.shape, device=x0.device) if u is None else u
        if self.masking == "counted":
            masked = rank(u) < self.masked_count(t, x0.shape[1]).unsqueeze(1)
        else:
            masked = u < self.mask_probability(t).unsqueeze(1)
        return torch.where(masked, self.mask, x0)

    # ------------------------------------------------------------------ loss and bound

    def training_losses(self, model: Callable, x0: torch.Tensor, t: torch.Tensor, x_t: torch.Tensor | None = None,
                        model_kwargs: dict | None = None) -> dict[str, torch.Tensor]:
        """The bound's integrand at times t: the cross-entropy of the masked tokens, times dsigma / (e^sigma - 1) = 1/t.

        For a normalised score it equals SEDD's score entropy (equation 5 there). For another, with r the sum of the
        score over clean tokens times e^sigma - 1, the score entropy is larger by (r - 1 - log r) / t >= 0 per place.

        Args:
            x0: (N, L) int64 clean tokens.
            t: (N,) times above 0.
            x_t: (N, L), x0 as `corrupt` gives it at t [made here, by torch's generator].

        Returns (N,) each: loss, in nats per code; nats, the bound alone in nats per token.
        """
        x_t = self.corrupt(x0, t) if x_t is None else x_t
        L = x0.shape[1]
        log_score, entropy = self.cross_entropy(model, x0, x_t, t, model_kwargs)
        weight = L / self.masked_count(t, L).to(entropy) if self.masking == "counted" else 1 / t.to(entropy)    # (N,)
        loss = nats = weight * entropy.sum(dim=1)
        if self.score_entropy:
            log_r = log_score.logsumexp(dim=2) + self.sigma(t).expm1().log().to(log_score).unsqueeze(1)         # (N, L)
            # before expm1: where that overflows, its gradient is not finite, though its weight is 0
            log_r = log_r.where(x_t == self.mask, 0)
            loss = loss + weight * (log_r.expm1() - log_r).sum(dim=1)
        return dict(loss=loss, nats=nats.detach() / L)

    def cross_entropy(self, model: Callable, x0: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor,
                      model_kwargs: dict | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The model's log scores of clean tokens (N, L, V), and the cross-entropy of x0's masked ones (N, L), else 0.

        The model is asked for all places: how many are masked only the device knows, and a CPU would have to wait.
        """
        log_score = model(x_t, self.told(t), **(model_kwargs or {}))[..., :self.V]
        entropy = F.cross_entropy(log_score.flatten(0, 1), x0.flatten(), reduction="none").view_as(x0)
        return log_score, entropy.where(x_t == self.mask, 0)

    @torch.no_grad()
    def code_bounds(self, model: Callable, x0: torch.Tensor, u: torch.Tensor, levels: int | None = None,
                    shift: torch.Tensor | None = None, model_kwargs: dict | None = None) -> torch.Tensor:
        """For each code an unbiased estimate of the bound on -log p(x0), (N,) float64 nats per code.

        The bound is L times the mean over k = 1..L of the mean cross-entropy of k masked tokens. It is the integral of
        the loss over masking probabilities from 0 to 1, since the one at which the k-th token is masked has the
        distribution of the k-th smallest of L uniform numbers. So u gives both the order, which is the same for all k,
        and the times.

        Args:
            u: (N, L) uniform numbers.
            levels: how many values of k to use, one from each of as many equal parts [L: all of them].
            shift: (N,) uniform numbers, where in its part each k lies [0.5].
        """
        L = x0.shape[1]
        levels, ranks, times = min(levels or L, L), rank(u), u.sort(dim=1).values
        shift = torch.full((len(x0),), 0.5, device=x0.device, dtype=torch.float64) if shift is None else shift
        total = torch.zeros(len(x0), dtype=torch.float64, device=x0.device)
        for level in range(levels):
            k = ((level + shift) * L / levels).long().clamp(0, L - 1) + 1                                   # (N,)
            x_t = torch.where(ranks < k.unsqueeze(1), self.mask, x0)
            t = times.gather(1, k.unsqueeze(1) - 1).squeeze(1)
            _, entropy = self.cross_entropy(model, x0, x_t, t, model_kwargs)
            total += entropy.double().sum(dim=1) / k
        return total * (L / levels)

    # ------------------------------------------------------------------ reverse process

    @staticmethod
    def reveal_probability(t: torch.Tensor, s: torch.Tensor, eta: float | torch.Tensor = 0.0) -> torch.Tensor:
        """That a masked token is revealed between times t and s < t.

        (t - s) / t without remasking: SEDD's analytic (Tweedie) step and MDLM's posterior. Where revealed tokens become
        masks with probability eta, the step is longer by eta (1 - t), which restores the marginal at s (ReMDM, Wang et
        al. 2025, arXiv 2503.00307, section 3): q = (t - s + eta (1 - t)) / t, at most 1, is the weight of all tokens
        together. The DLC project's corrector gives the mask the weight eta + (1 - eta)(1 - q) beside it.
        """
        q = ((t - s + eta * (1 - t)) / t).clamp(max=1)
        return q / (1 + eta * q)


def rank(u: torch.Tensor) -> torch.Tensor:
    """Each number's place in its row from the smallest, (N, L) int64; of equal ones the first comes first."""
    return u.argsort(dim=1, stable=True).argsort(dim=1)


def mean_bound(code_bounds: torch.Tensor, L: int) -> tuple[float, float]:
    """Nats per token and the standard error of the mean over codes, of bounds (N,) in nats per code."""
    error = code_bounds.std().item() / math.sqrt(len(code_bounds)) if len(code_bounds) > 1 else math.nan
    return code_bounds.mean().item() / L, error / L
