"""python -m dlc.features: info, check, pack, import-hf."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, L, V
from PIL import Image

from dlc.data import Features, FeatureWriter, Manifest, kind_dir
from dlc.data.inspection import code_usage, latent_statistics
from dlc.features import main

RANDOM = np.random.default_rng(0)


def tool(*arguments, env=None):
    return subprocess.run(
        [sys.executable, "-m", "dlc.features", *map(str, arguments)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env={**os.environ, **(env or {})},
    )


def call(capsys, *arguments):
    """The tool in this process: what it printed, and how it ended."""
    status = 0
    try:
        sys.argv = ["features", *map(str, arguments)]
        main()
    except SystemExit as end:
        status = end.code
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def packed(root, codes, std=1.0, **settings):
    """Features in shards of at most 20 rows."""
    manifest = Manifest(
        **{
            **dict(
                image_size=32,
                latents="sample",
                dtype="float32",
                L=codes.shape[1],
                V=5,
                classes=["a", "b"],
                images=len(codes),
                flip="none",
            ),
            **settings,
        }
    )
    writer = FeatureWriter(root, manifest)
    writer.start()
    latents = RANDOM.normal(size=(len(codes), manifest.stored_channels, 4, 4)).astype(np.float32)
    starts = range(0, len(codes), 20)
    for shard, start in enumerate(starts):
        part = codes[start : start + 20]
        names = np.array([f"a/{start + i}" for i in range(len(part))])
        writer.write(
            shard,
            dict(
                features=std * latents[start : start + 20],
                sem=part.astype(np.uint8),
                labels=np.arange(len(part)) % 2,
                path=names,
            ),
            [],
        )
    writer.finish(len(starts))
    return std * latents


def lone_files(root, count=30, side=8, codes=True):
    arrays = dict(
        features=RANDOM.normal(size=(count, 1, 4, side, side)).astype(np.float32),
        labels=RANDOM.integers(0, 1000, (count, 1)),
    )
    if codes:
        arrays["sem"] = RANDOM.integers(0, 256, (count, 1, 16))
    for kind, array in arrays.items():
        kind_dir(root, 8 * side, kind).mkdir(parents=True)
        for index in range(count):
            np.save(kind_dir(root, 8 * side, kind) / f"{index}.npy", array[index])
    return arrays


@pytest.mark.slow
def test_info_says_what_is_there(features):
    result = tool("info", features)
    assert result.returncode == 0, result.stderr
    assert "14 rows of 15 images at 64x64 in 4 shards, 1 images skipped" in result.stdout
    assert "skipped 'dog/1_broken.jpg': UnidentifiedImageError" in result.stdout
    assert f"codes: L={L}, V={V}, uint16" in result.stdout and "2 of them with rows, 7 to 7 each" in result.stdout
    assert Image.open(features / "codes.png").size == (340, 34 + L * (512 // L))  # 340: room for the caption


def test_statistics_are_those_of_the_whole(tmp_path, capsys):
    codes = RANDOM.integers(0, 4, (50, 3))  # token 4 is dead, everywhere
    codes[:, 1] = 2  # position 1 says nothing
    codes[40] = codes[3]
    latents = packed(tmp_path, codes, std=3.0)
    mean, std = latent_statistics(Features(tmp_path))
    np.testing.assert_allclose(mean, latents.mean(axis=(0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(std, latents.std(axis=(0, 2, 3)), rtol=1e-5)
    counts, duplicates = code_usage(Features(tmp_path))
    np.testing.assert_array_equal(counts, [np.bincount(codes[:, i], minlength=5) for i in range(3)])
    assert duplicates == 50 - len(np.unique(codes, axis=0)) > 0

    status, out, _ = call(capsys, "info", tmp_path)
    assert status == 0 and out.count("outside 0.5 to 2") == 4 and "least 1.0 (position 1)" in out
    assert f"dead tokens: {(counts == 0).sum()} of 15" in out
    picture = np.array(Image.open(tmp_path / "codes.png"))[34:]
    height, width = 512 // 3, 512 // 5
    cells = picture[height // 2 :: height, width // 2 :: width][:3, :5].astype(int)
    np.testing.assert_array_equal(cells[..., 0] > cells[..., 1], counts == 0)  # red: never used


def test_moments_and_both_flips_are_understood(tmp_path, capsys):
    codes = RANDOM.integers(0, 5, (20, 8)).repeat(2, axis=0)
    stored = packed(tmp_path, codes, latents="moments", flip="both", images=20)
    _, std = latent_statistics(Features(tmp_path))
    draws = stored[:, :4, None] + stored[:, 4:, None] * RANDOM.normal(size=(40, 4, 500, 4, 4))
    np.testing.assert_allclose(std, draws.std(axis=(0, 2, 3, 4)), rtol=0.02)
    status, out, _ = call(capsys, "info", tmp_path)
    assert status == 0 and "duplicates: 0 images" in out and "40 rows of 20 images" in out


@pytest.mark.slow
def test_check_finds_nothing_wrong_with_what_is_right(features, tmp_path, capsys):
    result = tool("check", features)
    assert result.returncode == 0 and result.stdout == f"{features}: nothing wrong with its 14 rows\n"
    lone_files(tmp_path)
    assert "give --V" in call(capsys, "check", tmp_path)[1]
    assert call(capsys, "check", tmp_path, "--V", 256)[:2] == (0, f"{tmp_path}: nothing wrong with its 30 rows\n")


def test_check_lists_all_that_is_wrong(tmp_path, capsys):
    packed(tmp_path, RANDOM.integers(0, 5, (100, 3)))

    def change(kind, shard, function):
        path = kind_dir(tmp_path, 32, kind) / f"{shard:06d}.npy"
        np.save(path, function(np.load(path)))

    def put(row, value):
        return lambda array: (array.__setitem__(row, value), array)[1]

    kind_dir(tmp_path, 32, "sem").joinpath("000001.npy").unlink()
    kind_dir(tmp_path, 32, "path").joinpath("000004.npy").write_bytes(b"junk")
    change("features", 0, put(7, np.nan))
    change("features", 2, lambda array: array[:, :2])
    change("features", 3, lambda array: array.astype(np.float16))
    change("labels", 2, put(5, 2))
    change("labels", 3, lambda array: array[:19])
    change("sem", 0, put((6, 2), 5))
    np.save(kind_dir(tmp_path, 32, "features") / "000009.npy", np.zeros(3))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "count": 101}))
    status, out, _ = call(capsys, "check", tmp_path)
    assert status == 1
    found = [line.replace(f"{tmp_path}/", "") for line in out.splitlines()]
    wanted = (
        "manifest.json counts 101 rows, its shards 100",
        "features/000009.npy is not in the manifest",
        "features/000000.npy, row 7: values that are not finite",
        "features/000002.npy has rows of shape (2, 4, 4)",
        "features/000003.npy has values of type float16, the manifest says float32",
        "sem/000000.npy, row 6: value 5 outside 0..4",
        "sem/000001.npy is missing",
        "labels/000002.npy, row 5: value 2 outside 0..1",
        "labels/000003.npy has shape (19,), wanted 20 row(s)",
        "path/000004.npy is not a readable .npy",
    )
    for line in wanted:
        assert [one for one in found if line in one], line
    assert len(found) == len(wanted), found


def test_check_of_what_is_no_manifest(tmp_path, capsys):
    """Exit 1 with the reason; and a first shard that is wrong is not what the others are held against."""
    packed(tmp_path, RANDOM.integers(0, 5, (60, 3)))
    path = kind_dir(tmp_path, 32, "features") / "000000.npy"
    np.save(path, np.load(path)[..., :2])
    status, out, _ = call(capsys, "check", tmp_path)
    assert status == 1 and out == f"{path} has rows of shape (4, 4, 2), most files (4, 4, 4)\n"
    np.save(path, np.full((20, 4, 4, 4), np.nan, np.float32))
    assert "latents that are not finite: check says where" in call(capsys, "info", tmp_path)[1]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    for text, message in (
        ("junk", "not readable JSON"),
        (json.dumps({**manifest, "V": "5"}), "V is '5'"),
        (json.dumps({**manifest, "dtype": "foo"}), "type 'foo'"),
        (json.dumps({**manifest, "shards": [], "count": 0}), "counts 0 rows"),
    ):
        (tmp_path / "manifest.json").write_text(text)
        status, out, _ = call(capsys, "check", tmp_path)
        assert status == 1 and message in out, out
    assert call(capsys, "check", tmp_path / "nowhere")[0] == 1


@pytest.mark.slow
def test_pack(tmp_path, capsys):
    """Rows in numeric order of their names, to the bit; twice does nothing; what does not fit is refused by name."""
    arrays = lone_files(tmp_path / "old")
    command = ("pack", tmp_path / "old", tmp_path / "new", "--V", 256, "--shard-size", 8)
    result = tool(*command)
    assert result.returncode == 0, result.stderr
    new = Features(tmp_path / "new")
    assert (new.count, new.L, new.V, new.num_classes, new.image_size) == (30, 16, 256, 1000, 64)
    assert new.codes.array(0).dtype == np.uint8 and new.latents.array(0).dtype == np.float32
    for stack, kind in ((new.latents, "features"), (new.codes, "sem"), (new.labels, "labels")):
        np.testing.assert_array_equal(stack.gather(np.arange(30)), arrays[kind][:, 0])
    assert new.paths.gather([9, 10]).tolist() == ["9.npy", "10.npy"]
    assert call(capsys, "check", tmp_path / "new")[0] == 0
    assert "is complete; nothing to do" in call(capsys, *command)[1]

    def refused(*arguments):
        status, _, err = call(capsys, "pack", *arguments)
        assert status == 2 and err.count("\n") == 1
        return err

    assert "give --V" in refused(tmp_path / "old", tmp_path / "x")
    assert "is packed already" in refused(tmp_path / "new", tmp_path / "x")
    shutil.copytree(tmp_path / "old", tmp_path / "other")
    assert "source " in refused(tmp_path / "other", tmp_path / "new", "--V", 256, "--shard-size", 8)
    assert "holds .npy files but no manifest.json" in refused(tmp_path / "old", tmp_path / "old", "--V", 256)
    assert "V 256 there, 300 here" in refused(tmp_path / "old", tmp_path / "new", "--V", 300, "--shard-size", 8)
    assert "outside 0..99" in refused(tmp_path / "old", tmp_path / "x", "--V", 100)
    (kind_dir(tmp_path / "old", 64, "sem") / "7.npy").unlink()
    assert "7.npy is not in both" in refused(tmp_path / "old", tmp_path / "y", "--V", 256)
    assert not (tmp_path / "y").exists()


def test_pack_without_codes_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    arrays = lone_files(tmp_path / "old", codes=False)
    command = ("pack", tmp_path / "old", tmp_path / "new", "--dtype", "float16", "--shard-size", 8)
    write = FeatureWriter.write

    def full_disk(writer, shard, *rest):
        if shard == 2:
            raise OSError("no space")
        write(writer, shard, *rest)

    monkeypatch.setattr(FeatureWriter, "write", full_disk)
    assert "no space" in call(capsys, *command)[2]
    monkeypatch.setattr(FeatureWriter, "write", write)
    with pytest.raises(ValueError, match="half-written"):
        Features(tmp_path / "new")
    before = (kind_dir(tmp_path / "new", 64, "features") / "000001.npy").stat().st_mtime_ns
    assert call(capsys, *command)[0] == 0
    assert (kind_dir(tmp_path / "new", 64, "features") / "000001.npy").stat().st_mtime_ns == before
    new = Features(tmp_path / "new")
    np.testing.assert_array_equal(new.latents.gather(np.arange(30)), arrays["features"][:, 0].astype(np.float16))
    assert new.codes is None and new.V is None


def test_import_of_a_hugging_face_dataset(tmp_path, capsys):
    """Columns features and labels: latents, and codes or classes."""
    datasets = pytest.importorskip("datasets")
    latents = RANDOM.normal(size=(30, 1, 4, 8, 8)).astype(np.float32)
    codes = RANDOM.integers(0, 300, (30, 16))
    typed = datasets.Features(
        features=datasets.Array4D((1, 4, 8, 8), "float32"), labels=datasets.Sequence(datasets.Value("int64"))
    )
    for name, data in (
        ("typed", datasets.Dataset.from_dict(dict(features=latents, labels=codes), features=typed)),
        (
            "lists",
            datasets.DatasetDict(
                train=datasets.Dataset.from_dict(
                    dict(features=latents[:, 0].tolist(), labels=codes.tolist(), other=list(range(30)))
                )
            ),
        ),
    ):
        data.save_to_disk(tmp_path / name)
        command = ("import-hf", tmp_path / name, tmp_path / f"{name}_new", "--V", 300, "--shard-size", 8)
        status, _, err = call(capsys, *command)
        assert status == 0, err
        new = Features(tmp_path / f"{name}_new")
        new.validate()
        np.testing.assert_allclose(new.latents.gather(np.arange(30)), latents[:, 0])
        np.testing.assert_array_equal(new.codes.gather(np.arange(30)), codes)
        assert (new.image_size, new.num_classes, new.V, new.codes.array(0).dtype) == (64, 1, 300, np.uint16)
        assert call(capsys, "check", tmp_path / f"{name}_new")[0] == 0

    labels = RANDOM.integers(0, 7, 30)
    datasets.Dataset.from_dict(dict(features=latents[:, 0].tolist(), labels=labels)).save_to_disk(tmp_path / "classes")
    assert call(capsys, "import-hf", tmp_path / "classes", tmp_path / "classes_new", "--num-classes", 7)[0] == 0
    new = Features(tmp_path / "classes_new")
    np.testing.assert_array_equal(new.labels.gather(np.arange(30)), labels)
    assert new.codes is None and new.num_classes == 7
    deep = RANDOM.normal(size=(2, 16, 8, 8))
    datasets.Dataset.from_dict(dict(features=deep, labels=[0, 1])).save_to_disk(tmp_path / "deep")
    assert call(capsys, "import-hf", tmp_path / "deep", tmp_path / "deep_new")[0] == 0
    np.testing.assert_allclose(Features(tmp_path / "deep_new").latents.gather([0, 1]), deep, rtol=1e-6)
    assert Features(tmp_path / "deep_new").latent_shape == (16, 8, 8)

    def refused(*arguments):
        capsys.readouterr()  # what datasets shows while it saves
        status, _, err = call(capsys, "import-hf", *arguments)
        assert status == 2 and err.count("\n") == 1
        return err

    assert "give --V" in refused(tmp_path / "typed", tmp_path / "x")
    assert "outside 0..9" in refused(tmp_path / "typed", tmp_path / "x", "--V", 10)
    assert "there is no such file or folder" in refused(tmp_path / "nowhere", tmp_path / "x")
    assert "no split 'test': --split one of train" in refused(tmp_path / "lists", tmp_path / "x", "--split", "test")
    last = dict(features=np.zeros((2, 8, 8, 4)), labels=[0, 1])
    datasets.Dataset.from_dict(last).save_to_disk(tmp_path / "channels_last")
    assert "latents of shape (8, 8, 4), wanted (channels, height, width)" in refused(
        tmp_path / "channels_last", tmp_path / "x"
    )
    ragged = dict(features=latents[:2, 0].tolist(), labels=[[1, 2], [1]])
    datasets.Dataset.from_dict(ragged).save_to_disk(tmp_path / "ragged")
    assert "rows 0 to 1: not all have lists of one length, but 1 and 2" in refused(
        tmp_path / "ragged", tmp_path / "x", "--V", 10
    )
    assert "split train" in refused(tmp_path / "lists", tmp_path / "typed_new", "--V", 300, "--shard-size", 8)
    datasets.Dataset.from_dict(dict(image=[1])).save_to_disk(tmp_path / "other")
    assert "there is no column 'features', only image" in refused(tmp_path / "other", tmp_path / "x")


def save_parquet(path, latents, codes, rows_per_group=7, **columns):
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    table = dict(features=list(latents.tolist()), labels=list(codes.tolist()), **columns)
    pyarrow.parquet.write_table(pyarrow.table(table), path, row_group_size=rows_per_group)
    return path


LATENTS = RANDOM.normal(size=(30, 1, 4, 8, 8)).astype(np.float32)
CODES = RANDOM.integers(0, 300, (30, 16))


def assert_imported(path, rows=slice(0, 30)):
    new = Features(path)
    new.validate()
    np.testing.assert_allclose(new.latents.gather(np.arange(new.count)), LATENTS[rows, 0], rtol=1e-6)
    np.testing.assert_array_equal(new.codes.gather(np.arange(new.count)), CODES[rows])
    return new.manifest


def test_import_of_parquet_files(tmp_path, capsys):
    """A folder of them, one file, and what datasets itself writes; shards that straddle files and row groups."""
    datasets = pytest.importorskip("datasets")
    save_parquet(tmp_path / "data/train-00000-of-00002.parquet", LATENTS[:17], CODES[:17], other=["x"] * 17)
    save_parquet(tmp_path / "data/train-00001-of-00002.parquet", LATENTS[17:], CODES[17:])
    save_parquet(tmp_path / "data/test-00000-of-00001.parquet", LATENTS[:3], CODES[:3])
    typed = datasets.Features(
        features=datasets.Array4D((1, 4, 8, 8), "float32"), labels=datasets.Sequence(datasets.Value("uint16"))
    )
    data = datasets.Dataset.from_dict(dict(features=LATENTS, labels=CODES), features=typed)
    data.to_parquet(tmp_path / "typed.parquet")
    for source, rows, flags in (
        (tmp_path, slice(0, 30), ()),
        (tmp_path, slice(0, 3), ("--split", "test")),
        (tmp_path / "typed.parquet", slice(0, 30), ()),
    ):
        new = tmp_path / f"new{len(flags)}{source.suffix}"
        if source == tmp_path:
            source = tmp_path / "data"
        status, _, err = call(capsys, "import-hf", source, new, "--V", 300, "--shard-size", 8, *flags)
        assert status == 0, err
        assert_imported(new, rows)

    def refused(path, *flags):
        status, _, err = call(capsys, "import-hf", path, tmp_path / "x", "--V", 300, *flags)
        assert status == 2 and err.count("\n") == 1, err
        return err

    assert "no .parquet files of the split 'dev': --split one of " in refused(tmp_path / "data", "--split", "dev")
    save_parquet(tmp_path / "data/small/train.parquet", LATENTS, CODES)
    assert "several datasets have a split 'train', in" in refused(tmp_path / "data")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "typed.parquet").read_bytes()[:-9])
    assert "cut.parquet: " in refused(tmp_path / "cut.parquet")
    content = bytearray((tmp_path / "typed.parquet").read_bytes())
    content[2000:60_000] = bytes(58_000)
    (tmp_path / "broken.parquet").write_bytes(content)
    refused(tmp_path / "broken.parquet")
    ragged = save_parquet(tmp_path / "ragged.parquet", LATENTS[:2], CODES[:2])
    for columns, message in (
        (dict(labels=[[1, 2], [1]]), "rows 0 to 1: not all have lists of one length, but 1 and 2"),
        (dict(labels=[[1, None], [1, 2]]), "values are missing"),
        (dict(labels=["a", "b"]), "values of type string, wanted numbers"),
        (dict(labels=[[300], [1]]), "row 0: value 300 outside 0..299"),
        (dict(labels=[[-1], [1]]), "row 0: value -1 outside 0..299"),
    ):
        import pyarrow

        table = pyarrow.parquet.read_table(ragged)
        for name, values in columns.items():
            table = table.set_column(table.schema.get_field_index(name), name, pyarrow.array(values))
        pyarrow.parquet.write_table(table, tmp_path / "other.parquet")
        assert message in refused(tmp_path / "other.parquet")


@pytest.mark.slow
def test_import_from_the_hub(tmp_path, hub):
    """By id and revision; Parquet is streamed, and the commit recorded. In processes of their own: datasets reads the
    hub's address when it is imported."""
    datasets = pytest.importorskip("datasets")
    names = [f"data/train-0000{part}-of-00002.parquet" for part in (0, 1)]
    files = {
        name: save_parquet(tmp_path / "half.parquet", LATENTS[rows], CODES[rows]).read_bytes()
        for name, rows in zip(names, (slice(0, 16), slice(16, 30)))
    }
    commit = hub.add("owner/codes", dict(files, **{"README.md": b"x"}), revision="v1", kind="dataset")
    data = datasets.DatasetDict(train=datasets.Dataset.from_dict(dict(features=LATENTS, labels=CODES)))
    data.save_to_disk(tmp_path / "saved")
    saved = {path.relative_to(tmp_path / "saved"): path for path in (tmp_path / "saved").rglob("*") if path.is_file()}
    hub.add("owner/saved", {str(name): path.read_bytes() for name, path in saved.items()}, kind="dataset")
    env = dict(HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "home"))

    def imported(name):
        return tool("import-hf", name, tmp_path / name, "--V", 300, "--shard-size", 8, env=env)

    for name in ("owner/codes@v1", "owner/saved"):
        result = imported(name)
        assert result.returncode == 0, result.stderr
        manifest = assert_imported(tmp_path / name)
        if name != "owner/saved":
            assert manifest.converted_from == f"owner/codes@{commit}, split train"
            assert not any((tmp_path / "home").rglob("*.parquet"))
    for name, message in (("owner/codes", "RevisionNotFound"), ("owner/nothing", "RepositoryNotFound")):
        result = imported(name)
        assert result.returncode == 2 and result.stderr.count("\n") == 1 and message in result.stderr, result.stderr


@pytest.mark.slow
def test_import_says_what_it_needs(tmp_path):
    (tmp_path / "datasets.py").write_text("raise ImportError")
    result = tool("import-hf", tmp_path, tmp_path / "new", env=dict(PYTHONPATH=str(tmp_path)))
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "pip install datasets" in result.stderr
