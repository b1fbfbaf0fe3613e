"""PNGs, when they are written, the .npz and its check."""

import itertools
import threading
import time
import zipfile

import numpy as np
import pytest
from conftest import refusal, tiny_vae
from drawing import STEPS, draw, tiny_model
from grids import grid_cells

from dlc.data.images import save_png
from dlc.sampling.pictures import Decoder, check_npz, npz_rows, png_path, save_grid, write_npz


@pytest.fixture
def folder(tmp_path):
    """300 PNGs of noise, more than are read at once, and their pixels."""
    images = np.random.default_rng(0).integers(0, 256, (300, 8, 8, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    for index, image in enumerate(images):
        save_png(png_path(tmp_path / "images", index), image)
    return tmp_path / "images", images


def test_npz_is_the_images_in_order(folder, tmp_path):
    path = tmp_path / "images.npz"
    write_npz(path, folder[0], 300)
    with np.load(path) as archive:
        assert archive.files == ["arr_0"]
        np.testing.assert_array_equal(archive["arr_0"], folder[1])
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:  # as ADM's evaluator streams it
        header = member.read(128)
        assert header.startswith(b"\x93NUMPY\x01\x00") and b"'descr': '|u1', 'fortran_order': False" in header
        assert member.read() == folder[1].tobytes()
    assert npz_rows(path) == 300
    first = path.read_bytes()
    write_npz(path, folder[0], 300)
    assert path.read_bytes() == first  # no time of day in it


def test_npz_is_refused_for_a_missing_or_odd_image(folder, tmp_path):
    path, odd = png_path(folder[0], 123), r"has shape \(8, 9, 3\), wanted \(8, 8, 3\)"
    save_png(path, np.zeros((8, 9, 3), np.uint8))
    for content, message in ((path.read_bytes(), odd), (path.read_bytes()[:20], "is not a whole PNG: delete it")):
        path.write_bytes(content)
        refusal(write_npz, tmp_path / "images.npz", folder[0], 300, words=f"000123.png {message}")
        assert [one.name for one in tmp_path.iterdir()] == ["images"] and npz_rows(tmp_path / "images.npz") == 0


def test_check(folder, tmp_path, call):
    path = tmp_path / "images.npz"
    write_npz(path, folder[0], 300)
    lines, wrong = check_npz(path, grid=True)
    assert lines[0] == f"{path}: keys arr_0; arr_0 of uint8, shape (300, 8, 8, 3)"
    assert lines[1] == f"values 0 to 255, mean {folder[1].mean():.1f}"
    assert lines[2].startswith("warning: FID of 300 images") and not wrong
    sheet = grid_cells(tmp_path / "images.npz.grid.png", 8, 10, captions=True)
    np.testing.assert_array_equal(sheet.reshape(-1, 8, 8, 3), folder[1][:60])
    whole = path.read_bytes()
    for harmed in (whole[:-30], whole[:300] + bytes([whole[300] ^ 1]) + whole[301:], b""):
        path.write_bytes(harmed)
        code, _, error = call("dlc.sampling.__main__", "check", path)
        line = error.splitlines()[-1]
        assert code == 2 and line.startswith("python -m dlc.sampling: error: ") and str(path) in line
    odd = folder[1].copy()
    odd[5], odd[299] = (1, 2, 3), odd[17]
    np.savez(path, odd, more=np.zeros(3))
    code, said, _ = call("dlc.sampling.__main__", "check", path)
    assert code == 1 and "keys more, arr_0;" in said
    assert "wrong: 1 images of one colour: 5" in said and "wrong: 1 images twice: 17 = 299" in said
    for arrays, words in (
        (dict(arr_0=np.zeros((2048, 8, 8, 3))), "is float64 .*wanted uint8"),
        (dict(other=odd), "has no arr_0, .*: its keys are other"),
    ):
        np.savez(path, **arrays)
        refusal(check_npz, path, words=words)
    np.savez(path, np.tile(folder[1], (7, 1, 1, 1))[:2048])
    assert not any("warning" in line for line in check_npz(path)[0])


def test_a_contact_sheet_waits_for_no_image(tmp_path):
    """It is drawn after the first batch, when images of a later one may still be broken."""
    save_png(png_path(tmp_path, 0), np.zeros((64, 64, 3), np.uint8))
    png_path(tmp_path, 1).write_bytes(b"")
    for name in ("one.png", "other.png"):
        save_grid(tmp_path / name, tmp_path, 3, lambda indices: [""] * len(indices), {})
        png_path(tmp_path, 1).unlink(missing_ok=True)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "other.png").read_bytes()


def test_a_batch_is_written_during_the_next_one(monkeypatch, tmp_path):
    """And before the one after that is given to the writer: by order of events, which no clock decides."""
    model, order, steps, writes = tiny_model(), [], itertools.count(), itertools.count()
    begun, denoise, write = [threading.Event() for _ in range(3)], model.denoise, Decoder._write

    def denoising(*args):
        batch, step = divmod(next(steps), STEPS)
        if step == 0:
            order.append(f"denoise {batch}")
            begun[batch].set()
        return denoise(*args)

    def writing(*args):
        """Ends only once the next batch is being denoised."""
        batch = next(writes)
        assert begun[min(batch + 1, 2)].wait(60), f"batch {batch + 1} waits until {batch} is written"
        time.sleep(0.2)  # else a batch that nothing waits for might be written in time
        write(*args)
        order.append(f"write {batch}")

    model.denoise = denoising
    monkeypatch.setattr(Decoder, "_write", writing)
    draw(tmp_path, model, tiny_vae(), batch=2, batches=3)
    assert order == ["denoise 0", "denoise 1", "write 0", "denoise 2", "write 1", "write 2"]
