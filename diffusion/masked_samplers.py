"""Samplers of masked diffusion: from masks to codes, through a model that is asked for the tokens of some places.

    for codes in sampler(predict, codes, uniforms):      # one item per call of the model; the last is the sample
        ...

codes (N, L) int64 are tokens in 0..V-1 to keep (infilling) and the mask V where tokens are wanted.
predict(codes, t, places) gives logits (M, V) of the clean tokens at the M masked places, row-major, for codes (N, L),
times t (N,) and places (N, L) bool; (N, L, V) of all places, if places is None. It owns guidance, classes and
precision. uniforms(draw) is (N, L) in [0, 1), the same whenever it is asked for the same draw: randomness belongs to
samples.

When each place is revealed does not depend on the tokens (except with the confidence sampler). So the whole timetable
is drawn first, and the model is only asked when a token is due, on a CPU for these places alone: no call is spent on a
step in which a code does not change. Rows have their own steps and times. A sampler of thousands of steps calls the
model at most once per token, plus once per token that was masked again.

The random numbers and the given tokens decide how many calls there are: on a GPU the CPU waits for this number once,
before the first call, and the corrector once for each round of masking again. It waits for nothing after that.

To add a sampler, write its class here and give it a row in SAMPLERS: the scripts' flags, their help and the tests
follow the table.
"""
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from .masked import MaskedDiffusion, at_all_places, rank

AT_ONCE = 2**22             # float64 numbers of probabilities that are made at once
NEARLY_ONE = 1 - 1e-12      # a probability that keeps log(1 - p) finite
FIRST_TIME, LAST_TIME = 1.0, 1e-5       # of the analytic sampler, as published


#################################################################################
#                                Drawing tokens                                 #
#################################################################################

