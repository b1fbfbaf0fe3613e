"""Models out of weights, by path or hub id: our own by the record beside them, others' through `dlc.weights.foreign`.

model, name, meta = load_model("results/checkpoints/0400000")
model, name, meta = load_model("facebook/DiT-XL-2-256")

Either way: tensors and a `ModelConfig`, from which the model is built and filled strictly.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from diffusion.process_table import Process, create_process, predicted_by
from dlc.machine.cli import warn_once
from dlc.machine.records import differences
from dlc.weights.foreign.dits import DIFFUSERS_EPS, trained_process, use_diffusers_function
from dlc.weights.foreign.layouts import File, OtherKind, open_weights
from dlc.weights.foreign.names import names_of, read_foreign
from dlc.weights.foreign.safe import RECORDABLE, check_tensors, differences_from, fill, load_tensors
from dlc.weights.hub import locate
from dlc.weights.meta import (
    ModelConfig,
    NoCheckpoint,
    RunMeta,
    newest_of_run,
    only_run,
    plain,
    read_config,
    read_meta,
    run_checkpoints,
)
from models import DiT, DiT_models, build_model
from prior import DLCPrior, DLCPrior_models

YOUNG = 0.05  # share of an EMA that is still the start of training
OWN_FILES = "ema.safetensors", "model.safetensors"


def newest_in(
    at: str | Path,
    files: Sequence[str],
    choose: Callable[[Path, Sequence[str]], Path | None] = newest_of_run,
    fits: Callable[[Path], bool] = lambda path: True,
    what: str = "checkpoint",
) -> str | Path:
    """choose(run, files) of the run of ours that is a folder, or the only one in it; any other path as it is.

    Raises ValueError as `only_run` does, which gets `fits` and `what`, and as choose does.
    """
    if Path(at).is_dir() and not (Path(at) / "config.json").is_file():
        with contextlib.suppress(NoCheckpoint):  # others' weights
            is_run = run_checkpoints(at) or run_checkpoints(at, "best")
            return choose(Path(at) if is_run else only_run(at, fits, what), files) or at
    return at


def read_own(named: object, at: Path, ema: bool = True) -> tuple[dict, ModelConfig, RunMeta] | None:
    """The tensors, config and meta of a run, a checkpoint or an export of ours, or of a file in one; else None.

    named, at: a path or hub id, and where `locate` found it. Raises ValueError as `load_model` does.
    """
    words, given = "checkpoint of this program", at
    at = Path(newest_in(given, ("config.json", "meta.json", OWN_FILES[0 if ema else 1])))
    if at != given:
        words = f"newest checkpoint of the run, {at.name}, {words}"
    folder = at if at.is_dir() else at.parent
    config = read_config(folder) if at.is_dir() or at.name in OWN_FILES else None
    if config is None:
        return None
    meta = read_meta(folder) if (folder / "meta.json").is_file() else RunMeta()
    exported = meta.noted.get("weights")
    file = at if at.is_file() else folder / OWN_FILES[0 if ema and not exported else 1]
    if not ema and (exported == "ema" or not file.is_file() or at.name == OWN_FILES[0]):
        raise ValueError(f"{named} has no raw weights: leave out --no-ema")
    tensors = check_tensors(load_tensors(file), file, RECORDABLE)
    kind = exported or ("ema" if file.name == OWN_FILES[0] else "raw")
    words = "exported by this program" if exported else words
    return tensors, config, replace(meta, model=config.model, process=config.process, weights=kind, layout=words)


def filled(config: ModelConfig, tensors: dict, named: object) -> torch.nn.Module:
    """The model of a config, in eval mode and float32, with these tensors, or ValueError if they are not its own."""
    if config.arguments.get("depth", 0) > len(tensors):  # before so many blocks are built
        raise ValueError(f"{named} has {len(tensors)} tensors for {config.arguments['depth']} blocks")
    said, outline = f"{named} does not fit the {config.model}: it", {}
    with contextlib.suppress(Exception), torch.device("meta"):  # not every constructor can be run on it
        outline = build_model(config.built).state_dict()
    different = differences_from(outline, tensors) if outline else ""  # before memory is taken
    if different:
        raise ValueError(f"{said} {different}")
    return fill(config.build(), tensors, said)


def opened(named: object, kind: str, ema: bool, flag: str, **options) -> tuple[torch.nn.Module, ModelConfig, RunMeta]:
    """A model, what it was built from, and what is recorded of it; see `load_model`. kind: "model" or "prior"."""
    at = locate(named, kind, flag)
    own = read_own(named, at, ema)
    if own is not None:
        tensors, config, meta = own
        if options.get("diffusers_time") == "diffusers":
            raise ValueError(f"{named} is not in diffusers' layout: --diffusers-time diffusers is for those")
        if options.get("process") not in (None, (config.process or {}).get("process")):
            raise ValueError(f"{named} records the process that it was trained on: leave out --objective")
    else:
        tensors, build, file = read_foreign(named, at, kind, ema, **options)
        config = ModelConfig(model=name_of(**build["arguments"], family=build["family"]), **build)
        meta = meta_of(file, model=config.model, process=config.process)
    return filled(config, tensors, named), config, meta


def meta_of(file: File, **more) -> RunMeta:
    """What is known of foreign weights, and of DiT's training script's arguments those of the kind of ours."""
    size, keys = file.arguments.get("image_size"), ("model", "num_classes", "global_batch_size", "global_seed")
    said = {key: file.arguments[key] for key in keys if type(file.arguments.get(key)) in (int, str)}
    # their VAEs are Stability AI's two, by these names; a file must not name another to load
    vae = next((name for name in ("ema", "mse") if name == file.arguments.get("vae")), None)
    return RunMeta(
        image_size=size if type(size) is int and 0 < size < 2**16 else None,
        vae=file.vae or vae,
        noted={**said, **file.noted},
        step=file.step,
        weights=file.weights,
        layout=file.said,
        **more,
    )


def name_of(family: str, depth: int, hidden_size: int, num_heads: int, patch_size: int | None = None, **_) -> str:
    """The name of these sizes in DiT_models or DLCPrior_models, or for other sizes one such as "DiT-2x16/2"."""
    for name, spec in {**DiT_models, **DLCPrior_models}.items():
        known = name.startswith(f"{family}-") and getattr(spec, "patch_size", None) == patch_size
        if known and (spec.depth, spec.hidden_size, spec.num_heads) == (depth, hidden_size, num_heads):
            return name
    return f"{family}-{depth}x{hidden_size}" + (f"/{patch_size}" if patch_size else "")


def load_model(named: object, ema: bool = True, *, flag: str = "checkpoint", **options) -> tuple[DiT, str, RunMeta]:
    """The diffusion transformer that a path or hub id holds, in eval mode; its name; and its RunMeta.

    Args:
        ema: the EMA weights rather than the raw ones, if there are both.
        flag: that it was given to, for errors.
        options: for weights without a record of ours:
            diffusers_time: whose function to compute, "dit" or "diffusers" [what the folder says, else "dit"].
            input_size: height and width of the latents, for weights that do not tell [32].
            process: a name in `diffusion.process_table` [what the file says, else "gaussian", to predict noise].

    Raises ValueError, naming the path, for what is damaged, of no layout, or has EMA weights alone where raw ones are
    wanted; OtherKind for another kind of network.
    """
    model, config, meta = opened(named, "model", ema, flag, **options)
    if not isinstance(model, DiT):
        raise OtherKind(f"{named} is a {config.model}, a prior over codes, no diffusion transformer", "prior")
    if meta.noted.get("trained_with") == "diffusers":
        use_diffusers_function(model, meta.noted.get("norm_eps", DIFFUSERS_EPS)).eval()
    return model, config.model, meta


def load_prior(named: object, ema: bool = True, flag: str = "checkpoint") -> tuple[DLCPrior, RunMeta]:
    """The prior over codes that a path or hub id holds, and its RunMeta, whose process is known; as `load_model`."""
    model, config, meta = opened(named, "prior", ema, flag)
    if not isinstance(model, DLCPrior):
        raise OtherKind(f"{named} is not a prior over codes, but a {config.model}", "model")
    return model, meta


def process_of(meta: RunMeta) -> Process:
    """The process that a model was trained on, by its meta; that of DiT's weights if nothing says one."""
    config = meta.process or dict(process="gaussian", arguments={})
    return create_process(config["process"], **config["arguments"])


