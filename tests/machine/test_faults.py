"""Real processes killed at random moments: the same command again, and the bytes are those of a run left alone."""

import importlib
import itertools
import os
import random
import re
import signal
import sys
import time
from pathlib import Path

import pytest
from conftest import extract_command, launch, save_images
from forked import Run
from test_extract import contents


@pytest.fixture(scope="module")
def many_images(tmp_path_factory):
    root = tmp_path_factory.mktemp("many_images")
    save_images(root, per_class=60)
    (root / "dog/1_broken.jpg").write_text("not an image")
    return root


@pytest.fixture
def extraction(many_images, tiny_models, tmp_path):
    """extraction(folder, flags…, processes=N): a started run into that folder of tmp_path."""
    outputs = (tmp_path / f"output_{number}.txt" for number in itertools.count())

    def start(name, *flags, processes=1):
        arguments = extract_command("", 1, many_images, tmp_path / name, tiny_models, *flags)[3:]
        return Run("extract_features_withdlc", arguments, next(outputs), processes)

    return start


@pytest.fixture(scope="module")
def whole(tmp_path_factory, many_images, tiny_models):
    """The files of a run left alone."""
    path = tmp_path_factory.mktemp("whole")
    launch(extract_command("torchrun", 1, many_images, path, tiny_models), path)
    return contents(path)


def shards_done(features):
    """The files of the shards whose record says that they are done, and when they were written."""
    return {
        path: path.stat().st_mtime_ns
        for record in (features / "progress").glob("0*.json")
        for path in features.glob(f"imagenet64_*/{record.stem}.npy")
    }


def test_extraction_killed_at_random_moments(whole, extraction, tmp_path):
    """At least 20 kills of the only rank, the first or the second; a shard recorded as done is never done again."""
    seconds = []
    for name in ("warm", "timed"):
        start = time.time()
        run = extraction(name)
        assert run.wait(), run.said()
        seconds.append(time.time() - start)
    chance = random.Random(0)
    kills = midway = finished = 0
    while kills < 25 or midway < 10 or not finished:
        name = f"features_{finished}"
        done = shards_done(tmp_path / name)
        run = extraction(name, "--num-workers", chance.randint(0, 2), processes=chance.choice([1, 2]))
        if not run.wait(chance.uniform(0.1, seconds[1])) and run.kill(
            chance.randrange(len(run.ranks)), grace=chance.choice([0, 0.1, 0.5])
        ):
            kills += 1
            midway += len(shards_done(tmp_path / name)) > len(done)
        else:
            assert run.wait(), run.said()
            assert contents(tmp_path / name) == whole
            finished += 1
        assert all(path.stat().st_mtime_ns == before for path, before in done.items())
    print(f"{kills} kills survived, {midway} of them after new shards were done; {finished} extractions finished")


