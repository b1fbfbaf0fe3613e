"""The records beside our weights, and by them the checkpoints of a run: listed, chosen, and checked for damage.

config.json: the model's name, family and constructor arguments, and the process that it was trained on. The model is
rebuilt from these alone, so a new argument of a model needs no line here. meta.json: how far the run is, what a reader
of the weights must know about the latents and codes, and whatever else the trainer recorded.

A checkpoint is written under a temporary name that is then changed, so that one with its final name is whole.
"""

import contextlib
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from diffusion.process_table import Process, create_process
from dlc.data.listing import is_hidden
from dlc.machine.files import Damaged, folder_names, read_json
from dlc.machine.records import (
    OBJECT,
    TEXT,
    Record,
    differences,
    key,
    list_of,
    one_of,
    or_null,
    real_number,
    whole_number,
)
from dlc.weights.foreign.safe import RECORDABLE, check_tensors, differences_from, load_tensors
from models import Recorded, build_model
from prior import DLCPrior

OURS = "dlc-dit"  # the "format" of our config.json
CHECKPOINT_FILES = ("model.safetensors", "ema.safetensors", "optimizer.pt", "config.json", "meta.json")
# keys of meta.json that two models, or features, of the same latents and codes share
SAME_LATENTS = "image_size vae_sha256 scaling_factor shift_factor latents_mean latents_std encoder_sha256".split()
RESUMED = ("step", "place", "logged", "skipped")  # keys without which a run cannot continue

COUNT, SIZE, ID = or_null(whole_number(0)), or_null(whole_number(1)), or_null(TEXT)
PROCESS = (
    lambda value: (
        isinstance(value, dict) and isinstance(value.get("process"), str) and isinstance(value.get("arguments"), dict)
    ),
    "an object of process, a name, and arguments, an object",
)  # as `Process.config`
NUMBERS = or_null(list_of(real_number(-1e30, 1e30)))


#################################################################################
#                                  config.json                                  #
#################################################################################


@dataclass(frozen=True)
class ModelConfig(Record):
    """The keys of config.json."""

    model: str = key(TEXT)  # its name, for people
    family: str = key(TEXT)
    arguments: dict = key(OBJECT)
    process: dict = key(or_null(PROCESS))  # None: others' model, trained on the process that its family expects
    format: str = key(one_of(OURS), OURS)

    @property
    def built(self) -> dict:
        """As `models.build_model` takes it."""
        return dict(family=self.family, arguments=self.arguments)

    def build(self) -> torch.nn.Module:
        """The model without memory: its parameters are on the meta device, its buffers have their values.

        Raises ValueError for arguments that do not build a model.
        """
        try:
            return without_memory(lambda: build_model(self.built))
        except Exception as error:  # whatever a constructor raises for arguments that came from a file
            raise ValueError(f"{self.model} cannot be built from its config.json: {error}") from error

    def flat(self) -> dict:
        """What is trained, by key: the model's arguments by their names, those of the process after "process"."""
        process = self.process or dict(process=None, arguments={})
        arguments = {f"process {name}": value for name, value in process["arguments"].items()}
        return dict(self.arguments, model=self.model, family=self.family, process=process["process"], **arguments)

    def completed(self) -> "ModelConfig":
        """With the defaults of arguments that the model and its process got after this was written."""
        try:
            process = self.process and create_process(self.process["process"], **self.process["arguments"]).config
            arguments = {**self.build().config["arguments"], **self.arguments}
            return replace(self, arguments=plain(arguments, "argument"), process=process and plain(process, "process"))
        except Exception:  # another program recorded it: compared as it is
            return self

    def differences(self, here: "ModelConfig") -> str:
        """How the model and the process of another record differ from these, in words; "" where they do not."""
        there, here = self.flat(), here.flat()
        return differences(there, {**dict.fromkeys(there), **here})


