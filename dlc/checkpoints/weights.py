"""Models from files of weights: our checkpoints, `.safetensors`, and `.pt` files as DiT and fast-DiT write them (a bare
state dict, or several under "ema" and "model").
"""
import hashlib
import math
from pathlib import Path

import torch

from dlc.checkpoints.run import read_meta
from dlc.checkpoints.tensor_files import check_tensors, differences_from, load_tensors
from models import FAMILIES, DiT_models


def load_weights(path, use_ema=True):
    """A model's state dict, and its meta: meta.json of a checkpoint of ours, and the key `weights`.

    `weights` is "ema", "raw", or "as in the file" if the file does not distinguish them.

    Args:
        path: a checkpoint directory, or a `.pt`, `.pth` or `.safetensors` file.
        use_ema: load the EMA weights rather than the raw ones, if the file distinguishes them.

    Raises ValueError if path is neither.
    """
    path = Path(path)
    meta = {}
    if path.is_dir():
        if not (path / "meta.json").is_file():
            raise ValueError(f"{path} is not a checkpoint directory: it has no meta.json")
        meta = read_meta(path)
        path = path / ("ema.safetensors" if use_ema else "model.safetensors")
    elif not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist")
    weights, kind = load_tensors(path), "ema" if use_ema else "raw"
    if not meta:
        name, other = ("ema", "model") if use_ema else ("model", "ema")
        if name not in weights and other in weights:
            raise ValueError(f"{path} has no {kind} weights, only {other!r}: "
                             f"{'give --no-ema' if use_ema else 'leave out --no-ema'} to sample from those")
        weights, kind = weights.get(name, weights), kind if name in weights else "as in the file"
    weights, meta = check_tensors(weights, path), dict(meta, weights=kind)
    return {key.replace("module.", "").replace("_orig_mod.", ""): value for key, value in weights.items()}, meta


def model_from_weights(weights, path):
    """The model with this state dict, in eval mode, and its name in DiT_models.

    Family, size, patch, L, V, classes, and the latents' channels and size are all read from the tensors' shapes. All
    shapes are compared before memory is allocated for the model.

    Raises ValueError, naming path, if the weights fit no model in DiT_models.
    """
    def shape(name, ndim):
        if name not in weights or weights[name].ndim != ndim:
            raise ValueError(f"checkpoint {path} is not a DiT, DiTSEM or DiTCONT (no {name} of {ndim} dimensions)")
        return tuple(weights[name].shape)

    hidden_size, in_channels, patch_size, _ = shape("x_embedder.proj.weight", 4)
    # counted, because the highest number in a file could be any
    depth = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
    arguments = dict(
        in_channels=in_channels, input_size=patch_size * math.isqrt(shape("pos_embed", 3)[1]),
        learn_sigma=shape("final_layer.linear.bias", 1)[0] == 2 * in_channels * patch_size**2)
    # in reverse, because a DiTCONT's linear layer has the same name as a DiT's table
    family = next((family for family in reversed(FAMILIES) if family.table in weights), FAMILIES[0])
    arguments.update(family.sizes_of(shape(family.table, family.table_ndim)))
    name = next((name for name, build in DiT_models.items() if (
        build.family, build.hidden_size, build.depth, build.patch_size) == (family, hidden_size, depth, patch_size)), None)
    if name is None:
        raise ValueError(f"checkpoint {path} is a {family.__name__} of depth {depth}, width {hidden_size}, patch "
                         f"{patch_size}, which has no name in DiT_models")
    if min(value for key, value in arguments.items() if key != "learn_sigma") < 1:
        raise ValueError(f"checkpoint {path} does not fit {name}: by its shapes, "
                         + ", ".join(f"{key} is {value}" for key, value in arguments.items()))
    build = DiT_models[name]
    with torch.device("meta"):
        different = differences_from(build(**arguments).state_dict(), weights)
    if different:
        raise ValueError(f"checkpoint {path} does not fit {name}: it {different}")
    model = build(**arguments)
    model.load_state_dict(weights)
    return model.eval(), name


def load_pretrained(path, model):
    """Load the weights that fit into a model to train. Returns a line that says which were taken and which were not.

    Raises ValueError if path holds no weights, or none that fit.
    """
    weights, _ = load_weights(path)
    wanted = model.state_dict()
    fit = {key: value for key, value in weights.items() if key in wanted and value.shape == wanted[key].shape}
    if not fit:
        raise ValueError(f"--pretrained-path {path} has no tensor that fits the model")
    model.load_state_dict(fit, strict=False)
    said = [f"{len(fit)} of {len(wanted)} tensors from {path}"]
    said += [f"{key} not taken: {tuple(weights[key].shape)} there, {tuple(wanted[key].shape)} here"
             for key in sorted((key for key in weights if key in wanted and key not in fit),
                               key=lambda key: "embedding_table" not in key)[:5]]
    for what, keys in (("left out", weights.keys() - wanted.keys()), ("new", wanted.keys() - weights.keys())):
        if keys:
            said.append(f"{what}: {', '.join(sorted(keys)[:5])}{f' and {len(keys) - 5} more' if len(keys) > 5 else ''}")
    return "; ".join(said)


def weights_sha256(module):
    """A digest of a module's names and tensors, which identifies weights whatever their file is called."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def info(path):
    """A description of a checkpoint, a list of lines. Raises ValueError if path is not a checkpoint."""
    weights, meta = load_weights(path)
    model, name = model_from_weights(weights, path)
    lines = [f"{path}: {name}, {sum(tensor.numel() for tensor in model.parameters()) / 1e6:.1f} M parameters"]
    if "step" not in meta:
        return [*lines, "a file of weights, which says nothing else of itself"]
    size = sum(file.stat().st_size for file in Path(path).iterdir())
    lines += [f"step {meta['step']:,}, {size / 1e9:.2f} GB", "trained on: " + ", ".join(
        f"{key} {meta[key]}" for key in ("features_path", "data_path", "image_size", "L", "V", "num_classes", "in_dim",
                                         "vae")
        if meta.get(key) is not None)]
    lines.append("with: " + ", ".join(f"{key} {meta[key]}" for key in (
        "global_batch_size", "precision", "lr", "weight_decay", "ema_decay", "global_seed") if key in meta))
    lines.append("by: " + ", ".join(f"{name} {version}" for name, version in meta.get("versions", {}).items()))
    with torch.no_grad():
        difference = [(ema - raw).norm() / raw.norm() for ema, raw in zip(
            weights.values(), load_weights(path, use_ema=False)[0].values()) if raw.norm() > 0]
    lines.append(f"EMA weights differ from the raw ones by {torch.stack(difference).mean():.2%} of their norm")
    return lines
