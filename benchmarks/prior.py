"""Codes per second of a prior: training, and drawing with each sampler, beside the published way.

    python -m benchmarks.prior

The published way is SEDD's, as the DLC project runs it, on the same network: eager; training computes the score entropy
of all places; a step of sampling calls the network, computes the scores of all places, and draws every token anew from
probabilities over all V + 1 tokens with Gumbel noise in float64. Ours calls the network only when a token is due, which
does not change the distribution.

Rows take turns `--repeats` times, so that other work on the machine affects all of them; the shortest time counts. In
sampling, `--calls` calls are timed together with the drawing; rows whose calls do the same work share the measurement.
Calls per code are counted by drawing whole timetables. Weights are random: no time depends on them.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.record import DEVICE, ON_GPU, in_turns, record, synchronize
from diffusion.masked import MaskedDiffusion, stratified_times
from diffusion.masked_samplers import create_sampler
from dlc.machine.noise import Stream, uniforms
from dlc.machine.processes import autocast
from prior import DLCPrior, DLCPrior_models

PUBLISHED, TIMES = "published way", "times the published way"
COUNTED_ROWS = 64  # codes whose timetables are drawn to count calls


def published_loss(model: DLCPrior, diffusion: MaskedDiffusion, x0: Tensor, t: Tensor, precision: str) -> Tensor:
    """SEDD's score entropy, equation 5, of all places (N, L), with the masked ones counted, as loss (N,)."""
    x_t, sigma = diffusion.corrupt(x0, t), diffusion.sigma(t)
    with autocast(DEVICE, precision):
        log_score = model(x_t, sigma).float()  # (N, L, V+1)
    clean = log_score[..., : model.V]
    log_ratio = -sigma.expm1().log().unsqueeze(1)  # of the true score, at masked places
    entropy = clean.exp().sum(dim=2) - log_ratio.exp() * (clean.gather(2, x0.unsqueeze(2)).squeeze(2) - log_ratio + 1)
    rate = (1 - diffusion.eps) / (1 - diffusion.mask_probability(t))  # dsigma/dt
    return rate * torch.where(x_t == diffusion.mask, entropy, 0).sum(dim=1)


class PublishedSampler:
    """Every step: all scores, and a draw of every token, which keeps those that are there."""

    def __init__(self, diffusion: MaskedDiffusion, steps: int, eta: float):
        self.V, self.eta, self.times = diffusion.V, eta, torch.linspace(1, 1e-5, steps + 1, device=DEVICE)

    def __call__(self, log_scores: Callable, codes: Tensor) -> Iterator[Tensor]:
        for t, s in itertools.pairwise(self.times):
            logp = log_scores(codes, t.expand(len(codes)))[..., : self.V].log_softmax(dim=2)
            eta = self.eta if 0.3 < t < 0.55 else 0.0
            q = ((t - s + eta * (1 - t)) / t).clamp(max=1)  # the weight of all tokens together at a masked place
            mask = (eta + (1 - eta) * (1 - q)).expand(*codes.shape, 1)
            kept = (1 - eta) * F.one_hot(codes, self.V + 1).to(logp)
            kept[..., self.V] += eta
            masked = (codes == self.V).unsqueeze(2)
            weights = torch.where(masked, torch.cat([q * logp.exp(), mask], dim=2), kept).double()  # (N, L, V+1)
            gumbel = 1e-10 - (torch.rand_like(weights) + 1e-10).log()
            codes = (weights / gumbel).argmax(dim=2)
            yield codes


