"""Samplers of masked diffusion: from masks to codes, through a model that is asked for the tokens of all places.

    for codes in sampler(predict, codes, uniforms):      # one item per call of the model; the last is the sample
        ...

codes (N, L) int64 are tokens in 0..V-1 to keep (infilling) and the mask V where tokens are wanted. predict(codes, t)
gives logits (N, L, V) of the clean tokens, for codes (N, L) and times t (N,). It owns guidance, classes and precision.
uniforms(draw) is (N, L) in [0, 1), the same whenever it is asked for the same draw: randomness belongs to samples.

When each place is revealed does not depend on the tokens (except with the confidence sampler). So the whole timetable
is drawn first, and the model is only asked when a token is due: no call is spent on a step in which a code does not
change. Rows have their own steps and times. A sampler of thousands of steps calls the model at most once per token,
plus once per token that was masked again.

The random numbers and the given tokens decide how many calls there are: on a GPU the CPU waits for this number once,
before the first call, and the corrector once for each round of masking again. It waits for nothing after that.

To add a sampler, write its class here and give it a row in CODE_SAMPLERS: the scripts' flags, their help and the tests
follow the table.
"""
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from .masked import MaskedDiffusion, rank
from .options import Option
from .samplers import SamplerSpec

AT_ONCE = 2**22             # float64 numbers of probabilities that are made at once
NEARLY_ONE = 1 - 1e-12      # a probability that keeps log(1 - p) finite
FIRST_TIME, LAST_TIME = 1.0, 1e-5       # of the analytic sampler, as published
WINDOW = 0.3, 0.55          # times between which the corrector masks tokens again, as published


