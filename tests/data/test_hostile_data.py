"""Data files that may come from anyone: manifests, .npy, .npz and saved data sets. One line says why one is refused,
before memory is taken for what it claims."""

import json
import os
import re
import shutil
import tracemalloc
import zipfile

import numpy as np
import pytest
from conftest import refusal
from PIL import Image
from test_feature_tools import packed

from dlc.data import Features, read_manifest
from dlc.data.rows import StoredArray, load_array
from dlc.sampling.code_folder import open_codes
from dlc.sampling.pictures import check_npz, npz_rows

SHARDS = [
    *[dict(name=name, rows=4) for name in ("../outside", "/etc/passwd", "", "C:x", 3)],
    *[dict(name="000000", rows=rows) for rows in (-1, "4", True, 10**30)],
]
BAD_VALUES = dict(
    count=-1,
    image_size="64",
    L=True,
    V=10**9,
    classes=[1],
    skipped=[["x"]],
    vae=["ema"],
    scaling_factor=0,
    seed=1.5,
    latent_channels=0,
    shift_factor=[],
    latents="\x1b[31m" + "x" * 999,
    dtype="x" * 999,
    shards=["000000"],
)


def test_manifests(tmp_path):
    packed(tmp_path, np.zeros((8, 3), int))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    for change, message in (
        *((dict(shards=[shard]), "shards is") for shard in SHARDS),
        *(({key: value}, f"{key} is") for key, value in BAD_VALUES.items()),
    ):
        (tmp_path / "manifest.json").write_text(json.dumps({**manifest, **change}))
        for read in (read_manifest, Features):
            assert message in refusal(read, tmp_path), change
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "shards": [dict(name="000000", rows=10**12)]}))
    refusal(Features, tmp_path, words=r"000000.npy has shape \(8, .*wanted 1000000000000 row")


def npy(header, body=b"", version=(1, 0), length=None):
    """A .npy of any header."""
    header = header if isinstance(header, bytes) else header.encode()
    size = (len(header) if length is None else length).to_bytes(2 if version == (1, 0) else 4, "little")
    return b"\x93NUMPY" + bytes(version) + size + header + body


def described(shape, descr="'|u1'", order=False):
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n"


BAD_NPY = [
    (npy(described("(1099511627776, 6)"), bytes(60)), "its header claims 6,597,069,766,656 bytes, 60 follow"),
    (npy(described("(11,)"), bytes(10)), "claims 11 bytes, 10 follow"),
    (npy(described("(4611686018427387904, 4611686018427387904)"), bytes(60)), "claims"),
    (npy(described("(10,)", "'<U250000000'"), bytes(60)), "claims 10,000,000,000 bytes"),
    (npy(described("(-1,)"), bytes(60)), "shape"),
    (npy(described("(True,)"), bytes(60)), "shape"),
    (npy(described("(1,) * 10**9"), bytes(60)), "not a readable"),
    (npy(described(str((1,) * 60)), bytes(60)), "shape"),
    (npy(described("[4]"), bytes(60)), "not a readable"),
    (npy(described("(1,)", "'|V0'"), bytes(60)), "values of type"),
    (npy(described("(1,)", "[('a', '<f4')]"), bytes(60)), "values of type"),
    (npy(described("(1,)", "'<M8[s]'"), bytes(60)), "values of type"),
    (npy(described("(1,)", "'|O'"), bytes(60)), "holds pickled objects"),
    (npy(b"(" * 9000), "not a readable"),
    (npy(b"[" * 60_000), "header of 60,000 bytes"),
    (npy(b"{}", version=(2, 0), length=2**32 - 1), "header of 4,294,967,295 bytes"),
    (npy(b"{}", version=(3, 0)), "version"),
    (npy(b"{}", version=(9, 9)), "not a readable"),
    (b"", "not a readable"),
    (b"version https://git-lfs.github.com/spec/v1\noid", "a git-lfs pointer, not the file: run git lfs pull"),
    (b"\x93NUMPY", "not a readable"),
    (npy("{'descr': '\x1b[31m', 'fortran_order': False, 'shape': (1,)}"), "not a readable"),
]


def test_npy(tmp_path):
    path = tmp_path / "bad.npy"
    for content, message in BAD_NPY:
        path.write_bytes(content)
        for whole in (True, False):
            assert re.search(message, refusal(load_array, path, whole)), content[:99]
    assert "bad.npy" in refusal(open_codes, path)


