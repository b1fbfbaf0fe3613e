"""meta.json: what a checkpoint says of itself. `RunMeta` owns every key; nothing else in the program spells one.

Version 0 has no format_version, and any of its keys may be missing: such a field is None, which means "not recorded".
From version 1 on, a key that its version has is missing only by damage, which is an error. A key that came later gets
the default that `from_json` states for it.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from dlc.disk import (
    SWITCH,
    TEXT,
    check_values,
    differences,
    list_of,
    one_of,
    or_null,
    read_json,
    real_number,
    whole_number,
)

FORMAT_VERSION = 2  # 2 added latents_mean and latents_std, and the keys of priors
RESUMED = ("step", "place", "logged", "skipped")  # keys without which a run cannot continue

COUNT, SIZE, ID = whole_number(0), whole_number(1), or_null(TEXT)
VERSIONS = (
    lambda value: isinstance(value, dict) and all(isinstance(text, str) for text in value.values()),
    "texts by name",
)


def key(kind, since=0, optional=False):
    """A field that is a key of meta.json.

    Args:
        kind: of its value, as `check_values` takes it.
        since: the format version that introduced it.
        optional: written only where it applies, such as V only where there are codes.
    """
    return dataclasses.field(default=None, metadata=dict(kind=kind, since=since, optional=optional))


@dataclass(frozen=True)
class RunMeta:
    """The keys of meta.json, in the order in which they are written. Another kind of trainer may add its own."""

    format_version: int = key(whole_number(1), since=1)
    # what is trained: a run with other values is another run
    model: str | None = key(ID)
    image_size: int | None = key(or_null(SIZE))
    L: int | None = key(SIZE, optional=True)
    V: int | None = key(SIZE, optional=True)
    code_init: str | None = key(one_of("unit", "dlc"), since=1, optional=True)
    num_classes: int | None = key(SIZE, optional=True)
    in_dim: int | None = key(SIZE, optional=True)
    shared_embedding: bool | None = key(SWITCH, since=2, optional=True)  # of a prior, as the next two
    scale_by_sigma: bool | None = key(SWITCH, since=2, optional=True)
    time_conditioning: bool | None = key(SWITCH, since=2, optional=True)
    # on what: a run continues with other values only by --allow-change
    features_count: int | None = key(SIZE)
    latents: str | None = key(ID)  # a kind of latents, or "images"
    global_batch_size: int | None = key(SIZE)
    global_seed: int | None = key(COUNT)
    vae_sha256: str | None = key(ID)
    scaling_factor: float | None = key(or_null(real_number(1e-30)))
    shift_factor: float | None = key(or_null(real_number(-1e30, 1e30)), since=1)
    latents_mean: list[float] | None = key(or_null(list_of(real_number(-1e30, 1e30))), since=2)
    latents_std: list[float] | None = key(or_null(list_of(real_number(1e-30, 1e30))), since=2)
    encoder_sha256: str | None = key(ID)
    listing_sha256: str | None = key(ID)
    flip: str | None = key(ID)
    masking: str | None = key(one_of("independent", "counted"), since=2, optional=True)  # of a prior, as the next two
    score_entropy: bool | None = key(SWITCH, since=2, optional=True)
    holdout: float | None = key(real_number(0, 1), since=2, optional=True)
    heldout_path: str | None = key(ID, since=2, optional=True)
    first_vectors_sha256: str | None = key(ID)
    # how far: optimizer steps, global sample index, step of the log's last line, steps skipped since
    step: int | None = key(COUNT)
    place: int | None = key(COUNT)
    logged: int | None = key(COUNT)
    skipped: int | None = key(COUNT)
    # where from and how: recorded, never compared
    vae: str | None = key(ID)
    data_path: str | None = key(ID, optional=True)
    features_path: str | None = key(ID, optional=True)
    dropout: float | None = key(real_number(0, 1), since=2, optional=True)  # of a prior
    precision: str | None = key(TEXT)
    lr: float | None = key(real_number(0))
    weight_decay: float | None = key(real_number(0))
    ema_decay: float | None = key(real_number(0))
    versions: dict[str, str] | None = key(VERSIONS)
    # not in the file: which weights of the checkpoint were read, "ema", "raw", or "as in the file"; from what layout
    weights: str | None = None
    layout: str | None = None

    @classmethod
    def from_json(cls, values: dict, where) -> "RunMeta":
        """Read a dict. Raises ValueError, naming where and the key, for a value that is missing or not of its kind."""
        keys = json_keys()
        check_values(where, values, {name: field["kind"] for name, field in keys.items()})
        version = values.get("format_version", 0)
        if version > FORMAT_VERSION:
            raise ValueError(f"{where} is of format {version}, this program knows up to {FORMAT_VERSION}: update it")
        needed = [
            name for name, field in keys.items() if version and field["since"] <= version and not field["optional"]
        ]
        check_values(where, values, {name: keys[name]["kind"] for name in needed}, needed)
        values = {name: value for name, value in values.items() if name in keys}
        if version < 1:
            values.setdefault("shift_factor", 0.0)  # of all VAEs that were taken then
            if "V" in values:
                values.setdefault("code_init", "unit")  # the only start that there was
        return cls(**values)

    def to_json(self) -> dict:
        """What meta.json holds: every key, optional ones only where they apply."""
        values = dict(dataclasses.asdict(self), format_version=FORMAT_VERSION)
        return {
            name: values[name]
            for name, field in json_keys().items()
            if values[name] is not None or not field["optional"]
        }

    def differences(self, settings: dict) -> str:
        """How the checkpoint differs from these values of some of its keys, in words; "" where it does not."""
        return differences(dataclasses.asdict(self), settings)

    def missing(self) -> str | None:
        """The first key that a run cannot continue without and that is not recorded."""
        return next((name for name in RESUMED if getattr(self, name) is None), None)


def json_keys() -> dict[str, dict]:
    """The keys of meta.json: kind, since and optional by name."""
    return {field.name: field.metadata for field in dataclasses.fields(RunMeta) if field.metadata}


def read_meta(path) -> RunMeta:
    """A checkpoint's meta.json. Raises ValueError, naming file and key, for one that `RunMeta.from_json` refuses."""
    path = Path(path) / "meta.json"
    return RunMeta.from_json(read_json(path), path)