def describe(meta: RunMeta) -> str:
    """What was recognised, in one line: layout, EMA or raw, step."""
    kind = {"ema": "EMA weights", "raw": "raw weights"}.get(meta.weights, "weights as in the file, EMA or raw unknown")
    return f"{meta.layout}; {kind}, step {'unknown' if meta.step is None else f'{meta.step:,}'}"


def warn_of_young_ema(path: str | Path, meta: RunMeta) -> None:
    """Warn where EMA weights still hold much of the random network that training began with: they draw noise."""
    if meta.weights == "ema" and (meta.ema_start or 0.0) > YOUNG:
        warn_once(
            f"young {path}",
            f"{meta.ema_start:.0%} of the EMA weights of {path}, step {meta.step:,}, is still the random network that "
            "training began with: samples will look like noise; draw with the raw weights (--no-ema), or train longer",
        )


def load_pretrained(
    named: object, model: torch.nn.Module, process: dict | None = None, train_only: str | None = None
) -> str:
    """Load into a model to train those tensors of a checkpoint that fit. Returns a line that says what was taken.

    Args:
        process: what the model is trained on, as `Process.config`, which is compared.
        train_only: the part that is trained; all others are to come from the checkpoint. None: they need not.

    Raises ValueError if there are no weights, or none that fit, or with train_only not all.
    """
    kind = "model" if isinstance(model, DiT) else "prior"
    at = locate(named, kind, "--pretrained-path")
    own, wanted = read_own(named, at), model.state_dict()
    if own is None:
        file = open_weights(named, at, kind)
        own = names_of(file), None, meta_of(file, process=trained_process(file))
    weights, config, meta = own
    built = config and differences(config.completed().arguments, plain(model.config["arguments"], "argument"))
    fit = {key: value for key, value in weights.items() if key in wanted and value.shape == wanted[key].shape}
    if not fit:
        raise ValueError(f"--pretrained-path {named} has no tensor that fits the model")
    before = process_of(meta).config if process and (kind == "model" or meta.process) else None
    other = differences(predicted_by(before), predicted_by(process)) if before else ""
    lacking = [key for key, one in model.named_parameters() if not one.requires_grad and key not in fit]
    if train_only and (lacking or other):
        raise ValueError(
            f"--pretrained-path {named} does not fit this --model and --objective "
            f"({f'no {lacking[0]} of this shape' if lacking else other}), and --train-only {train_only} would leave it "
            "so: leave out --train-only"
        )
    model.load_state_dict(fit, strict=False)
    said = [f"{len(fit)} of {len(wanted)} tensors from {named} ({describe(meta)})"]
    if before and before["process"] != process["process"]:
        said.append(
            f"it was trained on the process {before['process']}, this run is on {process['process']}: its blocks are a "
            "start, and what its output and its times mean is learned anew"
        )
    elif other:
        said.append(f"it was trained on the same process, but for {other}")
    if built:
        said.append(f"its model was built with {built}")
    others = sorted(weights.keys() & wanted.keys() - fit.keys(), key=lambda key: ("embedding_table" not in key, key))
    for key in others[:5]:
        said.append(f"{key} not taken: {tuple(weights[key].shape)} there, {tuple(wanted[key].shape)} here")
    for what, keys in (("left out", weights.keys() - wanted.keys()), ("new", wanted.keys() - weights.keys())):
        if keys:
            said.append(f"{what}: {', '.join(sorted(keys)[:5])}{f' and {len(keys) - 5} more' if len(keys) > 5 else ''}")
    return "; ".join(said)