class CodeSampler:
    """The base of all samplers, which are called as above.

    Args:
        steps: calls of the model, or steps in time.
        process: what the model was trained on.
        temperature: the logits are divided by it; 0 takes the most probable token.
        top_p: keep the most probable tokens that reach this share together (nucleus; Holtzman et al. 2020).
    """

    def __init__(self, steps: int | None, process: MaskedDiffusion, temperature: float = 1.0, top_p: float = 1.0):
        self.steps, self.V, self.temperature, self.top_p = steps, process.V, temperature, top_p

    def most_calls(self, L: int) -> int:
        """How often the model is called at most, for codes of L tokens."""
        return min(self.steps or L, L)

    def draw(self, logits: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (N, L) int64 of logits (N, L, V), by uniform numbers u (N, L), and their log probabilities, float64.

        The inverse of the cumulative distribution, in float64, of a bounded number of rows at once.
        """
        rows = max(1, AT_ONCE // logits[0].numel())
        parts = [self.draw_rows(*part) for part in zip(logits.split(rows), u.split(rows))]
        tokens, logp = map(torch.cat, zip(*parts))
        return tokens, logp

    def draw_rows(self, logits: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = logits.double()
        if self.temperature == 0:
            logp, tokens = logits.log_softmax(dim=-1).max(dim=-1)
            return tokens, logp
        probabilities = (logits / self.temperature).softmax(dim=-1)                      # (n, L, V)
        if self.top_p < 1:
            ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
            kept = ordered.cumsum(dim=-1) - ordered < self.top_p
            kept[..., 0] = True
            probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered * kept)
        cumulative = probabilities.cumsum(dim=-1)
        total = cumulative[..., -1:]
        tokens = torch.searchsorted(cumulative, u.double().unsqueeze(-1) * total, right=True)
        tokens = tokens.clamp(max=logits.shape[-1] - 1)                                  # (n, L, 1)
        return tokens.squeeze(-1), (probabilities.gather(-1, tokens) / total).log().squeeze(-1)


#################################################################################
#                                  Timetables                                   #
#################################################################################

@dataclass
class Timetable:
    """When each place is revealed, and masked again.

    Attributes:
        reveal: list of (N, L) int64, in each round the step in which a place is revealed; -1 for tokens that are
            given, `never` for places that have no such round.
        remask: the same of the step at whose end the place becomes a mask again; it may lack the last round, whose
            tokens then stay.
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
        rounds = itertools.zip_longest(self.reveal, self.remask, fillvalue=self.never)
        for number, (reveal, remask) in enumerate(rounds):
            masked &= ~((reveal < steps) & (steps <= remask))
            due = torch.where((reveal == steps) & (steps < self.never), number, due)
        return masked, due


# Draws of a sampler's uniform numbers: of each round, when a place is revealed, its token, and when it is masked again.
REVEAL, TOKEN, REMASK, PER_ROUND = 0, 1, 2, 3


class TimetableSampler(CodeSampler):
    """A sampler whose timetable(codes, uniforms) is drawn before the model is asked."""

    def __call__(self, predict: Callable, codes: torch.Tensor, uniforms: Callable) -> Iterator[torch.Tensor]:
        table = self.timetable(codes, uniforms)
        u_token = torch.stack([uniforms(PER_ROUND * number + TOKEN) for number in range(len(table.reveal))])
        times = torch.nn.functional.pad(table.times, (0, 1), value=1.0).expand(len(codes), -1)  # for rows that are done
        for steps in table.row_steps().unbind(dim=1):
            masked, due = table.at(steps)
            t = times.gather(1, steps.unsqueeze(1)).squeeze(1)
            u = u_token.gather(0, due.clamp(min=0).unsqueeze(0))[0]                          # (N, L)
            tokens, _ = self.draw(predict(torch.where(masked, self.V, codes), t), u)         # (N, L)
            codes = torch.where(due >= 0, tokens, codes)
            yield torch.where(masked & (due < 0), self.V, codes)


class FirstHittingSampler(TimetableSampler):
    """One token per call, in random order: exact, in as many calls as there are tokens to draw.

    Zheng et al. 2024, arXiv 2409.02908: with k tokens masked, the next is revealed at the largest of k uniform times,
    at a random place. That is the analytic sampler of infinitely many steps. With fewer calls, several tokens are drawn
    at once, each as if the others of its call were not there: no longer exact.

    steps: how often to call the model, or None for once per token.
    """

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
        return Timetable([reveal], [], times)


class AnalyticSampler(TimetableSampler):
    """The published steps: evenly spaced times from 1 to 1e-5, then one that reveals what is left.

    In each step a masked token is revealed with probability (t - s) / t (SEDD's analytic step, "Tweedie"). With eta,
    the DLC project's corrector: at times within the window, revealed tokens become masks again with probability eta per
    step, and more are revealed. A step in which several tokens are revealed is not exact.
    """

    def __init__(self, steps: int, process: MaskedDiffusion, eta: float = 0.0, **draw):
        super().__init__(steps, process, **draw)
        self.eta = eta
        self.times = torch.linspace(FIRST_TIME, LAST_TIME, steps + 1, dtype=torch.float64)   # (steps + 1,)
        before = self.times[:-1]
        etas = eta * ((before > WINDOW[0]) & (before < WINDOW[1])).double()                  # (steps,)
        q = process.reveal_probability(before, self.times[1:], etas)
        self.log_masked, self.log_revealed = log_survival(q, last=-math.inf), log_survival(etas, last=0.0)

    def most_calls(self, L: int) -> int:
        """See `CodeSampler`. Without remasking also at most L times."""
        return self.steps + 1 if self.eta else min(self.steps + 1, L)

    def timetable(self, codes: torch.Tensor, uniforms: Callable) -> Timetable:
        never, device = len(self.times), codes.device
        log_masked, log_revealed = self.log_masked.to(device), self.log_revealed.to(device)
        table = Timetable([], [], self.times.unsqueeze(0).to(device))
        alive, step = codes == self.V, torch.zeros_like(codes)          # masked, since the step
        for first in itertools.count(0, PER_ROUND):
            reveal = torch.where(alive, survived(log_masked, step, uniforms(first + REVEAL)), never if first else -1)
            table.reveal.append(reveal)
            if not self.eta:
                return table
            remask = survived(log_revealed, (reveal + 1).clamp(max=never), uniforms(first + REMASK))
            table.remask.append(torch.where(alive, remask, never))
            alive, step = table.remask[-1] < never, (table.remask[-1] + 1).clamp(max=never)
            if not alive.any():
                return table


class CorrectorSampler(AnalyticSampler):
    """The analytic sampler with remasking by default."""

    def __init__(self, steps: int, process: MaskedDiffusion, eta: float = 0.01, **draw):
        super().__init__(steps, process, eta, **draw)


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


class ConfidenceSampler(CodeSampler):
    """Draws all masked tokens at each call and keeps the most probable ones, with noise that fades: for few calls.

    MaskGIT (Chang et al. 2022, arXiv 2202.04200). It is not exact for any number of calls: easy tokens come first.

    steps: how often to call the model; as many tokens are kept at each call.
    """
    noise = 4.5         # scale of the Gumbel noise in the log probabilities, at the start; it falls linearly to 0

    def __call__(self, predict: Callable, codes: torch.Tensor, uniforms: Callable) -> Iterator[torch.Tensor]:
        count, L = (codes == self.V).sum(dim=1, keepdim=True), codes.shape[1]                # (N, 1)
        u = uniforms(REVEAL).sort(dim=1).values                                              # times, in first hitting
        calls = count.clamp(1, self.most_calls(L))                                           # (N, 1)
        for call in range(int(calls.max())):
            places = codes == self.V
            k = places.sum(dim=1, keepdim=True)                                              # (N, 1)
            t = u.gather(1, (k - 1).clamp(min=0)).squeeze(1)
            tokens, logp = self.draw(predict(codes, t), uniforms(PER_ROUND * call + TOKEN))
            gumbel = -(-uniforms(PER_ROUND * call + REMASK).clamp(min=2.0**-33).log()).log()
            noise = self.noise * (1 - (call + 1) / calls)                                    # (N, 1)
            confidence = torch.where(places, logp + noise * gumbel, -math.inf)
            kept = k - (count * (calls - call - 1) // calls).clamp(min=0)
            codes = torch.where(places & (rank(-confidence) < kept), tokens, codes)
            yield codes


#################################################################################
#                                     Table                                     #
#################################################################################

DRAW = dict(temperature=Option("divide the logits by this; 0 takes the likeliest", low=0),
            top_p=Option("draw from the likeliest tokens of this share", low=1e-6, high=1))
ANY_STEPS = dict(fewest_steps=1, most_steps=math.inf, options=DRAW)
CODE_SAMPLERS = {
    "first-hitting": SamplerSpec(
        "one token per call in random order, which is exact; with fewer calls than tokens, several at once",
        FirstHittingSampler, None, **ANY_STEPS),
    "analytic": SamplerSpec(
        "SEDD's analytic steps at evenly spaced times; exact only for many more steps than tokens",
        AnalyticSampler, 1024, **ANY_STEPS),
    "corrector": SamplerSpec(
        "the analytic steps, and at times from 0.3 to 0.55 tokens are masked again with probability eta, as published",
        CorrectorSampler, 4096, **ANY_STEPS | dict(options=DRAW | dict(eta=Option(
            "set the probability per step that the corrector masks a token again [0.01]", low=0, high=1)))),
    "confidence": SamplerSpec(
        "the most probable of all drawn tokens first (MaskGIT), for few calls; not exact",
        ConfidenceSampler, 16, **ANY_STEPS),
}
