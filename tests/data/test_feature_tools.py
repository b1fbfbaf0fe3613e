"""python -m dlc.features: info, check, pack, import-hf."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, change_json, refusal
from PIL import Image
from test_features import lone_files

from dlc.data import Features, FeatureWriter, Manifest, kind_dir
from dlc.data.convert import fetch_features
from dlc.data.images import GAP, open_source
from dlc.data.inspection import code_usage, latent_statistics

RANDOM = np.random.default_rng(0)
REFERENCE = dict(  # what the reference scripts store, by kind
    features=RANDOM.normal(size=(30, 4, 8, 8)).astype(np.float32),
    labels=RANDOM.integers(0, 1000, 30),
    sem=RANDOM.integers(0, 256, (30, 16)),
)


def packed(root, codes, std=1.0, skipped=(), **settings):
    """Features in shards of at most 20 rows; their latents."""
    given = dict(image_size=32, latents="sample", dtype="float32", L=codes.shape[1], V=5, classes=["a", "b"])
    manifest = Manifest(**{**given, "images": len(codes), "flip": "none", **settings})
    writer = FeatureWriter(root, manifest)
    writer.start()
    latents = std * RANDOM.normal(size=(len(codes), manifest.stored_channels, 4, 4)).astype(np.float32)
    starts = range(0, len(codes), 20)
    for shard, start in enumerate(starts):
        part = codes[start : start + 20].astype(np.uint8)
        names = np.array([f"a/{start + i}" for i in range(len(part))])
        rows = dict(features=latents[start : start + 20], sem=part, labels=np.arange(len(part)) % 2, path=names)
        writer.write(shard, rows, [] if shard else list(skipped))
    writer.finish(len(starts))
    return latents


def test_statistics_are_those_of_the_whole(tmp_path, tool, monkeypatch):
    codes = RANDOM.integers(0, 4, (48, 3))  # token 4 is dead, everywhere
    codes[:, 1] = 2  # position 1 says nothing
    codes[:, 2] = np.arange(48) % 4
    codes[43] = codes[3]
    latents = packed(tmp_path, codes, std=3.0, skipped=[["b/x.png", "no image"]], images=49)
    mean, std = latent_statistics(Features(tmp_path))
    np.testing.assert_allclose(mean, latents.mean(axis=(0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(std, latents.std(axis=(0, 2, 3)), rtol=1e-5)
    counts, duplicates = code_usage(Features(tmp_path))
    np.testing.assert_array_equal(counts, [np.bincount(codes[:, i], minlength=5) for i in range(3)])
    assert duplicates == 48 - len(np.unique(codes, axis=0)) > 0

    status, out, _ = tool("info", tmp_path)
    assert status == 0 and out.count("4 of 4 channels of the latents have a std") == 1
    for words in (
        "48 rows of 49 images at 32x32 in 3 shards, 1 images skipped, 0 blended\n  skipped 'b/x.png': no image",
        "codes: L=3, V=5, uint8; perplexity of a position: ",
        "least 1.0 (position 1), most 4.0",
        f"dead tokens: {(counts == 0).sum()} of 15",
        "2 of them with rows, 24 to 24 each",
    ):
        assert words in out, words
    picture = np.array(Image.open(tmp_path / "codes.png"))[GAP:, GAP:]
    height, width = 512 // 3, 512 // 5
    cells = picture[height // 2 :: height, width // 2 :: width][:3, :5].astype(int)
    np.testing.assert_array_equal(cells[..., 0] > cells[..., 1], counts == 0)  # red: never used
    said = f"{tmp_path}: nothing wrong with its 48 rows; 1 of 49 images were skipped, the first 'b/x.png' (no image)"
    assert tool("check", tmp_path)[1].startswith(said)

    np.save(kind_dir(tmp_path, 32, "features") / "000000.npy", np.full((20, 4, 4, 4), np.nan, np.float32))
    (tmp_path / "codes.png").unlink()
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)  # as those of somebody else
    status, out, _ = tool("info", tmp_path)
    assert status == 0 and f"no picture, since {tmp_path} may not be" in out and not (tmp_path / "codes.png").exists()
    assert "latents that are not finite: check says where" in out


def test_moments_and_both_flips_are_understood(tmp_path, tool):
    codes = RANDOM.integers(0, 5, (20, 8)).repeat(2, axis=0)
    stored = packed(tmp_path, codes, latents="moments", flip="both", images=20)
    _, std = latent_statistics(Features(tmp_path))
    draws = stored[:, :4, None] + stored[:, 4:, None] * RANDOM.normal(size=(40, 4, 500, 4, 4))
    np.testing.assert_allclose(std, draws.std(axis=(0, 2, 3, 4)), rtol=0.02)
    status, out, _ = tool("info", tmp_path)
    assert status == 0 and "duplicates: 0 images" in out and "40 rows of 20 images" in out


def test_check_lists_all_that_is_wrong(tmp_path, tool):
    packed(tmp_path, RANDOM.integers(0, 5, (100, 3)))

    def change(kind, shard, function):
        path = kind_dir(tmp_path, 32, kind) / f"{shard:06d}.npy"
        np.save(path, function(np.load(path)))

    def put(row, value):
        return lambda array: (array.__setitem__(row, value), array)[1]

    kind_dir(tmp_path, 32, "sem").joinpath("000001.npy").unlink()
    kind_dir(tmp_path, 32, "path").joinpath("000004.npy").write_bytes(b"junk")
    change("features", 0, put(7, np.nan))
    change("features", 1, np.zeros_like)
    change("features", 2, lambda array: array[:, :2])
    change("labels", 2, put(5, 2))
    change("labels", 3, lambda array: array[:19])
    change("sem", 0, put((6, 2), 5))
    shutil.copy(kind_dir(tmp_path, 32, "sem") / "000003.npy", kind_dir(tmp_path, 32, "sem") / "000004.npy")
    np.save(kind_dir(tmp_path, 32, "features") / "000009.npy", np.zeros(3))
    change_json(tmp_path / "manifest.json", count=101)
    status, out, _ = tool("check", tmp_path)
    assert status == 1
    found = [line.replace(f"{tmp_path}/", "") for line in out.splitlines()]
    wanted = (
        "manifest.json counts 101 rows, its shards 100",
        "features/000009.npy is not in the manifest",
        "features/000000.npy, row 7: values that are not finite",
        "features/000001.npy is not what was written: its digest is another one in manifest.json",
        "features/000002.npy has rows of shape (2, 4, 4), most files (4, 4, 4)",
        "features/000002.npy is not what was written: its digest is another one in manifest.json",
        "sem/000000.npy, row 6: value 5 outside 0..4",
        "sem/000001.npy is not a readable .npy (it does not exist)",
        "sem/000004.npy is not what was written: its digest is another one in manifest.json",
        "labels/000002.npy, row 5: value 2 outside 0..1",
        "labels/000003.npy has shape (19,), wanted 20 row(s)",
        "path/000004.npy is not a readable .npy",
    )
    for line in wanted:
        assert [one for one in found if line in one], line
    assert len(found) == len(wanted), found
    (tmp_path / "manifest.json").write_text("junk")
    assert "not readable JSON" in tool("check", tmp_path)[1]


def test_check_holds_the_files_against_the_manifest(tmp_path, tool):
    packed(tmp_path, RANDOM.integers(0, 5, (20, 3)))
    change_json(tmp_path / "manifest.json", L=4, dtype="float16")
    out = tool("check", tmp_path)[1]
    assert "features/000000.npy has values of type float32, the manifest says float16" in out
    assert "sem has rows of shape (3,), by the manifest the first is 4" in out and len(out.splitlines()) == 2


def refused(tool, *arguments):
    """The one line by which the tool refuses."""
    status, _, err = tool(*arguments)
    assert status == 2 and err.count("\n") == 1, err
    return err


def test_pack(tmp_path, tool):
    old, new = tmp_path / "old", tmp_path / "new"
    lone_files(old, **REFERENCE)
    command = ("pack", old, new, "--V", 256, "--shard-size", 8)
    assert "give --V" in tool("check", old)[1]
    assert tool("check", old, "--V", 256)[:2] == (0, f"{old}: nothing wrong with its 30 rows\n")
    assert tool(*command)[0] == 0
    rows = Features(new)
    assert (rows.count, rows.L, rows.V, rows.num_classes, rows.image_size) == (30, 16, 256, 1000, 64)
    assert rows.codes.array(0).dtype == np.uint8 and rows.latents.array(0).dtype == np.float32
    for kind, array in REFERENCE.items():
        np.testing.assert_array_equal(rows.gather(kind, np.arange(30)), array)
    assert rows.paths.gather([9, 10]).tolist() == ["9.npy", "10.npy"]
    assert tool("check", new)[0] == 0
    assert "is complete; nothing to do" in tool(*command)[1]
    shutil.copytree(old, tmp_path / "other")
    for arguments, message in (
        ((old, tmp_path / "x"), "give --V"),
        ((new, tmp_path / "x"), "is packed already"),
        ((tmp_path / "other", new, "--V", 256, "--shard-size", 8), "source "),
        ((old, tmp_path / "x", "--V", 100), "outside 0..99"),
    ):
        assert message in refused(tool, "pack", *arguments)
    assert not (tmp_path / "x/manifest.json").exists()


def test_pack_without_codes_goes_on_where_it_was(tmp_path, tool):
    """Once a latent that is no finite number is mended."""
    lone_files(tmp_path / "old", features=REFERENCE["features"], labels=REFERENCE["labels"])
    command = ("pack", tmp_path / "old", tmp_path / "new", "--dtype", "float16", "--shard-size", 8)
    spoilt, done = (
        tmp_path / path for path in ("old/imagenet64_features/21.npy", "new/imagenet64_features/000001.npy")
    )
    whole = spoilt.read_bytes()
    for value, message in (
        (1e5, "are too large for float16: give --dtype float32"),
        (np.nan, "are not finite numbers: fix it, or take it out"),
    ):
        np.save(spoilt, np.full((1, 4, 8, 8), value))
        assert f"old, row 21 {message}" in refused(tool, *command)
    assert not (tmp_path / "new/manifest.json").exists()
    spoilt.write_bytes(whole)
    before = done.stat().st_mtime_ns
    assert tool(*command)[0] == 0 and done.stat().st_mtime_ns == before
    new = Features(tmp_path / "new")
    np.testing.assert_array_equal(new.latents.gather(np.arange(30)), REFERENCE["features"].astype(np.float16))
    assert new.codes is None and new.V is None


# ---------------------------------------------------------------------- import-hf

LATENTS = RANDOM.normal(size=(30, 1, 4, 8, 8)).astype(np.float32)
CODES = RANDOM.integers(0, 300, (30, 16))


def save_parquet(path, rows=slice(None), **columns):
    """Rows of LATENTS and CODES, and other columns beside them or in their place, None for no such column."""
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    table = {**dict(features=LATENTS[rows].tolist(), labels=CODES[rows].tolist()), **columns}
    table = {name: column for name, column in table.items() if column is not None}
    pyarrow.parquet.write_table(pyarrow.table(table), path, row_group_size=7)
    return path


def assert_imported(path, rows=slice(None)):
    new = Features(path)
    new.validate()
    np.testing.assert_allclose(new.latents.gather(np.arange(new.count)), LATENTS[rows, 0], rtol=1e-6)
    np.testing.assert_array_equal(new.codes.gather(np.arange(new.count)), CODES[rows])
    return new


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Datasets of several kinds: saved by datasets, typed and as lists; a folder of .parquet; one such file."""
    datasets, root = pytest.importorskip("datasets"), tmp_path_factory.mktemp("sources")
    for dtype, name in (("int64", "typed"), ("uint16", "typed.parquet")):
        kinds = dict(features=datasets.Array4D((1, 4, 8, 8), "float32"), labels=[datasets.Value(dtype)])
        data = datasets.Dataset.from_dict(dict(features=LATENTS, labels=CODES), datasets.Features(kinds))
        (data.save_to_disk if name == "typed" else data.to_parquet)(root / name)
    lists = dict(features=LATENTS[:, 0].tolist(), labels=CODES.tolist(), other=list(range(30)))
    datasets.DatasetDict(train=datasets.Dataset.from_dict(lists)).save_to_disk(root / "lists")
    save_parquet(root / "data/train-00000-of-00002.parquet", slice(17), other=["x"] * 17)
    save_parquet(root / "data/train-00001-of-00002.parquet", slice(17, 30))
    save_parquet(root / "data/test-00000-of-00001.parquet", slice(3))
    return root


