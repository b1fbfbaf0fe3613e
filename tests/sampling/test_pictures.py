"""PNGs, the .npz and its check."""

import shutil
import struct
import zipfile

import numpy as np
import pytest
from conftest import refusal
from grids import grid_cells

from dlc.data.images import save_png
from dlc.sampling.pictures import check_npz, npz_rows, png_path, save_grid, write_npz


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """300 PNGs of noise, more than are read at once."""
    images = np.random.default_rng(0).integers(0, 256, (300, 8, 8, 3), dtype=np.uint8)
    root = tmp_path_factory.mktemp("images")
    for index, image in enumerate(images):
        save_png(png_path(root, index), image)
    return root, images


@pytest.fixture
def folder(written, tmp_path):
    shutil.copytree(written[0], tmp_path / "images")
    return tmp_path / "images", written[1]


def streamed(path, rows):
    """arr_0 as ADM's evaluator streams it: a member of a zip, a version 1 header, then so many rows a read."""
    parts = []
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive, archive.open("arr_0.npy") as member:
        assert member.read(8) == b"\x93NUMPY\x01\x00"
        header = eval(member.read(struct.unpack("<H", member.read(2))[0]))  # a dict's literal
        assert header["descr"] == "|u1" and header["fortran_order"] is False
        count, *shape = header["shape"]
        for start in range(0, count, rows):
            n = min(rows, count - start)
            parts.append(np.frombuffer(member.read(n * int(np.prod(shape))), np.uint8).reshape(n, *shape))
        assert member.read(1) == b""
    return np.concatenate(parts)


def test_npz_is_the_images_in_order(folder, tmp_path):
    path = tmp_path / "images.npz"
    write_npz(path, folder[0], 300)
    with np.load(path) as archive:
        assert archive.files == ["arr_0"]
        np.testing.assert_array_equal(archive["arr_0"], folder[1])
    np.testing.assert_array_equal(streamed(path, 64), folder[1])
    assert npz_rows(path) == 300
    first = path.read_bytes()
    write_npz(path, folder[0], 300)
    assert path.read_bytes() == first  # no time of day in it


def test_npz_is_refused_for_a_missing_or_odd_image(folder, tmp_path):
    path = png_path(folder[0], 123)

    def refused(message):
        refusal(write_npz, tmp_path / "images.npz", folder[0], 300, words=f"000123.png {message}")
        assert [one.name for one in tmp_path.iterdir()] == ["images"] and npz_rows(tmp_path / "images.npz") == 0

    save_png(path, np.zeros((8, 9, 3), np.uint8))
    refused(r"has shape \(8, 9, 3\), wanted \(8, 8, 3\)")
    path.write_bytes(path.read_bytes()[:20])
    refused("is missing or not a whole PNG")
    path.unlink()
    refused("is missing or not a whole PNG")


def test_check(folder, tmp_path):
    path = tmp_path / "images.npz"
    write_npz(path, folder[0], 300)
    lines, wrong = check_npz(path, grid=True)
    assert lines[0] == f"{path}: keys arr_0; arr_0 of uint8, shape (300, 8, 8, 3)"
    assert lines[1] == f"values 0 to 255, mean {folder[1].mean():.1f}"
    assert lines[2].startswith("warning: FID of 300 images") and not wrong
    sheet = grid_cells(tmp_path / "images.npz.grid.png", 8, 10, captions=True)
    np.testing.assert_array_equal(sheet.reshape(-1, 8, 8, 3), folder[1][:60])

    odd = folder[1].copy()
    odd[5], odd[299] = (1, 2, 3), odd[17]
    np.savez(path, odd, more=np.zeros(3))
    lines, wrong = check_npz(path)
    assert "arr_0" in lines[0] and "more" in lines[0]
    assert wrong == ["1 images of one colour: 5", "1 images twice: 17 = 299"]
    np.savez(path, np.zeros((2048, 8, 8, 3)))
    refusal(check_npz, path, words="is float64, .*wanted uint8")
    np.savez(path, np.tile(folder[1], (7, 1, 1, 1))[:2048])
    assert not any("warning" in line for line in check_npz(path)[0])


def test_check_of_what_is_no_whole_file(folder, tmp_path, call):
    path = tmp_path / "images.npz"
    write_npz(path, folder[0], 300)
    whole = path.read_bytes()

    def command():
        return call("dlc.sampling.__main__", "check", path)

    assert command()[0] == 0
    for harmed in (whole[:-30], whole[:300] + bytes([whole[300] ^ 1]) + whole[301:], b"", b"text"):
        path.write_bytes(harmed)
        code, _, error = command()
        line = error.splitlines()[-1]
        assert code == 2 and line.startswith("python -m dlc.sampling: error: ") and str(path) in line
    np.savez(path, other=folder[1])
    assert "has no arr_0, which holds the images: its keys are other" in command()[2]
    np.savez(path, np.zeros((3, 8, 8, 3), np.uint8))
    code, said, _ = command()
    assert code == 1 and "wrong: 3 images of one colour" in said
    path.unlink()
    assert command()[0] == 2


def test_a_contact_sheet_waits_for_no_image(tmp_path):
    """It is drawn after the first batch, when images of a later one may still be broken."""
    (tmp_path / "images").mkdir()
    save_png(png_path(tmp_path / "images", 0), np.zeros((64, 64, 3), np.uint8))
    png_path(tmp_path / "images", 1).write_bytes(b"")
    save_grid(tmp_path / "one.png", tmp_path / "images", 3, lambda indices: [""] * len(indices), {})
    png_path(tmp_path / "images", 1).unlink()
    save_grid(tmp_path / "other.png", tmp_path / "images", 3, lambda indices: [""] * len(indices), {})
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "other.png").read_bytes()
