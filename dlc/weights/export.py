"""Weights out: `.safetensors` with a config.json, or a pipeline folder of diffusers. Whole or not at all.

    python -m dlc.checkpoints export results/checkpoints/0400000 OUT --format diffusers

--format safetensors writes model.safetensors, config.json and meta.json of any model, which --ckpt reads back. --format
diffusers writes a pipeline of a published family that draws what our sampler draws for the same noise and steps: of
DPM-Solver++, or of Euler where the model was trained on a flow. It comes with small files of code, because diffusers'
own DiT is another function than DiT. Beside each lies a model card, README.md.
"""

import argparse
import importlib
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch

from diffusion.process_table import describe_process, samplers_of
from dlc.machine.files import write_folder, write_json
from dlc.nets.vae import same_vae
from dlc.weights.card import model_card
from dlc.weights.foreign.dits import to_diffusers, uses_diffusers_function
from dlc.weights.load import describe, load_model, process_of
from dlc.weights.meta import ModelConfig, RunMeta, config_of, run_checkpoints
from dlc.weights.networks import load_vae
from models import DiT, DiTSEM

FORMATS = ("safetensors", "diffusers")
SHIPPED = Path(__file__).parent / "shipped"
WEIGHTS = "diffusion_pytorch_model.safetensors"
NULL_LABEL = 1000  # of diffusers' DiTPipeline, whatever the number of classes
# The arguments that the classes of diffusers and of SHIPPED know, and of these what the shipped transformer takes.
SIZES = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "learn_sigma")
ARGUMENTS = {*SIZES, "mlp_ratio", "class_dropout_prob", "num_classes", "L", "V", "code_init", "intermediate_head"}


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
    sampler: str | None = None  # whose steps the pipeline takes


def export(args: argparse.Namespace) -> list[str]:
    """Write args.out, and say what it is. Raises ValueError or OSError for a user's mistake, writing nothing then."""
    out = Path(args.out)
    check_new(out)
    model, name, meta = load_model(args.checkpoint, args.ema, diffusers_time=args.diffusers_time)
    job = Export(model, name, meta, args.checkpoint, args.format, args.license or "unknown")
    if args.format != "safetensors":
        model.drop_head()  # which no class of diffusers knows
        add_vae(job, args.vae)
    elif args.vae:
        raise ValueError("--vae goes with the formats of diffusers: .safetensors hold the model alone")
    write_folder(out, lambda folder: write(folder, job))
    return [f"{out}: {name} ({describe(meta)}) as {args.format}, licence {job.license}"]


def check_new(out: Path) -> None:
    """Raise ValueError where a folder to write is there, has no folder to lie in, or would be read as a checkpoint."""
    parent = out.absolute().parent
    if os.path.lexists(out):
        raise ValueError(f"{out} exists: give another path")
    if not parent.is_dir():
        raise ValueError(f"{parent}, the folder to write {out.name} in, does not exist")
    if run_checkpoints(parent.parent, parent.name):
        raise ValueError(f"{out} would be read as a checkpoint of the run {parent.parent}: give a path elsewhere")


def add_vae(job: Export, name: str | None) -> None:
    """Load the VAE of a pipeline. Raises ValueError where diffusers' classes cannot draw what the model draws."""
    arguments = job.model.config["arguments"]
    others = [name for name, value in arguments.items() if name not in ARGUMENTS and value]
    if type(job.model) not in (DiT, DiTSEM) or others:
        raise ValueError(
            f"--format diffusers is for the published DiT and DiTSEM: {job.source} is a {type(job.model).__name__}"
            + (f" with the argument {others[0]}" if others else "")
            + ": export it as safetensors"
        )
    if type(job.model) is DiTSEM and uses_diffusers_function(job.model):
        raise ValueError(f"{job.source} computes as diffusers does, and a DiTSEM's pipeline as DiT: export safetensors")
    if type(job.model) is DiT and job.model.blocks[0].mlp.fc1.out_features != 4 * arguments["hidden_size"]:
        raise ValueError(f"{job.source} has an MLP that is not 4 times as wide as the rest, as diffusers' always is")
    process = process_of(job.meta)
    job.sampler = next((name for name, spec in samplers_of(process).items() if spec.scheduler), None)
    if job.sampler is None:
        raise ValueError(
            f"{job.source} was trained on the {describe_process(process)}, for which diffusers has no scheduler: "
            "export it as safetensors"
        )
    job.vae_name = name or job.meta.vae or "ema"
    job.vae = load_vae(job.vae_name)
    same_vae(job.vae, job.vae_name, name is not None, job.model.in_channels, vars(job.meta), "the checkpoint's latents")
    if type(job.model) is DiT:
        classes = arguments["num_classes"]
        if classes > NULL_LABEL:
            raise ValueError(f"{job.source} has {classes} classes: diffusers' DiTPipeline takes at most {NULL_LABEL}")
        if any(job.vae.config.get(key) for key in ("shift_factor", "latents_mean", "latents_std")):
            raise ValueError(f"--vae {job.vae_name} shifts its latents, which diffusers' DiTPipeline does not undo")