def test_import(sources, tmp_path, tool):
    """In shards of 8 rows, which straddle files and row groups."""
    for name, split in (
        ("typed", "train"),
        ("lists", "train"),
        ("data", "train"),
        ("data", "test"),
        ("typed.parquet", "train"),
    ):
        path, flags = tmp_path / name / split, ("--V", 300, "--shard-size", 8, "--split", split)
        status, _, err = tool("import-hf", sources / name, path, *flags)
        assert status == 0, err
        new = assert_imported(path, slice(3 if split == "test" else 30))
        assert (new.image_size, new.num_classes, new.V, new.codes.array(0).dtype) == (64, 1, 300, np.uint16)
        assert tool("check", path)[0] == 0
    assert "split train" in refused(tool, "import-hf", sources / "lists", path, *flags)
    deep = dict(features=RANDOM.normal(size=(20, 16, 8, 8)).tolist(), labels=np.arange(20) % 7)
    save_parquet(tmp_path / "deep.parquet", **deep)
    assert tool("import-hf", tmp_path / "deep.parquet", tmp_path / "classes", "--num-classes", 7)[0] == 0
    new = Features(tmp_path / "classes")
    np.testing.assert_array_equal(new.labels.gather(np.arange(20)), np.arange(20) % 7)
    assert new.codes is None and new.num_classes == 7 and new.latent_shape == (16, 8, 8)


