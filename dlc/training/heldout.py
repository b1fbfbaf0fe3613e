"""The bound on codes that a prior is not trained on, as training goes: logged, and the best weights kept."""

import math
from typing import TYPE_CHECKING

import torch

from diffusion.masked import MaskedDiffusion
from dlc.machine.noise import Stream, random_words
from dlc.training.code_batches import Codes
from dlc.training.metrics_file import append_metrics, read_metrics
from dlc.weights.checkpoint import save_best

if TYPE_CHECKING:
    from dlc.training.run import Run

SEED = 0  # of the masks: the same in all runs, so that they compare
ROWS_AT_ONCE = 256


@torch.no_grad()
def heldout_bounds(
    model: torch.nn.Module,
    diffusion: MaskedDiffusion,
    codes: torch.Tensor,
    indices: torch.Tensor,
    levels: int,
    model_kwargs: dict | None = None,
) -> torch.Tensor:
    """The bound of each of the codes (n, L), in nats per code, (n,) float64.

    Args:
        model: in eval mode; codes, indices and the tensors of model_kwargs lie on its device.
        indices: (n,) int64, by which the masks are drawn.
        levels: numbers of masked tokens per code, see `MaskedDiffusion.code_bounds`.
        model_kwargs: of (n,) tensors.
    """
    L, bounds = codes.shape[1], []
    for start in range(0, len(codes), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        words = random_words(SEED, Stream.BOUND_MASK, indices[rows], L + 1).double() / 2**32
        some = {name: value[rows] for name, value in (model_kwargs or {}).items()}
        bounds.append(diffusion.code_bounds(model, codes[rows], words[:, :L], levels, words[:, L], some))
    return torch.cat(bounds) if bounds else torch.zeros(0, dtype=torch.float64, device=codes.device)


class HeldOut:
    """Measures the EMA weights on the held-out codes, every --eval-every steps and at the end.

    Each measurement is a line of metrics.jsonl and of the log. RESULTS/best/ holds the weights of the lowest bound.

    Args:
        run: the `Run`.
        codes: the `Codes`; nothing is measured if none are held out.
        diffusion: the `MaskedDiffusion` that is trained.
    """

    def __init__(self, run: "Run", codes: Codes, diffusion: MaskedDiffusion):
        self.run, self.codes, self.diffusion = run, codes, diffusion
        self.size, self.bounds = len(codes.heldout_rows), []  # (step, nats per token) of each measurement
        if not self.size:
            return
        # as many for each process, some twice: a sharded EMA is gathered at every call
        processes = run.state.num_processes
        places = torch.arange(run.state.process_index, -(-self.size // processes) * processes, processes)
        self.counted = (places < self.size).to(run.device)
        tokens, labels = (values[places % self.size].to(run.device) for values in codes.heldout)
        self.tokens, self.labels, self.indices = tokens, labels, (places % self.size).to(run.device)
        self.uniform, self.independent = math.log(codes.V), codes.independent_nats()
        run.logger.info(
            f"held out: {self.size:,} codes; nats per token of uniform tokens (ln V) {self.uniform:.4f}, of "
            f"independent positions {self.independent:.4f}"
        )
        self.bounds = [
            (line["step"], line["heldout_nats"])
            for line in read_metrics(run.folder / "metrics.jsonl")
            if isinstance(line.get("heldout_nats"), float)
        ]

    def is_due(self, step: int) -> bool:
        every = self.run.args.eval_every or min(10_000, self.run.checkpoints[1])
        return bool(self.size) and (step % every == 0 or step == self.run.last_step)

    def measure(self, step: int) -> None:
        """Measure, write a line, and keep the weights if they are the best so far. Every process calls this."""
        run, args, L = self.run, self.run.args, self.codes.L
        found = {}
        with run.whole_ema(everywhere=True) as ema:
            kinds = {"heldout": {}}
            if ema.num_classes is not None:  # the prior without a class comes second: it is trained on fewer samples
                kinds = {"heldout": dict(y=self.labels), "heldout_no_class": {}}
            for name, kwargs in kinds.items():
                with run.accelerator.autocast():
                    bounds = heldout_bounds(ema, self.diffusion, self.tokens, self.indices, args.eval_levels, kwargs)
                bounds = bounds[self.counted]
                sums = run.accelerator.reduce(torch.stack([bounds.sum(), bounds.square().sum()]), "sum").tolist()
                mean = sums[0] / self.size
                error = math.sqrt(max(0.0, sums[1] / self.size - mean**2) / max(1, self.size - 1))
                found[f"{name}_nats"], found[f"{name}_error"] = mean / L, error / L
            nats = found["heldout_nats"]
            best = nats < min((bound for _, bound in self.bounds), default=math.inf)  # NaN is not
            self.bounds += [(step, nats)] if math.isfinite(nats) else []
            if best:
                run.record(self._keep, step, ema)
        line = dict(step=step, **found, uniform_nats=self.uniform, independent_nats=self.independent)
        if run.state.is_main_process:
            run.record(append_metrics, run.folder / "metrics.jsonl", line)
        if args.report_to:
            run.accelerator.log({name: value for name, value in line.items() if name != "step"}, step)
        run.logger.info(
            f"step {step:,}: held-out bound {nats:.4f} +- {found['heldout_error']:.4f} nats per token"
            + (f" given the class, {found['heldout_no_class_nats']:.4f} without it" if len(kinds) > 1 else "")
            + f" (uniform {self.uniform:.4f}, independent positions {self.independent:.4f})"
            + (", the lowest so far" if best else "")
        )

    def _keep(self, step, ema):
        save_best(self.run.folder, self.run.config, self.run.meta(step), ema=ema, write=self.run.state.is_main_process)

    def conclude(self) -> None:
        """Say in the log at which step the bound was lowest, and whether it has risen since."""
        if not self.bounds:
            return
        (last, nats), (step, best) = self.bounds[-1], min(self.bounds, key=lambda one: one[1])
        risen = f"; it has risen to {nats:.4f} by step {last:,}: training overfits" if nats > best else ""
        self.run.logger.info(
            f"held-out bound: lowest at step {step:,}, {best:.4f} nats per token{risen}; "
            f"those weights are {self.run.folder / 'best' / f'{step:07d}'}"
        )
