"""The engine: draw latents for given conditions, with any sampler, guided in an interval of the diffusion times."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from diffusion.options import default_of
from diffusion.process_table import LATENT_SAMPLERS, Process, create_process, describe_process, samplers_of
from diffusion.samplers import Sampler
from dlc.machine.noise import StepNoise, Stream, normal
from dlc.machine.processes import PRECISIONS
from models import Condition, DiT


def create_sampler(
    name: str | None = None,
    steps: int | None = None,
    process: Process | None = None,
    learn_sigma: bool = True,
    **options,
) -> Sampler:
    """A sampler. It keeps its `name`, and its `options` with the defaults.

    Args:
        name: None for the process's default.
        steps: None for the sampler's default.
        process: what the model was trained on, from `create_process` [that of DiT].
        learn_sigma: whether the model's output has the variance's channels.
        options: of the sampler; one that is None is left to its default.

    Raises ValueError for a sampler that does not draw from such models, and for steps or options that it does not have.
    """
    process = process or create_process("gaussian")
    fitting = samplers_of(process)
    name = name or next(iter(fitting), None)
    if name not in fitting:
        said = f"--sampler {name} does not draw" if name else "no sampler draws"
        others = f": {' or '.join(fitting)} does" if fitting else ""
        raise ValueError(f"{said} from a model that was trained on the {describe_process(process)}{others}")
    spec, given = fitting[name], {option: value for option, value in options.items() if value is not None}
    for option in given.keys() - spec.options.keys():
        have = [other for other, specs in LATENT_SAMPLERS.items() if any(option in one.options for one in specs)]
        flag = f"--{option.replace('_', '-')}"
        raise ValueError(f"{flag} {given[option]}: --sampler {name} has none, {' and '.join(have)} has")
    steps = steps or spec.default_steps
    if not spec.fewest_steps <= steps <= spec.most_steps:
        raise ValueError(f"--num-sampling-steps {steps}: --sampler {name} has {spec.fewest_steps} to {spec.most_steps}")
    sampler = spec.build(steps, process, learn_sigma, **given)
    sampler.name, sampler.options = name, {option: default_of(spec.build, option) for option in spec.options} | given
    return sampler


def check_conditions(y: Condition, null: Condition) -> None:
    """Raise ValueError for a label or token that a model does not have; null, the next one after them, means "none".

    Only what is on the CPU is looked at: it would wait for a GPU.
    """

    def check(given, bound):
        if given.device.type == bound.device.type == "cpu" and are_numbers(given) and are_numbers(bound):
            outside = given[(given < 0) | (given >= bound)]
            if len(outside):
                raise ValueError(
                    f"condition {int(outside[0])} is outside 0..{int(bound.max()) - 1}, those of the model"
                )

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
    denoise: Callable | None = None  # replaces `network`, for example by its CUDA graph

    def network(self, main: DiT) -> Callable:
        """What a guided step calls beside main.denoise, or with a head in its place."""
        return self.model.denoise if self.model else partial(main.denoise, head=True)

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
    sample. Called with its `denoise` and x (n, ...); doubled: x (2n, ...), whose second half is for the null condition.

    Raises ValueError as `check_conditions` does.
    """

    def __init__(self, model: DiT, y: Condition, n: int, sampler: Sampler, device: torch.device):
        y = tree_map(lambda one: one.long() if are_numbers(one) else one, y)  # 8 bits would not hold a null token
        check_conditions(y, model.null_condition(1))
        self.condition = model.embed_condition(y)  # (N, D), or a tree of tensors (N, ...)
        null = model.embed_condition(tree_map(lambda null, given: null.to(given), model.null_condition(1), y))  # (1, D)
        self.both = tree_map(
            lambda one, null: torch.cat([one, null.expand(n, *null.shape[1:])]), self.condition, null
        )  # (2N, D)
        self.embed = lambda times: model.t_embedder(sampler.told(torch.tensor(times, device=device)))
        times = list(dict.fromkeys(sampler.times))
        self.times = dict(zip(times, self.embed(times)))  # (D,) each

    def __call__(self, denoise: Callable, x: torch.Tensor, time: float, doubled: bool) -> torch.Tensor:
        if time not in self.times:  # a solver may choose times as it goes
            self.times[time] = self.embed([time])[0]
        return denoise(x, self.times[time], self.both if doubled else self.condition).float()


