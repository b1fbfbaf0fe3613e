"""The folder of PNGs that one set of samples goes to, and the files beside it."""

from pathlib import Path

import numpy as np

from dlc.machine.files import remove_temporaries, write_json
from dlc.machine.folder import ResumableFolder
from dlc.machine.records import differences
from dlc.sampling.pictures import missing_indices
from dlc.sampling.samples_record import SamplesRecord


class SampleFolder(ResumableFolder):
    """FOLDER/{index:06d}.png and FOLDER/samples.json; beside it FOLDER.npz, FOLDER.grid.png, FOLDER.progressive.png.

    If a prior draws the codes, FOLDER.codes/, too.

    Args:
        conditions: what the samples are drawn for, see CONDITIONINGS.
    """

    record_type, record_name, holds, files = SamplesRecord, "samples.json", "samples", ("*.png",)
    elsewhere, count, parts = "give another --sample-dir", "num_fid_samples", "images"

    def __init__(self, path: str | Path, conditions):
        super().__init__(path)
        self.conditions = conditions
        self.npz, self.grid, self.strip, self.codes = (
            self.path.with_name(self.path.name + end) for end in (".npz", ".grid.png", ".progressive.png", ".codes")
        )

    def missing(self, record: SamplesRecord) -> list[int]:
        """The indices of the images to draw."""
        remove_temporaries(self.path.parent, self.path.name + ".")
        return missing_indices(self.path, record.num_fid_samples)

    def difference(self, record: SamplesRecord, earlier: SamplesRecord) -> str:
        """See `ResumableFolder`. Where the settings agree, the conditions of the samples that are there count."""
        different, drawn = record.difference(earlier), earlier.num_fid_samples
        if different or drawn > record.num_fid_samples:
            return different
        digest = record.conditions["sha256"] if drawn == record.num_fid_samples else self.conditions.digest(drawn)
        there = {"conditions.sha256": earlier.conditions.get("sha256")}
        return differences(there, {"conditions.sha256": digest})

    def write_record(self, record: SamplesRecord) -> None:
        """Write samples.json with the condition of each sample, and remove the .npz, whose images are out of date."""
        self.npz.unlink(missing_ok=True)
        values = self.conditions.values(np.arange(record.num_fid_samples)).tolist()
        write_json(self.record_path, {**record.to_json(), self.conditions.key: values})