@pytest.mark.parametrize("whole", [True, False])
def test_npy_that_are_kept(tmp_path, whole):
    for array in (
        np.arange(24).reshape(2, 3, 4),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.zeros((0, 4), np.float16),
        np.array(3),
        np.array(["a", "bc"]),
        np.arange(4, dtype=">i4"),
        np.array([True, False]),
    ):
        np.save(tmp_path / "good.npy", array)
        loaded = load_array(tmp_path / "good.npy", whole)
        assert whole or isinstance(loaded, StoredArray) == (array.ndim > 0 and not array.flags.fnc)
        loaded = loaded[:] if isinstance(loaded, StoredArray) else loaded
        np.testing.assert_array_equal(loaded, array)
        assert loaded.dtype == array.dtype and loaded.flags.fnc == array.flags.fnc


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_npz(tmp_path, compression):
    path = tmp_path / "bad.npz"
    for content, message in (
        *((BAD_NPY[index][0], "bad.npz: arr_0 ") for index in (0, 3, 4, 12, 15, 18, 19)),
        (npy(described("(1, 20000, 20000, 3)"), bytes(2**21)), "more than it has or than images are"),
        (npy(described("(1000000000000, 8, 8, 3)"), bytes(8 * 8 * 3)), "more than it has or than images are"),
        (npy(described("()"), bytes(8)), "wanted uint8"),
        (npy(described("(2, 8, 8, 3)"), bytes(2 * 8 * 8 * 3 + 1)), "there is more"),
    ):
        with zipfile.ZipFile(path, "w", compression) as archive:
            archive.writestr("arr_0.npy", content)
        message = "another way than NumPy's" if compression == zipfile.ZIP_LZMA else message
        assert re.search(message, refusal(check_npz, path)), content[:99]
        assert npz_rows(path) in (0, 2)


def test_npz_that_inflates_without_end(tmp_path):
    for head in (npy(described("(1, 3000, 3000, 3)")), npy(b"{}", version=(2, 0), length=2**27)):
        with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("arr_0.npy", head + bytes(27 * 10**6))
        tracemalloc.start()
        refusal(check_npz, tmp_path / "bomb.npz")
        assert npz_rows(tmp_path / "bomb.npz") == 0
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**22


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    datasets = pytest.importorskip("datasets")
    path = tmp_path_factory.mktemp("dataset") / "saved"
    datasets.Dataset.from_dict(dict(features=np.zeros((2, 4, 8, 8)).tolist(), labels=[0, 1])).save_to_disk(path)
    return path


def import_error(tool, *arguments):
    status, _, error = tool("import-hf", *arguments)
    assert status == 2 and error.count("\n") == 1 and len(error) < 360 and "\x1b" not in error, error
    return error


@pytest.mark.parametrize(
    "file, change",
    [
        ("state.json", lambda state: state["_data_files"][0].update(filename="/etc/passwd")),
        ("state.json", lambda state: state["_data_files"][0].update(filename=3)),
        ("state.json", lambda state: state.clear()),
        ("dataset_info.json", lambda info: info["features"].update(features={"_type": "Image"})),
        ("dataset_info.json", lambda info: info["features"].update(more={"_type": "\x1b[31mpopen" + "x" * 999})),
        ("dataset_info.json", lambda info: info.update(features="x")),
    ],
)
def test_datasets(dataset, tmp_path, tool, file, change):
    copy = shutil.copytree(dataset, tmp_path / "copy")
    value = json.loads((copy / file).read_text())
    change(value)
    (copy / file).write_text(json.dumps(value))
    assert str(copy) in import_error(tool, copy, tmp_path / "new")


def test_no_column_opens_another_file(tmp_path, monkeypatch, tool):
    """A column of images holds paths and URLs, which datasets itself would open."""
    datasets = pytest.importorskip("datasets")
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    data = datasets.Dataset.from_dict(dict(features=[str(tmp_path / "x.png")], labels=[1]))
    data.cast_column("features", datasets.Image()).save_to_disk(tmp_path / "images")
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("opened"))
    error = import_error(tool, tmp_path / "images", tmp_path / "new")
    assert "values of type struct" in error or "values are missing" in error, error
    for place in ("hf://datasets/x", "http://localhost/x", "s3://x"):
        assert "no such file or folder" in import_error(tool, place, tmp_path / "new")


def test_what_is_no_file(tmp_path):
    """A pipe, at which a reader would wait for ever, or a device, which has no end."""
    os.mkfifo(tmp_path / "pipe.npy")
    (tmp_path / "endless.npz").symlink_to("/dev/zero")
    for read, name in ((load_array, "pipe.npy"), (check_npz, "pipe.npy"), (check_npz, "endless.npz"), (open_codes, "")):
        assert "is no file" in refusal(read, tmp_path / name)
