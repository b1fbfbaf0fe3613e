"""The records beside our weights: config.json, what the model is, and meta.json, what it was trained on.

config.json: the model's name, family and constructor arguments, and the process that it was trained on. The model is
rebuilt from these alone, so a new argument of a model needs no line here. meta.json: how far the run is, what a reader
of the weights must know about the latents and codes, and whatever else the trainer recorded.
"""

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from diffusion.process_table import Process, create_process
from dlc.machine.files import read_json
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
from dlc.weights.foreign.safe import RECORDABLE, differences_from, in_words, tensor_fault
from models import Recorded, build_model
from prior import DLCPrior

OURS = "dlc-dit"  # the "format" of our config.json
RESUMED = ("step", "place", "logged", "skipped")  # keys without which a run cannot continue

COUNT, SIZE, ID = or_null(whole_number(0)), or_null(whole_number(1)), or_null(TEXT)
PROCESS = (
    lambda value: (
        isinstance(value, dict)
        and isinstance(value.get("process"), str)
        and "arguments" in value
        and isinstance(value["arguments"], dict)
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

    with contextlib.suppress(NotImplementedError, RuntimeError):  # what torch raises for values on that device
        with init_empty_weights(include_buffers=False):
            model = build()
        if not any(buffer.is_meta for buffer in model.buffers()):
            return model
    return build()


def config_of(name: str, model: torch.nn.Module, process: Process | None = None) -> ModelConfig:
    """What config.json says of a model, checked: the same model can be built from it.

    Args:
        name: the model's, for people.
        model: a `Recorded`.
        process: as `diffusion.process_table.create_process` makes it.

    Raises ValueError, naming the argument, for one that JSON does not hold, or if the arguments do not build the model.
    """
    config = ModelConfig(
        model=name,
        family=model.config["family"],
        arguments=plain(model.config["arguments"], f"{name}'s argument"),
        process=process and plain(process.config, f"{name}'s process:"),
    )
    for tensor, value in model.state_dict().items():
        fault = unrecordable(value)
        if fault:
            raise ValueError(
                f"{name}'s {tensor} {fault}, which a checkpoint cannot hold: register it with persistent=False"
            )
    different = differences_from(model.state_dict(), config.build().state_dict())
    if different:
        raise ValueError(f"{name} is not what its recorded arguments build: what they build {different}")
    return config


def unrecordable(value: object) -> str | None:
    """Why a checkpoint cannot hold a value of a model's state dict, in words, or None."""
    if not isinstance(value, torch.Tensor):
        return f"is {in_words(value)}"
    if value.is_meta:
        return None if value.dtype in RECORDABLE else f"is of type {value.dtype}"
    return tensor_fault(value.detach().cpu().contiguous(), RECORDABLE)


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

    def missing(self) -> str | None:
        """The first key that a run cannot continue without and that is not recorded."""
        return next((name for name in RESUMED if getattr(self, name) is None), None)


def read_meta(path: str | Path) -> RunMeta:
    """A checkpoint's meta.json. Raises ValueError, naming file and key, for one that `RunMeta.from_json` refuses."""
    return RunMeta.read(Path(path) / "meta.json")
