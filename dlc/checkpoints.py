"""Weights and run state in and out.

A checkpoint of ours is a directory `checkpoints/{step:07d}/` of model.safetensors (the raw model), ema.safetensors
(float32), optimizer.pt and meta.json. It is written under another name and renamed, so one that has its name is whole.
Everything random in training is a function of (seed, position in the data), so there is no generator's state: meta.json
says the step and the place in the data, optimizer.pt holds the sums of the log's next line, too.

Read as well: `.pt` files such as DiT and fast-DiT write (a bare state dict, or one under "ema" and "model"), and
`.safetensors`.
"""
import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import zipfile
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor, distribute_tensor

from dlc.cli import one_line
from dlc.disk import TEXT, check_values, or_null, read_json, real_number, sync, whole_number
from dlc.tensor_files import check_tensors, differences_from, load_tensors, read_torch, tensor_fault
from models import DiT_models

CHECKPOINT_FILES = ("model.safetensors", "ema.safetensors", "optimizer.pt", "meta.json")
RESUMED = ("step", "place", "logged", "skipped")        # keys of meta.json without which a run cannot continue


def save_checkpoint(run_dir, meta, model, ema, optimizer, scaler=None, sums=None, write=True):
    """Write RESULTS/checkpoints/{meta["step"]:07d}/ whole or not at all. Returns its path.

    Args:
        model, ema, optimizer: where they are sharded every process calls this, and their parts are brought together.
        sums: a tensor (processes, …), what each has summed up for the log since its last line.
        write: whether this is the process that writes.

    Raises OSError, naming the checkpoint, where the disk does not take it.
    """
    states = [whole(module.state_dict(), write) for module in (model, ema, optimizer)]
    if not write:
        return None
    path = Path(run_dir) / "checkpoints" / f"{meta['step']:07d}"
    temporary = path.with_name(f"{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        safetensors.torch.save_file(states[0], temporary / "model.safetensors")
        safetensors.torch.save_file(states[1], temporary / "ema.safetensors")
        torch.save(dict(optimizer=states[2], scaler=scaler.state_dict() if scaler else None, sums=sums),
                   temporary / "optimizer.pt")
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
        for file in temporary.iterdir():
            sync(file)
        sync(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:       # whatever the writers make of a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"cannot write checkpoint {path} ({error})") from error
    sync(path.parent)             # before older ones may go
    return path


def whole(state, keep=True):
    """A state dict with its sharded tensors brought together, on the CPU; only kept where `keep` says so."""
    if isinstance(state, dict):
        return {key: whole(value, keep) for key, value in state.items()}
    if isinstance(state, DTensor):
        together = state.full_tensor()
        return together.cpu() if keep else None
    return state


def sharded_like(tensor, other):
    """A tensor that every process has whole, sharded as `other` is, or as it is."""
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)


def load_checkpoint(path, model, ema, optimizer, scaler=None):
    """Read a checkpoint back into the objects that made it. Returns its sums.

    Raises ValueError, naming the file, where weights or the optimizer's state are damaged or not those of the model.
    """
    for module, name in ((model, "model"), (ema, "ema")):
        file, ours = path / f"{name}.safetensors", module.state_dict()
        weights = check_tensors(load_tensors(file), file)
        different = differences_from(ours, weights)
        if different:
            raise ValueError(f"{file} {different}")
        module.load_state_dict({key: sharded_like(weights[key], value) for key, value in ours.items()})
    state = read_torch(path / "optimizer.pt", "an optimizer's state")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    try:
        for group, own in zip(state["optimizer"]["param_groups"], optimizer.param_groups):
            group["fused"] = own["fused"]       # another precision may want it otherwise
        for index, moments in state["optimizer"]["state"].items():
            for key in ("exp_avg", "exp_avg_sq"):
                fault = tensor_fault(moments[key])
                if fault or moments[key].shape != parameters[index].shape:
                    raise ValueError(f"{key} of parameter {index} {fault or 'has another shape'}")
                moments[key] = sharded_like(moments[key], parameters[index])
        optimizer.load_state_dict(state["optimizer"])
        if scaler and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        sums = state["sums"]
        return sums if sums is None else sums.clone()               # not a view of the mapped file
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:      # of whatever else lies there
        raise ValueError(f"{path / 'optimizer.pt'} is no optimizer's state of this model "
                         f"({one_line(repr(error), 100)})") from None


def remove_old_checkpoints(run_dir, keep):
    """Remove all but the newest `keep` checkpoints of a run; one that is being removed no longer counts as whole."""
    for path in run_checkpoints(run_dir)[:-keep]:
        going = path.with_name(f"{path.name}.tmp")
        shutil.rmtree(going, ignore_errors=True)
        os.replace(path, going)
        shutil.rmtree(going, ignore_errors=True)


def remove_unfinished(run_dir):
    """Remove what a run that was killed had begun to write or to remove."""
    for path in Path(run_dir).glob("checkpoints/*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def load_pretrained(path, model):
    """Weights alone into a model to train, as far as they fit. Returns a line that says what was taken and what not.

    Raises ValueError where path holds no weights, or none that fit.
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


# Every key of meta.json. Each may be missing: `load_weights` reads checkpoints that say less.
COUNT, SIZE, ID = whole_number(0), whole_number(1), or_null(TEXT)
META = dict(
    step=COUNT, place=COUNT, logged=COUNT, skipped=COUNT, model=ID, image_size=SIZE, L=SIZE, V=SIZE, num_classes=SIZE,
    in_dim=SIZE, features_count=SIZE, latents=TEXT, global_batch_size=SIZE, global_seed=COUNT, vae=ID, vae_sha256=ID,
    scaling_factor=or_null(real_number(1e-30)), encoder_sha256=ID, listing_sha256=ID, flip=ID, first_vectors_sha256=ID,
    data_path=ID, features_path=ID, precision=TEXT, lr=real_number(0), weight_decay=real_number(0),
    ema_decay=real_number(0), versions=(
        lambda value: isinstance(value, dict) and all(isinstance(one, str) for one in value.values()), "texts by name"))


def read_meta(path):
    """A checkpoint's meta.json. Raises ValueError, naming file and key, for a value of another kind than ours."""
    path = Path(path) / "meta.json"
    meta = read_json(path)
    check_values(path, meta, META)
    return meta


def run_checkpoints(run_dir):
    """The checkpoints of one run by step, oldest first. A name without .tmp is given to whole ones only."""
    return sorted((path for path in Path(run_dir).glob("checkpoints/*")
                   if re.fullmatch(r"[0-9]{7,}", path.name) and path.is_dir()), key=lambda path: int(path.name))


def damage(path, files=CHECKPOINT_FILES):
    """What is wrong with a checkpoint that was whole once, in words, "" where nothing is.

    A crash of the machine, or a copy that was cut off, leaves files short or missing: their frames tell, nothing large
    is read.

    Args:
        files: those that are wanted of it; one that was stripped of the others will do.
    """
    try:
        for name in files:
            if not (path / name).is_file():
                return f"{name} is missing"
            if name == "meta.json":
                meta = read_meta(path)
                unsaid = [key for key in RESUMED if "optimizer.pt" in files and key not in meta]
                if unsaid:
                    return f"meta.json does not say {unsaid[0]}"
            elif name.endswith(".safetensors"):
                with safe_open(path / name, framework="pt"):        # compares the header with the file's size
                    pass
            elif not zipfile.is_zipfile(path / name):               # a zip's directory is at its end
                return f"{name} is cut short"
    except SafetensorError as error:
        return f"{name} is cut short or overwritten: {error}"
    except (ValueError, OSError) as error:
        return str(error).replace(f"{path}{os.sep}", "")
    return ""


def newest_of_run(run_dir, files=CHECKPOINT_FILES):
    """The checkpoint of the highest step of a run, None where there is none.

    Raises ValueError where it is damaged (see `damage`), naming the one before it that is whole.
    """
    checkpoints = run_checkpoints(run_dir)
    if not checkpoints:
        return None
    reason = damage(checkpoints[-1], files)
    if reason:
        before = next((path for path in reversed(checkpoints[:-1]) if not damage(path, files)), None)
        raise ValueError(f"checkpoint {checkpoints[-1]} is damaged ({reason}): remove it; " + (
            f"the newest whole one before it is {before.name}" if before else "there is no whole one before it"))
    return checkpoints[-1]


def newest_checkpoint(results_dir, model, use_ema=True):
    """The newest checkpoint of a model (a name in DiT_models) under results_dir, a run or a folder of runs.

    Within a run it is the one of the highest step, since a copy may change the files' times; between runs, the one last
    written.

    Raises ValueError where there is none, or where its meta.json or the weights that are wanted are damaged.
    """
    runs, written = {}, {}
    for run in [Path(results_dir), *sorted(Path(results_dir).glob("*"))]:
        checkpoints = run_checkpoints(run)
        if checkpoints:
            meta = checkpoints[-1] / "meta.json"
            written[run] = (meta if meta.is_file() else checkpoints[-1]).stat().st_mtime
            runs[run] = "an unknown model (damaged)"
        for path in reversed(checkpoints):
            with contextlib.suppress(ValueError):                   # of a damaged one, the one before says the model
                runs[run] = read_meta(path).get("model")
                break
    of_model = [run for run, name in runs.items() if name == model]
    if not of_model:
        others = f" (there are some of {', '.join(sorted(set(map(str, runs.values()))))})" if runs else ""
        raise ValueError(f"no checkpoint of {model} under --results-dir {results_dir}{others}: train one with "
                         "train_diffusion.py first, or name one with --ckpt")
    weights = "ema.safetensors" if use_ema else "model.safetensors"
    return newest_of_run(max(of_model, key=written.get), ("meta.json", weights))


def weights_sha256(module):
    """A digest of a module's names and tensors: tells weights apart whatever their file is called."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_weights(path, use_ema=True):
    """A model's state dict, and its meta: that of a checkpoint of ours, and `weights`, which they are.

    These are "ema", "raw", or "as in the file", which does not say.

    Args:
        path: a checkpoint directory, or a `.pt` / `.pth` / `.safetensors` file.
        use_ema: the EMA weights rather than the raw ones, of a checkpoint that tells them apart.

    Raises ValueError where path is no such thing.
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
    plain = {key.replace("module.", "").replace("_orig_mod.", ""): value for key, value in weights.items()}
    if len(plain) < len(weights):
        raise ValueError(f"{path} holds tensors of one name twice, with and without module. or _orig_mod. before it")
    return plain, meta


def model_from_weights(weights, path):
    """The model whose state dict these are, in eval mode, and its name in DiT_models.

    Family, size, patch, L, V, classes and latent size are all read off the tensors' shapes, and all shapes compared
    before memory is taken for the model.

    Raises ValueError, naming path, where they are no model of ours.
    """
    def shape(name, ndim):
        if name not in weights or weights[name].ndim != ndim:
            raise ValueError(f"checkpoint {path} is not a DiT, DiTSEM or DiTCONT (no {name} of {ndim} dimensions)")
        return tuple(weights[name].shape)

    hidden_size, in_channels, patch_size, _ = shape("x_embedder.proj.weight", 4)
    # not by the highest number, which may be any
    depth = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
    arguments = dict(
        in_channels=in_channels, input_size=patch_size * math.isqrt(shape("pos_embed", 3)[1]),
        learn_sigma=shape("final_layer.linear.bias", 1)[0] == 2 * in_channels * patch_size**2)
    if "sem_embedder.embedding_table" in weights:
        family = "DiTSEM"
        L, rows, _ = shape("sem_embedder.embedding_table", 3)
        arguments.update(L=L, V=rows - 1)
    elif "y_embedder.fake_latent" in weights:
        family = "DiTCONT"
        arguments.update(in_dim=shape("y_embedder.fake_latent", 2)[1])
    else:
        family = "DiT"
        arguments.update(num_classes=shape("y_embedder.embedding_table.weight", 2)[0] - 1)
    for name, build in DiT_models.items():
        size = build.keywords
        if name.startswith(f"{family}-") and (size["hidden_size"], size["depth"], size["patch_size"]) == (
                hidden_size, depth, patch_size):
            break
    else:
        raise ValueError(f"checkpoint {path} is a {family} of depth {depth}, width {hidden_size}, patch {patch_size}, "
                         "which has no name in DiT_models")
    if min(value for key, value in arguments.items() if key != "learn_sigma") < 1:
        raise ValueError(f"checkpoint {path} does not fit {name}: by its shapes, "
                         + ", ".join(f"{key} is {value}" for key, value in arguments.items()))
    with torch.device("meta"):
        different = differences_from(build(**arguments).state_dict(), weights)
    if different:
        raise ValueError(f"checkpoint {path} does not fit {name}: it {different}")
    model = build(**arguments)
    model.load_state_dict(weights)
    return model.eval(), name


def info(path):
    """A checkpoint in words, a list of lines. Raises ValueError where path is none."""
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
    raw = load_weights(path, use_ema=False)[0]
    different = differences_from(weights, raw)
    if different:
        raise ValueError(f"{Path(path) / 'model.safetensors'} is not of the model that ema.safetensors is of: it "
                         f"{different}")
    with torch.no_grad():
        norms = [((ema - raw[name]).norm(), raw[name].norm()) for name, ema in weights.items()]
    difference = [apart / norm for apart, norm in norms if norm > 0] or [torch.tensor(0.0)]
    lines.append(f"EMA weights differ from the raw ones by {torch.stack(difference).mean():.2%} of their norm")
    return lines


def main():
    from dlc.cli import ArgumentParser
    parser = ArgumentParser("Say what a checkpoint is.", prog="python -m dlc.checkpoints")
    parser.add_argument("command", choices=["info"])
    parser.add_argument("path", help="checkpoint directory, .pt or .safetensors")
    args = parser.parse_args()
    with parser.one_line_errors():
        print("\n".join(one_line(line, 2000) for line in info(args.path)))


if __name__ == "__main__":
    main()
