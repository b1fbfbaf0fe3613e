"""samples.json, which says what made the images of a folder: every key of it, with the format that introduced it."""

import datetime
import platform
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

from dlc.disk import SWITCH, TEXT, check_values, differences, list_of, or_null, read_json, real_number, whole_number
from dlc.runtime import versions

FORMAT = 3  # 1 had no format_version, and no vectors; 2 no prior
COUNT, SIZE = whole_number(0), whole_number(1)
OBJECT = (lambda value: isinstance(value, dict)), "an object"


def key(kind, *, since: int = 1, decides: bool = True, **default):
    """A key of samples.json: the kind of its value, its first format, and whether the images depend on it."""
    return field(metadata=dict(kind=kind, since=since, decides=decides), **default)


@dataclass(frozen=True)
class SamplesRecord:
    """samples.json but for its last key, in which the conditioning lists what each sample is drawn for.

    That list, `labels`, `code_rows` (both since format 1) or `vector_rows` (since 2), is for readers: this program
    compares `conditions_sha256` instead.
    """

    # the settings: two sets of images are alike only where all agree, but for names of where files lay
    model: str = key(TEXT)
    checkpoint: str = key(TEXT, decides=False)
    weights_sha256: str = key(TEXT)
    step: int | None = key(or_null(COUNT))  # null: a file of weights, which does not say
    weights: str = key(TEXT, decides=False)  # "ema", "model", or a key of a file
    conditions: str = key(TEXT)
    image_size: int = key(SIZE)
    vae: str = key(TEXT, decides=False)
    vae_sha256: str = key(TEXT)
    vae_precision: str = key(TEXT)
    sampler: str = key(TEXT)
    num_sampling_steps: int = key(SIZE)
    eta: float | None = key(or_null(real_number(0, 1)))  # null: the sampler has none
    cfg_scale: float = key(real_number(1))
    cfg_channels: int = key(SIZE)
    t_min: int = key(COUNT)
    t_max: int = key(COUNT)
    precision: str = key(TEXT)
    tf32: bool = key(SWITCH)
    global_seed: int = key(COUNT)
    # the set: how many images, the digest of what all of them are drawn for, and the launches that drew some
    num_fid_samples: int = key(SIZE, decides=False)
    conditions_sha256: str = key(TEXT, decides=False)
    runs: list[dict] = key(list_of(OBJECT), decides=False)
    prior: dict | None = key(or_null(OBJECT), since=3, default=None)  # all that decides codes that a prior drew

    @classmethod
    def read(cls, path: Path) -> "SamplesRecord":
        """The record in a samples.json. Raises ValueError, naming file and key, for a value that is missing or no such.

        A file without format_version is of format 1.
        """
        values = read_json(path)
        version = values.get("format_version", 1)
        check_values(path, dict(format_version=version), dict(format_version=SIZE))
        if version > FORMAT:
            raise ValueError(
                f"{path} has format_version {version}, of a newer version of this program, which knows "
                f"{FORMAT}: give another --sample-dir"
            )
        kinds = {one.name: one.metadata["kind"] for one in fields(cls) if one.metadata["since"] <= version}
        check_values(path, values, kinds, needed=kinds)
        return cls(**{name: values[name] for name in kinds})

    def to_json(self) -> dict:
        return dict(format_version=FORMAT, **asdict(self))

    def difference(self, there: "SamplesRecord") -> str:
        """How the settings of another record differ from these, in words; "" where the images would be alike."""
        here = {one.name: getattr(self, one.name) for one in fields(self) if one.metadata["decides"]}
        return differences(asdict(there), here)


def this_launch(state, per_proc_batch_size: int) -> dict:
    """What an entry of `runs` says of this launch, but for `images`, how many it draws."""
    return dict(
        command=sys.argv,
        date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        processes=state.num_processes,
        per_proc_batch_size=per_proc_batch_size,
        device=torch.cuda.get_device_name() if state.device.type == "cuda" else platform.processor() or "cpu",
        versions=versions(),
    )
