"""Codes per second of a prior: training, and the network's calls in drawing, beside the published way.

    python -m benchmarks.prior

The published way is SEDD's, see benchmarks/README.md; ours calls the network only where a token is due. Work
between the calls is not counted in either. Rows take turns; the shortest time counts. Calls per code are counted by
drawing whole timetables. On a CPU seconds are CPU seconds of the process.
"""

import argparse
from functools import partial

import torch
from torch import Tensor

from benchmarks.record import DEVICE, flags_of, in_turns, record
from diffusion.masked import MaskedDiffusion, stratified_times
from diffusion.process_table import create_process
from dlc.machine.noise import Stream, uniforms
from dlc.machine.processes import autocast, compile_blocks, set_numerics
from dlc.sampling.latents import create_sampler
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


def sampling_rows(L: int) -> list[tuple]:
    """Name, sampler, steps, eta, and whether it is the published way."""
    rows = []
    for name, steps, eta in (("analytic", 512, None), ("analytic", 1024, None), ("corrector", 4096, 0.01)):
        rows += [(f"{PUBLISHED}, {name}", name, steps, eta, True), (name, name, steps, eta, False)]
    fewer = sorted({L, max(1, L // 4), 16}, reverse=True)
    rows += [("first-hitting", "first-hitting", calls, None, False) for calls in fewer]
    return [*rows, ("confidence", "confidence", 16, None, False)]


def calls_per_code(row: tuple, args: argparse.Namespace) -> float:
    """How often the network is called for a code, on average; where rows of a batch differ, a batch takes its most."""
    _, name, steps, eta, published = row
    if published:
        return float(steps + 1)  # one more for what is still masked
    sampler = create_sampler(name, steps, create_process("masked", V=args.V), eta=eta)
    indices = torch.arange(COUNTED_ROWS)
    if not hasattr(sampler, "timetable"):
        return float(sampler.most_calls(args.L))
    masked = torch.full((COUNTED_ROWS, args.L), args.V)
    table = sampler.timetable(masked, partial(uniforms, 0, Stream.SAMPLE_CODE, indices, args.L))
    calls = (table.row_steps() < table.never).sum(dim=1).double()
    return torch.stack([part.max() for part in calls.split(args.batch)]).mean().item()


def seconds_of_steps(args: argparse.Namespace) -> dict[str, float]:
    """The shortest step of each row of training, by name. They train the same model."""
    torch.manual_seed(0)
    x0 = torch.randint(args.V, (args.batch, args.L), device=DEVICE)
    model = DLCPrior_models[args.model](L=args.L, V=args.V).to(DEVICE).train()
    compile_blocks(model, DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, weight_decay=0.0, fused=True)
    diffusion, indices = MaskedDiffusion(args.V), torch.arange(len(x0), device=DEVICE)

    def step(published, compiled):
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

    rows = {PUBLISHED: (True, False), "ours": (False, False), "ours, compiled": (False, True)}
    steps = {name: partial(step, *row) for name, row in rows.items() if args.compile or not row[1]}
    for one in steps.values():
        one()  # allocates, compiles
    return {name: min(seconds) for name, seconds in in_turns(steps, args.repeats).items()}


@torch.inference_mode()
def seconds_of_call(args: argparse.Namespace) -> float:
    """The shortest call of the network on a batch of masked codes."""
    model, diffusion = DLCPrior_models[args.model](L=args.L, V=args.V).to(DEVICE).eval(), MaskedDiffusion(args.V)
    codes = torch.full((args.batch, args.L), args.V, device=DEVICE)
    told = diffusion.told(torch.ones(args.batch, device=DEVICE))

    def call():
        with autocast(DEVICE, args.precision):
            model(codes, told)

    return min(in_turns({"call": call}, args.repeats)["call"])


def main() -> None:
    parser, add = flags_of(__doc__)
    add("--model", "measure this prior", "DLCPrior-M", "DLCPrior-S", choices=DLCPrior_models)
    add("--L", "take this many code positions", 512)
    add("--V", "take this many tokens per position", 256)
    add("--batch", "take this many codes at once", 64, 1)
    add("--precision", "set the network's precision", "bf16", "fp32")
    add("--repeats", "let the rows take this many turns", 5, 3)
    add("--compile", "measure compiled training, too", True)
    args = parser.parse_args()
    set_numerics(tf32=True)  # as in training and sampling
    table, steps = [], seconds_of_steps(args)

    for name, seconds in steps.items():
        row = {"": name, "what": "training", **dict.fromkeys(("steps", "calls", "s per call"))}
        table.append({**row, "codes/s": args.batch / seconds, TIMES: steps[PUBLISHED] / seconds})
    rows, rates, seconds = sampling_rows(args.L), {}, seconds_of_call(args)
    for row in rows:
        calls = calls_per_code(row, args)
        rates[row] = args.batch / (calls * seconds)
        # the published row of the same steps, or of the published default
        same = rates[next((one for one in rows if one[4] and one[1:3] == row[1:3]), rows[2])]
        measured = {"steps": row[2], "calls": calls, "s per call": seconds, "codes/s": rates[row]}
        table.append({"": row[0], "what": "sampling", **measured, TIMES: rates[row] / same})
    record("prior", table, **vars(args))


if __name__ == "__main__":
    main()
