"""No step mixes devices or makes the CPU wait for the GPU: the real functions on tensors that only say they are there.

Each path is a function of PATHS that prepares on the fake GPU and gives its steps. The first step may fill tables and
the optimizer's state; the others may not wait. To add a path, give its function a row there.
"""

import contextlib
import types
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_vae
from fake_cuda import CUDA, Waits, assert_on, fake_cuda, no_waiting, real
from torch._subclasses.fake_tensor import DynamicOutputShapeException

import train_prior
from diffusion import samplers
from diffusion.masked import MaskedDiffusion
from diffusion.process_table import PROCESSES, create_process
from dlc.data.images import to_uint8
from dlc.machine.processes import autocast
from dlc.nets.encoder import SEMEncoder, tokens
from dlc.nets.pixels import PixelEncoder
from dlc.nets.vae import decode
from dlc.sampling.latents import Guide, create_sampler, fuse_gelu, lower_precision, sample_latents
from dlc.sampling.prior_draw import sample_codes
from dlc.training.alignment import ALIGNMENTS, Alignment
from dlc.training.heldout import heldout_bounds
from dlc.training.run import Run
from dlc.training.run_flags import warmup
from evaluation import distances
from evaluation import feature_networks as networks
from evaluation import similarity as similarities
from evaluation.feature_networks import DINOv2Network, InceptionNetwork
from evaluation.inception import InceptionV3
from evaluation.metrics import FeatureStatistics, density_coverage, kernel_distance, precision_recall, squared_radii
from evaluation.similarity import psnr, ssim
from models import DiT, DiTCONT, DiTSEM
from prior import DLCPrior
from train_diffusion import argument_parser, build_optimizer, losses_of

N, L, V = 4, 3, 5
SIZES = dict(input_size=8, patch_size=4, hidden_size=24, depth=1, num_heads=2)
PER_CHANNEL = dict(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0])
FAMILIES = {  # a class, its arguments, and n conditions for it
    "DiTSEM": (DiTSEM, dict(L=L, V=V), lambda n: torch.randint(V, (n, L), dtype=torch.uint8)),
    "DiT": (DiT, dict(num_classes=7), lambda n: torch.randint(7, (n,))),
    "DiTCONT": (DiTCONT, dict(in_dim=6), lambda n: torch.randn(n, 6).half()),
}
HEAD = dict(depth=2, intermediate_head=1)


def build(family, **more):
    model, arguments, conditions = FAMILIES[family]
    return real(model, **{**SIZES, **arguments, **more}), conditions


class Launched:
    """accelerate's Accelerator, as far as a `Run` uses it in a step, of a process that may be on the fake GPU."""

    def __init__(self, precision, device):
        real(Accelerator, cpu=True)  # the state that accelerate's optimizer looks at
        self.precision, self.device = precision, device
        self.scaler = torch.amp.GradScaler("cuda") if precision == "fp16" else None

    def autocast(self):
        return autocast(self.device, self.precision)

    def no_sync(self, model):
        return contextlib.nullcontext()

    def prepare_model(self, model, **_):
        def call(*args, **kwargs):
            with self.autocast():
                return model(*args, **kwargs)

        return call

    def backward(self, loss):
        (self.scaler.scale(loss) if self.scaler else loss).backward()


def launched_run(model, parser, precision, flags, device, alignment=None):
    """A `Run` without launcher and folder, of that model."""
    run = Run.__new__(Run)
    run.parser, run.args = parser, parser.parse_args(["--log-every", "100", *flags])
    run.state, run.device = types.SimpleNamespace(is_main_process=False, num_processes=1), device
    run.accelerator, run.compiled, run.sharded = Launched(precision, device), run.args.compile, False
    run.resumed, run.first_step, run.skipped, run.ema_start, run.checkpoints = None, 0, 0, 1.0, (100, 100)
    run.ema_images, run.batches = 0, types.SimpleNamespace(first_of=lambda step: step * N)
    run.micro_batch_size, run.last_step, run.postponed = N // run.args.grad_accum, 100, False
    run.stop_request, run.bar = types.SimpleNamespace(agreed=lambda: None), types.SimpleNamespace(update=lambda: None)
    run.folder, run.config = Path("nowhere"), types.SimpleNamespace(built=model.config)
    run.adopt(model)
    if alignment:
        projector = real(ALIGNMENTS[alignment.kind].projector, model.pos_embed.shape[2], alignment.shape[1])
        alignment.projector, alignment.project = run.adopt_beside("projector", projector)
    run.optimize(build_optimizer(run.args, model, alignment and alignment.projector), warmup)
    return run