@dataclass(frozen=True)
class TokenDraw:
    """How tokens are drawn from logits.

    Attributes:
        temperature: the logits are divided by it; 0 takes the most probable token.
        top_p: keep the most probable tokens that reach this share together (nucleus; Holtzman et al. 2020).
    """
    temperature: float = 1.0
    top_p: float = 1.0

    def __call__(self, logits: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (M,) int64 of logits (M, V), by uniform numbers u (M,), and their log probabilities (M,) float64.

        The inverse of the cumulative distribution, in float64, of a bounded number of places at once.
        """
        rows = max(1, AT_ONCE // logits.shape[1])
        parts = [self.draw(*part) for part in zip(logits.split(rows), u.split(rows))]
        return torch.cat([tokens for tokens, _ in parts]), torch.cat([logp for _, logp in parts])

    def at(self, places: torch.Tensor, u: torch.Tensor, predict: Callable) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (N, L) at places (N, L) bool, by u (N, L), and their log probabilities; no meaning elsewhere.

        predict(places) gives the logits there; on GPUs predict(None) those of all places, see `at_all_places`.
        """
        if at_all_places(places.device):
            tokens, logp = self(predict(None).flatten(0, 1), u.flatten())
            return tokens.view_as(places), logp.view_as(places)
        tokens, logp = (u.new_zeros(u.shape, dtype=dtype) for dtype in (torch.int64, torch.float64))
        tokens[places], logp[places] = self(predict(places), u[places])
        return tokens, logp

    def draw(self, logits: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = logits.double()
        if self.temperature == 0:
            tokens = logits.argmax(dim=1)
            return tokens, logits.log_softmax(dim=1).gather(1, tokens.unsqueeze(1)).squeeze(1)
        probabilities = (logits / self.temperature).softmax(dim=1)                       # (M, V)
        if self.top_p < 1:
            ordered, order = probabilities.sort(dim=1, descending=True, stable=True)
            kept = ordered.cumsum(dim=1) - ordered < self.top_p
            kept[:, 0] = True
            ordered = ordered * kept
            probabilities = torch.zeros_like(probabilities).scatter(1, order, ordered)
        cumulative = probabilities.cumsum(dim=1)
        total = cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, u.double().unsqueeze(1) * total, right=True)
        tokens = tokens.clamp(max=logits.shape[1] - 1)                                   # (M, 1)
        return tokens.squeeze(1), (probabilities.gather(1, tokens) / total).log().squeeze(1)


#################################################################################
#                                  Timetables                                   #
#################################################################################

@dataclass
class Timetable:
    """When each place is revealed, and masked again.

    Attributes:
        reveal: list of (N, L) int64, in each round the step in which a place is revealed; -1 for tokens that are
            given, `never` for places that have no such round.
        remask: list of (N, L) int64, in each round the step at whose end the place becomes a mask again, or `never`.
        times: (1 or N, never) float64, the time that the model is asked for in each step.
    """
    reveal: list[torch.Tensor]
    remask: list[torch.Tensor]
    times: torch.Tensor

    @property
    def never(self) -> int:
        return self.times.shape[1]

    def row_steps(self) -> torch.Tensor:
        """Each row's steps in which tokens are due, ascending, (N, C) int64; `never` fills rows that have fewer."""
        steps = torch.cat(self.reveal, dim=1).sort(dim=1).values
        repeated = torch.nn.functional.pad(steps[:, 1:] == steps[:, :-1], (1, 0))
        steps = torch.where(repeated | (steps < 0), self.never, steps).sort(dim=1).values
        return steps[:, :int((steps < self.never).sum(dim=1).max())]

    def at(self, steps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """In rows' steps (N,): the places that are masked, (N, L) bool, and in which round a place is due, or -1."""
        steps = steps.unsqueeze(1)
        masked, due = torch.ones_like(self.reveal[0], dtype=torch.bool), torch.full_like(self.reveal[0], -1)
        for number, (reveal, remask) in enumerate(zip(self.reveal, self.remask)):
            masked &= ~((reveal < steps) & (steps <= remask))
            due = torch.where((reveal == steps) & (steps < self.never), number, due)
        return masked, due


# Draws of a sampler's uniform numbers: of each round, when a place is revealed, its token, and when it is masked again.
REVEAL, TOKEN, REMASK, PER_ROUND = 0, 1, 2, 3


class TimetableSampler:
    """A sampler whose timetable(codes, uniforms) is drawn before the model is asked."""

    def __init__(self, V: int, draw: TokenDraw):
        self.V, self.draw = V, draw

    def __call__(self, predict: Callable, codes: torch.Tensor, uniforms: Callable) -> Iterator[torch.Tensor]:
        table = self.timetable(codes, uniforms)
        u_token = torch.stack([uniforms(PER_ROUND * number + TOKEN) for number in range(len(table.reveal))])
        times = torch.nn.functional.pad(table.times, (0, 1), value=1.0).expand(len(codes), -1)  # for rows that are done
        for steps in table.row_steps().unbind(dim=1):
            masked, due = table.at(steps)
            places, t = due >= 0, times.gather(1, steps.unsqueeze(1)).squeeze(1)
            u = u_token.gather(0, due.clamp(min=0).unsqueeze(0))[0]                          # (N, L)
            left = torch.where(masked, self.V, codes)
            codes = torch.where(places, self.draw.at(places, u, partial(predict, left, t))[0], codes)
            yield torch.where(masked & ~places, self.V, codes)


class FirstHittingSampler(TimetableSampler):
    """One token per call, in random order: exact, in as many calls as there are tokens to draw.

    Zheng et al. 2024, arXiv 2409.02908: with k tokens masked, the next is revealed at the largest of k uniform times,
    at a random place. That is the analytic sampler of infinitely many steps. With fewer calls, several tokens are drawn
    at once, each as if the others of its call were not there: no longer exact.

    calls: how often to call the model, or None for once per token.
    """

    def __init__(self, V: int, calls: int | None, draw: TokenDraw):
        super().__init__(V, draw)
        self.calls = calls

    def most_calls(self, L: int) -> int:
        """How often the model is called at most, for codes of L tokens."""
        return min(self.calls or L, L)

    def timetable(self, codes: torch.Tensor, uniforms: Callable) -> Timetable:
        u, wanted = uniforms(REVEAL), codes == self.V
        count = wanted.sum(dim=1, keepdim=True)                                          # (N, 1)
        never = self.most_calls(codes.shape[1])
        calls = count.clamp(max=never)
        order = rank(torch.where(wanted, -u, 2.0))                                       # the largest time comes first
        reveal = torch.where(wanted, order * calls // count.clamp(min=1), -1)
        # Masked before step c: those of its call and of later ones. The next of k tokens out of L is revealed at the
        # k-th smallest of L uniform times, whichever tokens are given.
        step = torch.arange(never, device=codes.device)
        masked = count - -(-step * count // calls.clamp(min=1))                          # (N, never)
        times = u.sort(dim=1).values.gather(1, (masked - 1).clamp(min=0))
        return Timetable([reveal], [torch.full_like(reveal, never)], times)


class AnalyticSampler(TimetableSampler):
    """The published steps: evenly spaced times from 1 to 1e-5, then one that reveals what is left.

    In each step a masked token is revealed with probability (t - s) / t (SEDD's analytic step, "Tweedie"). With eta,
    the DLC project's corrector: at times within the window, revealed tokens become masks again with probability eta per
    step, and more are revealed. A step in which several tokens are revealed is not exact.
    """

    def __init__(self, V: int, steps: int, eta: float, draw: TokenDraw, window: tuple[float, float] = (0.3, 0.55)):
        super().__init__(V, draw)
        self.steps, self.eta = steps, eta
        self.times = torch.linspace(FIRST_TIME, LAST_TIME, steps + 1, dtype=torch.float64)   # (steps + 1,)
        before = self.times[:-1]
        self.etas = eta * ((before > window[0]) & (before < window[1])).double()             # (steps,)
        q = MaskedDiffusion.reveal_probability(before, self.times[1:], self.etas)
        self.log_masked = log_survival(q, last=-math.inf)
        self.log_revealed = log_survival(self.etas, last=0.0)

    def most_calls(self, L: int) -> int:
        """How often the model is called at most, for codes of L tokens; without remasking also at most L times."""
        return self.steps + 1 if self.eta else min(self.steps + 1, L)

    def timetable(self, codes: torch.Tensor, uniforms: Callable) -> Timetable:
        never, device = len(self.times), codes.device
        log_masked, log_revealed = self.log_masked.to(device), self.log_revealed.to(device)
        alive = codes == self.V
        reveal = torch.where(alive, survived(log_masked, torch.zeros_like(codes), uniforms(REVEAL)), -1)
        table = Timetable([reveal], [], self.times.unsqueeze(0).to(device))
        while self.eta:
            number = len(table.remask)
            remask = survived(log_revealed, (reveal + 1).clamp(max=never), uniforms(PER_ROUND * number + REMASK))
            remask = torch.where(alive, remask, never)
            table.remask.append(remask)
            alive = remask < never
            if not alive.any():
                return table
            reveal = survived(log_masked, (remask + 1).clamp(max=never), uniforms(PER_ROUND * (number + 1) + REVEAL))
            reveal = torch.where(alive, reveal, never)
            table.reveal.append(reveal)
        table.remask.append(torch.full_like(reveal, never))
        return table


def log_survival(p: torch.Tensor, last: float) -> torch.Tensor:
    """Log probability of still being in a state when each step begins, if steps leave it with probability p (steps,).

    (steps + 2,): 0 before the first step; one more step follows the last, and adds `last`.
    """
    stayed = torch.log1p(-p.clamp(max=NEARLY_ONE)).cumsum(0)
    return torch.cat([stayed.new_zeros(1), stayed, stayed[-1:] + last])


def survived(log_survival: torch.Tensor, first: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """The step in which a state is left that began with step `first` (N, L), by uniform numbers u (N, L).

    len(log_survival) - 1, if no step leaves it.
    """
    return torch.searchsorted(-log_survival, -(log_survival[first] + u.log())) - 1


class ConfidenceSampler:
    """Draws all masked tokens at each call and keeps the most probable ones, with noise that fades: for few calls.

    MaskGIT (Chang et al. 2022, arXiv 2202.04200). It is not exact for any number of calls: easy tokens come first.

    calls: how often to call the model; as many tokens are kept at each call.
    noise: scale of the Gumbel noise in the log probabilities that are compared, at the start; it falls linearly to 0.
    """

    def __init__(self, V: int, calls: int, draw: TokenDraw, noise: float = 4.5):
        self.V, self.calls, self.draw, self.noise = V, calls, draw, noise

    def most_calls(self, L: int) -> int:
        """How often the model is called at most, for codes of L tokens."""
        return min(self.calls, L)

    def __call__(self, predict: Callable, codes: torch.Tensor, uniforms: Callable) -> Iterator[torch.Tensor]:
        count, L = (codes == self.V).sum(dim=1, keepdim=True), codes.shape[1]                # (N, 1)
        u = uniforms(REVEAL).sort(dim=1).values                                              # times, in first hitting
        calls = count.clamp(1, self.most_calls(L))                                           # (N, 1)
        for call in range(int(calls.max())):
            places = codes == self.V
            k = places.sum(dim=1, keepdim=True)                                              # (N, 1)
            t = u.gather(1, (k - 1).clamp(min=0)).squeeze(1)
            tokens, logp = self.draw.at(places, uniforms(PER_ROUND * call + TOKEN), partial(predict, codes, t))
            gumbel = -(-uniforms(PER_ROUND * call + REMASK).clamp(min=2.0**-33).log()).log()
            noise = self.noise * (1 - (call + 1) / calls)                                    # (N, 1)
            confidence = torch.where(places, logp + noise * gumbel, -math.inf)
            kept = k - (count * (calls - call - 1) // calls).clamp(min=0)
            codes = torch.where(places & (rank(-confidence) < kept), tokens, codes)
            yield codes


#################################################################################
#                                     Table                                     #
#################################################################################

@dataclass(frozen=True)
class SamplerSpec:
    """What a name in SAMPLERS stands for."""
    about: str                      # completes "--sampler NAME: …" in the scripts' help
    build: Callable                 # (V, steps, eta, draw) -> sampler
    default_steps: int | None       # None: one per token
    has_eta: bool = False
    default_eta: float = 0.0


SAMPLERS = {
    "first-hitting": SamplerSpec(
        "one token per call in random order, which is exact; with fewer calls than tokens, several at once",
        lambda V, steps, eta, draw: FirstHittingSampler(V, steps, draw), None),
    "analytic": SamplerSpec(
        "SEDD's analytic steps at evenly spaced times; exact only for many more steps than tokens",
        lambda V, steps, eta, draw: AnalyticSampler(V, steps, 0.0, draw), 1024),
    "corrector": SamplerSpec(
        "the analytic steps, and at times from 0.3 to 0.55 tokens are masked again with probability eta, as published",
        lambda V, steps, eta, draw: AnalyticSampler(V, steps, eta, draw), 4096, has_eta=True, default_eta=0.01),
    "confidence": SamplerSpec(
        "the most probable of all drawn tokens first (MaskGIT), for few calls; not exact",
        lambda V, steps, eta, draw: ConfidenceSampler(V, steps, draw), 16),
}


def create_sampler(name: str, V: int, steps: int | None = None, eta: float | None = None, temperature: float = 1.0,
                   top_p: float = 1.0) -> TimetableSampler | ConfidenceSampler:
    """The sampler of a name in SAMPLERS.

    Args:
        steps: calls of the model, or for the analytic sampler and the corrector steps in time [the sampler's default].
        eta: probability per step that the corrector masks a token again.

    Raises ValueError for an option that the sampler does not have.
    """
    spec = SAMPLERS[name]
    if eta is not None and not spec.has_eta:
        raise ValueError(f"--eta {eta}: --sampler {name} masks no token again, "
                         f"{' and '.join(other for other, one in SAMPLERS.items() if one.has_eta)} does")
    return spec.build(V, steps or spec.default_steps, spec.default_eta if eta is None else eta,
                      TokenDraw(temperature, top_p))