def test_what_import_refuses(sources, tmp_path, tool):
    content = (sources / "typed.parquet").read_bytes()
    (tmp_path / "broken.parquet").write_bytes(content[:2000] + bytes(58_000) + content[60_000:])
    shutil.copytree(sources / "data", tmp_path / "several")
    save_parquet(tmp_path / "several/small/train.parquet")
    labels = dict(uneven=[[1, 2], [1]], none=[[1, None], [1, 2]], floats=[[0.5], [1]], low=[[-1], [1]])
    for name, column in labels.items():
        save_parquet(tmp_path / f"{name}.parquet", slice(2), labels=column)
    save_parquet(tmp_path / "other.parquet", slice(2), features=None)
    save_parquet(tmp_path / "last.parquet", slice(2), features=np.zeros((2, 8, 8, 4)).tolist())
    for source, flags, message in (
        (sources / "typed", (), "give --V"),
        ("nowhere", (), "there is no such file or folder"),
        (sources / "lists", ("--split", "test"), "no split 'test': name one of train"),
        (tmp_path / "last.parquet", ("--V", 300), "latents of shape (8, 8, 4), wanted (channels, height, width)"),
        (tmp_path / "other.parquet", ("--V", 300), "there is no column 'features', only labels"),
        (tmp_path / "several", ("--V", 300), "several datasets have a split 'train', in"),
        (tmp_path / "broken.parquet", ("--V", 300), "broken.parquet"),
        (tmp_path / "uneven.parquet", ("--V", 300), "rows 0 to 1: not all have lists of one length, but 1 and 2"),
        (tmp_path / "none.parquet", ("--V", 300), "values are missing"),
        (tmp_path / "floats.parquet", ("--V", 300), "values of type double, wanted integers"),
        (tmp_path / "low.parquet", ("--V", 300), "row 0: value -1 outside 0..299"),
        (
            tmp_path / "uneven.parquet",
            ("--V", 300, "--shard-size", 1),
            "rows of shape (1,) from row 1 on, and first (2,)",
        ),
    ):
        said = refused(tool, "import-hf", source, tmp_path / "x", *flags)
        assert message in said and "again" not in said, said


