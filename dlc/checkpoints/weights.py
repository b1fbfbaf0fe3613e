"""Models out of files of weights: our checkpoints, `.safetensors`, and `.pt` files as DiT and fast-DiT write them.

Those are a bare state dict, or one under "ema" and "model".
"""

import dataclasses
import hashlib
import math
from pathlib import Path

import torch

from dlc.checkpoints.meta import RunMeta, read_meta
from dlc.checkpoints.tensor_files import check_tensors, differences_from, load_tensors
from models import FAMILIES, DiT_models


def load_weights(path, use_ema: bool = True) -> tuple[dict, RunMeta]:
    """A model's state dict, and the meta of its checkpoint: of a lone file nothing is recorded but `weights`.

    Args:
        path: a checkpoint directory, or a `.pt` / `.pth` / `.safetensors` file.
        use_ema: the EMA weights rather than the raw ones, if the checkpoint has both.

    Raises ValueError if path is none of these.
    """
    path = Path(path)
    is_ours = path.is_dir()
    if is_ours:
        if not (path / "meta.json").is_file():
            raise ValueError(f"{path} is not a checkpoint directory: it has no meta.json")
        meta = read_meta(path)
        path = path / ("ema.safetensors" if use_ema else "model.safetensors")
    elif path.is_file():
        meta = RunMeta()
    else:
        raise ValueError(f"checkpoint {path} does not exist")
    weights, kind = load_tensors(path), "ema" if use_ema else "raw"
    if not is_ours:
        name, other = ("ema", "model") if use_ema else ("model", "ema")
        if name not in weights and other in weights:
            raise ValueError(
                f"{path} has no {kind} weights, only {other!r}: "
                f"{'give --no-ema' if use_ema else 'leave out --no-ema'} to sample from those"
            )
        weights, kind = weights.get(name, weights), kind if name in weights else "as in the file"
    weights = check_tensors(weights, path)
    plain = {key.replace("module.", "").replace("_orig_mod.", ""): value for key, value in weights.items()}
    if len(plain) < len(weights):
        raise ValueError(f"{path} holds tensors of one name twice, with and without module. or _orig_mod. before it")
    return plain, dataclasses.replace(meta, weights=kind)


def model_from_weights(weights: dict, path):
    """The model whose state dict these are, in eval mode, and its name in DiT_models.

    Family, size, patch size, L, V, classes and latent size are read off the tensors' shapes. All shapes are compared
    before memory is allocated for the model.

    Raises ValueError, naming path, if they are no model of ours.
    """

    def shape(name, ndim):
        if name not in weights or weights[name].ndim != ndim:
            raise ValueError(f"checkpoint {path} is not a DiT, DiTSEM or DiTCONT (no {name} of {ndim} dimensions)")
        return tuple(weights[name].shape)

    hidden_size, in_channels, patch_size, _ = shape("x_embedder.proj.weight", 4)
    # not by the highest number, which may be any
    depth = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
    arguments = dict(
        in_channels=in_channels,
        input_size=patch_size * math.isqrt(shape("pos_embed", 3)[1]),
        learn_sigma=shape("final_layer.linear.bias", 1)[0] == 2 * in_channels * patch_size**2,
    )
    # from the last: a DiTCONT's linear layer is called as a DiT's table
    family = next((family for family in reversed(FAMILIES) if family.table in weights), FAMILIES[0])
    arguments.update(family.sizes_of(shape(family.table, family.table_ndim)))
    size = family, hidden_size, depth, patch_size
    name = next(
        (
            name
            for name, spec in DiT_models.items()
            if (spec.family, spec.hidden_size, spec.depth, spec.patch_size) == size
        ),
        None,
    )
    if name is None:
        raise ValueError(
            f"checkpoint {path} is a {family.__name__} of depth {depth}, width {hidden_size}, patch "
            f"{patch_size}, which has no name in DiT_models"
        )
    if min(value for key, value in arguments.items() if key != "learn_sigma") < 1:
        raise ValueError(
            f"checkpoint {path} does not fit {name}: by its shapes, "
            + ", ".join(f"{key} is {value}" for key, value in arguments.items())
        )
    with torch.device("meta"):
        different = differences_from(DiT_models[name](**arguments).state_dict(), weights)
    if different:
        raise ValueError(f"checkpoint {path} does not fit {name}: it {different}")
    model = DiT_models[name](**arguments)
    model.load_state_dict(weights)
    return model.eval(), name


def load_pretrained(path, model) -> str:
    """Load into a model to train those tensors of a checkpoint that fit. Returns a line that says what was taken.

    Raises ValueError if path holds no weights, or none that fit.
    """
    weights, _ = load_weights(path)
    wanted = model.state_dict()
    fit = {key: value for key, value in weights.items() if key in wanted and value.shape == wanted[key].shape}
    if not fit:
        raise ValueError(f"--pretrained-path {path} has no tensor that fits the model")
    model.load_state_dict(fit, strict=False)
    said = [f"{len(fit)} of {len(wanted)} tensors from {path}"]
    said += [
        f"{key} not taken: {tuple(weights[key].shape)} there, {tuple(wanted[key].shape)} here"
        for key in sorted(
            (key for key in weights if key in wanted and key not in fit), key=lambda key: "embedding_table" not in key
        )[:5]
    ]
    for what, keys in (("left out", weights.keys() - wanted.keys()), ("new", wanted.keys() - weights.keys())):
        if keys:
            said.append(f"{what}: {', '.join(sorted(keys)[:5])}{f' and {len(keys) - 5} more' if len(keys) > 5 else ''}")
    return "; ".join(said)


def weights_sha256(module) -> str:
    """A digest of a module's tensors and their names: it tells weights apart, whatever their file is called."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def info(path) -> list[str]:
    """Lines that say what a checkpoint is. Raises ValueError if path is none."""
    weights, meta = load_weights(path)
    model, name = model_from_weights(weights, path)
    lines = [f"{path}: {name}, {sum(tensor.numel() for tensor in model.parameters()) / 1e6:.1f} M parameters"]
    if meta.step is None:
        return [*lines, "a file of weights, which says nothing else of itself"]

    def recorded(*names):
        return ", ".join(f"{name} {getattr(meta, name)}" for name in names if getattr(meta, name) is not None)

    size = sum(file.stat().st_size for file in Path(path).iterdir())
    lines += [
        f"step {meta.step:,}, {size / 1e9:.2f} GB",
        "trained on: "
        + recorded("features_path", "data_path", "image_size", "L", "V", "code_init", "num_classes", "in_dim", "vae"),
        "with: " + recorded("global_batch_size", "precision", "lr", "weight_decay", "ema_decay", "global_seed"),
        "by: " + ", ".join(f"{name} {version}" for name, version in (meta.versions or {}).items()),
    ]
    raw = load_weights(path, use_ema=False)[0]
    different = differences_from(weights, raw)
    if different:
        raise ValueError(
            f"{Path(path) / 'model.safetensors'} is not of the model that ema.safetensors is of: it {different}"
        )
    with torch.no_grad():
        norms = [((ema - raw[name]).norm(), raw[name].norm()) for name, ema in weights.items()]
    difference = [apart / norm for apart, norm in norms if norm > 0] or [torch.tensor(0.0)]
    lines.append(f"EMA weights differ from the raw ones by {torch.stack(difference).mean():.2%} of their norm")
    return lines
