"""The keys of samples.json, which records what made the images of a folder."""

import datetime
import platform
import sys
from dataclasses import dataclass

import torch

from dlc.machine.processes import versions
from dlc.machine.records import OBJECT, SWITCH, TEXT, Record, key, list_of, or_null, real_number, whole_number

COUNT, SIZE = whole_number(0), whole_number(1)


CONDITIONS = (
    (lambda value: isinstance(value, dict) and isinstance(value.get("kind"), str)),
    "an object with a kind of conditions",
)
SAID = ("source", "encoder_sha256", "sha256")  # keys of `conditions` on which no sample depends


@dataclass(frozen=True)
class SamplesRecord(Record):
    """samples.json but for its last key, in which the conditioning lists what each sample is drawn for.

    That list, `labels`, `code_rows` or `vector_rows`, is for readers: this program compares the digest instead.
    """

    # the settings: two sets of images are alike only where all agree, but for names of where files lay
    model: str = key(TEXT)
    checkpoint: str = key(TEXT, decides=False)
    weights_sha256: str = key(TEXT)
    step: int | None = key(or_null(COUNT))  # null: a file of weights, which does not say
    weights: str = key(TEXT, decides=False)  # "ema", "model", or a key of a file
    conditions: dict = key(CONDITIONS)  # see `Conditions.recorded`, and with `sha256` the digest of all of them
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
    # the set: how many images, and the launches that drew some
    num_fid_samples: int = key(SIZE, decides=False)
    runs: list[dict] = key(list_of(OBJECT), decides=False)

    def settings(self) -> dict:
        """See `Record`."""
        conditions = {name: value for name, value in self.conditions.items() if name not in SAID}
        return {**super().settings(), "conditions": conditions}


def this_launch(state, per_proc_batch_size: int) -> dict:
    """The entry of `runs` for this launch, but for the number of images or shards that it draws."""
    return dict(
        command=sys.argv,
        date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        processes=state.num_processes,
        per_proc_batch_size=per_proc_batch_size,
        device=torch.cuda.get_device_name() if state.device.type == "cuda" else platform.processor() or "cpu",
        versions=versions(),
    )
