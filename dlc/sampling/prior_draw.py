"""Codes drawn from a prior, as sample_prior.py and `sample_ddp_computed_dlc.py --prior` draw them.

The code of sample i is a function of (seed, i) and the settings. The network is run on batches of one size that are cut
by index, so neither the number of processes, nor which codes are missing, nor how many are wanted changes a code.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from diffusion.masked_samplers import SAMPLERS, create_sampler
from dlc.data.codes import SHARD, CodeSpec, compare
from dlc.machine.cli import BAR, progress
from dlc.machine.files import recorded_id
from dlc.machine.processes import compile_blocks, same_kernels, set_numerics
from dlc.nets.digest import weights_sha256
from dlc.sampling.code_folder import CodeFolder, CodesRecord
from dlc.sampling.prior_engine import sample_codes
from dlc.sampling.prior_options import Given, PriorOptions
from dlc.weights.load import load_prior, newest_in, process_of, warn_of_young_ema
from dlc.weights.meta import RunMeta, damage, is_prior, newest_of_run, only_run, run_checkpoints
from prior import DLCPrior

if TYPE_CHECKING:
    from accelerate import PartialState

BATCH = 64  # codes per batch; divides code_folder.SHARD


def newest_prior(results_dir: str | Path, use_ema: bool = True) -> Path:
    """The weights to draw codes with from the one run of train_prior.py that is results_dir, or a folder of it: those
    of the run's lowest held-out bound, best/, if they were kept, else its newest checkpoint.

    Raises NoCheckpoint if there is none; ValueError if there are several, see `only_run`.
    """
    return best_of_run(only_run(results_dir, is_prior, "prior", "train_prior.py"), files_of(use_ema))


def files_of(use_ema: bool) -> tuple[str, str]:
    """The files of a checkpoint without which it draws no codes."""
    return "meta.json", "ema.safetensors" if use_ema else "model.safetensors"


def best_of_run(run: Path, files: Sequence[str]) -> Path | None:
    """The weights of a run's lowest held-out bound, best/, if they have the files, else its newest checkpoint."""
    whole = [path for path in run_checkpoints(run, "best") if not damage(path, files)]
    return whole[-1] if whole else newest_of_run(run, files)


def resolved(path: str | Path, use_ema: bool = True) -> str | Path:
    """The path of a prior that a user names: of a run, or a folder of one, the weights to draw with; else as it is."""
    return newest_in(path, files_of(use_ema), best_of_run, is_prior, "prior")


def spec_of(owner: str, prior: DLCPrior, meta: RunMeta) -> CodeSpec:
    return CodeSpec(owner=owner, L=prior.L, V=prior.V, encoder_sha256=meta.encoder_sha256)


class PriorDraw:
    """A prior, by a path as `load_prior` takes it, with all that decides its codes: draw(indices) gives them.

    Raises ValueError if it cannot be loaded, or for options that it does not have.
    """

    def __init__(
        self,
        path: str | Path,
        use_ema: bool,
        options: PriorOptions,
        *,
        seed: int,
        precision: str = "fp32",
        tf32: bool = True,
    ):
        path = resolved(path, use_ema)
        self.path, self.seed, self.precision, self.tf32 = path, seed, precision, tf32
        self.model, self.meta = model, meta = load_prior(path, use_ema)
        warn_of_young_ema(path, meta)
        self.spec = spec_of(f"the prior {path}", model, meta)
        self.diffusion, spec, classes = process_of(meta), SAMPLERS[options.sampler], options.classes
        steps = options.steps or spec.default_steps or model.L
        self.sampler = create_sampler(options.sampler, model.V, steps, options.eta, options.temperature, options.top_p)
        if classes:
            if model.num_classes is None:
                raise ValueError(f"--class: the prior {path} has no classes: train one with --class-conditional")
            if "all" in classes and len(classes) > 1:
                raise ValueError("--class all draws every class: leave the others out")
            classes = list(range(model.num_classes)) if "all" in classes else classes
            if max(classes) >= model.num_classes:
                raise ValueError(f"--class {max(classes)}: the prior's classes are 0 to {model.num_classes - 1}")
        self.guide = self._open_guide(options, path, use_ema) if options.guide_ckpt else None
        self.given = Given(options, model.L, model.V, seed) if options.given else None
        eta = (spec.default_eta if options.eta is None else options.eta) if spec.has_eta else None
        self.options = replace(options, steps=steps, eta=eta, classes=classes)

    def _open_guide(self, options, path, use_ema):
        """The weaker prior to guide by, its process, and the scale."""
        named = resolved(options.guide_ckpt, use_ema)
        weak, meta = load_prior(named, use_ema, "--guide-ckpt")
        compare(spec_of(f"the guide {named}", weak, meta), self.spec)
        if options.classes and weak.num_classes != self.model.num_classes:
            raise ValueError(
                f"--guide-ckpt {named} has {weak.num_classes or 'no'} classes, the prior {path} "
                f"{self.model.num_classes}: leave out --class"
            )
        return weak, process_of(meta), options.guide_scale

    def record(self, num: int) -> CodesRecord:
        """The record in codes.json of `num` codes, without the launches that draw them."""
        classes, own = self.options.classes, dict(precision=self.precision, tf32=self.tf32, global_seed=self.seed)
        digests = dict(given=self.given and self.given.sha256, guide_ckpt=self.guide and weights_sha256(self.guide[0]))
        return CodesRecord(
            model=self.meta.model or "DLCPrior",
            checkpoint=recorded_id(str(self.path)),
            weights_sha256=weights_sha256(self.model),
            step=self.meta.step,
            weights=self.meta.weights,
            L=self.model.L,
            V=self.model.V,
            encoder_sha256=self.meta.encoder_sha256,
            options={**asdict(self.options), **digests},
            given=self.options.given and recorded_id(self.options.given),
            guide=self.options.guide_ckpt and recorded_id(self.options.guide_ckpt),
            **own,
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

    def draw(self, indices: np.ndarray, batch: int = BATCH, on_call: Callable | None = None) -> np.ndarray:
        """Codes (N, L) int64 of consecutive samples; `to` a device first.

        Args:
            batch: codes at once. How a network rounds depends on it, so that of very many codes some differ.
            on_call: called after each call of the network, with the number of codes that it completed, a fraction.
        """
        device, parts, classes = next(self.model.parameters()).device, [], self.options.classes
        share = batch / self.sampler.most_calls(self.model.L)
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
                on_call=on_call and (lambda _: on_call(share)),
            )
            parts.append(codes.cpu().numpy()[np.isin(own.numpy(), indices)])
        return np.concatenate(parts)


def draw_into(
    folder: CodeFolder,
    missing: list[int],
    draw: PriorDraw,
    num: int,
    state: "PartialState",
    batch: int = BATCH,
    compiled: bool | None = None,
) -> None:
    """Draw this process's share of the missing shards of a folder of `num` codes. compiled: see `PriorDraw.to`."""
    draw.to(state.device, compiled)
    own, done = [folder.places(shard, num) for shard in missing[state.process_index :: state.num_processes]], 0
    share = f" (of {state.num_processes} processes, this one)" if state.num_processes > 1 else ""
    total = sum(map(len, own))
    with progress(total=total, unit="code", desc="drawing codes" + share, delay=2, bar_format=BAR) as bar:
        for indices in own:
            codes = draw.draw(indices, batch, lambda codes: bar.update(min(codes, total - bar.n)))
            folder.write(int(indices[0]) // SHARD, codes, draw.model.V)
            done += len(indices)
            bar.update(done - bar.n)
