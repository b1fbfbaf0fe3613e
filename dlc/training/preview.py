"""Pictures of how a model in training draws: a diffusion model, or a prior over codes."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from diffusion.masked import MaskedDiffusion
from diffusion.process_table import Process, samplers_of
from diffusion.samplers import Sampler
from dlc.data.codes import CodeSet, CodeSpec, compare
from dlc.data.images import image_grid, save_png, to_uint8
from dlc.nets.vae import check_decodes, decode
from dlc.sampling.latents import create_sampler, sample_latents
from dlc.sampling.prior_draw import sample_codes
from dlc.training.split import Split
from dlc.weights.load import load_model, process_of
from dlc.weights.networks import load_vae
from models import Condition
from prior import DLCPrior

PREVIEW_SAMPLES, PREVIEW_STEPS, PREVIEW_CFG = 8, 50, 1.5
PREVIEW_CALLS = 128  # of a prior, for each code, at most


def preview_sampler(process: Process) -> Sampler:
    """The first sampler of a process, with as many of PREVIEW_STEPS as it has. Raises ValueError if there is none."""
    most = [spec.most_steps for spec in samplers_of(process).values()]
    return create_sampler(None, min([PREVIEW_STEPS, *most[:1]]), process)


def save_picture(
    path: Path,
    model: torch.nn.Module,
    sampler: Sampler,
    y: Condition,
    vae: torch.nn.Module,
    seed: int,
    above: torch.Tensor,
    columns: int,
    rows: Sequence[str],
    captions: Sequence[str] = (),
    on_step: Callable | None = None,
) -> None:
    """Write a picture: latents `above` (k, C, h, w), decoded, and below them a model's samples for conditions y, from
    the same noise every time.

    columns, rows, captions: see `image_grid`. on_step: see `sample_latents`.
    """
    indices = torch.arange(len(tree_leaves(y)[0]), device=above.device)
    how = dict(y=y, seed=seed, indices=indices, cfg_scale=PREVIEW_CFG)
    samples = sample_latents(model, sampler, **how, on_step=on_step)
    with torch.inference_mode():
        parts = torch.cat([above, samples]).split(PREVIEW_SAMPLES)
        images = torch.cat([to_uint8(decode(vae, part)) for part in parts]).cpu().numpy()
    path.parent.mkdir(exist_ok=True)
    save_png(path, image_grid(images, columns, rows, captions=captions))


def save_preview(
    path: Path,
    ema: torch.nn.Module,
    process: Process,
    latents: torch.Tensor,
    y: Condition,
    vae: torch.nn.Module,
    seed: int,
    classes: Sequence[str] = (),
    on_step: Callable | None = None,
) -> None:
    """Write a picture of latents, and of the EMA's samples for their conditions y.

    classes: the names of labels y, which are written below.
    """
    sampler = preview_sampler(process)
    named = [classes[label] for label in y.tolist()] if classes and ema.conditioning == "labels" else []
    rows = ("training", f"samples, cfg {PREVIEW_CFG}")
    save_picture(path, ema, sampler, y, vae, seed, latents, len(latents), rows, [*named, *named], on_step)


class CodePreview:
    """Pictures of codes that a prior in training draws, made by a DiTSEM: under those of training codes.

    Args:
        checkpoint: the DiTSEM's.
        vae: as --vae takes it [the checkpoint's].
        split: the codes that the prior is trained on.

    Raises ValueError if there is no such model, if it was trained on other codes, or if its VAE cannot be loaded.
    """

    def __init__(self, checkpoint: str | Path, vae: str | None, split: Split, device: torch.device, seed: int):
        self.model, name, meta = load_model(checkpoint, flag="--preview-ckpt")
        if self.model.conditioning != "codes":
            raise ValueError(f"--preview-ckpt {checkpoint} is a {name}, which is not conditioned on codes")
        process = process_of(meta)
        fastest = min(samplers_of(process).items(), key=lambda item: item[1].default_steps, default=[None])[0]
        self.sampler = create_sampler(fastest, None, process)
        theirs, embedder = CodeSet.of_features(split.features), self.model.sem_embedder
        owner = f"--preview-ckpt {checkpoint}"
        compare(CodeSpec(owner=owner, L=embedder.L, V=embedder.V, encoder_sha256=meta.encoder_sha256), theirs)
        vae = vae or meta.vae or "ema"
        self.vae, self.seed = load_vae(vae, device), seed
        check_decodes(self.vae, vae, self.model.in_channels, vars(meta), f"the latents of {checkpoint}")
        self.model.to(device)
        self.none = torch.empty(0, self.model.in_channels, *self.model.x_embedder.img_size, device=device)
        shown = split.rows[np.linspace(0, len(split.rows) - 1, PREVIEW_SAMPLES).round().astype(int)]
        self.trained = torch.from_numpy(theirs.gather(shown)).to(device)  # rows often go class by class

    def save(self, path: Path, prior: DLCPrior, diffusion: MaskedDiffusion, go_on: Callable) -> None:
        """Write a picture: a row for training codes, two for codes that the prior draws, always from the same noise.

        go_on: called at each step, see `Run.go_on`.
        """
        drawing = create_sampler("first-hitting", min(prior.L, PREVIEW_CALLS), diffusion)
        indices = torch.arange(2 * PREVIEW_SAMPLES, device=self.none.device)
        drawn = sample_codes(prior, diffusion, drawing, seed=self.seed, indices=indices, on_call=go_on)
        y, rows = torch.cat([self.trained, drawn]), ("training codes", "the prior's codes", "the prior's codes")
        how = (self.sampler, y, self.vae, self.seed, self.none, PREVIEW_SAMPLES, rows)
        save_picture(path, self.model, *how, on_step=go_on)
