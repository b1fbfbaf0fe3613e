"""Images of every kind a folder of them holds: each becomes the right row, or is skipped with the reason."""

import warnings

import numpy as np
import pytest
from conftest import refusal
from grids import grid_cells
from PIL import Image, ImageFont

import compose_dlc
from dlc.data.images import (
    GAP,
    GRID_GREY,
    LINE,
    _in_lines,
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


def three(grey):
    return np.repeat(grey[..., None], 3, axis=2)


def on(background, colours, alpha):
    """Colours (H, W, 3) blended on a background by alpha (H, W), 0 to 255."""
    alpha = alpha[..., None] / 255
    return alpha * colours + (1 - alpha) * np.array(background)


def test_modes_without_loss(tmp_path):
    image, grey = Image.fromarray(PIXELS), Image.fromarray(GREY)
    palette, opaque = image.quantize(64), Image.new("L", image.size, 255)
    for name, case, expected in (
        ("rgb", image, PIXELS),
        ("grey", grey, three(GREY)),
        ("one_bit", grey.convert("1"), np.array(grey.convert("1").convert("RGB"))),
        ("opaque", Image.merge("RGBA", (*image.split(), opaque)), PIXELS),
        ("palette", palette, np.array(palette.convert("RGB"))),
    ):
        path = saved(tmp_path / f"{name}.png", case)
        assert Image.open(path).mode == case.mode and not is_transparent(load_rgb(path))
        np.testing.assert_array_equal(rgb(path), expected)


def test_transparency_is_blended_on_a_background(tmp_path):
    """And not dropped, which would show the colours that are hidden under it; without a warning of Pillow's."""
    image, grey = Image.fromarray(PIXELS), Image.fromarray(GREY)
    palette, some = image.quantize(64), np.arange(64, dtype=np.uint8)
    colours, indices = np.array(palette.convert("RGB")), np.array(palette)
    cases = dict(
        rgba=(Image.merge("RGBA", (*image.split(), grey)), {}, PIXELS, GREY),
        grey_alpha=(Image.merge("LA", (grey, grey)), {}, three(GREY), GREY),
        palette_index=(palette, dict(transparency=3), colours, np.where(indices == 3, 0, 255)),
        palette_bytes=(palette, dict(transparency=bytes(some)), colours, indices),
        rgb_key=(image, dict(transparency=tuple(map(int, PIXELS[5, 6]))), PIXELS, None),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, (case, flags, colours, alpha) in cases.items():
            alpha = np.where((PIXELS == PIXELS[5, 6]).all(axis=2), 0, 255) if alpha is None else alpha
            path = saved(tmp_path / f"{name}.png", case, **flags)
            assert is_transparent(load_rgb(path))
            for background in ((255, 255, 255), (10, 200, 0)):
                np.testing.assert_allclose(rgb(path, background), on(background, colours, alpha), atol=1, err_msg=name)


def read_by_folder(path, size):
    return next(FileImages(open_source(path.parent, names=[path.name]), crop=size).batches(0, 1, 1))[0]


def views_of(path, size, code_size):
    return Views(open_source(path.parent, names=[path.name]), np.zeros((1, 1), bool), size, code_size)


DOORS = dict(
    extraction_and_training=lambda path, size: views_of(path, size, None)[0][0][0],
    encoder=lambda path, size: views_of(path, 8, size)[0][1],
    compose=lambda path, size: np.array(compose_dlc.view_of(path, size, (255, 255, 255))),
    samples=lambda path, size: np.array(center_crop(Image.fromarray(read_png(path)), size)),
    evaluation=read_by_folder,
)


@pytest.mark.parametrize("door", DOORS)
def test_all_doors_read_an_image_in_one_way(door, tmp_path):
    """A phone's photo is upright, and what is transparent is white, wherever an image file comes in."""
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    upright = Image.fromarray(np.repeat(np.repeat(PIXELS[:8, :8], 8, axis=0), 8, axis=1))
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "photo.png", exif=exif)
    np.testing.assert_array_equal(DOORS[door](tmp_path / "photo.png", 64), np.array(upright))
    Image.new("RGBA", (64, 64), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (DOORS[door](tmp_path / "clear.png", 64) == 255).all()


def test_what_is_no_image_is_called_by_its_name(tmp_path):
    (tmp_path / "lfs.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refusal(load_rgb, tmp_path / "lfs.png", words="a git-lfs pointer, not the file: run git lfs pull")
    Image.fromarray(PIXELS).save(tmp_path / "odd.jpg", exif=b"Exif\0\0not a TIFF header")
    assert rgb(tmp_path / "odd.jpg").shape == PIXELS.shape


def test_cmyk(tmp_path):
    smooth = saved(tmp_path / "smooth.jpg", Image.new("CMYK", (80, 80), (255, 0, 0, 0)))
    assert Image.open(smooth).mode == "CMYK" and np.abs(rgb(smooth).astype(int) - (0, 255, 255)).max() <= 2  # cyan


def test_16_bits_of_grey_and_colour(tmp_path):
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


@pytest.mark.parametrize("shape", [(1, 200), (200, 1), (1, 1), (3, 50_000), (50_000, 2)])
def test_thin_images(tmp_path, shape):
    """A row or column repeated, in the memory of a small image; its middle is what is cropped."""
    line = np.linspace(0, 255, max(shape)).astype(np.uint8)
    pixels = np.broadcast_to(line[None] if shape[1] > shape[0] else line[:, None], shape).copy()
    crop = np.array(center_crop(load_rgb(saved(tmp_path / "thin.png", Image.fromarray(pixels))), 64))
    assert crop.shape == (64, 64, 3)
    assert abs(int(crop[32, 32, 0]) - 127) <= 2 or shape == (1, 1)


def test_pixels_past_pillows_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)  # of 6300
    path = saved(tmp_path / "large.png", Image.fromarray(PIXELS))
    refusal(load_rgb, path, words="more pixels than Pillow's limit of 5,000")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)  # twice the limit: Pillow's own error
    refusal(load_rgb, path, words="more pixels than Pillow's limit of 3,000")


def test_the_disks_errors_are_not_the_images(tmp_path, monkeypatch):
    """A file that is broken is skipped; one that the disk does not give would be there at the next try."""

    def read(path):
        crops, view, _, (index, *what) = views_of(path, 32, None)[0]
        assert (index, crops.any(), view) == (0, False, None)  # black
        return what

    (tmp_path / "text.jpg").write_text("text")
    (tmp_path / "link.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "self.jpg").symlink_to("self.jpg")
    assert read(tmp_path / "text.jpg")[1] and read(tmp_path / "link.jpg")[1] and read(tmp_path / "self.jpg")[1]
    assert read(tmp_path / "gone.jpg") == ["FileNotFoundError: [Errno 2] No such file or directory", False]

    def fails(error):
        def open(path):
            raise error

        monkeypatch.setattr(Image, "open", open)
        return read(tmp_path / "text.jpg")

    assert fails(OSError(5, "Input/output error")) == ["OSError: [Errno 5] Input/output error", False]
    assert not fails(MemoryError())[1]
    assert fails(OSError(22, "Invalid argument"))[1]  # a seek to where a broken file says
    assert fails(KeyError("tag"))[1]  # Pillow's plugins raise such, too


def test_grid_has_words_and_gaps(tmp_path):
    """Images stay as they are, or are enlarged, at their places; captions and row labels are drawn, in lines, and cut
    off where too long."""
    images = np.random.default_rng(0).integers(0, 256, (3, 20, 20, 3), dtype=np.uint8)
    image_grid([images[0], None, images[1], images[2]], 2).save(tmp_path / "plain.png")
    words = dict(rows=("one", "two"), captions=("0", "", "a caption that is too wide " * 2, "3"))
    image_grid([images[0], None, images[1], images[2]], 2, **words).save(tmp_path / "words.png")
    for name, captions in (("plain", 0), ("words", [1, 3])):
        cells = grid_cells(tmp_path / f"{name}.png", 20, 2, captions)
        assert (cells.reshape(4, 20, 20, 3)[[0, 2, 3]] == images).all() and (cells[0, 1] == GRID_GREY).all()
    grid = np.array(Image.open(tmp_path / "words.png"))
    wide = 2 * (80 + GAP)
    assert (grid[:, : -wide - GAP] > 200).any() and (grid[GAP + 80 : GAP + 80 + LINE, -wide:] > 200).any()
    font = ImageFont.load_default(11)
    assert _in_lines("0123-face-with-cold-sweat", font, 64) == ["0123-face-", "with-cold-", "sweat"]
    assert _in_lines("", font, 64) == [""] and _in_lines("Wide", font, 1) == ["W", "i", "…"]