@torch.inference_mode()
def sample_latents(
    model: DiT,
    sampler: Sampler,
    *,
    y: Condition,
    seed: int,
    indices: torch.Tensor,
    latent_shape: tuple[int, int, int],
    cfg_scale: float = 1.0,
    t_min: float = 0,
    t_max: float = math.inf,
    channels: int | None = None,
    guide: Guide | None = None,
    denoise: Callable | None = None,
    on_step: Callable | None = None,
) -> torch.Tensor:
    """Draw latents (N, *latent_shape) for the conditions y.

    Args:
        model: in eval mode.
        y: N conditions, a tensor (N, ...) or a tree of them as the model's `null_condition` gives it, on its device.
        seed, indices: a sample's noise is a function of (seed, its index); indices is (N,) int64 on the same device.
        cfg_scale: guidance; at 1, and at times outside t_min..t_max, the null half is not computed at all.
        t_min, t_max: times of the process, in the sampler's own count.
        channels: latent channels that guidance covers [the model's own choice, as in DiT.forward_with_cfg].
        guide: a weaker model to guide by, at its own times; with cfg_scale it acts on each half before that does.
        denoise: replaces model.denoise, for example by its CUDA graph.
        on_step: called after each step with its number, its x and the x_0 that the model saw.

    Raises ValueError as `check_conditions` does.
    """
    channels = channels or model.guided_channels or model.in_channels
    batch, denoise = (y, len(indices), sampler, indices.device), denoise or model.denoise
    main, network = Prediction(model, *batch), guide and (guide.denoise or guide.network(model))
    weak = Prediction(guide.model, *batch) if guide and guide.model else main

    def away_from_weak(x, time, since, doubled=False):
        if guide is None or not guide.acts(since):
            return main(denoise, x, time, doubled)
        weaker = weak(network, x, time, doubled)
        if guide.model is None:  # one pass gave both
            strong, weaker = weaker.split([model.out_channels, model.in_channels], dim=1)
        else:
            strong = main(denoise, x, time, doubled)
        return guided(weaker, strong, guide.scale, model.in_channels)

    def predict(x, time, since=None):
        since = time if since is None else since
        if cfg_scale == 1 or not t_min <= since <= t_max:
            return away_from_weak(x, time, since)
        conditional, null = away_from_weak(torch.cat([x, x]), time, since, doubled=True).chunk(2)
        return guided(null, conditional, cfg_scale, channels)

    noise = StepNoise(seed, Stream.SAMPLE_NOISE, indices, latent_shape, sampler.num_steps)
    start = normal(seed, Stream.SAMPLE_NOISE, indices, latent_shape)  # the same for any number of steps
    for step, (x, x_start) in enumerate(sampler(predict, start, noise)):
        if on_step is not None:
            on_step(step, x, x_start)
    return x


class CudaGraphs:
    """A function of CUDA tensors and trees of them: its kernels are recorded once per shapes, then launched as one."""

    def __init__(self, function: Callable):
        self.function, self.recorded = function, {}

    def __call__(self, *inputs) -> torch.Tensor:
        values, tree = tree_flatten(inputs)
        shapes = tuple(value.shape for value in values)
        if shapes not in self.recorded:
            fixed = [value.clone() for value in values]
            fixed_inputs = tree_unflatten(fixed, tree)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):  # compiles, and chooses kernels
                    self.function(*fixed_inputs)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                output = self.function(*fixed_inputs)
            self.recorded[shapes] = fixed, graph, output
        fixed, graph, output = self.recorded[shapes]
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
