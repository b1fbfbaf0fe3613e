"""Images of every kind a folder of them holds: each becomes the right row, or is skipped with the reason."""

from unittest import mock

import numpy as np
import pytest
from conftest import refusal
from grids import grid_cells
from PIL import Image

import compose_dlc
from dlc.data.images import (
    GAP,
    GRID_GREY,
    LINE,
    center_crop,
    image_grid,
    is_transparent,
    load_rgb,
    open_source,
    read_png,
)
from dlc.data.views import Views
from evaluation.sets import FileImages

RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (70, 90, 3), dtype=np.uint8)
GREY = PIXELS[..., 0]


def saved(path, image, **kwargs):
    image.save(path, **kwargs)
    return path


def rgb(path, *background):
    return np.array(load_rgb(path, *background))


def views_of(path, size, code_size):
    return Views(open_source(path.parent, names=[path.name]), np.zeros((1, 1), bool), size, code_size)[0]


def three(grey):
    return np.repeat(grey[..., None], 3, axis=2)


def on(background, colours, alpha):
    """Colours (H, W, 3) blended on a background by alpha (H, W), 0 to 255."""
    alpha = alpha[..., None] / 255
    return alpha * colours + (1 - alpha) * np.array(background)


@pytest.mark.filterwarnings("error::UserWarning")
def test_modes(tmp_path):
    """Transparency is blended, and not dropped, which would show the colours hidden under it; without a warning."""
    image, grey = Image.fromarray(PIXELS), Image.fromarray(GREY)
    palette, opaque, key = image.quantize(64), Image.new("L", image.size, 255), tuple(map(int, PIXELS[5, 6]))
    colours, indices = np.array(palette.convert("RGB")), np.array(palette)
    for number, (case, flags, wanted, alpha) in enumerate(
        (
            (grey, {}, three(GREY), None),
            (grey.convert("1"), {}, three(np.array(grey.convert("1").convert("L"))), None),
            (palette, {}, colours, None),
            (Image.merge("RGBA", (*image.split(), opaque)), {}, PIXELS, None),
            (Image.merge("RGBA", (*image.split(), grey)), {}, PIXELS, GREY),
            (Image.merge("LA", (grey, grey)), {}, three(GREY), GREY),
            (palette, dict(transparency=3), colours, np.where(indices == 3, 0, 255)),
            (palette, dict(transparency=bytes(range(64))), colours, indices),
            (image, dict(transparency=key), PIXELS, np.where((PIXELS == key).all(axis=2), 0, 255)),
        )
    ):
        path = saved(tmp_path / f"{number}.png", case, **flags)
        assert Image.open(path).mode == case.mode and is_transparent(load_rgb(path)) == (alpha is not None)
        for background in ((255, 255, 255), (10, 200, 0)):
            expected = wanted if alpha is None else on(background, wanted, alpha)
            np.testing.assert_allclose(rgb(path, background), expected, atol=alpha is not None, err_msg=str(number))