def steps_of(run, batch, losses_of_a_part, num_timesteps, steps):
    """The loop of a trainer, step by step; losses_of_a_part(indices, x, y, …) gives losses by name and times.

    batch() gives what that function takes, of a whole batch.
    """

    def step(number):
        for part in run.micro_batches(dict(zip("ixyz", batch()))):
            terms, t = losses_of_a_part(*part.values())
            run.backward(terms, t, num_timesteps)
        run.update(number)
        run.report(number)
        state = [list(values.values()) for one in run.optimizers for values in one.state.values()]
        assert_on(run.device, terms, t, run.losses.values, run.skips.counts, run.weights, run.averages, state)
        if run.args.grad_clip:
            assert_on(run.device, run.grad_norm)

    yield from (partial(step, number) for number in range(1, steps + 1))


def training(family, precision, *flags, moments=False, device=CUDA, steps=2, process="gaussian", align=None, **more):
    """Steps of train_diffusion.py."""
    process = create_process(process)
    model, conditions = build(family, **process.model_arguments, **more)
    head = "intermediate_head" in more
    alignment = align and Alignment(align, 1, 0.5, None, (16, 5), None)  # of another grid than the model's
    run = launched_run(model.to(device), argument_parser(), precision, flags, device, alignment)
    settings = dict(seed=0, dropout=model.class_dropout_prob, draw_latents=moments, head=head, alignment=alignment)

    def batch():
        targets = (torch.randn(N, 16, 5).half(),) if align else ()
        return torch.arange(N), torch.randn(N, 8 if moments else 4, 8, 8).half(), conditions(N), *targets

    def losses_of_a_part(i, x, y, z=None):
        return losses_of(run.model, process, i, x, y, targets=z, **settings)

    return steps_of(run, batch, losses_of_a_part, process.num_timesteps, steps)


def prior_training(classes, shared, precision, *flags, entropy=False, device=CUDA, steps=2, depth=1):
    """Steps of train_prior.py."""
    sizes = dict(hidden_size=16, depth=depth, num_heads=2, num_classes=classes, shared_embedding=shared)
    model = real(DLCPrior, L, V, scale_by_sigma=entropy, **sizes).to(device)
    run = launched_run(model, train_prior.argument_parser(), precision, flags, device)
    diffusion = MaskedDiffusion(V, masking="counted", time_conditioning=entropy, score_entropy=entropy)

    def losses(indices, x, y):
        y = y if classes else None
        return train_prior.losses_of(run.model, diffusion, indices, x, y, seed=0, label_dropout=0.1)

    batch = lambda: (torch.arange(N), torch.randint(V, (N, L)), torch.randint(classes or 1, (N,)))  # noqa: E731
    return steps_of(run, batch, losses, 1, steps)


def sampling(family, precision, name, scale, bounds, guide_scale=1, process="gaussian", **more):
    """Each step of the sampler: its model's calls, guidance by the null condition, and by a weaker model or a head."""
    (model, conditions), (weak, _) = (build(family, **more) for _ in range(2))
    create = partial(real, create_sampler) if process == "flow" else create_sampler  # whose times are read as numbers
    sampler = create(name, 5, create_process(process))
    for one in (model, weak):
        lower_precision(one.eval(), precision)
        one.to(CUDA)
        fuse_gelu(one)

    def draw(guard):
        def on_step(step, x, x_start):
            assert_on(CUDA, x, x_start)
            guard.__exit__(None, None, None) if step == sampler.num_steps - 1 else step or guard.__enter__()

        guide = Guide(None if more else weak, guide_scale, *bounds)
        where = dict(indices=torch.arange(N, device=CUDA), seed=0, on_step=on_step)
        how = dict(cfg_scale=scale, t_min=bounds[0], t_max=bounds[1], guide=guide)
        with autocast(CUDA, precision):
            latents = sample_latents(model, sampler, y=conditions(N).to(CUDA), **where, **how)
        assert latents.shape == (N, 4, 8, 8) and latents.dtype == torch.float32
        assert_on(CUDA, latents)

    yield lambda: draw(no_waiting())


def tiny_prior(classes):
    return real(DLCPrior, L, V, 16, 1, 2, shared_embedding=classes is None, num_classes=classes).eval().to(CUDA)


