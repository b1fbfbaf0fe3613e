"""The loss on held-out rows during training, always with the same times, noise and masks: it is logged, and the best
weights are kept."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from diffusion.masked import MaskedDiffusion
from diffusion.process_table import Process
from dlc.data.codes import token_counts
from dlc.data.inputs import Inputs
from dlc.machine.noise import Stream, random_words
from dlc.machine.processes import from_rank_0
from dlc.training.batches import gather
from dlc.training.metrics_file import read_metrics
from dlc.training.split import Split
from dlc.weights.checkpoint import save_checkpoint

if TYPE_CHECKING:
    from dlc.training.run import Run

SEED = 0  # of times, noise and masks: the same in all runs, so that they compare
TIMES = 8  # of each held-out row of latents
ROWS_AT_ONCE = 256
COUNTED = 200_000  # rows whose tokens are counted, at most, for the bound of independent positions


@torch.no_grad()
def heldout_bounds(
    model: Callable,
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


def independent_nats(split: Split) -> float:
    """Nats per token of the held-out codes under each token's frequency at each position in the training codes.

    Frequencies are those of at most COUNTED rows, plus one of each token.
    """
    codes, V = split.features.codes, split.features.V
    rows = split.rows[:: math.ceil(len(split.rows) / COUNTED)]
    counts = 1 + sum(token_counts(codes.gather(part), V) for part in np.array_split(rows, 1 + len(rows) // 4096))
    log_p = np.log(counts / counts.sum(axis=1, keepdims=True))  # (L, V)
    return -float(log_p[np.arange(len(log_p)), split.other.codes.gather(split.heldout)].mean())


class Measurement(ABC):
    """Measures the EMA weights on some rows, every --eval-every steps and at the end, for `Run.steps`.

    Args:
        run: the `Run`.
        size: how many rows, at least 1.

    Attributes: places of this process's rows among them, (n,) int64, and whether each counts; earlier: the lines of
    metrics.jsonl that have the key which a subclass gives; done: the steps that were measured.
    """

    key: str

    def __init__(self, run: "Run", size: int):
        self.run, self.size = run, size
        lines = read_metrics(run.folder / "metrics.jsonl") if run.state.is_main_process else []
        self.earlier = from_rank_0([line for line in lines if self.key in line])
        self.done = {line["step"] for line in self.earlier}
        # as many for each process, some twice: all ask equally often whether to stop
        processes = run.state.num_processes
        places = torch.arange(-(-size // processes)) * processes + run.state.process_index
        self.counted, self.places = (places < size).to(run.device), places % size

    def is_due(self, step: int) -> bool:
        every = self.run.args.eval_every or min(10_000, self.run.checkpoints[1])
        return step not in self.done and (step % every == 0 or step == self.run.last_step)

    @abstractmethod
    def measure(self, step: int) -> None:
        """Measure, and `note` it, in a block of `Run.whole_ema`. Every process calls this."""

    def note(self, step: int, line: dict, words: str) -> None:
        """Write a line to metrics.jsonl, its numbers to the tracker, and words to the log."""
        self.done.add(step)
        numbers = {name: value for name, value in line.items() if isinstance(value, float)}
        self.run.note(dict(step=step, **line), words, numbers)

    def conclude(self) -> None:  # noqa: B027
        """Called when the steps are done."""


class HeldOut(Measurement):
    """Measures on what is held out. RESULTS/best/ holds the weights of the lowest measurement.

    A subclass gives
        unit, what: of the numbers, in metrics.jsonl and in words.
        evaluate(ema): pairs of a name, the first of which is "heldout", and values (n,) of this process's places.
        words(found): the log's line, by the keys of metrics.jsonl.

    beside: constants to note with each measurement.
    """

    unit: str
    what: str

    def __init__(self, run: "Run", size: int, **beside: float):
        self.key, self.beside = f"heldout_{self.unit}", beside
        super().__init__(run, size)
        self.found = [(line["step"], line[self.key]) for line in self.earlier if isinstance(line[self.key], float)]

    @torch.no_grad()
    def measure(self, step: int) -> None:
        """Measure, and keep the weights if they are the best so far."""
        run, found = self.run, dict(self.beside)
        with run.whole_ema(everywhere=True) as ema:
            for name, values in self.evaluate(ema):
                values = values[self.counted].double()
                sums = run.accelerator.reduce(torch.stack([values.sum(), values.square().sum()]), "sum").tolist()
                mean = sums[0] / self.size
                error = math.sqrt(max(0.0, sums[1] / self.size - mean**2) / max(1, self.size - 1))
                found[f"{name}_{self.unit}"], found[f"{name}_error"] = mean, error
            value = found[self.key]
            best = value < min((one for _, one in self.found), default=math.inf)  # NaN is not
            self.found += [(step, value)] if math.isfinite(value) else []
            if best:
                run.record(self._keep, step, ema)
            self.note(step, found, f"{self.words(found)}{', the lowest so far' if best else ''}")

    def _keep(self, step, ema):
        run = self.run
        save_checkpoint(run.folder, run.config, run.meta(step), ema=ema, write=run.state.is_main_process)

    def conclude(self) -> None:
        """Say in the log at which step it was lowest, and whether it has risen since."""
        if not self.found:
            return
        (last, value), (step, best) = self.found[-1], min(self.found, key=lambda one: one[1])
        risen = f"; it has risen to {value:.4f} by step {last:,}: training overfits" if value > best else ""
        self.run.logger.info(
            f"held-out {self.what}: lowest at step {step:,}, {best:.4f}{risen}; "
            f"those weights are {self.run.folder / 'best' / f'{step:07d}'}"
        )


class HeldOutLatents(HeldOut):
    """The loss on held-out rows, each at TIMES times.

    inputs: what the model is conditioned on there.
    process: what the model is trained on.
    losses: train_diffusion.losses_of, but for what it is given here.
    """

    unit = what = "loss"

    def __init__(self, run: "Run", split: Split, inputs: Inputs, process: Process, losses: Callable):
        super().__init__(run, len(split.heldout))
        self.inputs, self.process, self.losses = inputs, process, losses
        self.features, self.rows = split.other, split.heldout[self.places.numpy()]

    def evaluate(self, ema: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """See `HeldOut`. Time and noise of a row belong to its place, and not to the process that has it."""
        run, means, arrays = self.run, [], dict(self.inputs.arrays, latents=self.features.latents)
        for start in range(0, len(self.rows), run.micro_batch_size):
            part = slice(start, start + run.micro_batch_size)
            batch = {name: one.to(run.device) for name, one in gather(arrays, self.rows[part]).items()}
            places, y, total = self.places[part].to(run.device), self.inputs.of(batch), 0
            for time in range(TIMES):
                run.go_on()
                with run.accelerator.autocast():
                    indices = places * TIMES + time
                    terms, _ = self.losses(ema, self.process, indices, batch["latents"], y, seed=SEED, dropout=0.0)
                total = total + terms["loss"].double()
            means.append(total / TIMES)
        yield "heldout", torch.cat(means)

    def words(self, found: dict) -> str:
        """See `HeldOut`."""
        return f"held-out loss {found['heldout_loss']:.5f} +- {found['heldout_error']:.5f}"


class HeldOutCodes(HeldOut):
    """The bound of a prior on held-out codes, in nats per token.

    diffusion: the `MaskedDiffusion` that is trained.
    """

    unit, what = "nats", "bound"

    def __init__(self, run: "Run", split: Split, diffusion: MaskedDiffusion):
        self.L, self.diffusion, size = split.features.L, diffusion, len(split.heldout)
        uniform, independent = math.log(split.features.V), independent_nats(split)
        super().__init__(run, size, uniform_nats=uniform, independent_nats=independent)
        found = gather(dict(x=split.other.codes, y=split.other.labels), split.heldout[self.places.numpy()])
        self.tokens, self.labels = found["x"].long().to(run.device), found["y"].long().to(run.device)
        self.indices = self.places.to(run.device)
        run.logger.info(
            f"held out: {size:,} codes; nats per token of uniform tokens (ln V) {uniform:.4f}, of independent "
            f"positions {independent:.4f}"
        )

    def evaluate(self, ema: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """See `HeldOut`. The prior without a class comes second: it is trained on fewer samples."""

        def network(*inputs, **kwargs):
            self.run.go_on()
            return ema(*inputs, **kwargs)

        kinds, levels = {"heldout": {}}, self.run.args.eval_levels
        if ema.num_classes is not None:
            kinds = {"heldout": dict(y=self.labels), "heldout_no_class": {}}
        for name, kwargs in kinds.items():
            with self.run.accelerator.autocast():
                yield name, heldout_bounds(network, self.diffusion, self.tokens, self.indices, levels, kwargs) / self.L

    def words(self, found: dict) -> str:
        """See `HeldOut`."""
        without = found.get("heldout_no_class_nats")
        return (
            f"held-out bound {found['heldout_nats']:.4f} +- {found['heldout_error']:.4f} nats per token"
            + ("" if without is None else f" given the class, {without:.4f} without it")
            + f" (uniform {found['uniform_nats']:.4f}, independent positions {found['independent_nats']:.4f})"
        )
