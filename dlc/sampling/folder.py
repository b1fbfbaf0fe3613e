"""The folder of PNGs that one set of samples goes to, and the files beside it."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from dlc.machine.files import DirectoryLock, differences, remove_temporaries, write_json
from dlc.sampling.files import missing_indices
from dlc.sampling.record import SamplesRecord


class SampleFolder:
    """FOLDER/{index:06d}.png and FOLDER/samples.json; beside it FOLDER.npz, FOLDER.grid.png, FOLDER.progressive.png.

    If a prior draws the codes, FOLDER.codes/, too.
    """

    def __init__(self, path: Path):
        self.path, self.lock = path, DirectoryLock(path)
        self.npz, self.grid, self.strip, self.codes = (
            path.with_name(path.name + end) for end in (".npz", ".grid.png", ".progressive.png", ".codes")
        )

    def open(self, record: SamplesRecord, conditions, launch: dict) -> list[int]:
        """Lock the folder for the samples of a record, and note in samples.json that a launch is about to draw some.

        Returns the indices of the missing ones. Raises ValueError where another launch has the folder, or where it
        holds samples of other settings or conditions, or more of them.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock.acquire()
        try:
            earlier = self.compare_with_earlier(record, conditions)
        except ValueError:
            self.lock.release()
            raise
        remove_temporaries(self.path)
        remove_temporaries(self.path.parent, self.path.name + ".")
        count = record.num_fid_samples
        missing = missing_indices(self.path, count)
        if missing or earlier is None:
            self.npz.unlink(missing_ok=True)  # it is of fewer images, or of some that are gone
            runs = [*(earlier.runs if earlier else []), dict(launch, images=len(missing))]
            write_json(
                self.path / "samples.json",
                {**replace(record, runs=runs).to_json(), conditions.key: conditions.values(np.arange(count)).tolist()},
            )
        return missing

    def compare_with_earlier(self, record: SamplesRecord, conditions) -> SamplesRecord | None:
        """The record of the images that are in the folder already, None where there are none.

        Raises ValueError where they are not of these settings and conditions, or are more.
        """
        path, count = self.path / "samples.json", record.num_fid_samples
        if not path.is_file():
            if any(self.path.glob("*.png")):
                raise ValueError(
                    f"{self.path} holds images but no samples.json to say what they are; give another --sample-dir"
                )
            return None
        earlier = SamplesRecord.read(path)
        drawn, different = earlier.num_fid_samples, record.difference(earlier)
        if not different and drawn <= count:
            digest = record.conditions_sha256 if drawn == count else conditions.digest(drawn)
            different = differences(dict(conditions_sha256=earlier.conditions_sha256), dict(conditions_sha256=digest))
        if different:
            raise ValueError(
                f"{self.path} holds samples made with other settings: {different}; give another --sample-dir"
            )
        if drawn > count:
            raise ValueError(
                f"{self.path} is a set of {drawn:,} samples, and its .npz would shrink to "
                f"--num-fid-samples {count}: give another --sample-dir"
            )
        return earlier
