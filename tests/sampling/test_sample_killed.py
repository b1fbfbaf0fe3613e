"""Sampling that is killed at named points or interrupted, or whose disk can do less: the same command completes it."""

import json
import time

import pytest
from conftest import sample_folder
from forked import Run

pytestmark = pytest.mark.slow

COUNT, PATIENCE = 6, 300  # images; seconds for a launch
FLAGS = (
    *("--model", "DiTSEM-Ti/4", "--num-fid-samples", COUNT, "--num-sampling-steps", 2),
    *("--per-proc-batch-size", 2, "--progressive", 2),
)


@pytest.fixture
def start(workplace, tmp_path):
    """start(): a launch of the sampling script that draws into samples/; by several processes, or with a fault."""

    def run(processes=1, fault=None, into="samples", flags=FLAGS):
        command = ["sample_ddp_computed_dlc", *flags, "--sample-dir", tmp_path / into]
        output = tmp_path / f"{time.time_ns()}.txt"
        return Run(command[0], command[1:], output, processes, workplace, fault=fault)

    return run


def contents(root):
    """The bytes of every picture, and of the .npz; nothing else may be left."""
    folder = sample_folder(root)
    assert {path.name for path in folder.iterdir()} == {f"{i:06d}.png" for i in range(COUNT)} | {"samples.json"}
    beside = {f"{folder.name}.{end}" for end in ("npz", "json", "grid.png", "progressive.png")}
    assert {path.name for path in root.iterdir()} == {folder.name, *beside}
    return {path.name: path.read_bytes() for path in [*folder.glob("*.png"), *root.glob("*.npz"), *root.glob("*.png")]}


@pytest.mark.parametrize(
    "processes, points",
    [
        (1, "SIGKILL,samples.json,1 SIGKILL,000001.png,1 SIGINT,000004.png,1 SIGKILL,grid.png,1"),
        # by rank 1; then by rank 0 in what it always writes, for who draws which image depends on what was left
        (2, "SIGKILL,000002.png,1,1 SIGKILL,.npz,1,0"),
    ],
)
def test_killed(start, tmp_path, processes, points):
    """Before a file gets its name, by Ctrl-C once. It ends with the bytes of a run that was left alone and draws no
    image twice."""
    whole = start(processes, into="whole")
    assert whole.wait(PATIENCE), whole.said()
    for point in points.split():
        drawn = {path: path.stat().st_mtime_ns for path in tmp_path.glob("samples/*/*.png")}
        run = start(processes, f"signalled,{point}")
        if "INT" in point:
            assert not run.wait(PATIENCE) and run.ranks[0].exitcode == 130 and "Traceback" not in run.said()
            assert run.said().count("stopped; what is drawn is kept: run the same command again") == 1
        else:
            run.dies()
        assert all(path.stat().st_mtime_ns == when for path, when in drawn.items())
    last = start(processes)
    assert last.wait(PATIENCE), last.said()
    assert contents(tmp_path / "samples") == contents(tmp_path / "whole")
    folder = sample_folder(tmp_path / "samples")
    runs = json.loads((folder / "samples.json").read_text())["runs"]
    assert runs[0]["images"] == COUNT and runs[-1]["processes"] == processes
    # before anything is drawn, the .npz, whose images are there no more, is not touched
    (folder / "000000.png").unlink()
    run = start(fault="signalled,SIGINT,samples.json,1")
    assert not run.wait(PATIENCE) and run.ranks[0].exitcode == 130 and "Traceback" not in run.said(), run.said()
    assert run.said().count("stopped; nothing was drawn; what was there is kept") == 1
    (npz,), (other,) = tmp_path.glob("samples/*.npz"), tmp_path.glob("whole/*.npz")
    assert npz.read_bytes() == other.read_bytes() and not (folder / "000000.png").exists()


def test_a_full_disk(start, tmp_path):
    flags = [*FLAGS[:-2], "--dlc-dir", "features/imagenet64_sem"]  # without latents, whose images make the sheet large
    run = start(fault="limited,FSIZE,60000", flags=flags)  # the .npz is larger, a PNG is not
    assert not run.wait() and run.ranks[0].exitcode == 2 and "Traceback" not in run.said(), run.said()
    (error,) = (line for line in run.said().splitlines() if "error:" in line)
    assert "cannot write" in error and ".npz" in error
    assert len(list((tmp_path / "samples").glob("*/*.png"))) == COUNT
    assert not list(tmp_path.rglob("*.npz")) and not list(tmp_path.rglob("*.tmp"))
    run = start(flags=flags)
    assert run.wait() and f"0 of {COUNT} images to draw" in run.said()
    assert len(list(tmp_path.rglob("*.npz"))) == 1
