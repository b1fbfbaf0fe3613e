"""meta.json: what a checkpoint says of itself. `RunMeta` owns every key; nothing else in the program spells one.

Version 0 has no format_version, and any of its keys may be missing: such a field is None, which means "not recorded".
From version 1 on, a key that its version has is missing only by damage, which is an error. A key that came later is
None, or what `from_json` says.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from dlc.machine.files import SWITCH, TEXT, differences, list_of, one_of, or_null, real_number, whole_number
from dlc.machine.records import Record, key

RESUMED = ("step", "place", "logged", "skipped")  # keys without which a run cannot continue

COUNT, SIZE, ID = whole_number(0), whole_number(1), or_null(TEXT)
VERSIONS = (
    lambda value: isinstance(value, dict) and all(isinstance(text, str) for text in value.values()),
    "texts by name",
)


@dataclass(frozen=True)
class RunMeta(Record):
    """The keys of meta.json, in the order in which they are written. Another kind of trainer may add its own."""

    FORMAT = 3  # 2 added latents_mean and latents_std, and the keys of priors; 3 flags that decide a run
    OLDEST = 0

    # what is trained: a run with other values is another run
    model: str | None = key(ID, None)
    image_size: int | None = key(or_null(SIZE), None)
    L: int | None = key(SIZE, None, needed=False)
    V: int | None = key(SIZE, None, needed=False)
    code_init: str | None = key(one_of("unit", "dlc"), None, needed=False)
    num_classes: int | None = key(SIZE, None, needed=False)
    in_dim: int | None = key(SIZE, None, needed=False)
    shared_embedding: bool | None = key(SWITCH, None, since=2, needed=False)  # of a prior, as the next two
    scale_by_sigma: bool | None = key(SWITCH, None, since=2, needed=False)
    time_conditioning: bool | None = key(SWITCH, None, since=2, needed=False)
    # on what: a run continues with other values only by --allow-change
    features_count: int | None = key(SIZE, None)
    latents: str | None = key(ID, None)  # a kind of latents, or "images"
    global_batch_size: int | None = key(SIZE, None)
    global_seed: int | None = key(COUNT, None)
    vae_sha256: str | None = key(ID, None)
    scaling_factor: float | None = key(or_null(real_number(1e-30)), None)
    shift_factor: float | None = key(or_null(real_number(-1e30, 1e30)), None)
    latents_mean: list[float] | None = key(or_null(list_of(real_number(-1e30, 1e30))), None, since=2)
    latents_std: list[float] | None = key(or_null(list_of(real_number(1e-30, 1e30))), None, since=2)
    encoder_sha256: str | None = key(ID, None)
    listing_sha256: str | None = key(ID, None)
    flip: str | None = key(ID, None)
    # of a prior
    masking: str | None = key(one_of("independent", "counted"), None, since=2, needed=False)
    score_entropy: bool | None = key(SWITCH, None, since=2, needed=False)
    holdout: float | None = key(real_number(0, 1), None, since=2, needed=False)
    heldout_path: str | None = key(ID, None, since=2, needed=False)
    eval_levels: int | None = key(SIZE, None, since=3, needed=False)
    dropout: float | None = key(real_number(0, 1), None, since=2, needed=False)
    label_dropout: float | None = key(real_number(0, 1), None, since=3, needed=False)
    first_vectors_sha256: str | None = key(ID, None)
    # how far: optimizer steps, global sample index, step of the log's last line, steps skipped since
    step: int | None = key(COUNT, None)
    place: int | None = key(COUNT, None)
    logged: int | None = key(COUNT, None)
    skipped: int | None = key(COUNT, None)
    # where from and how: a run may continue with other values
    vae: str | None = key(ID, None)
    data_path: str | None = key(ID, None, needed=False)
    features_path: str | None = key(ID, None, needed=False)
    precision: str | None = key(TEXT, None)
    lr: float | None = key(real_number(0), None)
    weight_decay: float | None = key(real_number(0), None)
    ema_decay: float | None = key(real_number(0), None)
    ema_warmup: bool | None = key(or_null(SWITCH), None, since=3)
    warmup_steps: int | None = key(or_null(COUNT), None, since=3)
    grad_clip: float | None = key(or_null(real_number(0)), None, since=3)
    versions: dict[str, str] | None = key(VERSIONS, None)
    # not in the file: which weights of the checkpoint were read, "ema", "raw", or "as in the file"; from what layout
    weights: str | None = None
    layout: str | None = None

    @classmethod
    def from_json(cls, values: dict, where, also_needed=()) -> "RunMeta":
        """See `Record`. What a file of an older format does not say had one value then, or has the flag's default."""
        version, known = values.get("format_version", 0), {}
        if version == 0:
            known = dict(shift_factor=0.0, **(dict(code_init="unit") if "V" in values else {}))
        if version == 2 and "masking" in values and values.get("num_classes"):  # of a prior
            known["label_dropout"] = 0.1
        if version == 2 and (values.get("holdout") or values.get("heldout_path")):
            known["eval_levels"] = 8
        values = {**known, **values}
        return super().from_json(values, where, also_needed)

    def to_json(self) -> dict:
        """What meta.json holds: every key, those that are not needed only where they apply."""
        keys = self.keys()
        return {
            name: value
            for name, value in super().to_json().items()
            if name not in keys or keys[name].metadata["needed"] or value is not None
        }

    def differences(self, settings: dict) -> str:
        """How the checkpoint differs from these values of some of its keys, in words; "" where it does not."""
        return differences(dataclasses.asdict(self), settings)

    def missing(self) -> str | None:
        """The first key that a run cannot continue without and that is not recorded."""
        return next((name for name in RESUMED if getattr(self, name) is None), None)


def read_meta(path) -> RunMeta:
    """A checkpoint's meta.json. Raises ValueError, naming file and key, for one that `RunMeta.from_json` refuses."""
    return RunMeta.read(Path(path) / "meta.json")
