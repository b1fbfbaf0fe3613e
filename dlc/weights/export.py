"""Weights out: `.safetensors` with a config.json, or a pipeline folder of diffusers. Whole or not at all.

    python -m dlc.checkpoints export results/checkpoints/0400000 OUT --format diffusers

--format safetensors writes model.safetensors and config.json, which --ckpt reads back. diffusers writes a pipeline that
draws what our sampler draws for the same noise and DPM-Solver++ steps; it comes with a small file of code, because
diffusers' own DiT is another function than DiT. diffusers-stock writes one without code, and says how far off it is.
Beside each lies a model card, README.md.
"""

import os
import shutil
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch

from diffusion.samplers import DPMSolver
from dlc.data.images import to_uint8
from dlc.machine.cli import progress
from dlc.machine.files import sync, write_json
from dlc.machine.noise import Stream, normal
from dlc.nets.vae import decode, same_vae
from dlc.weights.card import model_card
from dlc.weights.foreign.diffusers_dit import DiffusersTimestepEmbedder, to_diffusers, uses_diffusers_function
from dlc.weights.load import describe, load_model, process_of
from dlc.weights.meta import ModelConfig, RunMeta, config_of
from dlc.weights.networks import load_vae
from models import DiT, DiTSEM

FORMATS = ("safetensors", "diffusers", "diffusers-stock")
SHIPPED = Path(__file__).parent / "shipped"
WEIGHTS = "diffusion_pytorch_model.safetensors"
NULL_LABEL = 1000  # of diffusers' DiTPipeline, whatever the number of classes
# DPMSolverMultistepScheduler's, with which it takes the steps of --sampler dpmsolver++
SCHEDULER = dict(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", algorithm_type="dpmsolver++", solver_order=2)
MEASURED_STEPS, MEASURED_SAMPLES, MEASURED_GUIDANCE = 10, 2, 1.5


@dataclass
class Export:
    """What is written."""

    model: torch.nn.Module
    name: str  # of the model
    meta: RunMeta
    source: str  # the checkpoint, as it was named
    format: str
    license: str
    vae: torch.nn.Module | None = None
    vae_name: str | None = None


def export(args) -> list[str]:
    """Write args.out, and say what it is. Raises ValueError or OSError for a user's mistake, writing nothing then."""
    out = Path(args.out)
    if os.path.lexists(out):
        raise ValueError(f"{out} exists: give a path that does not")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"{out.absolute().parent}, the folder to write {out.name} in, does not exist")
    model, name, meta = load_model(args.checkpoint, args.ema, diffusers_time=args.diffusers_time)
    ours = meta.missing() is None
    job = Export(model, name, meta, args.checkpoint, args.format, args.license or ("mit" if ours else "unknown"))
    if args.format != "safetensors":
        add_vae(job, args.vae)
    elif args.vae:
        raise ValueError("--vae goes with the formats of diffusers: .safetensors hold the model alone")
    measured = [off_by(job)] if args.format == "diffusers-stock" else []
    write_folder(out, lambda folder: write(folder, job))
    return [f"{out}: {name} ({describe(meta)}) as {args.format}, licence {job.license}", *measured]


def add_vae(job: Export, name: str | None) -> None:
    """Load the VAE of a pipeline. Raises ValueError where diffusers' classes cannot draw what the model draws."""
    if type(job.model) not in (DiT, DiTSEM) or (job.format == "diffusers-stock" and type(job.model) is not DiT):
        raise ValueError(
            f"--format {job.format} is for DiT{'' if job.format == 'diffusers-stock' else ' and DiTSEM'}: "
            f"{job.source} is a {type(job.model).__name__}"
        )
    if type(job.model) is DiTSEM and uses_diffusers_function(job.model):
        raise ValueError(f"{job.source} computes as diffusers does, and a DiTSEM's pipeline as DiT: export safetensors")
    width = job.model.pos_embed.shape[2]
    if type(job.model) is DiT and job.model.blocks[0].mlp.fc1.out_features != 4 * width:
        raise ValueError(f"{job.source} has an MLP that is not 4 times as wide as the rest, as diffusers' always is")
    job.vae_name = name or job.meta.vae or "ema"
    job.vae = load_vae(job.vae_name)
    same_vae(job.vae, job.vae_name, name is not None, job.model.in_channels, vars(job.meta), "the checkpoint's latents")
    if type(job.model) is DiT:
        classes = job.model.condition_embedder.num_classes
        if classes > NULL_LABEL:
            raise ValueError(f"{job.source} has {classes} classes: diffusers' DiTPipeline takes at most {NULL_LABEL}")
        if any(job.vae.config.get(key) for key in ("shift_factor", "latents_mean", "latents_std")):
            raise ValueError(f"--vae {job.vae_name} shifts its latents, which diffusers' DiTPipeline does not undo")


