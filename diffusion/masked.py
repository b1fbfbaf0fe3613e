"""Masked (absorbing-state) diffusion over tokens: noise, loss, bound and reverse steps, apart from any model.

    diffusion = MaskedDiffusion(V=256)
    x_t = diffusion.corrupt(x0, t, u)                            # tokens (N, L), of which some are V, the mask
    loss = diffusion.training_losses(model, x0, t, x_t)["loss"]  # (N,) nats per code
    nats, error = diffusion.bound(model, x0, u)                  # per token

`model(x_t, sigma, places=places, **model_kwargs)` gives log scores (M, V+1) of the M masked places, up to a constant
per place the log probabilities of the clean token there; without places (N, L, V+1), of all. t runs from 0 (clean) to 1
(all masked).

Score entropy and process: Lou et al. 2024, arXiv 2310.16834 (SEDD). That its score is a distribution over clean tokens
times a known number: Ou et al. 2024, arXiv 2406.03736 (RADD), theorem 1. The loss as weighted cross-entropy: Sahoo et
al. 2024, arXiv 2406.07524 (MDLM), and RADD. Samplers are in masked_samplers.py.
"""
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

MASKINGS = ("independent", "counted")


class Bound(NamedTuple):
    """An upper bound on the negative log-likelihood: nats per token and its standard error."""
    nats: float
    error: float


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
        places, L, dense = x_t == self.mask, x0.shape[1], at_all_places(x0.device)
        log_score, terms, owner = self._of_places(model, x0, x_t, t, places, model_kwargs)                  # (M, …)
        weight = L / self.masked_count(t, L).to(terms) if self.masking == "counted" else 1 / t.to(terms)    # (N,)
        nats = weight * per_code(terms, owner, x0)
        loss = nats
        if self.score_entropy:
            log_r = log_score.logsumexp(dim=1) + self.sigma(t).expm1().log().to(log_score)[owner]
            if dense:       # beforehand: the gradient of an expm1 that overflows is not finite, though its weight is 0
                log_r = log_r.where(places.flatten(), 0)
            loss = loss + weight * per_code(log_r.expm1() - log_r, owner, x0)
        return dict(loss=loss, nats=nats.detach() / L)

    def _of_places(self, model, x0, x_t, t, places, model_kwargs):
        """The model's output at M places: log scores (M, V), the cross-entropy of x0's tokens (M,), the rows (M,).

        On GPUs these are all N * L places, with a cross-entropy of 0 where no token is wanted.
        """
        kwargs = dict(model_kwargs or {})
        if not at_all_places(x0.device):
            log_score = model(x_t, self.told(t), places=places, **kwargs)[:, :self.V]
            return log_score, F.cross_entropy(log_score, x0[places], reduction="none"), places.nonzero()[:, 0]
        log_score = model(x_t, self.told(t), **kwargs)[..., :self.V].flatten(0, 1)
        terms = F.cross_entropy(log_score, x0.flatten(), reduction="none").where(places.flatten(), 0)
        return log_score, terms, torch.arange(len(x0), device=x0.device).repeat_interleave(x0.shape[1])

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
            places = ranks < k.unsqueeze(1)
            t = times.gather(1, k.unsqueeze(1) - 1).squeeze(1)
            x_t = torch.where(places, self.mask, x0)
            _, terms, owner = self._of_places(model, x0, x_t, t, places, model_kwargs)
            total += per_code(terms.double() / k[owner], owner, x0)
        return total * (L / levels)

    def bound(self, model: Callable, x0: torch.Tensor, u: torch.Tensor | None = None, levels: int | None = None,
              shift: torch.Tensor | None = None, model_kwargs: dict | None = None) -> Bound:
        """`code_bounds`, averaged over codes: nats per token, with the standard error of the mean over codes.

        u [torch's generator]; the other arguments are those of `code_bounds`.
        """
        u = torch.rand(x0.shape, device=x0.device, dtype=torch.float64) if u is None else u
        return mean_bound(self.code_bounds(model, x0, u, levels, shift, model_kwargs), x0.shape[1])

    # ------------------------------------------------------------------ reverse process

    @staticmethod
    def reveal_weight(t: torch.Tensor, s: torch.Tensor, eta: float | torch.Tensor = 0.0) -> torch.Tensor:
        """q, the weight of all tokens together for a masked place, between times t and s < t.

        (t - s) / t without remasking: SEDD's analytic (Tweedie) step and MDLM's posterior. Where revealed tokens become
        masks with probability eta, the step is longer by eta (1 - t), which restores the marginal at s (ReMDM, Wang et
        al. 2025, arXiv 2503.00307, section 3): q = (t - s + eta (1 - t)) / t, at most 1.
        """
        return ((t - s + eta * (1 - t)) / t).clamp(max=1)

    @classmethod
    def reveal_probability(cls, t: torch.Tensor, s: torch.Tensor, eta: float | torch.Tensor = 0.0) -> torch.Tensor:
        """That a masked token is revealed between times t and s < t.

        The DLC project's corrector gives the mask the weight eta + (1 - eta)(1 - q) beside q for the tokens, which
        makes it q / (1 + eta q).
        """
        q = cls.reveal_weight(t, s, eta)
        return q / (1 + eta * q)


def at_all_places(device: torch.device) -> bool:
    """Whether to ask the model for all places, and leave out those that are not wanted afterwards: on GPUs.

    Only the device knows how many places are wanted, so the CPU would have to wait. On a CPU only those are computed.
    """
    return device.type != "cpu"


def per_code(values: torch.Tensor, owner: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
    """Sums (N,) of values (M,) over the places that belong to each of the codes x0 (N, L), the rows owner (M,)."""
    if at_all_places(x0.device):        # in one order, which index_add on a GPU has not
        return values.view_as(x0).sum(dim=1)
    return values.new_zeros(len(x0)).index_add(0, owner, values)


def rank(u: torch.Tensor) -> torch.Tensor:
    """Each number's place in its row from the smallest, (N, L) int64; of equal ones the first comes first."""
    return u.argsort(dim=1, stable=True).argsort(dim=1)


def mean_bound(code_bounds: torch.Tensor, L: int) -> Bound:
    """Nats per token and the standard error, of bounds (N,) in nats per code."""
    error = code_bounds.std().item() / math.sqrt(len(code_bounds)) if len(code_bounds) > 1 else math.nan
    return Bound(code_bounds.mean().item() / L, error / L)
