"""Extraction whose processes are killed or interrupted at named points, on disks that are full or can do less."""

import importlib
import itertools
import re
import sys

import pytest
from conftest import extract_command, launch, save_images
from forked import Run
from test_extract import contents

EXTRACT = "extract_features_withdlc"


@pytest.fixture(scope="module")
def many_images(tmp_path_factory):
    """28 images and a broken one: 8 shards."""
    root = tmp_path_factory.mktemp("many_images")
    save_images(root, per_class=14)
    (root / "dog/1_broken.jpg").write_text("not an image")
    return root


@pytest.fixture
def extraction(many_images, tiny_models, tmp_path):
    """extraction(folder, flags…, fault=…, processes=N): a started run into that folder of tmp_path."""
    outputs = (tmp_path / f"output_{number}.txt" for number in itertools.count())

    def start(name, *flags, fault=None, processes=1):
        arguments = extract_command("", 1, many_images, tmp_path / name, tiny_models, *flags)[3:]
        return Run(EXTRACT, arguments, next(outputs), processes, fault=fault)

    return start


@pytest.fixture(scope="module")
def whole(tmp_path_factory, many_images, tiny_models):
    """The files of a run left alone."""
    path = tmp_path_factory.mktemp("whole")
    launch(extract_command("forked", 1, many_images, path, tiny_models), path)
    return contents(path)


def shards_done(features):
    """The files of the shards whose record says that they are done, and when they were written."""
    return {
        path: path.stat().st_mtime_ns
        for record in (features / "progress").glob("0*.json")
        for path in features.glob(f"imagenet64_*/{record.stem}.npy")
    }


@pytest.mark.slow
def test_killed_where_it_hurts(whole, extraction, tmp_path):
    """Before each kind of file is renamed; a shard recorded as done is never done again."""
    for processes, rank, part, number in (
        (1, 0, "settings.json", 1),
        (1, 0, "_features/", 1),
        (2, 1, "_sem/", 2),
        (1, 0, "progress/0", 1),
        (2, 0, "_path/", 2),
        (1, 0, "manifest.json", 1),
    ):
        done = shards_done(tmp_path / "features")
        run = extraction("features", fault=f"signalled,SIGKILL,{part},{number},{rank}", processes=processes)
        run.dies()
        assert all(path.stat().st_mtime_ns == before for path, before in done.items())
        assert not (tmp_path / "features/manifest.json").exists()
    assert len(shards_done(tmp_path / "features")) == 4 * 8
    run = extraction("features")
    assert run.wait() and contents(tmp_path / "features") == whole
    (tmp_path / "features/preview.png").unlink()  # as if killed before it was drawn
    run = extraction("features")
    assert run.wait() and "nothing to do" in run.said() and (tmp_path / "features/preview.png").is_file()


@pytest.mark.slow
def test_a_full_disk(extraction, tmp_path):
    """One line that names the file and says how to go on; and so it does, once there is room."""
    run = extraction("full", "--shard-size", 100, fault="limited,FSIZE,5000")  # latents are 14,464
    assert not run.wait() and run.ranks[0].exitcode == 2 and "Traceback" not in run.said()
    error = [line for line in run.said().splitlines() if "error:" in line]
    assert len(error) == 1
    assert re.search(r"cannot write .*_features/00000\d.npy \(.*\); what is done is kept: run the same", error[0])
    assert not list((tmp_path / "full").rglob("*.tmp"))
    for name in ("full", "other"):
        assert extraction(name, "--shard-size", 100).wait()
    assert contents(tmp_path / "full") == contents(tmp_path / "other")


def the_line(run, status, beginning):
    """The line that says how a run ended; no traceback, and what was done is kept."""
    assert not run.wait() and run.ranks[0].exitcode == status and "Traceback" not in run.said(), run.said()
    (line,) = [line for line in run.said().splitlines() if "what is done is kept: run the same command again" in line]
    assert beginning in line


@pytest.mark.slow
@pytest.mark.parametrize(
    "to, status, beginning",
    [
        ("readers:SIGKILL", 2, "error: a data reader was killed, by the kernel where memory is short: lower"),
        ("SIGINT", 130, "stopped; "),  # Ctrl-C, which ends its readers, too
    ],
)
def test_ended_by_a_signal(to, status, beginning, whole, extraction, tmp_path):
    run = extraction("features", "--num-workers", 2, fault=f"signalled,{to},progress/0,1")
    the_line(run, status, beginning)
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
        importlib.import_module(EXTRACT).main()
    assert stopped.value.code == 130 and f"stopped; {kept}\n" in capsys.readouterr().err