HUB = """
import contextlib, sys
from pathlib import Path
from dlc.data.images import load_rgb, open_source
from dlc.features import main
from dlc.machine.cli import ArgumentParser
root, *names = sys.argv[1:]
for name in names:
    with contextlib.suppress(SystemExit):
        if "images" in name:
            with ArgumentParser("").one_line_errors():
                print(open_source(name).sha256(), load_rgb(open_source(name).open(0)).size)
        else:
            sys.argv[1:] = ["import-hf", name, f"{root}/{name}", "--V", "300", "--shard-size", "8"]
            main()
            print("Parquet" if any(Path(root, "home").rglob("*.parquet")) else "no Parquet")
"""


@pytest.mark.slow
def test_datasets_of_the_hub(sources, tmp_path, hub):
    """By id and revision; Parquet is streamed, and the commit recorded; images are fetched, and then there without the
    hub. In processes of their own: datasets reads the hub's address when it is imported."""
    files = {path.relative_to(sources).as_posix(): path.read_bytes() for path in sources.glob("data/train*")}
    commit = hub.add("owner/codes", dict(files, **{"README.md": b"x"}), revision="v1", kind="dataset")
    saved = {path.relative_to(sources / "lists"): path for path in (sources / "lists").rglob("*") if path.is_file()}
    hub.add("owner/saved", {str(name): path.read_bytes() for name, path in saved.items()}, kind="dataset")
    Image.new("RGB", (9, 7)).save(tmp_path / "x.png")
    columns = dict(image=2 * [(tmp_path / "x.png").read_bytes()], label=[1, 0])
    path = save_parquet(tmp_path / "x.parquet", slice(2), features=None, labels=None, **columns)
    hub.add("owner/images", {"test-00000-of-00001.parquet": path.read_bytes()}, revision="v1", kind="dataset")

    def said(*names, offline="0"):
        env = dict(os.environ, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE=offline, HF_HOME=str(tmp_path / "home"))
        command = [sys.executable, "-c", HUB, tmp_path, *names]
        result = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env=env)
        assert "Traceback" not in result.stderr, result.stderr
        return result.stdout.splitlines(), [line for line in result.stderr.splitlines() if "error: " in line]

    images = f"{open_source(path).sha256()} (9, 7)"
    names = ("owner/codes@v1", "owner/codes", "owner/nothing", "owner/saved")
    printed, errors = said(*names, "owner/images@v1:test", "owner/images@v1", "owner/no_images")
    assert "no Parquet" in printed and "Parquet" not in printed and printed[-1] == images
    for line, words in zip(
        errors, ("RevisionNotFound", "RepositoryNotFound", 'Unknown split "train"', "no file or fo")
    ):
        assert words in line
    assert len(errors) == 4 and said("owner/images@v1:test", offline="1") == ([images], [])
    manifest = assert_imported(tmp_path / "owner/codes@v1").manifest
    assert manifest.converted_from == f"owner/codes@{commit}, split train"
    assert_imported(tmp_path / "owner/saved")


def test_features_are_fetched_once(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    refusal(fetch_features, "owner/codes@v1", tmp_path / "new", 300, None, words="pip install datasets")
    packed(tmp_path / "new", np.zeros((4, 3), int), converted_from="owner/codes@5f")
    fetch_features("owner/codes@v1", tmp_path / "new", 300, None)
    for other in ("owner/other", "owner/code", "owner/codes2"):
        words = f"{other}: .*new holds other features .owner/codes@5f.: give"
        refusal(fetch_features, other, tmp_path / "new", 300, None, words=words)