def drawing_codes(name, classes, *reads, copies=0):
    """Each call of a prior's network by the sampler. Before the first, the CPU may wait for `reads` and `copies`.

    The last number that it reads is how many calls there are.
    """
    model, sampler, calls = tiny_prior(classes), create_sampler(name, 6, create_process("masked", V=V)), []

    def draw(guard):
        def on_call(codes):
            assert_on(CUDA, codes)
            calls.append(codes)
            guard.__enter__() if len(calls) == 1 else len(calls) < reads[-1] or guard.__exit__(None, None, None)

        given, y = torch.randint(V + 1, (N, L), device=CUDA), torch.zeros(N, dtype=torch.int64, device=CUDA)
        choices = dict(codes=given, y=y, cfg_scale=2.0, precision="bf16") if classes else {}
        indices, diffusion = torch.arange(N, device=CUDA), MaskedDiffusion(V)
        with no_waiting(*reads, copies=copies):
            codes = sample_codes(model, diffusion, sampler, seed=0, indices=indices, on_call=on_call, **choices)
        assert codes.shape == (N, L) and codes.dtype == torch.int64 and len(calls) == reads[-1]
        assert_on(CUDA, codes)

    yield lambda: draw(no_waiting())


def bound(classes):
    """The bound on codes that are held out."""
    model, diffusion, indices = tiny_prior(classes), MaskedDiffusion(V), torch.arange(N, device=CUDA)

    def step():
        codes = torch.randint(V, (N, L), device=CUDA)
        with autocast(CUDA, "bf16"):
            assert_on(CUDA, heldout_bounds(model, diffusion, codes, indices, 2, dict(y=indices) if classes else None))

    yield from [step] * 2


def extraction(precision, **vae):
    """Networks that are moved to the GPU as extraction moves them, on crops and views that are still on the CPU; and
    what the decoder's thread does before it takes the pixels to the CPU."""
    sizes = dict(embed_dim=24, depth=1, num_heads=2, reg_tokens=2)
    encoder = real(SEMEncoder, "vit_tiny_patch16_224", 32, L, V, backbone_args=sizes).eval()
    vae = real(tiny_vae, **vae)
    encode = PixelEncoder(vae, encoder, CUDA, precision)

    def step():
        crops, views = (torch.randint(255, (N, size, size, 3), dtype=torch.uint8) for size in (16, 32))
        assert_on(CUDA, encode.moments(crops.unsqueeze(1), 3), encode.codes(views, 3), encode(crops, views))
        assert_on(CUDA, encode.patch_tokens(views))
        with torch.inference_mode(), autocast(CUDA, precision):
            assert_on(CUDA, to_uint8(decode(vae, torch.randn(N, 4, 8, 8, device=CUDA)).float()))

    yield from [step] * 2


def evaluation():
    """Networks, on images as they are decoded or as Pillow has resized them, and what is computed of their features."""
    inception, dinov2 = (kind.__new__(kind) for kind in (InceptionNetwork, DINOv2Network))
    sizes = dict(embed_dim=24, depth=1, num_heads=2, reg_tokens=2)
    encoder = real(SEMEncoder, "vit_tiny_patch16_224", 32, L, V, backbone_args=sizes).eval().to(CUDA)
    inception.module, dinov2.module = InceptionV3().to(CUDA), encoder.backbone
    inception.device = dinov2.device = CUDA
    statistics = FeatureStatistics(24 * 3)

    def step():
        images = torch.randint(255, (N, 32, 32, 3), dtype=torch.uint8)
        with mock.patch.object(networks, "preprocess", lambda images: torch.randn(N, 3, 32, 32)):
            assert_on(CUDA, dinov2(images))
        images = images.to(CUDA, non_blocking=True)
        prefix = encoder.prefix_tokens(images)
        statistics.update(prefix)
        assert_on(CUDA, prefix, tokens(encoder.encode_pixels(images)), psnr(images, images), ssim(images, images))

    with no_waiting():  # it has no tables to fill
        found = inception(torch.randint(255, (N, 20, 20, 3), dtype=torch.uint8))
        assert_on(CUDA, found, squared_radii(found["pool"], 2, half=False))
    yield from [step] * 2


