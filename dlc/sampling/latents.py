"""The engine: draw latents for given conditions, with any sampler, guided in an interval of the diffusion times."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from diffusion.masked_samplers import CodeSampler
from diffusion.options import default_of
from diffusion.process_table import Process, create_process, describe_process, samplers_of
from diffusion.samplers import Sampler
from dlc.machine.noise import StepNoise, Stream, normal
from dlc.machine.processes import PRECISIONS, autocast
from models import Condition, DiT


def create_sampler(
    name: str | None = None, steps: int | None = None, process: Process | None = None, **options
) -> Sampler | CodeSampler:
    """A sampler, of codes if the process is a masked one. It keeps its `name`, and its `options` with the defaults.

    Args:
        name, steps: None for the process's default, and for the sampler's.
        process: what the model was trained on, from `create_process` [that of DiT].
        options: of the sampler; one that is None is left to its default.

    Raises ValueError for a sampler that does not draw from such models, and for steps or options that it does not have.
    """
    process = process or create_process("gaussian")
    fitting = samplers_of(process)
    name = name or next(iter(fitting), None)
    if name not in fitting:
        trained = f"a model that was trained on the {describe_process(process)}"
        raise ValueError(f"--sampler {name} does not draw from {trained}: {' or '.join(fitting) or 'none'} does")
    spec, given = fitting[name], {option: value for option, value in options.items() if value is not None}
    for option in given.keys() - spec.options.keys():
        have = " and ".join(other for other, one in fitting.items() if option in one.options)
        flag, instead = f"--{option.replace('_', '-')}", f", {have} has" if have else ": leave it out"
        raise ValueError(f"{flag} {given[option]}: --sampler {name} has none{instead}")
    steps = steps or spec.default_steps
    if steps is not None and not spec.fewest_steps <= steps <= spec.most_steps:
        raise ValueError(f"--num-sampling-steps {steps}: --sampler {name} has {spec.fewest_steps} to {spec.most_steps}")
    sampler = spec.build(steps, process, **given)
    sampler.name, sampler.options = name, {option: default_of(spec.build, option) for option in spec.options} | given
    return sampler


def check_conditions(y: Condition, null: Condition) -> None:
    """Raise ValueError for a label or token that a model does not have; null, the next one after them, means "none".

    Only what is on the CPU is looked at: it would wait for a GPU.
    """

    def check(given, bound):
        if given.device.type == bound.device.type == "cpu" and are_numbers(given) and are_numbers(bound):
            for value in given[(given < 0) | (given >= bound)].tolist():
                raise ValueError(f"condition {value} is outside 0..{int(bound.max()) - 1}, those of the model")

    tree_map(check, y, null)  # by name, whatever the order of two dicts


def are_numbers(values: torch.Tensor) -> bool:
    """Whether a condition's values are numbers of classes or tokens, and neither floats nor a mask."""
    return not values.is_floating_point() and values.dtype != torch.bool


@dataclass(frozen=True)
class Guide:
    """A weaker model to guide by (autoguidance, Karras et al. 2024, arXiv 2406.02507), or None: the model's own
    intermediate head, whose prediction comes with the model's (internal guidance, Zhou et al. 2026, arXiv 2512.24176).

    At times from t_min to t_max a prediction is weak + scale * (the model's - weak), both for the same condition, in
    all latent channels; the variance stays the model's. At scale 1 the weak model is not called.
    """

    model: DiT | None
    scale: float
    t_min: float
    t_max: float

    def acts(self, time: float) -> bool:
        return self.scale != 1 and self.t_min <= time <= self.t_max


def guided(weak: torch.Tensor, strong: torch.Tensor, scale: float, channels: int) -> torch.Tensor:
    """weak + scale * (strong - weak) in the first channels of predictions (N, C or 2C, H, W); the others are strong's.

    Linear, so the same for predictions of noise, of x_0 or of a velocity.
    """
    mixed = weak[:, :channels] + scale * (strong[:, :channels] - weak[:, :channels])
    return torch.cat([mixed, strong[:, channels:]], dim=1)


class Prediction:
    """A model at the conditions y of a batch of n: conditions are embedded once, not per step, and times once, not per
    sample. Called with x (n, ...), or if doubled (2n, ...), whose second half is for the null condition."""

    def __init__(self, model: DiT, y: Condition, n: int, sampler: Sampler, device: torch.device, precision: str | None):
        self.model, self.autocast = model, partial(autocast, device, precision) if precision else contextlib.nullcontext
        y = tree_map(lambda one: one.long() if are_numbers(one) else one, y)  # 8 bits would not hold a null token
        check_conditions(y, model.null_condition(1))
        null = tree_map(lambda null, given: null.to(given), model.null_condition(1), y)
        with self.autocast():
            self.condition, null = model.embed_condition(y), model.embed_condition(null)  # (N, D), or trees of (N, ...)
        self.both = tree_map(
            lambda one, null: torch.cat([one, null.expand(n, *null.shape[1:])]), self.condition, null
        )  # (2N, D)
        self.embed = lambda times: model.t_embedder(sampler.told(torch.tensor(times, device=device)))
        times = list(dict.fromkeys(sampler.times))
        self.times = dict(zip(times, self.embed(times)))  # (D,) each

    def __call__(self, x: torch.Tensor, time: float, doubled: bool, **asked) -> torch.Tensor:
        """asked: of the model's `denoise`."""
        if time not in self.times:  # a solver may choose times as it goes
            self.times[time] = self.embed([time])[0]
        with self.autocast():
            return self.model.denoise(x, self.times[time], self.both if doubled else self.condition, **asked).float()


