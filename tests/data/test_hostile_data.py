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
from conftest import change_json, refusal
from PIL import Image
from test_feature_tools import packed, refused

from dlc.data import Features, read_manifest
from dlc.data.rows import StoredArray, load_array
from dlc.sampling.code_folder import open_codes
from dlc.sampling.pictures import check_npz, npz_rows

BAD_VALUES = [
    *[dict(shards=[dict(name=name, rows=4)]) for name in ("../outside", "/etc/passwd", "", 3)],
    *[dict(shards=[dict(name="000000", rows=rows)]) for rows in (-1, "4", True, 10**30)],
    *[dict(shards=["000000"]), dict(count=-1), dict(image_size="64"), dict(L=True), dict(V=10**9), dict(classes=[1])],
    *[dict(skipped=[["x"]]), dict(vae=["ema"]), dict(scaling_factor=0), dict(seed=1.5), dict(latent_channels=0)],
    *[dict(shift_factor=[]), dict(latents="\x1b[31m" + "x" * 999)],
]


def test_manifests(tmp_path):
    packed(tmp_path, np.zeros((8, 3), int))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    for change in BAD_VALUES:
        (tmp_path / "manifest.json").write_text(json.dumps({**manifest, **change}))
        refusal(read_manifest, tmp_path, words=f"{next(iter(change))} is")
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "shards": [dict(name="000000", rows=10**12)]}))
    refusal(Features, tmp_path, words=r"000000.npy has shape \(8, .*wanted 1000000000000 row")


def npy(header, body=bytes(60), version=(1, 0), length=None):
    """A .npy of any header."""
    header = header if isinstance(header, bytes) else header.encode()
    size = (len(header) if length is None else length).to_bytes(2 if version == (1, 0) else 4, "little")
    return b"\x93NUMPY" + bytes(version) + size + header + body


def described(shape, descr="'|u1'"):
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n"


IN_ANY = [  # wherever a .npy lies
    (npy(described("(1099511627776, 6)")), "its header claims 6,597,069,766,656 bytes, 60 follow"),
    (npy(described("(10,)", "'<U250000000'")), "claims 10,000,000,000 bytes"),
    (npy(described("(-1,)")), "shape"),
    (npy(described("(1,)", "'|O'")), "values of type object"),
    (npy(b"{}", b"", version=(2, 0), length=2**32 - 1), "header of 4,294,967,295 bytes"),
    (b"", "not a readable"),
    (b"version https://git-lfs.github.com/spec/v1\noid", "a git-lfs pointer, not the file: run git lfs pull"),
]
BAD_NPY = [
    *IN_ANY,
    (npy(described("(61,)")), "claims 61 bytes, 60 follow"),
    (npy(described("(4611686018427387904, 4611686018427387904)")), "claims"),
    (npy(described("(1,) * 10**9")), "not a readable"),
    (npy(described("(1,)", "'|V0'")), "values of type"),
    (npy(described("(1,)", "[('a', '<f4')]")), "values of type"),
    (npy(b"(" * 9000), "not a readable"),
    (npy(b"{}", version=(3, 0)), "version"),
    (npy("{'descr': '\x1b[31m', 'fortran_order': False, 'shape': (1,)}"), "not a readable"),
]


