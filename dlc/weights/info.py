"""What `python -m dlc.checkpoints info` says of weights, in any layout."""

from pathlib import Path

import torch

from dlc.weights.foreign.safe import differences_from
from dlc.weights.foreign.source import AVAE, AnEncoder, APrior, NoRawWeights
from dlc.weights.load import describe, load_model, load_weights
from dlc.weights.meta import RunMeta


def info(path, diffusers_time: str | None = None) -> list[str]:
    """Lines that say what weights are: model, layout, EMA or raw, step, and what else is recorded of them.

    Of an encoder or a VAE, one line says what it is.

    Raises ValueError if path holds none, or if its two sets of weights are not of one model.
    """
    try:
        model, name, meta = load_model(path, diffusers_time=diffusers_time)
    except AnEncoder:
        from dlc.weights.networks import load_encoder

        encoder = load_encoder(path, flag="encoder")
        sizes = ", ".join(f"{name} {getattr(encoder, name)}" for name in ("L", "V", "image_size"))
        return [f"{path}: encoder of images, for --encoder: {encoder.said}; {sizes}"]
    except AVAE:
        from dlc.weights.networks import load_vae

        return [f"{path}: VAE, for --vae: {load_vae(path).said}"]
    except APrior:
        from dlc.weights.load import describe_prior, load_prior

        model, meta = load_prior(path)
        return about(path, meta.model, model, describe_prior(model, meta), meta)
    lines = about(path, name, model, describe_model(model), meta)
    difference = ema_and_raw(path, meta)
    return [*lines, difference] if difference else lines


def about(path, name: str, model, sizes: str, meta: RunMeta) -> list[str]:
    """Lines on a model: name and sizes, layout, what it was trained on, with and by."""
    lines = [
        f"{path}: {name}, {sum(tensor.numel() for tensor in model.parameters()) / 1e6:.1f} M parameters, {sizes}",
        f"{describe(meta)}{f', {size_of(path) / 1e9:.2f} GB' if Path(path).exists() else ''}",
    ]
    recorded = dict(model.config["arguments"], model=meta.model, **meta.recorded())
    for words, names in (
        (
            "trained on",
            ("features_path", "data_path", "image_size", "L", "V", "code_init", "num_classes", "in_dim", "vae"),
        ),
        ("with", ("model", "global_batch_size", "precision", "lr", "weight_decay", "ema_decay", "global_seed")),
    ):
        said = ", ".join(f"{name} {recorded[name]}" for name in names if recorded.get(name) is not None)
        if said:
            lines.append(f"{words}: {said}")
    if recorded.get("versions"):
        lines.append("by: " + ", ".join(f"{package} {version}" for package, version in recorded["versions"].items()))
    return lines


def describe_model(model) -> str:
    """The sizes that a name in DiT_models does not tell."""
    arguments, (height, width) = model.config["arguments"], model.x_embedder.img_size
    sizes = ", ".join(f"{name} {arguments[name]}" for name in ("L", "V", "in_dim") if name in arguments)
    labels = model.conditioning == "labels"
    condition = f"{arguments['num_classes']} classes" if labels else f"{model.conditioning} of {sizes}"
    return f"latents {model.in_channels} x {height} x {width}, {arguments['num_heads']} heads, {condition}"


def size_of(path) -> int:
    """Bytes of a file, or of all files of a folder."""
    path = Path(path)
    return sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())


def ema_and_raw(path, meta: RunMeta) -> str:
    """How far the EMA weights are from the raw ones, in words; "" where there are not both."""
    if meta.weights != "ema":
        return ""
    try:
        raw, of_raw = load_weights(path, use_ema=False)
    except NoRawWeights:
        return ""
    if of_raw.weights != "raw":
        return ""
    ema = load_weights(path)[0]
    different = differences_from(ema, raw)
    if different:
        raise ValueError(
            f"{path}: its raw weights are not of the model that its EMA weights are of: the raw {different}"
        )
    with torch.no_grad():
        norms = [((value - raw[name]).norm(), raw[name].norm()) for name, value in ema.items()]
    difference = [apart / norm for apart, norm in norms if norm > 0] or [torch.tensor(0.0)]
    return f"EMA weights differ from the raw ones by {torch.stack(difference).mean():.2%} of their norm"
