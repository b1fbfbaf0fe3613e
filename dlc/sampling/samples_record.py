"""The folder of PNGs that one set of samples goes to, the files beside it, and samples.json: what made them."""

import datetime
import hashlib
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from dlc.machine.files import recorded_id, remove_temporaries, write_bytes, write_json
from dlc.machine.folder import ResumableFolder
from dlc.machine.part import WHOLE, Part
from dlc.machine.processes import versions
from dlc.machine.records import (
    OBJECT,
    SWITCH,
    TEXT,
    Record,
    differences,
    key,
    list_of,
    or_null,
    real_number,
    whole_number,
)
from dlc.nets.digest import weights_sha256
from dlc.sampling.pictures import missing_indices, npz_rows, png_path, write_npz

if TYPE_CHECKING:
    from accelerate import PartialState

    from dlc.sampling.conditions import Conditions
    from dlc.weights.meta import RunMeta

COUNT, SIZE = whole_number(0), whole_number(1)
CONDITIONS = lambda value: isinstance(value, dict) and isinstance(value.get("kind"), str), "an object with a kind"
NAMED = 64  # samples whose conditions are in the folder's name
# keys that older files lack: folders of sets for which they are null or empty keep their names
LATER = ("time_shift", "sampler_options", "guide")
SAID = ("source", "encoder_sha256", "sha256")  # keys of `conditions` on which no sample depends
GUIDE_SAID = ("checkpoint", "step", "weights")  # and of `guide`


@dataclass(frozen=True, kw_only=True)
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
    eta: float | None = key(or_null(real_number(0, 1)))  # null: the sampler has none; so, and below
    time_shift: float | None = key(or_null(real_number(0)), None)
    sampler_options: dict = key(OBJECT, {})  # all of its options that have no key of their own
    cfg_scale: float = key(real_number(1))
    cfg_channels: int = key(SIZE)
    t_min: float = key(real_number(0))
    t_max: float = key(real_number(0))
    # the weaker model or the head that guides, see `open_guide`; null: none
    guide: dict | None = key(or_null(OBJECT), None)
    precision: str = key(TEXT)
    tf32: bool = key(SWITCH)
    global_seed: int = key(COUNT)
    # the set: how many images, and the launches that drew some
    num_fid_samples: int = key(SIZE, decides=False)
    runs: list[dict] = key(list_of(OBJECT), decides=False)

    def settings(self) -> dict:
        def without(values, names):
            return values and {name: value for name, value in values.items() if name not in names}

        parts = dict(conditions=without(self.conditions, SAID), guide=without(self.guide, GUIDE_SAID))
        return super().settings() | parts


def short_digest(record: SamplesRecord, conditions: "Conditions") -> str:
    """Eight digits that tell sets apart: of all settings, and of what the first samples are drawn for.

    It does not depend on the number of samples, so that a set may grow.
    """
    settings = {
        name: value for name, value in record.settings().items() if name not in LATER or value not in (None, {})
    }
    decides = settings, conditions.digest(NAMED)
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:8]


def guidance_of(record: dict) -> str:
    """What samples are guided by, in words, by the keys of their samples.json."""
    words, guide = f"cfg {record.get('cfg_scale')}", record.get("guide")
    if not isinstance(guide, dict):
        return words
    return f"{words}, guide {guide.get('checkpoint', 'the intermediate head')} {guide.get('scale')}"


def weights_of(path: str | Path, model: torch.nn.Module, meta: "RunMeta") -> dict:
    """What a record says of weights that were drawn from, by key."""
    digest = weights_sha256(model)
    return dict(checkpoint=recorded_id(str(path)), weights_sha256=digest, step=meta.step, weights=meta.weights)


def this_launch(state: "PartialState", per_proc_batch_size: int, part: Part = WHOLE) -> dict:
    """The entry of `runs` for this launch, but for the number of images or shards that it draws."""
    return dict(
        command=sys.argv,
        date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        part=str(part),
        processes=state.num_processes,
        per_proc_batch_size=per_proc_batch_size,
        device=torch.cuda.get_device_name() if state.device.type == "cuda" else platform.processor() or "cpu",
        versions=versions(),
    )


