"""meta.json: what a checkpoint says of itself. `RunMeta` owns every key; nothing else in the program spells one.

None means that a key does not apply, or is not recorded.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from dlc.machine.records import (
    SWITCH,
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

RESUMED = ("step", "place", "logged", "skipped")  # keys without which a run cannot continue

COUNT, SIZE, ID = whole_number(0), whole_number(1), or_null(TEXT)
VERSIONS = (
    lambda value: isinstance(value, dict) and all(isinstance(text, str) for text in value.values()),
    "texts by name",
)


@dataclass(frozen=True)
class RunMeta(Record):
    """The keys of meta.json, in the order in which they are written. Another kind of trainer may add its own."""

    # what is trained: a run with other values is another run
    model: str | None = key(ID, None)
    image_size: int | None = key(or_null(SIZE), None)
    L: int | None = key(SIZE, None)
    V: int | None = key(SIZE, None)
    code_init: str | None = key(one_of("unit", "dlc"), None)
    num_classes: int | None = key(SIZE, None)
    in_dim: int | None = key(SIZE, None)
    shared_embedding: bool | None = key(SWITCH, None)  # of a prior, as the next two
    scale_by_sigma: bool | None = key(SWITCH, None)
    time_conditioning: bool | None = key(SWITCH, None)
    # on what: a run continues with other values only by --allow-change
    features_count: int | None = key(SIZE, None)
    latents: str | None = key(ID, None)  # a kind of latents, or "images"
    global_batch_size: int | None = key(SIZE, None)
    global_seed: int | None = key(COUNT, None)
    vae_sha256: str | None = key(ID, None)
    scaling_factor: float | None = key(or_null(real_number(1e-30)), None)
    shift_factor: float | None = key(or_null(real_number(-1e30, 1e30)), None)
    latents_mean: list[float] | None = key(or_null(list_of(real_number(-1e30, 1e30))), None)
    latents_std: list[float] | None = key(or_null(list_of(real_number(1e-30, 1e30))), None)
    encoder_sha256: str | None = key(ID, None)
    listing_sha256: str | None = key(ID, None)
    flip: str | None = key(ID, None)
    # of a prior
    masking: str | None = key(one_of("independent", "counted"), None)
    score_entropy: bool | None = key(SWITCH, None)
    holdout: float | None = key(real_number(0, 1), None)
    heldout_path: str | None = key(ID, None)
    eval_levels: int | None = key(SIZE, None)
    dropout: float | None = key(real_number(0, 1), None)
    label_dropout: float | None = key(real_number(0, 1), None)
    first_vectors_sha256: str | None = key(ID, None)
    # how far: optimizer steps, global sample index, step of the log's last line, steps skipped since
    step: int | None = key(COUNT, None)
    place: int | None = key(COUNT, None)
    logged: int | None = key(COUNT, None)
    skipped: int | None = key(COUNT, None)
    # where from and how: a run may continue with other values
    vae: str | None = key(ID, None)
    data_path: str | None = key(ID, None)
    features_path: str | None = key(ID, None)
    precision: str | None = key(TEXT, None)
    lr: float | None = key(real_number(0), None)
    weight_decay: float | None = key(real_number(0), None)
    ema_decay: float | None = key(real_number(0), None)
    ema_warmup: bool | None = key(or_null(SWITCH), None)
    warmup_steps: int | None = key(or_null(COUNT), None)
    grad_clip: float | None = key(or_null(real_number(0)), None)
    versions: dict[str, str] | None = key(VERSIONS, None)
    # not in the file: which weights of the checkpoint were read, "ema", "raw", or "as in the file"; from what layout
    weights: str | None = None
    layout: str | None = None

    def to_json(self) -> dict:
        """What meta.json holds: the keys that apply."""
        return {name: value for name, value in super().to_json().items() if value is not None}

    def differences(self, settings: dict) -> str:
        """How the checkpoint differs from these values of some of its keys, in words; "" where it does not."""
        return differences(dataclasses.asdict(self), settings)

    def missing(self) -> str | None:
        """The first key that a run cannot continue without and that is not recorded."""
        return next((name for name in RESUMED if getattr(self, name) is None), None)


def read_meta(path) -> RunMeta:
    """A checkpoint's meta.json. Raises ValueError, naming file and key, for one that `RunMeta.from_json` refuses."""
    return RunMeta.read(Path(path) / "meta.json")