#################################################################################
#                                    Writing                                    #
#################################################################################


def write_folder(out: Path, write) -> None:
    """Let write(folder) fill a temporary folder beside out, then rename it to out."""
    temporary = out.absolute().with_name(f".{out.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir()
    try:
        write(temporary)
        for path in temporary.rglob("*"):
            sync(path)
        if os.path.lexists(out):
            raise ValueError(f"{out} exists by now: give a path that does not")
        os.replace(temporary, out)
        sync(out.absolute().parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, (OSError, RuntimeError, safetensors.SafetensorError)):
            raise OSError(f"cannot write {out} ({error})") from error
        raise


def write(folder: Path, job: Export) -> None:
    """The files of a format, and the model card."""
    if job.format == "safetensors":
        save(job.model.state_dict(), folder / "model.safetensors")
        config, meta = own_records(job)
        write_json(folder / "config.json", config.to_json())
        write_json(folder / "meta.json", meta.to_json())
    else:
        write_pipeline(folder, job)
    (folder / "README.md").write_text(model_card(job), encoding="utf-8")


def save(weights: dict, path: Path) -> None:
    safetensors.torch.save_file(
        {name: value.contiguous() for name, value in weights.items()}, path, metadata={"format": "pt"}
    )


def sizes(model) -> dict:
    """The arguments of a model's constructor that its tensors and heads tell, but for its condition's."""
    return dict(
        input_size=model.x_embedder.img_size[0],
        patch_size=model.patch_size,
        in_channels=model.in_channels,
        hidden_size=model.pos_embed.shape[2],
        depth=len(model.blocks),
        num_heads=model.blocks[0].attn.num_heads,
        mlp_ratio=model.blocks[0].mlp.fc1.out_features / model.pos_embed.shape[2],
        learn_sigma=model.out_channels > model.in_channels,
    )


def condition_sizes(model) -> dict:
    """The sizes of a model's condition: num_classes, L and V, or in_dim."""
    return model.sizes_of(model.state_dict()[model.table].shape)


def trained_with(model) -> str:
    """Whose time frequencies and eps a model computes with, as --diffusers-time names them."""
    return "diffusers" if uses_diffusers_function(model) else "dit"


def own_records(job: Export) -> tuple[ModelConfig, RunMeta]:
    """config.json and meta.json of --format safetensors, which --ckpt reads back."""
    noted = dict(job.meta.noted, weights=job.meta.weights)
    if uses_diffusers_function(job.model):
        noted |= dict(trained_with="diffusers", norm_eps=job.model.blocks[0].norm2.eps)
    return config_of(job.name, job.model, process_of(job.meta)), replace(job.meta, noted=noted)


#################################################################################
#                              Pipelines of diffusers                           #
#################################################################################


def write_pipeline(folder: Path, job: Export) -> None:
    """transformer/, vae/, scheduler/, model_index.json, and the code that the exact ones need."""
    import diffusers

    transformer = folder / "transformer"
    transformer.mkdir()
    parts = {"vae": ["diffusers", type(job.vae).__name__], "scheduler": ["diffusers", "DPMSolverMultistepScheduler"]}
    if type(job.model) is DiTSEM:
        save(job.model.state_dict(), transformer / WEIGHTS)
        config = dict(_class_name="DLCDiTTransformer", **sizes(job.model), **condition_sizes(job.model))
        shutil.copy(SHIPPED / "transformer_dlc.py", transformer)
        shutil.copy(SHIPPED / "pipeline_dlc.py", folder)
        index = dict(_class_name=["pipeline_dlc", "DLCDiTPipeline"])
        parts["transformer"] = ["transformer_dlc", "DLCDiTTransformer"]
    else:
        save(to_diffusers(padded(job.model)), transformer / WEIGHTS)
        # weights that were trained in diffusers are right by its own class
        exact = job.format == "diffusers" and not uses_diffusers_function(job.model)
        config = diffusers_config(job.model, "DiTTransformer" if exact else "DiTTransformer2DModel")
        index = dict(_class_name="DiTPipeline")
        parts["transformer"] = (
            ["transformer_dit", "DiTTransformer"] if exact else ["diffusers", "DiTTransformer2DModel"]
        )
        if exact:
            shutil.copy(SHIPPED / "transformer_dit.py", transformer)
    write_json(transformer / "config.json", dict(config, _diffusers_version=diffusers.__version__))
    job.vae.save_pretrained(folder / "vae")
    diffusers.DPMSolverMultistepScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    write_json(folder / "model_index.json", dict(index, _diffusers_version=diffusers.__version__, **parts))


def padded(model) -> dict:
    """A DiT's state dict whose table has rows up to the null label of DiTPipeline; those between are null as well."""
    weights = dict(model.state_dict())
    table = weights["y_embedder.embedding_table.weight"]
    weights["y_embedder.embedding_table.weight"] = torch.cat(
        [table, table[-1:].expand(NULL_LABEL + 1 - len(table), -1)]
    )
    return weights


def diffusers_config(model, class_name: str) -> dict:
    """transformer/config.json for diffusers' DiT. Keys with an underscore are ours; diffusers ignores them."""
    own, width = sizes(model), model.pos_embed.shape[2]
    return dict(
        _class_name=class_name,
        _num_classes=model.condition_embedder.num_classes,
        _trained_with=trained_with(model),
        activation_fn="gelu-approximate",
        attention_bias=True,
        attention_head_dim=width // own["num_heads"],
        dropout=0.0,
        in_channels=model.in_channels,
        norm_elementwise_affine=False,
        norm_eps=model.blocks[0].norm2.eps,
        norm_type="ada_norm_zero",
        num_attention_heads=own["num_heads"],
        num_embeds_ada_norm=NULL_LABEL,
        num_layers=own["depth"],
        out_channels=model.out_channels,
        patch_size=model.patch_size,
        sample_size=own["input_size"],
        upcast_attention=False,
    )


#################################################################################
#                          How far the stock class is off                       #
#################################################################################


@torch.inference_mode()
def off_by(job: Export) -> str:
    """One line that says how far diffusers' own class is from the model, measured on samples of the model itself."""
    model = job.model
    if uses_diffusers_function(model):
        return "diffusers' own class computes this model exactly: it was trained there"
    latents = (model.in_channels, *model.x_embedder.img_size)
    labels = torch.arange(MEASURED_SAMPLES) % model.condition_embedder.num_classes
    y = torch.cat([labels, model.null_condition(MEASURED_SAMPLES)])
    start = normal(0, Stream.SAMPLE_NOISE, torch.arange(MEASURED_SAMPLES), latents)
    ours, theirs = model.t_embedder, DiffusersTimestepEmbedder(model.pos_embed.shape[2])
    theirs.mlp = ours.mlp

    def predict(x, time, embedder):
        model.t_embedder = embedder
        t = torch.full((2 * MEASURED_SAMPLES,), float(time))
        return model.forward_with_cfg(torch.cat([x, x]), t, y, MEASURED_GUIDANCE, channels=model.in_channels)[
            :MEASURED_SAMPLES, : model.in_channels
        ]

    apart = []

    def compared(x, time):
        eps = predict(x, time, ours)
        apart.append(float((predict(x, time, theirs) - eps).norm() / eps.norm().clamp(min=1e-20)))
        return eps

    def drawn(predict):
        last = start
        for x, _ in DPMSolver(MEASURED_STEPS)(predict, start, None):
            last = x
            bar.update(1)
        return last

    with progress(total=2 * MEASURED_STEPS, desc="measuring diffusers' own class", unit="steps", delay=2) as bar:
        exact, stock = drawn(compared), drawn(lambda x, time: predict(x, time, theirs))
    model.t_embedder = ours
    exact, stock = (to_uint8(decode(job.vae, x).float()).int() for x in (exact, stock))
    levels = (exact - stock).abs().float()
    return (
        f"diffusers' own class is off by {min(apart):.1%} to {max(apart):.1%} of the predicted noise, and by "
        f"{levels.mean():.2f} grey levels of 255 on average, {levels.max():.0f} at most ({MEASURED_SAMPLES} samples, "
        f"{MEASURED_STEPS} steps of DPM-Solver++, guidance {MEASURED_GUIDANCE}): --format diffusers is exact"
    )
