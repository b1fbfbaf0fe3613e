"""What `python -m dlc.checkpoints info` says about weights, in any layout."""

from pathlib import Path

import torch

from diffusion.process_table import describe_process
from dlc.machine.cli import one_line
from dlc.weights.foreign.layouts import OtherKind
from dlc.weights.load import describe, load_model, load_prior, process_of
from dlc.weights.meta import RunMeta
from dlc.weights.networks import load_encoder, load_vae
from prior import DLCPrior

SIZE_KEYS = {"input_size", "in_channels", "hidden_size", "depth", "patch_size", "mlp_ratio", "class_dropout_prob"}


def info(path: str | Path, diffusers_time: str | None = None) -> list[str]:
    """Lines that say what weights are: model, layout, EMA or raw, step, and what else is recorded of them.

    Of an encoder or a VAE, one line says what it is. Raises ValueError if path holds none.
    """
    try:
        model, name, meta = load_model(path, diffusers_time=diffusers_time)
        sizes = describe_model(model)
    except OtherKind as error:
        if error.kind == "encoder":
            encoder = load_encoder(path, flag="encoder")
            sizes = ", ".join(f"{name} {getattr(encoder, name)}" for name in ("L", "V", "image_size"))
            return [f"{path}: encoder of images, for --encoder: {encoder.said}; {sizes}"]
        if error.kind == "vae":
            return [f"{path}: VAE, for --vae: {load_vae(str(path)).said}"]
        model, meta = load_prior(path)
        name, sizes = meta.model, describe_prior(model, meta)
    lines = [
        f"{path}: {name}, {sum(tensor.numel() for tensor in model.parameters()) / 1e6:.1f} M parameters, {sizes}",
        f"{describe(meta)}{f', {size_of(path) / 1e9:.2f} GB' if Path(path).exists() else ''}",
        f"predicts as the {describe_process(process_of(meta))}{'' if meta.process else ', not recorded'}",
    ]
    return lines + recorded_of(meta)


def recorded_of(meta: RunMeta) -> list[str]:
    """Lines on what a model was trained on, with and by."""
    recorded = meta.recorded()
    versions = recorded.pop("versions", None) or {}
    on = ("features_path", "data_path", "image_size", "features_count", "latents", "vae")
    known = {key: value for key, value in recorded.items() if value is not None and not key.endswith("_sha256")}
    said = {key: f"{key} {one_line(value, 200)}" for key, value in known.items()}  # classes may be many
    lines = {
        "trained on": [said[key] for key in on if key in said],
        "with": [said[key] for key in said if key not in on],
        "by": [f"{package} {version}" for package, version in versions.items()],
    }
    return [f"{words}: {', '.join(parts)}" for words, parts in lines.items() if parts]


def describe_prior(model: DLCPrior, meta: RunMeta) -> str:
    """What a prior is, in words, beside its name."""
    tables = "one table for all positions" if model.shared_embedding else "a table per position"
    classes = f"{model.num_classes} classes" if model.num_classes else "no classes"
    told = "told" if meta.process["arguments"]["time_conditioning"] else "not told"
    return f"prior over codes of L {model.L}, V {model.V}, {tables}, {classes}, {told} the noise level"


def describe_model(model: torch.nn.Module) -> str:
    """The latents, and those arguments of a model that its name does not tell."""
    arguments, (height, width) = model.config["arguments"], model.x_embedder.img_size
    unused = () if model.conditioning == "labels" else ("num_classes",)  # which any family takes
    unused = (*unused, *(key for key, value in arguments.items() if value is None))
    others = (f"{key} {value}" for key, value in arguments.items() if key not in (*SIZE_KEYS, *unused))
    return ", ".join([f"latents {model.in_channels} x {height} x {width}", *others])


def size_of(path: str | Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    path = Path(path)
    return sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())