def test_a_rank_killed_under_torchrun(whole, many_images, tiny_models, tmp_path):
    """torchrun ends with the rank that was killed, and run again finishes."""
    command = extract_command("torchrun", 2, many_images, tmp_path, tiny_models)
    process = launch(command, tmp_path, wait=False)
    while not (ranks := children(process.pid)) or len(shards_done(tmp_path)) < 8:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.kill(ranks[1], signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode
    launch(command, tmp_path)
    assert contents(tmp_path) == whole


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_full_disk(many_images, tiny_models, tmp_path):
    """One line that names the file and says how to go on; and so it does, once there is room."""

    def command(launcher, name):
        # without workers, whose batches go through shared memory and would meet the limit, too
        return extract_command(
            launcher, 1, many_images, tmp_path / name, tiny_models, "--num-workers", 0, "--shard-size", 100
        )

    result = launch(command("python", "full"), tmp_path, check=False, largest_file=20_000)  # latents are 51,328
    error = [line for line in result.stderr.splitlines() if "error:" in line]
    assert result.returncode == 2 and len(error) == 1 and "Traceback" not in result.stderr
    assert re.search(r"cannot write .*_features/00000\d.npy \(.*\); what is done is kept: run the same", error[0])
    assert not list((tmp_path / "full").rglob("*.tmp"))
    for name in ("full", "other"):
        launch(command("forked", name), tmp_path)
    assert contents(tmp_path / "full") == contents(tmp_path / "other")


def test_launches_at_once(whole, extraction, tmp_path):
    """One works, the others wait and find it done; one with other settings is refused."""
    runs = [extraction("features") for _ in range(3)]
    for run in runs:
        assert run.wait(), run.said()
    assert sorted("nothing to do" in run.said() for run in runs) == [False, True, True]
    assert contents(tmp_path / "features") == whole

    first = extraction("seed_0")
    while not (tmp_path / "seed_0/progress/settings.json").is_file():
        assert not first.wait(0.01), first.said()
    other = extraction("seed_0", "--global-seed", 1)
    assert not other.wait() and "error: " in other.said() and "seed 0 there, 1 here" in other.said()
    assert "Traceback" not in other.said()
    assert first.wait() and contents(tmp_path / "seed_0") == whole


@pytest.mark.parametrize(
    "fault, warning", [("no_locks", "has no locks"), ("no_directory_sync", "cannot sync directories")]
)
def test_disks_that_can_do_less(fault, warning, whole, many_images, tiny_models, tmp_path):
    """One warning, and the features are those of any disk."""
    arguments = extract_command("", 1, many_images, tmp_path / "features", tiny_models)[3:]
    run = Run("faulty", [fault, "extract_features_withdlc", *arguments], tmp_path / "output.txt")
    assert run.wait(), run.said()
    assert run.said().count("warning: the disk of") == 1 and warning in run.said()
    assert contents(tmp_path / "features") == whole


def wait_for_shard(run, features):
    while not list((features / "progress").glob("0*.json")):
        assert not run.wait(0.01), run.said()


def one_line(run, status, beginning):
    """The line that says how a run ended; no traceback, and what was done is kept."""
    assert not run.wait() and run.ranks[0].exitcode == status and "Traceback" not in run.said(), run.said()
    (line,) = [line for line in run.said().splitlines() if "what is done is kept: run the same command again" in line]
    assert beginning in line


def test_a_reader_killed_by_the_kernel(whole, extraction, tmp_path):
    run = extraction("features", "--num-workers", 1)
    wait_for_shard(run, tmp_path / "features")
    os.kill(children(run.ranks[0].pid)[0], signal.SIGKILL)
    one_line(run, 2, "error: a data reader was killed, by the kernel where memory or /dev/shm is short: lower --num")
    run = extraction("features")
    assert run.wait() and contents(tmp_path / "features") == whole


def test_interrupted(whole, extraction, tmp_path):
    """Ctrl-C ends it with one line; what is done is kept."""
    run = extraction("features")
    wait_for_shard(run, tmp_path / "features")
    os.kill(run.ranks[0].pid, signal.SIGINT)
    one_line(run, 130, "stopped; ")
    run = extraction("features")
    assert run.wait() and contents(tmp_path / "features") == whole


@pytest.mark.parametrize(
    "place, kept",
    [
        ("dlc.nets.pixels.PixelEncoder.__init__", "what is done is kept: run the same command again"),
        ("extract_features_withdlc.save_reconstructions", "the features are complete"),
    ],
)
def test_interrupted_elsewhere(place, kept, images, tiny_models, tmp_path, monkeypatch, capsys):
    """Ctrl-C between the checks and the work, and after it."""

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(place, interrupt)
    flags = extract_command("python", 1, images, tmp_path / "features", tiny_models)[3:]
    monkeypatch.setattr(sys, "argv", ["extract_features_withdlc.py", *map(str, flags)])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module("extract_features_withdlc").main()
    assert stopped.value.code == 130 and f"stopped; {kept}\n" in capsys.readouterr().err


def test_readers_killed_at_the_end(whole, extraction, tmp_path):
    """Readers that still work when the script ends are killed, which torch would raise as an error of its own."""
    run = extraction("features", "--num-workers", 2)
    wait_for_shard(run, tmp_path / "features")
    os.kill(run.ranks[0].pid, signal.SIGINT)
    one_line(run, 130, "stopped; ")
