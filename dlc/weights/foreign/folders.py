"""Folders of weights: from a folder that a layout recognises to the file in it that holds the tensors."""

import contextlib
import dataclasses
import re

from dlc.machine.files import read_json
from dlc.weights.foreign.safe import read_file, weights_in
from dlc.weights.foreign.source import NoRawWeights, Source, run_meta
from dlc.weights.meta import RunMeta


def opened(source: Source, **changes) -> Source:
    """The source of the file that source.at is."""
    values, words = read_file(source.at)
    return source.saying(*filter(None, [words]), values=values, **changes)


def with_kind(source: Source, kind: str) -> RunMeta:
    """The meta with the kind of weights that was read: "ema", "raw" or "as in the file"."""
    return dataclasses.replace(source.meta, weights=kind)


def finished(source: Source, values: dict, **changes) -> Source:
    """The last source: values are a model's tensors under our names, and checked."""
    meta = source.meta if source.meta.weights else with_kind(source, "as in the file")
    return dataclasses.replace(source, values=values, done=True, **{"meta": meta, **changes})


def dlc_checkpoints(source):
    """The checkpoint_N/ folders of a run of the DLC project, by N."""
    found = [
        path
        for pattern in ("checkpoints/checkpoints/checkpoint_*", "checkpoints/checkpoint_*", "checkpoint_*")
        for path in source.at.glob(pattern)
        if re.fullmatch(r"checkpoint_\d{1,9}", path.name) and path.is_dir()
    ]
    return sorted(found, key=lambda path: int(path.name.rpartition("_")[2]))


def read_dlc_run(source):
    newest, arguments = dlc_checkpoints(source)[-1], {}
    with contextlib.suppress(ValueError):  # it only describes the run, and may be missing
        arguments = read_json(newest.parent.parent / "metadata.json").get("args")
    meta = run_meta(arguments if isinstance(arguments, dict) else {}, None, None)
    return source.saying(f"newest checkpoint of a DLC run, {newest.name}", at=newest, meta=meta)


def is_dlc_checkpoint(source):
    return "custom_checkpoint_0.pkl" in source.files or (
        "random_states_0.pkl" in source.files and weights_in(source.files) is not None
    )


def read_dlc_checkpoint(source):
    """accelerate's folder: the raw model by its own name, the EMA as the first object registered for checkpointing."""
    name = "custom_checkpoint_0.pkl" if source.ema else weights_in(source.files)
    if name is None or name not in source.files:
        source.refuse(
            "has no EMA weights (custom_checkpoint_0.pkl): give --no-ema to read the raw ones"
            if source.ema
            else "has no raw weights (model.safetensors): leave out --no-ema",
            ValueError if source.ema else NoRawWeights,
        )
    return opened(
        dataclasses.replace(source, at=source.at / name),
        meta=with_kind(source, "ema" if source.ema else "raw"),
        is_eps=True,
    ).saying("accelerate checkpoint of the DLC project")


def read_pipeline(source):
    index, folder = read_json(source.at / "model_index.json"), source.at / "transformer"
    if not folder.is_dir():
        source.refuse("is a diffusers pipeline without transformer/: only those of a DiT or of a DLC DiT are read")
    kind = index.get("_class_name")
    kind = kind[-1] if isinstance(kind, list) and kind else kind
    # the VAE of its latents, unless the transformer's config.json knows better; of a hub id it is not fetched here
    inside = source.at / "vae"
    vae = str(inside) if inside.is_dir() else str(source.named) if "vae" in index else None
    meta = dataclasses.replace(source.meta, vae=vae)
    return source.saying(f"diffusers pipeline ({str(kind)[:40]})", at=folder, meta=meta)


def read_weights_folder(source):
    """A folder of a file of weights, or of its shards: diffusers' transformers, and what we export."""
    return read_weights_file(dataclasses.replace(source, at=source.at / weights_in(source.files)))


def read_weights_file(source):
    """A file of weights, or an index of its shards, with what the config.json beside it says."""
    beside, meta, is_eps = source.config_path, source.meta, source.is_eps
    config = read_json(beside) if beside.is_file() else {}
    kind = config["weights"] if config.get("weights") in ("ema", "raw") else "as in the file"
    return opened(source, config=config, meta=dataclasses.replace(meta, weights=kind), is_eps=is_eps)