def without_memory(build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """build() with its parameters on the meta device; with memory, if its constructor reads the values of parameters.

    Its buffers have their values either way.
    """
    from accelerate import init_empty_weights

    try:
        with init_empty_weights(include_buffers=False):
            model = build()
        if not any(buffer.is_meta for buffer in model.buffers()):
            return model
    except (NotImplementedError, RuntimeError) as error:  # what torch raises for values on that device
        if "meta" not in str(error):
            raise
    return build()


def config_of(name: str, model: torch.nn.Module, process: Process | None = None) -> ModelConfig:
    """What config.json says of a `Recorded` model, and the name that it has for people.

    Raises ValueError, naming the argument, for one that JSON does not hold, and if they do not build the same model.
    """
    config = ModelConfig(
        model=name,
        family=model.config["family"],
        arguments=plain(model.config["arguments"], f"{name}'s argument"),
        process=process and plain(process.config, f"{name}'s process:"),
    )
    values = dict(model.state_dict())
    for tensor, one in values.items():
        if torch.is_tensor(one):
            values[tensor] = torch.empty(0, dtype=one.dtype) if one.is_meta else one.detach().cpu().contiguous()
    try:
        check_tensors(values, name, RECORDABLE)
    except ValueError as error:
        raise ValueError(f"{error}, which a checkpoint cannot hold: register it with persistent=False") from None
    different = differences_from(model.state_dict(), config.build().state_dict())
    if different:
        raise ValueError(f"{name} is not what its recorded arguments build: what they build {different}")
    return config


def read_config(path: str | Path) -> ModelConfig | None:
    """The config.json of a folder, if it is one of ours. Raises ValueError, naming file and key, for a wrong value."""
    file = Path(path) / "config.json"
    if not file.is_file():
        return None
    values = read_json(file)
    return ModelConfig.from_json(values, file) if values.get("format") == OURS else None


def is_prior(path: str | Path) -> bool:
    """Whether a folder's config.json is that of a prior over codes. Raises ValueError as `read_config` does."""
    config = read_config(path)
    return config is not None and issubclass(Recorded.families.get(config.family, object), DLCPrior)


def plain(values: dict, what: str) -> dict:
    """values as JSON gives them back. Raises ValueError, naming `what` and the key, for what JSON does not hold."""
    for name, value in values.items():
        try:
            if json.loads(json.dumps(value, allow_nan=False)) != listed(value):
                raise ValueError("JSON gives it back as another value")
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{what} {name} is a {type(value).__name__}, which a checkpoint cannot record ({error}): "
                "make it a number, a text, a list or a dict of these"
            ) from None
    return json.loads(json.dumps(values))


def listed(value: object) -> object:
    """The value with lists in the place of tuples, as JSON has them."""
    if isinstance(value, dict):
        return {name: listed(one) for name, one in value.items()}
    return [listed(one) for one in value] if isinstance(value, (list, tuple)) else value


#################################################################################
#                                   meta.json                                   #
#################################################################################


