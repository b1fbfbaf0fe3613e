"""What a change to a step buys: forward passes, training steps and steps of sampling, in turns in one process.

    python -m benchmarks.steps --threads 1

benchmarks/README.md says what `before` and the DLC project's way are. `times the first` is the ratio to the first row
of the same work, turn by turn: the median, then the smallest and the largest. `differs by` is the mean relative
difference from that row: of outputs, of latents, or of all gradients. On a CPU seconds are CPU seconds of the process.
"""

from copy import deepcopy
from functools import cached_property, partial
from statistics import median

import torch

from benchmarks.checks import difference
from benchmarks.record import DEVICE, ON_GPU, flags_of, in_turns, record
from diffusion import GaussianDiffusion, create_diffusion
from dlc.machine.noise import Stream, integers, normal, uniforms
from dlc.machine.processes import PRECISIONS, autocast, compile_blocks, cores, set_numerics
from dlc.sampling.latents import create_sampler, lower_precision, sample_latents
from dlc.training.update import update_ema
from models import DiT, DiT_models
from train_diffusion import draws

FORWARD, TRAINING, SAMPLING = "forward pass", "training step", "2 guided steps of sampling"
EAGER, COMPILED = "eager", "compiled"
THEIRS = "the DLC project's way"
WAYS = [(work, f"{how}{when}") for work in (FORWARD, TRAINING, SAMPLING) for how in (EAGER, COMPILED)
        for when in (", before", "")]  # fmt: skip
ROWS = [(TRAINING, THEIRS), *WAYS]


