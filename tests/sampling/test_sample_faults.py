"""Sampling killed at random moments: the same command draws what is missing; the .npz is a lone run's."""

import json
import os
import random
import signal
import time

import pytest
from conftest import launch, sample_folder
from forked import Run

pytestmark = pytest.mark.slow

FLAGS = (
    "--model",
    "DiTSEM-Ti/4",
    "--num-fid-samples",
    22,
    "--num-sampling-steps",
    12,
    "--per-proc-batch-size",
    2,
    "--progressive",
    3,
)


def contents(root):
    """The bytes of every picture, and of the .npz; nothing else may be left."""
    folder = sample_folder(root)
    assert {path.name for path in folder.iterdir()} == {f"{index:06d}.png" for index in range(22)} | {"samples.json"}
    assert {path.name for path in root.iterdir()} == {
        folder.name,
        *(f"{folder.name}.{end}" for end in ("npz", "grid.png", "progressive.png")),
    }
    return {path.name: path.read_bytes() for path in [*folder.glob("*.png"), *root.glob("*.npz"), *root.glob("*.png")]}


@pytest.mark.parametrize("processes", [1, 2])
def test_sampling_killed_at_random_moments(workplace, tmp_path, processes):
    """12 kills each of one process, and of either of two: in all, 24 survived."""

    def start(name):
        return Run(
            "sample_ddp_computed_dlc",
            [*FLAGS, "--sample-dir", tmp_path / name],
            tmp_path / f"{time.time_ns()}.txt",
            processes,
            workplace,
        )

    for name in ("warm", "whole"):
        began = time.time()
        run = start(name)
        assert run.wait(), run.said()
        seconds = time.time() - began
    whole = contents(tmp_path / "whole")
    chance = random.Random(processes)
    kills = midway = finished = 0
    while kills < 12 or midway < 4 or not finished:
        root = tmp_path / f"samples_{finished}"
        before = {path: path.stat().st_mtime_ns for path in root.glob("*/*.png")}
        run = start(root.name)
        if not run.wait(chance.uniform(0.1, seconds)) and run.kill(
            chance.randrange(processes), grace=chance.choice([0, 0.1, 0.5])
        ):
            kills += 1
            midway += len(before) < len(list(root.glob("*/*.png"))) < 22
        else:
            assert run.wait(), run.said()
            assert contents(root) == whole
            runs = json.loads((sample_folder(root) / "samples.json").read_text())["runs"]
            assert runs[0]["images"] == 22 and runs[-1]["processes"] == processes
            finished += 1
        assert all(path.stat().st_mtime_ns == drawn for path, drawn in before.items())  # none is drawn again
    print(f"{kills} kills survived, {midway} of them between the first image and the last; {finished} runs finished")


def test_a_full_disk(workplace, tmp_path):
    """One line that names the file, and the same command goes on once there is room."""
    command = ("python", 1, "sample_ddp_computed_dlc.py", *FLAGS[:-2], "--sample-dir", tmp_path / "samples")
    result = launch(command, workplace, check=False, largest_file=20_000)  # the .npz is larger, a PNG is not
    error = [line for line in result.stderr.splitlines() if "error:" in line]
    assert result.returncode == 2 and len(error) == 1 and "Traceback" not in result.stderr
    assert "cannot write" in error[0] and ".npz" in error[0]
    assert len(list((tmp_path / "samples").glob("*/*.png"))) == 22 and not list(tmp_path.rglob("*.npz"))
    assert not list(tmp_path.rglob("*.tmp"))
    assert "0 of 22 images to draw" in launch(command, workplace).stdout
    assert len(list(tmp_path.rglob("*.npz"))) == 1


def test_another_launch_of_other_settings(workplace, tmp_path):
    """It waits, and is refused by what the first one has noted by then: one line, and no set is mixed."""

    def start(name, steps):
        return Run(
            "sample_ddp_computed_dlc",
            [*FLAGS, "--num-sampling-steps", steps, "--sample-dir", tmp_path / "samples"],
            tmp_path / name,
            1,
            workplace,
        )

    first = start("first.txt", 40)
    while not list(tmp_path.glob("samples/*/.lock")):
        assert not first.wait(0.01), first.said()
    other = start("other.txt", 5)
    assert not other.wait() and other.ranks[0].exitcode == 2
    assert "num_sampling_steps 40 there, 5 here" in other.said() and "Traceback" not in other.said()
    assert first.wait(), first.said()
    contents(tmp_path / "samples")


def test_launches_at_once(workplace, tmp_path):
    """One draws, the other waits and finds it done."""
    runs = [
        Run(
            "sample_ddp_computed_dlc",
            [*FLAGS, "--sample-dir", tmp_path / "samples"],
            tmp_path / f"{number}.txt",
            1,
            workplace,
        )
        for number in range(2)
    ]
    for run in runs:
        assert run.wait(), run.said()
    drawn = sorted(int(run.said().split(" of 22 images to draw")[0].split()[-1]) for run in runs)
    assert drawn == [0, 22]
    contents(tmp_path / "samples")


@pytest.mark.parametrize(
    "fault, warning", [("no_locks", "has no locks"), ("no_directory_sync", "cannot sync directories")]
)
def test_disks_that_can_do_less(fault, warning, workplace, tmp_path):
    run = Run(
        "faulty",
        [fault, "sample_ddp_computed_dlc", *FLAGS, "--sample-dir", tmp_path / "samples"],
        tmp_path / "output.txt",
        1,
        workplace,
    )
    assert run.wait(), run.said()
    assert run.said().count("warning: the disk of") == 1 and warning in run.said()
    assert len(contents(tmp_path / "samples")) == 25


def test_interrupted(workplace, tmp_path):
    """Ctrl-C ends it with one line, and the same command draws what is missing."""

    def start():
        return Run(
            "sample_ddp_computed_dlc",
            [*FLAGS, "--sample-dir", tmp_path / "samples"],
            tmp_path / f"{time.time_ns()}.txt",
            1,
            workplace,
        )

    run = start()
    while not list(tmp_path.glob("samples/*/*.png")):
        assert not run.wait(0.01), run.said()
    os.kill(run.ranks[0].pid, signal.SIGINT)
    assert not run.wait() and run.ranks[0].exitcode == 130 and "Traceback" not in run.said(), run.said()
    assert run.said().count("stopped; what is drawn is kept: run the same command again") == 1
    run = start()
    assert run.wait(), run.said()
    contents(tmp_path / "samples")
