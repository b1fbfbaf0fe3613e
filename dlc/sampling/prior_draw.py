"""Codes drawn from a prior: the engine, and what sample_prior.py and `sample_ddp_computed_dlc.py --prior` share.

The code of sample i is a function of (seed, i) and the settings. The network is run on batches of one size that are cut
by index, so neither the number of processes, nor which codes are missing, nor how many are wanted changes a code.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from diffusion.masked import MaskedDiffusion
from dlc.data.codes import SHARD, CodeSpec, compare
from dlc.machine.cli import BAR, progress
from dlc.machine.files import recorded_id
from dlc.machine.noise import Stream, uniforms
from dlc.machine.processes import autocast, compile_blocks, same_kernels, set_numerics, wait_for_all
from dlc.nets.digest import weights_sha256
from dlc.sampling.code_folder import CodeFolder, CodesRecord
from dlc.sampling.latents import check_conditions, create_sampler
from dlc.sampling.prior_options import Given, PriorOptions, class_number
from dlc.sampling.samples_record import weights_of
from dlc.weights.load import load_prior, newest_in, process_of, warn_of_young_ema
from dlc.weights.meta import damage, is_prior, newest_of_run, only_run, run_checkpoints
from prior import DLCPrior

if TYPE_CHECKING:
    from accelerate import PartialState
    from tqdm import tqdm

BATCH = 64  # codes per batch; divides code_folder.SHARD


def newest_prior(results_dir: str | Path, use_ema: bool = True) -> Path:
    """The weights to draw codes with from the one run of train_prior.py that is results_dir, or a folder of it: those
    of the run's lowest held-out bound, best/, if they were kept, else its newest checkpoint.

    Raises NoCheckpoint if there is none; ValueError if there are several, see `only_run`.
    """
    return best_of_run(only_run(results_dir, is_prior, "prior", "train_prior.py"), files_of(use_ema))


def resolved(path: str | Path, use_ema: bool = True) -> str | Path:
    """The same for the path of a prior that a user names; it may also be one of weights, which stays as it is."""
    return newest_in(path, files_of(use_ema), best_of_run, is_prior, "prior")


def files_of(use_ema: bool) -> tuple[str, str]:
    """The files of a checkpoint without which it draws no codes."""
    return "meta.json", "ema.safetensors" if use_ema else "model.safetensors"


def best_of_run(run: Path, files: Sequence[str]) -> Path | None:
    whole = [path for path in run_checkpoints(run, "best") if not damage(path, files)]
    return whole[-1] if whole else newest_of_run(run, files)


@torch.inference_mode()
def sample_codes(
    model: DLCPrior,
    diffusion: MaskedDiffusion,
    sampler: Callable,
    *,
    seed: int,
    indices: torch.Tensor,
    y: torch.Tensor | None = None,
    cfg_scale: float = 1.0,
    guide: tuple[DLCPrior, MaskedDiffusion, float] | None = None,
    codes: torch.Tensor | None = None,
    precision: str = "fp32",
    on_call: Callable | None = None,
) -> torch.Tensor:
    """Draw codes, (N, L) int64 in 0..V-1.

    Args:
        model, diffusion: in eval mode, and the process that it was trained on, which says what it is told of the time.
        sampler: of diffusion/masked_samplers.py, see `create_sampler`.
        seed, indices: a code's random numbers are functions of (seed, its index); (N,) int64 on the model's device.
        y: (N,) classes, if the prior has classes [none].
        cfg_scale: guidance by class (Ho & Salimans 2022) in log probabilities; at 1 the null half is not computed.
        guide: a weaker prior, its process, and a scale W: log p_weak + W (log p - log p_weak), both for the same y, in
            the place of guidance by class.
        codes: (N, L) tokens to keep, and V where tokens are to be drawn [V everywhere].
        precision: of the blocks, "fp32", "bf16" or "fp16"; scores are always float32, and draws float64.
        on_call: called after each call of the model with the codes so far, where V is left to draw.
    """
    if y is not None:
        check_conditions(y, model.null_condition(1))
    if codes is None:
        codes = torch.full((len(indices), model.L), model.V, device=indices.device)

    def logits(codes, sigma, y, model=model):
        with autocast(codes.device, precision):
            return model(codes, sigma, y)[..., : model.V]  # (N, L, V)

    def predict(codes, t):
        sigma = diffusion.told(t)
        if guide is not None and guide[2] != 1:
            weak, process, scale = guide
            weaker = logits(codes, process.told(t), y, weak)
            return weaker + scale * (logits(codes, sigma, y) - weaker)
        if y is None or cfg_scale == 1:
            return logits(codes, sigma, y)
        both = torch.cat([y, model.null_condition(len(y)).to(y)])
        conditional, null = logits(codes.repeat(2, 1), sigma.repeat(2), both).chunk(2)
        return null + cfg_scale * (conditional - null)

    drawn = codes
    for drawn in sampler(predict, codes, partial(uniforms, seed, Stream.SAMPLE_CODE, indices, model.L)):
        if on_call is not None:
            on_call(drawn)
    return drawn


class PriorDraw:
    """A prior, by a path as `load_prior` takes it, with all that decides its codes: draw(indices) gives them.

    Raises ValueError if it cannot be loaded, or for options that it does not have.
    """

    def __init__(self, path: str | Path, ema: bool, options: PriorOptions, seed: int, precision="fp32", tf32=True):
        self.seed, self.precision, self.tf32, self.path = seed, precision, tf32, resolved(path, ema)
        self.model, self.meta, self.spec = model, meta, spec = self.open(self.path, ema, "the prior")
        self.diffusion, classes = process_of(meta), options.classes
        draw = {name: getattr(options, name) for name in ("eta", "temperature", "top_p")}
        self.sampler = create_sampler(options.sampler, options.steps, self.diffusion, **draw)
        if classes:
            if model.num_classes is None:
                raise ValueError(f"--class: the prior {path} has no classes: train one with --class-conditional")
            if "all" in classes and len(classes) > 1:
                raise ValueError("--class all draws every class: leave the others out")
            every = range(model.num_classes)
            classes = [class_number(one, len(every)) for one in (every if classes == ["all"] else classes)]
        self.guide = self.given = None
        if options.guide_ckpt:  # the weaker prior, its process, and the scale
            named = resolved(options.guide_ckpt, ema)
            weak, known, theirs = self.open(named, ema, "the guide", "--guide-ckpt")
            compare(theirs, spec)
            if classes and weak.num_classes != model.num_classes:
                raise ValueError(
                    f"--guide-ckpt {named} has {weak.num_classes or 'no'} classes, the prior {path} "
                    f"{model.num_classes}: leave out --class"
                )
            self.guide = weak, process_of(known), options.guide_scale
        if options.given:
            self.given = Given(options, model.L, model.V, seed)
        steps, eta = self.sampler.steps or model.L, self.sampler.options.get("eta")
        self.options = replace(options, steps=steps, eta=eta, classes=classes)

    @staticmethod
    def open(path, ema, what, flag="--ckpt"):
        """A prior, its meta, and what its codes are."""
        model, meta = load_prior(path, ema, flag)
        warn_of_young_ema(path, meta)
        return model, meta, CodeSpec(owner=f"{what} {path}", L=model.L, V=model.V, encoder_sha256=meta.encoder_sha256)

    def record(self, num: int) -> CodesRecord:
        """The record in codes.json of `num` codes, without the launches that draw them."""
        options, classes = self.options, self.options.classes
        digests = dict(given=self.given and self.given.sha256, guide_ckpt=self.guide and weights_sha256(self.guide[0]))
        return CodesRecord(
            model=self.meta.model or "DLCPrior",
            **weights_of(self.path, self.model, self.meta),
            **{name: getattr(self.spec, name) for name in ("L", "V", "encoder_sha256")},
            options=asdict(options) | digests,
            given=options.given and recorded_id(options.given),
            guide=options.guide_ckpt and recorded_id(options.guide_ckpt),
            **dict(precision=self.precision, tf32=self.tf32, global_seed=self.seed),
            num=num,
            labels=classes and [classes[i % len(classes)] for i in range(num)],
            runs=[],
        )

    def to(self, device: torch.device, compiled: bool | None = None) -> "PriorDraw":
        """Get ready to draw on a device. compiled: whether the blocks are; None: on GPUs."""
        set_numerics(self.tf32)
        for model in (self.model, *(self.guide or ())[:1]):
            model.to(device)
            if compiled if compiled is not None else device.type == "cuda":
                compile_blocks(model, device, options=same_kernels())
        return self

    def draw(self, indices: np.ndarray, batch: int = BATCH, bar: "tqdm | None" = None) -> np.ndarray:
        """Codes (N, L) int64 of consecutive samples, which the bar counts; `to` a device first.

        batch: codes at once. How a network rounds depends on it, so that of very many codes some differ.
        """
        device, parts, classes = next(self.model.parameters()).device, [], self.options.classes
        begun, calls = bar.n if bar is not None else 0, self.sampler.most_calls(self.model.L)

        def on_call(_):
            if bar is not None:  # a large network takes minutes for a batch
                bar.update(min(batch / calls, begun + len(indices) - bar.n))

        for first in range(int(indices[0]) // batch * batch, int(indices[-1]) + 1, batch):
            own = torch.arange(first, first + batch)  # always whole, so that each sample keeps its place
            codes = sample_codes(
                self.model,
                self.diffusion,
                self.sampler,
                seed=self.seed,
                indices=own.to(device),
                y=torch.tensor(classes)[own % len(classes)].to(device) if classes else None,
                cfg_scale=self.options.cfg_scale,
                guide=self.guide,
                codes=None if self.given is None else self.given(own).to(device),
                precision=self.precision,
                on_call=on_call,
            )
            parts.append(codes.cpu().numpy()[np.isin(own.numpy(), indices)])
        if bar is not None:
            bar.update(begun + len(indices) - bar.n)
        return np.concatenate(parts)


def draw_into(
    folder: CodeFolder,
    missing: list[int],
    draw: PriorDraw,
    state: "PartialState",
    batch: int = BATCH,
    compiled: bool | None = None,
) -> None:
    """Draw the missing shards of a folder, by all processes. compiled: see `PriorDraw.to`."""
    draw.to(state.device, compiled)
    own = [folder.places(shard) for shard in missing[state.process_index :: state.num_processes]]
    share = f" (of {state.num_processes} processes, this one)" if state.num_processes > 1 else ""
    total, desc = sum(map(len, own)), f"drawing codes{share}"
    with progress(total=total, unit="code", desc=desc, delay=2, bar_format=BAR) as bar:
        for indices in own:
            folder.write(int(indices[0]) // SHARD, draw.draw(indices, batch, bar), draw.model.V)
    wait_for_all()
