"""A run's checkpoints: written whole, and loaded.

A checkpoint is a directory `checkpoints/{step:07d}/` of model.safetensors (the raw model), ema.safetensors (float32),
optimizer.pt (with the sums of the log's next line), and the records of `dlc.weights.meta`. There is no RNG state, since
everything random in training is a function of (seed, global sample index): meta.json has the step and that index.
"""

import json
import os
import shutil
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from types import MappingProxyType
from typing import Any

import safetensors.torch
import torch

from dlc.machine.cli import one_line
from dlc.machine.files import Damaged, write_folder
from dlc.weights.foreign.safe import RECORDABLE, check_tensors, differences_from, load_tensors, read_torch
from dlc.weights.meta import ModelConfig, RunMeta, run_checkpoints


def save_checkpoint(
    run_dir: str | Path,
    config: ModelConfig,
    meta: RunMeta,
    *,
    ema: torch.nn.Module,
    model: torch.nn.Module | None = None,
    optimizers: Sequence[torch.optim.Optimizer] = (),
    scaler: torch.amp.GradScaler | None = None,
    more: Mapping[str, Mapping[str, torch.Tensor]] = MappingProxyType({}),
    sums: torch.Tensor | None = None,
    losses: Sequence[str] = (),
    write: bool = True,
) -> Path | None:
    """Write RESULTS/checkpoints/{meta.step:07d}/ whole or not at all. Returns its path, None if write is False.

    Args:
        model: None: nothing but the EMA weights and what they are is written, to RESULTS/best/, in the place of an
            earlier best.
        model, ema, optimizers: if they are sharded, every process must call this, since gathering them is collective.
        more: further tensors, by the name of their file and by their own: averages of --ema-lengths, a projector.
        sums: a tensor (processes, …): what each process has summed for the log since the last line.
        losses: the names of the terms that were summed.
        write: whether this process writes; True in one process only.

    Raises OSError, naming the checkpoint, if the disk does not take it; nothing is left of it then.
    """
    states = dict(ema=ema.state_dict(), **more) | ({} if model is None else dict(model=model.state_dict()))
    weights = {name: gather_full(state, write) for name, state in states.items()}
    states = [dict(gather_full(one.state_dict(), write), kind=type(one).__name__) for one in optimizers]
    if not write:
        return None
    rest = dict(optimizers=states, scaler=scaler.state_dict() if scaler else None, sums=sums, losses=list(losses))

    def fill(temporary):
        write_files(temporary, config, meta, weights)
        if model is not None:
            with open(temporary / "optimizer.pt", "wb") as file:  # of Python's, whose error says why it failed
                torch.save(rest, file)

    path = Path(run_dir) / ("best" if model is None else "checkpoints") / f"{meta.step:07d}"
    # one that is there was left by a run that was killed after this step
    write_folder(path, fill, "checkpoint ", path.with_name(f"{path.name}.tmp"))
    for other in run_checkpoints(run_dir, "best") if model is None else ():
        if other != path:
            shutil.rmtree(other, ignore_errors=True)
    return path


def write_files(folder: Path, config: ModelConfig, meta: RunMeta, weights: Mapping[str, dict]) -> None:
    """Write {name}.safetensors of the weights, config.json and meta.json into a folder that is not yet whole.

    safetensors wants tensors contiguous and each in memory of its own: tied ones are copied.
    """
    for file, state in weights.items():
        apart, taken = {}, set()
        for name, tensor in state.items():
            place = tensor.untyped_storage().data_ptr()
            apart[name] = tensor.clone(memory_format=torch.contiguous_format) if place in taken else tensor.contiguous()
            taken.add(place)
        safetensors.torch.save_file(apart, folder / f"{file}.safetensors", metadata=dict(format="pt"))
    for name, record in (("config", config), ("meta", meta)):
        (folder / f"{name}.json").write_text(json.dumps(record.to_json(), indent=1) + "\n")


def gather_full(state: Any, keep: bool = True) -> Any:
    """A state dict whose sharded tensors are gathered to full ones on the CPU.

    Every process must take part; those with keep=False get None in the place of each tensor.
    """
    if isinstance(state, dict):
        return {key: gather_full(value, keep) for key, value in state.items()}
    if hasattr(state, "full_tensor"):  # FSDP's DTensor
        full = state.full_tensor()
        return full.cpu() if keep else None
    return state


