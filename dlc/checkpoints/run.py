"""A run's checkpoints: written whole, listed, read back, and what is wrong with a damaged one.

A checkpoint of ours is a directory `checkpoints/{step:07d}/` of model.safetensors (the raw model), ema.safetensors
(float32), optimizer.pt and meta.json. It is written under another name and renamed, so one that has its name is whole.
Everything random in training is a function of (seed, position in the data), so there is no generator's state: meta.json
says the step and the place in the data, optimizer.pt holds the sums of the log's next line, too.
"""
import contextlib
import json
import os
import re
import shutil
import zipfile
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from dlc.checkpoints.tensor_files import check_tensors, differences_from, load_tensors, read_torch
from dlc.disk import TEXT, check_values, or_null, read_json, real_number, sync, whole_number

CHECKPOINT_FILES = ("model.safetensors", "ema.safetensors", "optimizer.pt", "meta.json")
RESUMED = ("step", "place", "logged", "skipped")        # keys of meta.json without which a run cannot continue
# Every key of meta.json. Each may be missing: `load_weights` reads checkpoints that say less.
COUNT, SIZE, ID = whole_number(0), whole_number(1), or_null(TEXT)
META = dict(
    step=COUNT, place=COUNT, logged=COUNT, skipped=COUNT, model=ID, image_size=SIZE, L=SIZE, V=SIZE, num_classes=SIZE,
    in_dim=SIZE, features_count=SIZE, latents=TEXT, global_batch_size=SIZE, global_seed=COUNT, vae=ID, vae_sha256=ID,
    scaling_factor=or_null(real_number(1e-30)), shift_factor=real_number(-1e30, 1e30), encoder_sha256=ID,
    listing_sha256=ID, flip=ID, first_vectors_sha256=ID,
    data_path=ID, features_path=ID, precision=TEXT, lr=real_number(0), weight_decay=real_number(0),
    ema_decay=real_number(0), versions=(
        lambda value: isinstance(value, dict) and all(isinstance(one, str) for one in value.values()), "texts by name"))


def read_meta(path):
    """A checkpoint's meta.json. Raises ValueError, naming file and key, for a value of another kind than ours."""
    path = Path(path) / "meta.json"
    meta = read_json(path)
    check_values(path, meta, META)
    return meta


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
    if hasattr(state, "full_tensor"):                   # of FSDP's
        together = state.full_tensor()
        return together.cpu() if keep else None
    return state


def sharded_like(tensor, other):
    """A tensor that every process has whole, sharded as `other` is, or as it is."""
    if not hasattr(other, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)


def load_checkpoint(path, model, ema, optimizer, scaler=None):
    """Read a checkpoint back into the objects that made it. Returns its sums.

    Raises ValueError, naming the file, where weights are damaged or not those of the model.
    """
    for module, name in ((model, "model"), (ema, "ema")):
        file, ours = path / f"{name}.safetensors", module.state_dict()
        weights = check_tensors(load_tensors(file), file)
        different = differences_from(ours, weights)
        if different:
            raise ValueError(f"{file} {different}")
        module.load_state_dict({key: sharded_like(weights[key], value) for key, value in ours.items()})
    state = read_torch(path / "optimizer.pt", "an optimizer's state")
    for group, own in zip(state["optimizer"]["param_groups"], optimizer.param_groups):
        group["fused"] = own["fused"]           # another precision may want it otherwise
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, moments in state["optimizer"]["state"].items():
        for key in ("exp_avg", "exp_avg_sq"):
            moments[key] = sharded_like(moments[key], parameters[index])
    optimizer.load_state_dict(state["optimizer"])
    if scaler and state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    return state["sums"] if state["sums"] is None else state["sums"].clone()      # not a view of the mapped file


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


def run_checkpoints(run_dir):
    """The checkpoints of one run by step, oldest first. A name without .tmp is given to whole ones only."""
    return sorted((path for path in Path(run_dir).glob("checkpoints/*")
                   if re.fullmatch(r"\d{7,}", path.name) and path.is_dir()), key=lambda path: int(path.name))


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