@dataclass(frozen=True)
class RunMeta(Record):
    """The keys of meta.json. None means "not known", as of weights that come from others."""

    # how far: optimizer steps, global sample index, step of the log's last line, steps skipped since
    step: int | None = key(COUNT, None)
    place: int | None = key(COUNT, None)
    logged: int | None = key(COUNT, None)
    skipped: int | None = key(COUNT, None)
    # the share of the EMA that is still the random network that training began with; 0 after --pretrained-path
    ema_start: float | None = key(or_null(real_number(0, 1)), None)
    # images that the averages of --ema-lengths have seen, without those of skipped steps
    ema_images: int | None = key(COUNT, None)
    # what a reader of the weights needs
    image_size: int | None = key(SIZE, None)
    vae: str | None = key(ID, None)
    vae_sha256: str | None = key(ID, None)
    scaling_factor: float | None = key(or_null(real_number(1e-30)), None)
    shift_factor: float | None = key(or_null(real_number(-1e30, 1e30)), None)
    latents_mean: list[float] | None = key(NUMBERS, None)
    latents_std: list[float] | None = key(or_null(list_of(real_number(1e-30, 1e30))), None)
    encoder_sha256: str | None = key(ID, None)
    features_path: str | None = key(ID, None)
    data_path: str | None = key(ID, None)
    holdout: float | None = key(or_null(real_number(0, 1)), None)
    heldout_path: str | None = key(ID, None)
    # whatever else a trainer recorded: what a run is compared by, and what is only kept
    compared: dict = key(OBJECT, {})
    noted: dict = key(OBJECT, {})
    # not in the file: the model's name and process; which weights were read, "ema", "raw", or "as in the file"; from
    # what layout
    model: str | None = None
    process: dict | None = None
    weights: str | None = None
    layout: str | None = None

    @classmethod
    def of_run(cls, settings: dict, notes: dict, **progress) -> "RunMeta":
        """The meta of a run: `settings` decide what is trained, `notes` do not. Any key may be in either.

        Raises ValueError, naming the key, for a value that JSON does not hold.
        """
        settings, notes = plain(settings, "the setting"), plain(notes, "the note")
        own = {one.name for one in cls.keys().values()} - {"compared", "noted"}
        return cls(
            **{name: value for name, value in {**settings, **notes}.items() if name in own},
            compared={name: value for name, value in settings.items() if name not in own},
            noted={name: value for name, value in notes.items() if name not in own},
            **progress,
        )

    def to_json(self) -> dict:
        """What meta.json holds: every key but those that are not known."""
        return {name: value for name, value in super().to_json().items() if value is not None}

    def recorded(self) -> dict:
        """Everything that is known, by key, apart from how far the run is."""
        known = {name: value for name, value in self.to_json().items() if name not in (*RESUMED, "format_version")}
        return {**known.pop("compared", {}), **known.pop("noted", {}), **known}

    def differences(self, settings: dict) -> str:
        """How what is recorded differs from these values of some of its keys, in words; "" where it does not."""
        there = self.recorded()
        return differences({name: there.get(name) for name in settings}, plain(settings, "the setting"))


def read_meta(path: str | Path) -> RunMeta:
    """A checkpoint's meta.json. Raises ValueError, naming file and key, for one that `RunMeta.from_json` refuses."""
    return RunMeta.read(Path(path) / "meta.json")


#################################################################################
#                              Checkpoints of a run                             #
#################################################################################


def run_checkpoints(run_dir: str | Path, inside: str = "checkpoints") -> list[Path]:
    """The checkpoints of one run by step, oldest first, or those `inside` its best/. Only whole ones are named so.

    Raises OSError, naming the folder, if it cannot be listed.
    """
    folder = Path(run_dir) / inside
    paths = [folder / name for name in folder_names(folder) if re.fullmatch(r"[0-9]{7,}", name)]
    return sorted(filter(Path.is_dir, paths), key=lambda path: int(path.name))


def damage(path: Path, files: Sequence[str] = CHECKPOINT_FILES) -> str:
    """What is wrong with a checkpoint that was whole once, in words; "" if nothing is.

    A crash of the machine, or a copy that was cut off, leaves files short or missing. Headers and sizes show that: no
    tensor is read. Raises OSError for what cannot be read, and ValueError for a record that another program wrote:
    neither is damage.

    Args:
        files: the files that the caller needs; a checkpoint may have been stripped of the others.
    """
    for name in files:
        try:
            os.stat(path / name)
            if name == "meta.json":
                meta = read_meta(path)
                lacking = [key for key in RESUMED if getattr(meta, key) is None]
                if "optimizer.pt" in files and lacking:
                    return f"meta.json does not say {lacking[0]}"
            elif name == "config.json":
                if read_config(path) is None:
                    return "config.json was written by another program"
            else:
                load_tensors(path / name)
        except FileNotFoundError:
            return f"{name} is missing"
        except ValueError as error:  # of weights and states, also one that is empty, or zeros from its first byte on
            if name.endswith(".json") and not isinstance(error, Damaged):
                raise
            return str(error).replace(f"{path}{os.sep}", "")
    return ""