def distribute_like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A full tensor, sharded as `other` is; unchanged if `other` is not sharded."""
    if not hasattr(other, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)


def load_checkpoint(
    path: Path,
    *,
    model: torch.nn.Module,
    ema: torch.nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler | None = None,
    more: Mapping[str, Mapping[str, torch.Tensor]] = MappingProxyType({}),
) -> tuple[torch.Tensor | None, list[str]]:
    """Load a checkpoint into the objects that it was saved from, `more` too. Returns its sums and the losses' names.

    Raises ValueError, naming the checkpoint and the file, if it is damaged, or holds the state of another model or of
    other optimizers; OSError if it cannot be read.
    """
    try:
        for name, ours in dict(model=model.state_dict(), ema=ema.state_dict(), **more).items():
            file = path / f"{name}.safetensors"
            if name in more and not file.is_file():
                raise ValueError(
                    f"checkpoint {path} has no {file.name}: an average of --ema-lengths, or the projector of --align, "
                    "begins with its run; leave it out, or give another --results-dir"
                )
            weights = check_tensors(load_tensors(file), file, RECORDABLE)
            different = differences_from(ours, weights)
            if different:
                raise ValueError(
                    f"checkpoint {path} belongs to another model: {file.name} {different}. The model's code has "
                    "changed since: give another --results-dir to train this one from the start"
                )
            for key, value in ours.items():
                value.copy_(distribute_like(weights[key], value))
        state = _checked_state(path / "optimizer.pt")
        there = [_outline(one) for one in state["optimizers"]]
        here = [_outline(dict(one.state_dict(), kind=type(one).__name__)) for one in optimizers]
        if there != here:
            raise ValueError(
                f"checkpoint {path} holds the state of {' and '.join(there)}, but this program trains with "
                f"{' and '.join(here)}: give another --results-dir, or train the same parameters by the same optimizer"
            )
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            load_optimizer(optimizer, saved)
    except Damaged as error:
        reason = str(error).replace(f"{path}{os.sep}", "")
        raise ValueError(
            f"checkpoint {path} is damaged ({reason}): remove it to continue from the one before"
        ) from None
    if scaler and state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    return state["sums"], state["losses"]


def _checked_state(file: Path) -> dict:
    """What optimizer.pt holds. Raises ValueError for anything but what `save_checkpoint` wrote."""
    state = read_torch(file, "an optimizer's state")
    try:
        for saved in state["optimizers"]:
            for values in saved["state"].values():
                own = values.items() if isinstance(values, dict) else ()
                check_tensors({str(name): value for name, value in own if torch.is_tensor(value)}, file, RECORDABLE)
            _outline(saved)
        sums, losses = state["sums"], state.get("losses", [])  # which older files lack
        check_tensors({} if sums is None else dict(sums=sums), file)
        if sums is not None and (sums.ndim != 2 or not len(sums)):
            raise ValueError(f"its sums have shape {one_line(tuple(sums.shape), 60)}")
        return dict(state, scaler=state["scaler"], losses=[*map(str, losses)])
    except Damaged:
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:  # whatever the file holds
        raise Damaged(f"{file} is no optimizer's state ({one_line(repr(error), 100)})") from None


def _outline(saved: dict) -> str:
    """The optimizer that a state belongs to and its numbers of parameters, in words."""
    return f"{saved['kind']} of {' + '.join(str(len(group['params'])) for group in saved['param_groups'])} parameters"


def begin_groups(optimizer: torch.optim.Optimizer) -> None:
    """Note in each group, as "initial", what it begins with: what the optimizer changes of it is part of its state."""
    for group in optimizer.param_groups:
        group["initial"] = {name: deepcopy(value) for name, value in group.items() if name != "params"}


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Load an optimizer's state, whatever it holds, by parameter index. Hyperparameters stay those of this launch,
    but for those that the optimizer itself had changed (see `begin_groups`).

    What has its parameter's shape is sharded as the parameter is; other tensors are the same in each process.
    """
    groups = optimizer.state_dict()["param_groups"]
    for group, before in zip(groups, saved["param_groups"]):
        for name, value in before.get("initial", {}).items():
            if name != "lr" and name in group and not same(before.get(name), value):
                group[name] = before[name]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def placed(index, value):
        alike = isinstance(value, torch.Tensor) and value.shape == parameters[index].shape
        return distribute_like(value, parameters[index]) if alike else value

    state = {
        index: {key: placed(index, value) for key, value in values.items()}
        if isinstance(values, dict) and index in range(len(parameters))
        else values
        for index, values in saved["state"].items()
    }
    rest = {name: value for name, value in saved.items() if name != "kind"}
    optimizer.load_state_dict(dict(rest, state=state, param_groups=groups))


def unrecordable(state: Any) -> str:
    """What of an optimizer's state a checkpoint would not give back, in words; "" if nothing is."""
    if isinstance(state, torch.Tensor):
        return "" if state.dtype in RECORDABLE else f"a tensor of type {state.dtype}"
    if type(state) in (dict, list, tuple, OrderedDict):
        parts = [*state, *state.values()] if isinstance(state, dict) else state
        return next(filter(None, map(unrecordable, parts)), "")
    return "" if state is None or type(state) in (bool, int, float, str) else f"a {type(state).__name__}"


def same(one: Any, other: Any) -> bool:
    """Whether two values of a group, which may be tensors, are equal."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and bool((one.cpu() == other.cpu()).all())
    return type(one) is type(other) and one == other


def remove_old_checkpoints(run_dir: str | Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints of a run. Each is renamed first: half removed, it is not whole."""
    for path in run_checkpoints(run_dir)[:-keep]:
        going = path.with_name(f"{path.name}.tmp")
        shutil.rmtree(going, ignore_errors=True)
        os.replace(path, going)
        shutil.rmtree(going, ignore_errors=True)


def remove_unfinished(run_dir: str | Path) -> None:
    """Remove checkpoints that a killed run was writing or removing."""
    for path in (one for folder in ("checkpoints", "best") for one in Path(run_dir).glob(f"{folder}/*.tmp")):
        shutil.rmtree(path, ignore_errors=True)