def test_all_doors_read_an_image_in_one_way(tmp_path):
    """A phone's photo is upright, and what is transparent is white, wherever an image file comes in."""
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    upright = Image.fromarray(np.repeat(np.repeat(PIXELS[:8, :8], 8, axis=0), 8, axis=1))
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "photo.png", exif=exif)
    Image.new("RGBA", (64, 64), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    for name, wanted in (("photo.png", np.array(upright)), ("clear.png", 255)):
        path = tmp_path / name
        for read in (
            views_of(path, 64, None)[0][0],  # extraction and training
            views_of(path, 8, 64)[1],  # the encoder
            np.array(compose_dlc.view_of(path, 64, (255, 255, 255))),
            np.array(center_crop(Image.fromarray(read_png(path)), 64)),  # samples
            next(FileImages(open_source(tmp_path, names=[name]), crop=64).batches(0, 1, 1))[0],  # evaluation
        ):
            assert (read == wanted).all()


def test_odd_files(tmp_path, monkeypatch):
    (tmp_path / "lfs.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refusal(load_rgb, tmp_path / "lfs.png", words="a git-lfs pointer, not the file: run git lfs pull")
    Image.fromarray(PIXELS).save(tmp_path / "odd.jpg", exif=b"Exif\0\0not a TIFF header")
    assert rgb(tmp_path / "odd.jpg").shape == PIXELS.shape
    cyan = saved(tmp_path / "cyan.jpg", Image.new("CMYK", (80, 80), (255, 0, 0, 0)))
    assert Image.open(cyan).mode == "CMYK" and np.abs(rgb(cyan).astype(int) - (0, 255, 255)).max() <= 2
    deep = RANDOM.integers(0, 2**16, (70, 90)).astype(np.uint16)
    for name in ("deep.png", "deep.tif", "deep.pgm"):
        path = tmp_path / name
        if name == "deep.pgm":  # Pillow writes none
            path.write_bytes(b"P5 90 70 65535\n" + deep.astype(">u2").tobytes())
        else:
            Image.fromarray(deep).save(path)
        np.testing.assert_array_equal(rgb(path), three((deep >> 8).astype(np.uint8)), err_msg=name)
    Image.fromarray(deep.astype(np.float32)).save(tmp_path / "float.tif")
    refusal(load_rgb, tmp_path / "float.tif", words="TIFF of mode F")
    for limit in (5000, 3000):  # of 6300; at twice the limit it is Pillow's own error
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        refusal(load_rgb, tmp_path / "odd.jpg", words=f"more pixels than Pillow's limit of {limit:,}")


@pytest.mark.parametrize("shape", [(1, 1), (3, 50_000), (50_000, 2)])
def test_thin_images(tmp_path, shape):
    """A row or column repeated, in the memory of a small image; its middle is what is cropped."""
    line = np.linspace(0, 255, max(shape)).astype(np.uint8)
    pixels = np.broadcast_to(line[None] if shape[1] > shape[0] else line[:, None], shape).copy()
    crop = np.array(center_crop(load_rgb(saved(tmp_path / "thin.png", Image.fromarray(pixels))), 64))
    assert crop.shape == (64, 64, 3)
    assert abs(int(crop[32, 32, 0]) - 127) <= 2 or shape == (1, 1)


def test_the_disks_errors_are_not_the_images(tmp_path, monkeypatch):
    """A file that is broken is skipped; one that the disk does not give would be there at the next try."""

    def read(name):
        crops, view, _, (index, *what) = views_of(tmp_path / f"{name}.jpg", 32, None)
        assert (index, crops.any(), view) == (0, False, None)  # black
        return what

    (tmp_path / "text.jpg").write_text("text")
    (tmp_path / "link.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "self.jpg").symlink_to("self.jpg")
    assert all(read(name)[1] for name in ("text", "link", "self"))
    assert read("gone") == ["FileNotFoundError: [Errno 2] No such file or directory", False]
    for error, is_broken in (
        (OSError(5, "Input/output error"), False),
        (MemoryError(), False),
        (OSError(22, "Invalid argument"), True),  # a seek to where a broken file says
        (KeyError("tag"), True),  # Pillow's plugins raise such, too
    ):
        monkeypatch.setattr(Image, "open", mock.Mock(side_effect=error))
        assert read("text") == [f"{type(error).__name__}: {error}", is_broken]


def test_grid_has_words_and_gaps(tmp_path):
    """Images are enlarged, at their places; captions, of several lines, and row labels are drawn."""
    images = np.random.default_rng(0).integers(0, 256, (3, 20, 20, 3), dtype=np.uint8)
    words = dict(rows=("one", "two"), captions=("0", "", "a caption that is too wide " * 2, "3"))
    image_grid([images[0], None, images[1], images[2]], 2, **words).save(tmp_path / "words.png")
    cells = grid_cells(tmp_path / "words.png", 20, 2, [1, 3])
    assert (cells.reshape(4, 20, 20, 3)[[0, 2, 3]] == images).all() and (cells[0, 1] == GRID_GREY).all()
    grid, wide = np.array(Image.open(tmp_path / "words.png")), 2 * (80 + GAP)
    assert (grid[:, : -wide - GAP] > 200).any() and (grid[GAP + 80 : GAP + 80 + LINE, -wide:] > 200).any()