def newest_of_run(run_dir: str | Path, files: Sequence[str] = CHECKPOINT_FILES) -> Path | None:
    """The checkpoint of the highest step of a run; None if there is none.

    Raises ValueError if it is damaged (see `damage`), naming the newest whole one before it.
    """
    *others, newest = run_checkpoints(run_dir) or [None]
    reason = newest and damage(newest, files)
    if reason:
        before = next((path for path in reversed(others) if not damage(path, files)), None)
        raise ValueError(
            f"checkpoint {newest} is damaged ({reason}): remove it; "
            + (f"the newest whole one before it is {before.name}" if before else "there is no whole one before it")
        )
    return newest


def resume_point(
    run_dir: str | Path, config: ModelConfig, settings: dict, allow_change: bool
) -> tuple[Path | None, RunMeta, str]:
    """The checkpoint to resume a run from, its meta, and which settings, which may differ if allow_change is set, have
    changed since, in words. Without checkpoints that is None, the meta of step 0, and "".

    Raises ValueError if the folder holds another run, or if its newest checkpoint is damaged.
    """
    path = newest_of_run(run_dir, ["config.json", "meta.json"])
    if path is None:
        return None, RunMeta(step=0, place=0, logged=0, skipped=0, ema_start=1.0), ""
    meta = read_meta(path)
    different, changed = read_config(path).completed().differences(config), meta.differences(settings)
    if different:
        raise ValueError(f"{run_dir} holds another run: {different}; give another --results-dir")
    if changed and not allow_change:
        raise ValueError(
            f"{run_dir} holds another run: {changed}; give another --results-dir, or --allow-change to "
            "continue that one so"
        )
    newest_of_run(run_dir)
    return path, meta, changed


class NoCheckpoint(ValueError):
    """There is no checkpoint of a model where one was looked for."""


def only_run(results_dir: str | Path, fits: Callable[[Path], bool], what: str, script: str = "") -> Path:
    """The run of which a checkpoint fits, results_dir or one of its folders.

    what, script: what is looked for, and what trains it, for errors.

    Raises NoCheckpoint if there is none; ValueError, which lists them with their steps, if there are several.
    """
    runs, models = {}, set()
    folders = [name for name in folder_names(results_dir) if not is_hidden(name)]
    for run in map(Path(results_dir).joinpath, ["", *folders]):
        model = None
        for path in reversed([*run_checkpoints(run, "best"), *run_checkpoints(run)]):
            model = "an unknown model (damaged)"
            with contextlib.suppress(ValueError, AttributeError):  # if damaged, the one before it names the model
                model = read_config(path).model
                if fits(path):
                    runs[run] = path
                break
        models |= {model} - {None}
    if len(runs) > 1:
        listed = [f"{run} (step {int(path.name):,})" for run, path in runs.items()]
        more = f" and {len(listed) - 6} more" if len(listed) > 6 else ""
        raise ValueError(
            f"{len(runs)} runs under {results_dir} have a {what}: {', '.join(listed[:6])}{more}; name one of them"
        )
    if not runs:
        others = f" (there are some of {', '.join(sorted(models))})" if models else ""
        remedy = f"train one with {script} first, or name one with --ckpt"
        raise NoCheckpoint(f"no {what} under --results-dir {results_dir}{others}: {remedy}")
    return next(iter(runs))


def newest_checkpoint(results_dir: str | Path, model: str, use_ema: bool = True) -> Path:
    """The checkpoint of the highest step of the run of a model (a name in DiT_models): see `only_run`.

    Raises ValueError if its meta.json or the wanted weights are damaged.
    """
    what = f"checkpoint of {model}"
    run = only_run(results_dir, lambda path: read_config(path).model == model, what, "train_diffusion.py")
    return newest_of_run(run, ("config.json", "meta.json", f"{'ema' if use_ema else 'model'}.safetensors"))
