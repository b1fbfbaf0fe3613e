"""Extraction whose processes are killed or interrupted at named points, on disks that are full or can do less."""

import importlib
import itertools
import re

import pytest
from conftest import extract_command, save_images
from forked import Run
from test_extract import contents

EXTRACT = "extract_features_withdlc"


@pytest.fixture(scope="module")
def extraction(tiny_models, tmp_path_factory):
    """extraction(folder, flags…, fault=…, processes=N): a started run on 28 images and a broken one, in 8 shards."""
    root = tmp_path_factory.mktemp("many_images")
    save_images(root / "images", per_class=14)
    (root / "images/dog/1_broken.jpg").write_text("not an image")
    outputs = (root / f"output_{number}.txt" for number in itertools.count())
    large = ("--dtype", "float32", "--posterior", "moments")  # 8,320 bytes of latents in a shard

    def start(path, *flags, fault=None, processes=1):
        flags = extract_command("", 1, root / "images", path, tiny_models, *large, *flags)[3:]
        return Run(EXTRACT, flags, next(outputs), processes, fault=fault)

    return start


@pytest.fixture(scope="module")
def whole(tmp_path_factory, extraction):
    """The files of a run left alone."""
    run = extraction(path := tmp_path_factory.mktemp("whole"))
    assert run.wait(), run.said()
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
    features = tmp_path / "features"
    for processes, rank, part, number in (
        (1, 0, "settings.json", 1),
        (2, 1, "_sem/", 2),
        (1, 0, "progress/0", 1),
        (1, 0, "manifest.json", 1),
        (1, 0, "preview.png", 1),
    ):
        done = shards_done(features)
        extraction(features, fault=f"signalled,SIGKILL,{part},{number},{rank}", processes=processes).dies()
        assert all(path.stat().st_mtime_ns == before for path, before in done.items())
        assert (features / "manifest.json").exists() == (part == "preview.png")
    assert len(done) == 4 * 8 and not (features / "preview.png").exists()
    run = extraction(features)
    assert run.wait() and contents(features) == whole
    assert "nothing to do" in run.said() and (features / "preview.png").is_file()


@pytest.mark.slow
def test_ended_by_the_system(whole, extraction, tmp_path):
    """By a full disk, the kernel and Ctrl-C: one line says so and how to go on, and so it does."""
    features = tmp_path / "features"
    for fault, status, words in (
        ("limited,FSIZE,5000", 2, r"error: .*cannot write .*_features/00000\d.npy \(.*\); "),
        ("signalled,readers:SIGKILL,progress/0,1", 2, "error: a data reader was killed, by the kernel where memory is"),
        ("signalled,SIGINT,progress/0,1", 130, "stopped; "),  # which ends its readers, too
    ):
        run = extraction(features, "--num-workers", 2, fault=fault)
        assert not run.wait() and run.ranks[0].exitcode == status and "Traceback" not in run.said(), run.said()
        (line,) = (line for line in run.said().splitlines() if "is kept: run the same command again" in line)
        assert re.search(words, line) and run.said().count("error:") == (status == 2)
        assert not list(features.rglob("*.tmp"))
    assert extraction(features).wait() and contents(features) == whole


@pytest.mark.parametrize(
    "place, kept",
    [
        ("dlc.nets.pixels.PixelEncoder.__init__", "what is done is kept: run the same command again"),
        ("extract_features_withdlc.save_reconstructions", "the features are complete"),
    ],
)
def test_interrupted_elsewhere(place, kept, images, tiny_models, tmp_path, monkeypatch, call):
    """Ctrl-C between the checks and the work, and after it."""

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    importlib.import_module(EXTRACT)
    monkeypatch.setattr(place, interrupt)
    status, _, error = call(EXTRACT, *extract_command("", 1, images, tmp_path / "features", tiny_models)[3:])
    assert status == 130 and f"stopped; {kept}\n" in error