class SampleFolder(ResumableFolder):
    """FOLDER/ of {index:06d}.png, and beside it FOLDER.npz, FOLDER.json, FOLDER.grid.png, FOLDER.progressive.png.

    FOLDER.json is the samples.json of the images in FOLDER.npz, by which these stay known when the PNGs are removed;
    then nothing is missing. An .npz stays until another of the same set replaces it. FOLDER.codes/: what a prior drew.

    Args:
        conditions: what the samples are drawn for, see CONDITIONINGS.
        part, batch: what this launch draws of all, in blocks; consecutive samples that are drawn together.
    """

    record_type, record_name, holds, files = SamplesRecord, "samples.json", "samples", ("*.png",)
    elsewhere, count, makes = "give another --sample-dir", "num_fid_samples", "images"

    def __init__(self, path: str | Path, conditions: "Conditions", part: Part = WHOLE, batch: int = 1):
        super().__init__(path, part)
        self.conditions, self.batch = conditions, batch
        self.block = -(-batch // conditions.block) * conditions.block
        self.npz, self.about, self.grid, self.strip, self.codes = (
            self.path.with_name(self.path.name + end)
            for end in (".npz", ".json", ".grid.png", ".progressive.png", ".codes")
        )

    def compare(self, record: SamplesRecord) -> SamplesRecord | None:
        """As its base; the .npz, too, is to hold nothing else."""
        earlier = super().compare(record)
        if not self.npz.exists():
            return earlier
        there = SamplesRecord.read(self.about) if self.about.is_file() else earlier
        if there is None:
            raise ValueError(
                f"{self.npz} is there, but no {self.about.name} to say what it holds: move it, or {self.elsewhere}"
            )
        self.refuse_others(self.npz, record, there)
        return earlier or there

    def difference(self, record: SamplesRecord, earlier: SamplesRecord) -> str:
        """As its base. Where the settings agree, the conditions of the samples that are there count."""
        different, drawn = record.difference(earlier), earlier.num_fid_samples
        if different or drawn > record.num_fid_samples:
            return different
        digest = record.conditions["sha256"] if drawn == record.num_fid_samples else self.conditions.digest(drawn)
        there = {"conditions.sha256": earlier.conditions.get("sha256")}
        return differences(there, {"conditions.sha256": digest})

    def missing(self, record: SamplesRecord, part: Part = WHOLE) -> list[int]:
        """The indices of the images to draw."""
        share = part.share(range(record.num_fid_samples), self.block)
        missing = missing_indices(self.path, share)
        return [] if len(missing) == len(share) and self.is_finished(record.num_fid_samples) else missing

    def is_finished(self, count: int) -> bool:
        """Whether the .npz is whole and of all images that were drawn so far, of which no PNG need be left."""
        if npz_rows(self.npz) != count or not self.about.is_file():
            return False
        return not self.record_path.is_file() or self.about.read_bytes() == self.record_path.read_bytes()

    def left(self) -> list[int]:
        """As its base. By their names, if some have none: each of many launches asks, on a network disk."""
        count, there = self.opened.num_fid_samples, {path.name for path in self.path.glob("*.png")}
        unnamed = [index for index in range(count) if png_path(self.path, index).name not in there]
        return unnamed if 0 < len(unnamed) < count else super().left()

    def clear(self) -> None:
        super().clear()
        remove_temporaries(self.path.parent, self.path.name + ".")

    def write_record(self, record: SamplesRecord) -> None:
        """Write samples.json with the condition of each sample."""
        values = self.conditions.values(np.arange(record.num_fid_samples)).tolist()
        write_json(self.record_path, {**record.to_json(), self.conditions.key: values})

    def finish(self, count: int, sheet: Callable | None = None) -> None:
        """Draw the contact sheet, write the .npz if all images are there, and release the lock."""
        with self.leaving() as whole:
            if sheet:
                sheet()
            if whole and not self.is_finished(count):
                write_npz(self.npz, self.path, count)
                write_bytes(self.about, self.record_path.read_bytes())