#################################################################################
#                                    Writing                                    #
#################################################################################


def write(folder: Path, job: Export) -> None:
    """The files of a format, and the model card."""
    if job.format == "safetensors":
        noted = dict(job.meta.noted, weights=job.meta.weights)
        if uses_diffusers_function(job.model):
            noted |= dict(trained_with="diffusers", norm_eps=job.model.blocks[0].norm2.eps)
        config = config_of(job.name, job.model, process_of(job.meta))
        write_own(folder, job.model.state_dict(), config, replace(job.meta, noted=noted))
    else:
        write_pipeline(folder, job)
    (folder / "README.md").write_text(model_card(job), encoding="utf-8")


def save(weights: dict, path: Path) -> None:
    """Write tensors as libraries of the hub expect them."""
    safetensors.torch.save_file(
        {name: value.contiguous() for name, value in weights.items()}, path, metadata={"format": "pt"}
    )


def write_own(folder: Path, weights: dict, config: ModelConfig, meta: RunMeta) -> None:
    """The files of --format safetensors, which --ckpt reads back."""
    save(weights, folder / "model.safetensors")
    write_json(folder / "config.json", config.to_json())
    write_json(folder / "meta.json", meta.to_json())


#################################################################################
#                              Pipelines of diffusers                           #
#################################################################################


def write_pipeline(folder: Path, job: Export) -> None:
    """transformer/, vae/, scheduler/, model_index.json, and the code that they need."""
    import diffusers

    transformer, arguments = folder / "transformer", job.model.config["arguments"]
    transformer.mkdir()
    process = process_of(job.meta)
    module, scheduler, settings = samplers_of(process)[job.sampler].scheduler(process)
    parts = {"vae": ["diffusers", type(job.vae).__name__], "scheduler": [module, scheduler]}
    if type(job.model) is DiTSEM:
        save(job.model.state_dict(), transformer / WEIGHTS)
        sizes = {name: arguments[name] for name in (*SIZES, "L", "V")}
        ratio = job.model.blocks[0].mlp.fc1.out_features / arguments["hidden_size"]
        config = dict(_class_name="DLCDiTTransformer", **sizes, mlp_ratio=ratio)
        shutil.copy(SHIPPED / "transformer_dlc.py", transformer)
        shutil.copy(SHIPPED / "pipeline_dlc.py", folder)
        index = dict(_class_name=["pipeline_dlc", "DLCDiTPipeline"])
        parts["transformer"] = ["transformer_dlc", "DLCDiTTransformer"]
    else:
        save(to_diffusers(padded(job.model)), transformer / WEIGHTS)
        index = dict(_class_name="DiTPipeline")
        parts["transformer"] = ["transformer_dit", "DiTTransformer"]
        shutil.copy(SHIPPED / "transformer_dit.py", transformer)
        config = diffusers_config(job.model)
    version = dict(_diffusers_version=diffusers.__version__)
    recorded = dict(_process=job.meta.process) if job.meta.process else {}
    write_json(transformer / "config.json", {**config, **recorded, **version})
    job.vae.save_pretrained(folder / "vae")
    home = diffusers if module == "diffusers" else importlib.import_module(f"dlc.weights.shipped.{module}")
    getattr(home, scheduler)(**settings).save_pretrained(folder / "scheduler")
    write_json(folder / "model_index.json", dict(index, **version, **parts))


def padded(model: DiT) -> dict:
    """A DiT's state dict whose table has rows up to the null label of DiTPipeline; those between are null as well."""
    weights = dict(model.state_dict())
    table = weights["y_embedder.embedding_table.weight"]
    weights["y_embedder.embedding_table.weight"] = torch.cat(
        [table, table[-1:].expand(NULL_LABEL + 1 - len(table), -1)]
    )
    return weights


def diffusers_config(model: DiT) -> dict:
    """transformer/config.json for diffusers' DiT. Keys with an underscore are ours; diffusers keeps them."""
    own = model.config["arguments"]
    return dict(
        _class_name="DiTTransformer",
        _num_classes=own["num_classes"],
        _trained_with="diffusers" if uses_diffusers_function(model) else "dit",
        activation_fn="gelu-approximate",
        attention_bias=True,
        attention_head_dim=own["hidden_size"] // own["num_heads"],
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
