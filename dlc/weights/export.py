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
from dataclasses import replace
from pathlib import Path

import torch

from diffusion.process_table import Process, describe_process, samplers_of
from dlc.machine.files import write_folder
from dlc.nets.vae import same_vae
from dlc.weights.card import model_card
from dlc.weights.checkpoint import write_files
from dlc.weights.foreign.dits import to_diffusers, uses_diffusers_function
from dlc.weights.load import describe, load_model, process_of
from dlc.weights.meta import config_of, run_checkpoints
from dlc.weights.networks import load_vae
from models import DiT, DiTSEM

FORMATS = ("safetensors", "diffusers")
NULL_LABEL = 1000  # of diffusers' DiTPipeline, whatever the number of classes
# The arguments that the classes of diffusers and of shipped/ know, and of these what the shipped transformer takes.
SIZES = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "learn_sigma")
ARGUMENTS = {*SIZES, "mlp_ratio", "class_dropout_prob", "num_classes", "L", "V", "code_init", "intermediate_head"}


def export(args: argparse.Namespace) -> list[str]:
    """Write args.out, and say what it is. Raises ValueError or OSError for a user's mistake, writing nothing then."""
    out = Path(args.out)
    check_new(out)
    model, name, meta = load_model(args.checkpoint, args.ema, diffusers_time=args.diffusers_time)
    process, licence, sampler = process_of(meta), args.license or "unknown", None
    if args.format == "diffusers":
        model.drop_head()  # which no class of diffusers knows
        fault = unfit(model, process)
        if fault:
            raise ValueError(f"{args.checkpoint} {fault}: export it as safetensors")
        named = args.vae or meta.vae or "ema"
        vae = load_vae(named)
        same_vae(vae, named, args.vae is not None, model.in_channels, vars(meta), "the checkpoint's latents")
        if type(model) is DiT and any(vae.config.get(key) for key in ("shift_factor", "latents_mean", "latents_std")):
            raise ValueError(f"--vae {named} shifts its latents, which diffusers' DiTPipeline does not undo")
        sampler = next(name for name, spec in samplers_of(process).items() if spec.scheduler)
    elif args.vae:
        raise ValueError("--vae goes with the formats of diffusers: .safetensors hold the model alone")

    def write(folder):
        if sampler:
            pipeline_of(model, vae, process, sampler, recorded=meta.process).save_pretrained(folder)
        else:
            noted = dict(meta.noted, weights=meta.weights)
            if uses_diffusers_function(model):
                noted |= dict(trained_with="diffusers", norm_eps=model.blocks[0].norm2.eps)
            config = config_of(name, model, process)
            write_files(folder, config, replace(meta, noted=noted), dict(model=model.state_dict()))
        card = model_card(model, name, meta, licence, sampler)
        (folder / "README.md").write_text(card, encoding="utf-8")

    write_folder(out, write)
    return [f"{out}: {name} ({describe(meta)}) as {args.format}, licence {licence}"]


def check_new(out: Path) -> None:
    """Raise ValueError where a folder to write is there, has no folder to lie in, or would be read as a checkpoint."""
    parent = out.absolute().parent
    if os.path.lexists(out):
        raise ValueError(f"{out} exists: give another path")
    if not parent.is_dir():
        raise ValueError(f"{parent}, the folder to write {out.name} in, does not exist")
    if run_checkpoints(parent.parent, parent.name):
        raise ValueError(f"{out} would be read as a checkpoint of the run {parent.parent}: give a path elsewhere")


def unfit(model: DiT, process: Process) -> str:
    """Why diffusers' classes cannot draw what a model draws, in words; "" if they can."""
    arguments = model.config["arguments"]
    others = [name for name, value in arguments.items() if name not in ARGUMENTS and value]
    if type(model) not in (DiT, DiTSEM) or others:
        argument = f" with the argument {others[0]}" if others else ""
        return f"is a {type(model).__name__}{argument}, and pipelines are for the published DiT and DiTSEM"
    if not any(spec.scheduler for spec in samplers_of(process).values()):
        return f"was trained on the {describe_process(process)}, for which diffusers has no scheduler"
    if type(model) is DiTSEM:
        return "computes as diffusers does, and a DiTSEM's pipeline as DiT" if uses_diffusers_function(model) else ""
    if model.blocks[0].mlp.fc1.out_features != 4 * arguments["hidden_size"]:
        return "has an MLP that is not 4 times as wide as the rest, as diffusers' always is"
    if arguments["num_classes"] > NULL_LABEL:
        return f"has {arguments['num_classes']} classes, and diffusers' DiTPipeline takes at most {NULL_LABEL}"
    return ""


def shipped(module: str, name: str) -> type:
    """A class of diffusers, or of the files of code in shipped/, which save themselves beside what they save."""
    return getattr(importlib.import_module(module if module == "diffusers" else f"dlc.weights.shipped.{module}"), name)


def pipeline_of(model: DiT, vae: torch.nn.Module, process: Process, sampler: str, recorded: dict | None) -> object:
    """The pipeline of diffusers that draws as a sampler of ours does. recorded: the process, as config.json says it."""
    arguments, noted = model.config["arguments"], dict(_process=recorded) if recorded else {}
    module, name, settings = samplers_of(process)[sampler].scheduler(process)
    if type(model) is DiTSEM:
        kind, pipeline = shipped("transformer_dlc", "DLCDiTTransformer"), shipped("pipeline_dlc", "DLCDiTPipeline")
        sizes, weights = {name: arguments[name] for name in (*SIZES, "L", "V")}, model.state_dict()
        sizes["mlp_ratio"] = model.blocks[0].mlp.fc1.out_features / arguments["hidden_size"]
    else:
        kind, pipeline = shipped("transformer_dit", "DiTTransformer"), shipped("diffusers", "DiTPipeline")
        noted["_num_classes"] = arguments["num_classes"]
        noted["_trained_with"] = "diffusers" if uses_diffusers_function(model) else "dit"
        weights = to_diffusers(padded(model))
        sizes = dict(
            num_attention_heads=arguments["num_heads"],
            attention_head_dim=arguments["hidden_size"] // arguments["num_heads"],
            in_channels=model.in_channels,
            out_channels=model.out_channels,
            num_layers=arguments["depth"],
            sample_size=arguments["input_size"],
            patch_size=model.patch_size,
            norm_eps=model.blocks[0].norm2.eps,
        )
    with torch.device("meta"):
        transformer = kind(**sizes)
    transformer.load_state_dict(weights, assign=True)
    transformer.register_to_config(**noted)  # keys with an underscore are ours; diffusers keeps them
    return pipeline(transformer=transformer, vae=vae, scheduler=shipped(module, name)(**settings))


def padded(model: DiT) -> dict:
    """A DiT's state dict whose table has rows up to the null label of DiTPipeline; those between are null as well."""
    weights = dict(model.state_dict())
    table = weights["y_embedder.embedding_table.weight"]
    weights["y_embedder.embedding_table.weight"] = torch.cat(
        [table, table[-1:].expand(NULL_LABEL + 1 - len(table), -1)]
    )
    return weights