def sampling_rows(L: int) -> list[tuple]:
    """Name, sampler, steps, eta, and whether it is the published way."""
    rows = []
    for name, steps, eta in (("analytic", 512, None), ("analytic", 1024, None), ("corrector", 4096, 0.01)):
        rows += [(f"{PUBLISHED}, {name}", name, steps, eta, True), (name, name, steps, eta, False)]
    fewer = sorted({L, max(1, L // 4), 16}, reverse=True)
    rows += [("first-hitting", "first-hitting", calls, None, False) for calls in fewer]
    return [*rows, ("confidence", "confidence", 16, None, False)]


def work_of(row: tuple, L: int) -> str:
    """What a call of a row does, in words: equal for rows whose calls do the same work."""
    _, name, steps, _, published = row
    if published:
        return PUBLISHED
    one_place = name in ("analytic", "corrector") or (name, steps) == ("first-hitting", L)  # or two, where two are due
    return "one place per code" if one_place else f"{name}, {steps} calls"


def timed_calls(row: tuple, model: DLCPrior, diffusion: MaskedDiffusion, args: argparse.Namespace) -> float:
    """Seconds of a call of the network, with all that goes with it."""
    _, name, steps, eta, published = row
    codes = torch.full((args.batch, args.L), args.V, device=DEVICE)
    indices = torch.arange(args.batch, device=DEVICE)

    def scores(codes, t, places=None):
        with autocast(DEVICE, args.precision):
            return model(codes, diffusion.told(t), places=places)

    synchronize()
    start = time.perf_counter()
    if published:
        calls = PublishedSampler(diffusion, steps, eta or 0.0)(scores, codes)
    else:
        draw = partial(uniforms, 0, Stream.SAMPLE_CODE, indices, args.L)
        sampler = create_sampler(name, args.V, steps, eta)
        calls = sampler(lambda codes, t, places: scores(codes, t, places)[..., : args.V], codes, draw)
    done = sum(1 for _ in itertools.islice(calls, args.calls))
    synchronize()
    return (time.perf_counter() - start) / done


def calls_per_code(row: tuple, args: argparse.Namespace) -> float:
    """How often the network is called for a code, on average; where rows of a batch differ, a batch takes its most."""
    _, name, steps, eta, published = row
    if published:
        return float(steps + 1)  # one more for what is still masked
    sampler, indices = create_sampler(name, args.V, steps, eta), torch.arange(COUNTED_ROWS)
    if not hasattr(sampler, "timetable"):
        return float(sampler.most_calls(args.L))
    masked = torch.full((COUNTED_ROWS, args.L), args.V)
    table = sampler.timetable(masked, partial(uniforms, 0, Stream.SAMPLE_CODE, indices, args.L))
    calls = (table.row_steps() < table.never).sum(dim=1).double()
    return torch.stack([part.max() for part in calls.split(args.batch)]).mean().item()


def shortest(functions: dict, turns: int) -> dict[str, float]:
    """The shortest of the seconds that each function returns, by name; they take turns."""
    return {name: min(seconds) for name, seconds in in_turns(functions, turns).items()}


def seconds_of_steps(args: argparse.Namespace) -> dict[str, float]:
    """The shortest step of each row of training, by name. They train the same model."""
    torch.manual_seed(0)
    x0 = torch.randint(args.V, (args.train_batch, args.L), device=DEVICE)
    model = DLCPrior_models[args.model](L=args.L, V=args.V).to(DEVICE).train()
    for block in model.blocks:
        block.compile()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, weight_decay=0.0, fused=True)

    diffusion, indices = MaskedDiffusion(args.V), torch.arange(len(x0), device=DEVICE)

    def timed_step(published, compiled):
        synchronize()
        start = time.perf_counter()
        with torch.compiler.set_stance("default" if compiled else "force_eager"):
            t = stratified_times(torch.rand((), device=DEVICE), indices, len(x0))
            if published:
                loss = published_loss(model, diffusion, x0, t, args.precision)
            else:
                with autocast(DEVICE, args.precision):
                    loss = diffusion.training_losses(model, x0, t)["loss"]
            loss.mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        synchronize()
        return time.perf_counter() - start

    rows = {PUBLISHED: (True, False), "ours": (False, False), "ours, compiled": (False, True)}
    steps = {name: partial(timed_step, *row) for name, row in rows.items() if args.compile or not row[1]}
    for step in steps.values():
        step()  # allocates, compiles
    return shortest(steps, args.repeats)


def seconds_of_calls(rows: list[tuple], args: argparse.Namespace) -> dict[str, float]:
    """The shortest call of the network for each kind of work of the rows of sampling; see `work_of`."""
    torch.manual_seed(0)
    model = DLCPrior_models[args.model](L=args.L, V=args.V).to(DEVICE).eval()
    torch.nn.init.normal_(model.output_layer.linear.weight, std=0.02)
    with torch.inference_mode():
        works = {work_of(row, args.L): partial(timed_calls, row, model, MaskedDiffusion(args.V), args) for row in rows}
        return shortest(works, args.repeats)


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="DLCPrior-M" if ON_GPU else "DLCPrior-S", choices=DLCPrior_models, help="[%(default)s here]")
    add("--L", type=int, default=512, help="code positions [%(default)s]")
    add("--V", type=int, default=256, help="tokens per position [%(default)s]")
    add("--batch", type=int, default=64 if ON_GPU else 1, help="codes drawn at once [%(default)s here]")
    add("--train-batch", type=int, default=64 if ON_GPU else 1, help="codes per training step [%(default)s here]")
    add("--precision", default="bf16" if ON_GPU else "fp32", help="of the network [%(default)s here]")
    add("--calls", type=int, default=8 if ON_GPU else 2, help="calls that are measured at once [%(default)s here]")
    add("--repeats", type=int, default=5 if ON_GPU else 3, help="times that the rows take turns [%(default)s here]")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="measure compiled training, too")
    return parser


def main() -> None:
    args = argument_parser().parse_args()
    if ON_GPU:
        torch.backends.cuda.matmul.allow_tf32 = True  # as in training and sampling
    table, steps = [], seconds_of_steps(args)

    def add(what, name, rate, same, steps=None, calls=None, call_seconds=None):
        row = {"": name, "what": what, "steps": steps, "calls": calls, "s per call": call_seconds, "codes/s": rate}
        table.append({**row, TIMES: rate / same})

    for name, seconds in steps.items():
        add("training", name, args.train_batch / seconds, args.train_batch / steps[PUBLISHED])
    rows, rates = sampling_rows(args.L), {}
    seconds = seconds_of_calls(rows, args)
    for row in rows:
        calls, call_seconds = calls_per_code(row, args), seconds[work_of(row, args.L)]
        rates[row] = args.batch / (calls * call_seconds)
        # the published row of the same steps, or of the published default
        same = next((one for one in rows if one[4] and one[1:3] == row[1:3]), rows[2])
        add("sampling", row[0], rates[row], rates[same], row[2], calls, call_seconds)
    record("prior", table, **vars(args))


if __name__ == "__main__":
    main()