ALL_OPTIONS = ("--grad-accum", "2", "--grad-clip", "1", "--ema-warmup", "--checkpoint-activations")
PATHS = {
    "training in bf16, all options": partial(training, "DiTSEM", "bf16", *ALL_OPTIONS, moments=True),
    "training in fp16": partial(training, "DiT", "fp16", *ALL_OPTIONS[:4], "--ema-lengths", "0.05", "0.1"),
    "training on flow matching": partial(training, "DiTCONT", "bf16", moments=True, process="flow"),
    "training with REPA in fp16": partial(training, "DiTSEM", "fp16", "--grad-clip", "1", align="repa", **HEAD),
    "training with iREPA in bf16": partial(training, "DiTSEM", "bf16", align="irepa", depth=2),
    **{
        f"sampling {process} by {name}": partial(sampling, "DiTSEM", "fp32", name, 1.5, (0, 999), 1, process)
        for process, row in PROCESSES.items()
        for name in row.samplers
        if row.objective
    },
    "sampling in an interval": partial(sampling, "DiT", "bf16", "ddpm", 4, (250, 749)),
    "sampling guided by a head": partial(sampling, "DiTSEM", "bf16", "ddpm", 1.5, (250, 749), 2, **HEAD),
    "sampling guided by a weaker model": partial(sampling, "DiTSEM", "bf16", "heun", 1, (0.2, 0.7), 2, process="flow"),
    "sampling without guidance": partial(sampling, "DiTCONT", "fp16", "ddpm", 1, (0, 999)),
    "extraction and decoding": partial(extraction, "bf16", **PER_CHANNEL),
    "training a prior in bf16": partial(prior_training, None, True, "bf16"),
    "training a prior with classes in fp16": partial(
        prior_training, 7, False, "fp16", *("--warmup-steps", "9", "--grad-accum", "2"), entropy=True
    ),
    "drawing codes by first-hitting": partial(drawing_codes, "first-hitting", None, 3),
    "drawing codes by analytic steps": partial(drawing_codes, "analytic", None, 3, copies=3),
    # the corrector's first round masks some again, and its second none
    "drawing codes by the corrector, guided": partial(drawing_codes, "corrector", 7, True, False, 5, copies=3),
    "drawing codes by confidence, guided": partial(drawing_codes, "confidence", 7, 3),
    "the bound of a prior with classes": partial(bound, 7),
    "evaluation": evaluation,
}


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=[pytest.mark.slow] if "all options" in path else []) for path in PATHS]
)
def test_path(path, monkeypatch):
    for module, tables in ((samplers, "noise_levels"), (similarities, "window")):
        monkeypatch.setattr(module, tables, partial(real, getattr(module, tables)))
    with fake_cuda(monkeypatch):
        for number, step in enumerate(PATHS[path]()):
            with no_waiting() if number else contextlib.nullcontext():
                step()


def statistics_of(*batches):
    statistics = FeatureStatistics(batches[0].shape[1])
    for batch in batches:
        statistics.update(batch)
    return statistics


METRICS = {  # of two sets of features on the GPU; the numbers that the CPU reads for each; and the copies
    # whether each set is finite, and then the results
    "precision and recall": (partial(precision_recall, k=2, precision="float32"), (True, True, 0.5, 0.5), 0),
    # of each block of 10,000 rows also whether float16 holds both sets and the distances
    "precision and recall in float16": (partial(precision_recall, k=2), (*[True] * 11, 0.5, 0.5), 0),
    "density and coverage": (partial(density_coverage, k=2), (True, True, 3, 0.5), 0),
    "kernel distance": (partial(kernel_distance, subsets=5, subset_size=2), (True, True, 0.1, 0.2), 1),
    # whether a large batch is finite; the mean, and the products of centred rows
    "statistics": (lambda a, b: statistics_of(a, b).covariance, (True,), 2),
}


@pytest.mark.parametrize("metric", METRICS)
def test_metric(metric, monkeypatch):
    """The CPU waits for the results and for what it has to decide, and for no tile, subset or batch."""
    measure, reads, copies = METRICS[metric]
    monkeypatch.setattr(distances, "TILE", 2)
    with fake_cuda(monkeypatch):
        sets = torch.randn(2, 5, 6, device=CUDA)
        with no_waiting(*reads, copies=copies):
            measure(*sets)


def test_a_step_that_waits_is_seen(monkeypatch):
    with fake_cuda(monkeypatch), no_waiting():
        x = torch.arange(6, device=CUDA)
        assert_on(CUDA, x + 1, x * torch.ones(()), torch.ones(2).to(CUDA, non_blocking=True))
        copies = (x.cpu, lambda: torch.ones(2).to(CUDA), lambda: torch.tensor([1], device=CUDA))
        for wait in (*copies, x[0].item, x.tolist, x.nonzero, lambda: bool(x[0]), lambda: x[x > 2]):
            with pytest.raises((Waits, DynamicOutputShapeException)):
                wait()
        with pytest.raises(RuntimeError, match="on the same device"):
            x + torch.ones(6)