def test_npy(tmp_path):
    path = tmp_path / "bad.npy"
    for content, message in BAD_NPY:
        path.write_bytes(content)
        for whole in (True, False):
            assert re.search(message, refusal(load_array, path, whole)), content[:99]
    assert "bad.npy" in refusal(open_codes, path)
    for array in (
        np.arange(24).reshape(2, 3, 4),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.zeros((0, 4), np.float16),
        np.array(3),
        np.array(["a", "bc"]),
        np.arange(4, dtype=">i4"),
    ):
        np.save(path, array)
        for whole in (True, False):
            loaded = load_array(path, whole)
            assert whole or isinstance(loaded, StoredArray) == (array.ndim > 0 and not array.flags.fnc)
            loaded = loaded[:] if isinstance(loaded, StoredArray) else loaded
            np.testing.assert_array_equal(loaded, array)
            assert loaded.dtype == array.dtype and loaded.flags.fnc == array.flags.fnc


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_npz(tmp_path, compression):
    path = tmp_path / "bad.npz"
    for content, message in (
        *((content, "bad.npz: arr_0 ") for content, _ in IN_ANY),
        (npy(described("(1, 20000, 20000, 3)"), bytes(2**21)), "more than it has or than images have"),
        (npy(described("(1000000000000, 8, 8, 3)"), bytes(8 * 8 * 3)), "more than it has or than images have"),
        (npy(described("()"), bytes(8)), "wanted uint8"),
        (npy(described("(2, 8, 8, 3)"), bytes(2 * 8 * 8 * 3 + 1)), "there is more"),
    ):
        with zipfile.ZipFile(path, "w", compression) as archive:
            archive.writestr("arr_0.npy", content)
        message = "another way than NumPy's" if compression == zipfile.ZIP_LZMA else message
        assert re.search(message, refusal(check_npz, path)), content[:99]
        assert npz_rows(path) in (0, 2)


@pytest.mark.parametrize("claim, length", [(described("(1, 3000, 3000, 3)"), None), ("{}", 2**27)])
def test_npz_that_inflates_without_end(claim, length, tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        head = npy(claim, b"", version=(2, 0) if length else (1, 0), length=length)
        archive.writestr("arr_0.npy", head + bytes(27 * 10**6))
    tracemalloc.start()
    refusal(check_npz, tmp_path / "bomb.npz")
    assert npz_rows(tmp_path / "bomb.npz") == 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


def test_datasets(tmp_path, tool, monkeypatch):
    """No file that they name is opened: a column of images holds paths and URLs, which datasets itself would open."""
    datasets = pytest.importorskip("datasets")
    columns = dict(features=np.zeros((2, 4, 8, 8)).tolist(), labels=[0, 1])
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "saved")
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    data = datasets.Dataset.from_dict(dict(features=[str(tmp_path / "x.png")], labels=[1]))
    data.cast_column("features", datasets.Image()).save_to_disk(tmp_path / "images")
    kinds = json.loads((tmp_path / "saved/dataset_info.json").read_text())["features"]
    changes = (
        ("state.json", dict(_data_files=[dict(filename="/etc/passwd")])),
        ("dataset_info.json", dict(features={**kinds, "features": {"_type": "Image"}})),
        ("dataset_info.json", dict(features={**kinds, "more": {"_type": "\x1b[31mpopen" + "x" * 999}})),
        ("dataset_info.json", dict(features="x")),
    )
    for number, (file, values) in enumerate(changes):
        change_json(shutil.copytree(tmp_path / "saved", tmp_path / f"{number}") / file, **values)
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("opened"))
    for source, words in (
        *((tmp_path / f"{number}", f"{tmp_path}/{number}") for number in range(len(changes))),
        (tmp_path / "images", "values of type struct|values are missing"),
        *((place, "no such file or folder") for place in ("hf://datasets/x", "http://localhost/x", "s3://x")),
    ):
        error = refused(tool, "import-hf", source, tmp_path / "new")
        assert re.search(words, error) and len(error) < 360 and "\x1b" not in error, error


def test_what_is_no_file(tmp_path):
    """A pipe, at which a reader would wait for ever, or a device, which has no end."""
    os.mkfifo(tmp_path / "pipe.npy")
    (tmp_path / "endless.npz").symlink_to("/dev/zero")
    for read, name in ((load_array, "pipe.npy"), (check_npz, "pipe.npy"), (check_npz, "endless.npz"), (open_codes, "")):
        assert re.search("is no file|not a file", refusal(read, tmp_path / name))