def guidance(settings: object) -> dict:
    """Arguments of `sampling_steps` out of a SamplesRecord, or of the flags that it is made of."""
    return {name: getattr(settings, name) for name in ("cfg_scale", "t_min", "t_max", "cfg_channels", "precision")}


@torch.inference_mode()
def sampling_steps(
    model: DiT,
    sampler: Sampler,
    *,
    y: Condition,
    seed: int,
    indices: torch.Tensor,
    cfg_scale: float = 1.0,
    t_min: float = 0,
    t_max: float = math.inf,
    cfg_channels: int | None = None,
    guide: Guide | None = None,
    precision: str | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Draw latents (N, C, h, w) for the conditions y: after each step, they and the x_0 that the model saw.

    Args:
        model: in eval mode.
        y: N conditions, a tensor (N, ...) or a tree of them as the model's `null_condition` gives it, on its device.
        seed, indices: a sample's noise is a function of (seed, its index); indices is (N,) int64 on the same device.
        cfg_scale: guidance; at 1, and at times outside t_min..t_max, the null half is not computed at all.
        t_min, t_max: times of the process, in the sampler's own count.
        cfg_channels: latent channels that this covers [the model's own choice, as in DiT.forward_with_cfg].
        guide: a weaker model to guide by, at its own times; with cfg_scale it acts on each half before that does.
        precision: of the model, "fp32", "bf16" or "fp16" [that of the caller's autocast].

    Raises ValueError as `check_conditions` does.
    """
    cfg_channels = cfg_channels or model.guided_channels or model.in_channels
    batch = y, len(indices), sampler, indices.device, precision
    main, weak = Prediction(model, *batch), guide and guide.model and Prediction(guide.model, *batch)

    def away_from_weak(x, time, since, doubled=False):
        if guide is None or not guide.acts(since):
            return main(x, time, doubled)
        if weak is None:  # one pass gives both
            strong, weaker = main(x, time, doubled, head=True).split([model.out_channels, model.in_channels], dim=1)
        else:
            strong, weaker = main(x, time, doubled), weak(x, time, doubled)
        return guided(weaker, strong, guide.scale, model.in_channels)

    def predict(x, time, since=None):
        since = time if since is None else since
        if cfg_scale == 1 or not t_min <= since <= t_max:
            return away_from_weak(x, time, since)
        conditional, null = away_from_weak(torch.cat([x, x]), time, since, doubled=True).chunk(2)
        return guided(null, conditional, cfg_scale, cfg_channels)

    shape = model.in_channels, *model.x_embedder.img_size
    noise = StepNoise(seed, Stream.SAMPLE_NOISE, indices, shape, sampler.num_steps)
    start = normal(seed, Stream.SAMPLE_NOISE, indices, shape)  # the same for any number of steps
    yield from sampler(predict, start, noise)


def sample_latents(*args, on_step: Callable | None = None, **options) -> torch.Tensor:
    """The latents (N, C, h, w) after the last of `sampling_steps`. on_step: called after each step with its number, its
    x and the x_0 that the model saw."""
    for step, (x, x_start) in enumerate(sampling_steps(*args, **options)):
        if on_step is not None:
            on_step(step, x, x_start)
    return x


class CudaGraphs:
    """A function of CUDA tensors and trees of them: its kernels are recorded once per shapes and options, then launched
    as one."""

    def __init__(self, function: Callable):
        self.function, self.recorded = function, {}

    def __call__(self, *inputs, **options) -> torch.Tensor:
        values, tree = tree_flatten(inputs)
        key = *(value.shape for value in values), *options.items()
        if key not in self.recorded:
            function = partial(self.function, **options)
            fixed = [value.clone() for value in values]
            fixed_inputs = tree_unflatten(fixed, tree)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):  # compiles, and chooses kernels
                    function(*fixed_inputs)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                output = function(*fixed_inputs)
            self.recorded[key] = fixed, graph, output
        fixed, graph, output = self.recorded[key]
        for buffer, value in zip(fixed, values):
            buffer.copy_(value)
        graph.replay()
        return output.clone()  # the next replay overwrites it, and solvers keep several outputs


def lower_precision(model: torch.nn.Module, precision: str) -> None:
    """Cast the weights that autocast would cast at every step, once: the same results with less memory traffic.

    A subclass of these layers, such as one that turns autocast off for itself, stays as it is.
    """
    for part in (model.x_embedder, model.blocks, *model.output_layers):
        for layer in part.modules():
            if type(layer) in (torch.nn.Linear, torch.nn.Conv2d):
                layer.to(PRECISIONS[precision])


class LinearGELU(torch.nn.Linear):
    """A linear layer and the GELU after it, of tanh, as one product: cuBLASLt computes the GELU in its epilogue."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in_features), in any precision, to (..., out_features) in that of the weights."""
        rows = x.flatten(0, -2).to(self.weight.dtype)
        return torch._addmm_activation(self.bias, rows, self.weight.t(), use_gelu=True).unflatten(0, x.shape[:-1])


def fuse_gelu(model: torch.nn.Module) -> None:
    """Make the first layer and the GELU of each block's MLP one `LinearGELU`, where they are as in DiT: for GPUs."""
    for mlp in (getattr(block, "mlp", None) for block in model.blocks):
        act, fc1 = getattr(mlp, "act", None), getattr(mlp, "fc1", None)
        tanh = type(act) is torch.nn.GELU and act.approximate == "tanh"
        if tanh and type(fc1) is torch.nn.Linear and fc1.bias is not None:
            fc1.__class__, mlp.act = LinearGELU, torch.nn.Identity()