def channels_first(model: DiT, x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
    """model.denoise without its copy of the tokens to rows."""
    recompute, x, c = model.grad_checkpointing, model.x_embedder(x) + model.pos_embed, t + condition
    for block in model.blocks:
        x = torch.utils.checkpoint.checkpoint(block, x, c, use_reentrant=False) if recompute else block(x, c)
    return model.unpatchify(model.final_layer(x, c))


def three_draws(
    seed: int, indices: torch.Tensor, x: torch.Tensor, diffusion: GaussianDiffusion, dropout: float
) -> tuple:
    """train_diffusion.draws with a call of the generator for each."""
    noise = normal(seed, Stream.TRAIN_NOISE, indices, x.shape[1:])
    drop = uniforms(seed, Stream.TRAIN_DROP, indices, 1)[:, 0] < dropout
    return integers(seed, Stream.TRAIN_TIMESTEP, indices, diffusion.num_timesteps), noise, drop


class Steps:
    """A DiTSEM and what its steps need. Its weights stay as they are: the learning rate is 0.

    compiling: as torch.compile's arguments.
    """

    def __init__(self, name: str, batch: int, precision: str, L: int = 512, V: int = 256, **compiling):
        self.name, self.L, self.V, self.compiling = name, L, V, compiling
        torch.manual_seed(0)
        with DEVICE:
            self.model = DiT_models[name](L=L, V=V)
            self.x, self.y = torch.randn(batch, 4, 32, 32), torch.randint(V, (batch, L))
            self.indices = torch.arange(batch)
        for weight in self.model.parameters():
            torch.nn.init.normal_(weight, std=0.02)  # an untrained model's output is 0
        ema = deepcopy(self.model).requires_grad_(False)
        compile_blocks(self.model, DEVICE, **compiling)
        self.weights, self.averages = list(self.model.parameters()), list(ema.parameters())
        self.diffusion, self.precision = create_diffusion(""), precision
        self.scaler = torch.amp.GradScaler(DEVICE.type) if precision == "fp16" else None
        self.ours = torch.optim.AdamW(self.weights, 0.0, weight_decay=0.0, fused=True)
        self.theirs = torch.optim.AdamW(self.weights, 0.0, weight_decay=0.0)
        self.given = draws(0, self.indices, self.x, self.diffusion, 0.1)

    @cached_property
    def drawing(self) -> DiT:
        """The model as sampling has it."""
        model = DiT_models[self.name](L=self.L, V=self.V).to(DEVICE).eval()
        model.load_state_dict(self.model.state_dict())
        lower_precision(model, self.precision)
        compile_blocks(model, DEVICE, **self.compiling)
        return model

    def train(self, way: str) -> None:
        """A step; its gradients stay until the next one."""
        self.model.zero_grad()
        draw = three_draws if "before" in way else draws
        t, noise, drop = self.given if way == THEIRS else draw(0, self.indices, self.x, self.diffusion, 0.1)
        with autocast(DEVICE, self.precision):
            terms = self.diffusion.training_losses(self.model, self.x, t, dict(y=self.y, drop=drop), noise)
        loss = terms["loss"].mean()
        (self.scaler.scale(loss) if self.scaler else loss).backward()
        optimizer = self.theirs if way == THEIRS else self.ours
        self.scaler.step(optimizer) if self.scaler else optimizer.step()
        self.scaler and self.scaler.update()
        with torch.no_grad():
            for average, weight in zip(self.averages, self.weights) if way == THEIRS else ():
                average.mul_(0.9999).add_(weight, alpha=1e-4)
        if way != THEIRS:
            update_ema(self.averages, self.weights, 0.9999, self.scaler and torch.zeros((), dtype=bool, device=DEVICE))

    def __call__(self, work: str, way: str) -> list[torch.Tensor]:
        """Do it once. Returns what it computes, or nothing for a training step, which leaves it in the gradients."""
        model = self.drawing if work == SAMPLING else self.model
        model.train(work == TRAINING).set_grad_checkpointing(way == THEIRS)
        model.denoise = partial(
            channels_first if way.endswith("before") or way == THEIRS else type(model).denoise, model
        )
        with torch.compiler.set_stance("default" if way.startswith(COMPILED) else "force_eager"):
            if work == TRAINING:
                return self.train(way)
            with torch.no_grad(), autocast(DEVICE, self.precision):
                if work == FORWARD:
                    return [model(self.x, self.given[0], self.y)]
                half = len(self.x) // 2
                return [sample_latents(
                    model, create_sampler("ddpm", 2), y=self.y[:half], seed=0, indices=self.indices[:half],
                    cfg_scale=1.5,
                )]  # fmt: skip


def measure(steps: Steps, rows: list[tuple], turns: int) -> list[dict]:
    """The table's rows, which take so many turns."""
    first, table = {}, []
    for work, way in rows:  # compiles, allocates, and compares
        found = steps(work, way) or [weight.grad for weight in steps.weights]
        wanted = first.setdefault(work, [one.clone() for one in found])
        differs = difference(found, wanted) if wanted is not found else None
        table.append({"work": work, "": way, "seconds": None, "times the first": None, "differs by": differs})
    seconds = in_turns({row: partial(steps, *row) for row in rows}, turns)
    for row, (work, way) in zip(table, rows):
        name = next(name for name in rows if name[0] == work)
        ratios = sorted(one / other for one, other in zip(seconds[name], seconds[work, way]))
        spread = f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        row.update({"seconds": median(seconds[work, way]), "times the first": spread})
    return table


def main() -> None:
    parser, add = flags_of(__doc__)
    add("--model", "measure this DiTSEM", "DiTSEM-XL/2", "DiTSEM-S/2")
    add("--batch", "pass this many latents at once", 64, 8)
    add("--precision", "set the precision of products", "bf16", "fp32", choices=PRECISIONS)
    add("--turns", "let the rows take this many turns", 20, 7)
    add("--threads", "use this many threads of torch on a CPU", cores())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    set_numerics(tf32=True)
    name = "steps" if ON_GPU or args.precision == "fp32" else f"steps-{args.precision}"
    record(name, measure(Steps(args.model, args.batch, args.precision), ROWS, args.turns), **vars(args))


if __name__ == "__main__":
    main()
