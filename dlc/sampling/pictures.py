"""From latents to PNGs named by index, from these to the .npz that evaluation reads, and a check of such a file."""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dlc.data.images import image_grid, is_whole, read_png, save_png, save_sheet, to_uint8
from dlc.data.npz import array_names, image_shape, read_images, write_images
from dlc.machine.cli import one_line, progress
from dlc.machine.exact import in_batches
from dlc.machine.files import SHEET, check_output
from dlc.machine.processes import PRECISIONS
from dlc.nets.vae import decode

GRID_IMAGES, GRID_PAIRS, GRID_COLUMNS = 60, 30, 10
ROWS_AT_ONCE = 256  # images in memory while an .npz is written or read
THREADS = 16  # that look for missing images
FEWEST_FOR_FID = 2048  # dimensions of the Inception features: the covariance of fewer images is singular


def png_path(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.png"


def missing_indices(folder: Path, wanted: Sequence[int]) -> list[int]:
    """Those of the wanted indices that have no whole PNG in folder, in their order."""
    there = {entry.name for entry in os.scandir(folder)}

    def is_there(index):
        path = png_path(folder, index)
        return path.name in there and is_whole(path)

    with ThreadPoolExecutor(THREADS) as pool:  # a network disk takes a while to answer each
        return [index for index, whole in zip(wanted, pool.map(is_there, wanted)) if not whole]


def save_grid(
    path: Path, folder: Path, count: int, words: Callable[[np.ndarray], list[str]], asked: dict[int, np.ndarray]
) -> None:
    """Write a contact sheet of those of the first images of 0..count-1 that are whole, as a PNG.

    words, asked: what samples are drawn for, by their indices: in words, and as images, if there are any.
    """
    paths = {index: png_path(folder, index) for index in range(min(count, GRID_PAIRS if asked else GRID_IMAGES))}
    images = {index: read_png(one) for index, one in paths.items() if one.is_file() and is_whole(one)}
    if images:
        save_sheet(path, contact_sheet(images, words(np.array([*images])), asked))


def contact_sheet(images: dict[int, np.ndarray], words: Sequence[str], asked: dict[int, np.ndarray]) -> Image.Image:
    """Samples (H, W, 3) uint8 by their index, and below them index and words; or below the images asked for, in rows
    of their own, the words."""
    indices, columns = [*images], min(GRID_COLUMNS, len(images))
    if not asked:
        captions = [f"{index}: {word}" if word else str(index) for index, word in zip(indices, words)]
        return image_grid([*images.values()], columns, captions=captions)
    cells, captions = [], []
    for start in range(0, len(indices), columns):
        some, gap = indices[start : start + columns], columns - len(indices[start : start + columns])
        cells += [*map(asked.get, some), *[None] * gap, *map(images.get, some), *[None] * gap]
        captions += [*words[start : start + columns], *[""] * gap, *map(str, some), *[""] * gap]
    return image_grid(cells, columns, ("code of", "sample") * (len(cells) // columns // 2), captions)


class Decoder:
    """Decodes and writes PNGs while the next batch is denoised: on GPUs in a thread and a CUDA stream of its own.

    On the CPU, where decoding and denoising would share the cores, only the writing overlaps. Images are decoded 16
    at a time, so that memory does not grow with the batch, and one at a time on the CPU, where that is faster.

    after_first: called once, when the first batch has been written.
    """

    def __init__(self, vae: torch.nn.Module, folder: Path | None = None, precision: str = "fp32"):
        for part in filter(None, (vae.decoder, getattr(vae, "post_quant_conv", None))):
            part.to(dtype=PRECISIONS[precision], memory_format=torch.channels_last)
        self.vae, self.folder, self.on_gpu = vae, folder, vae.device.type == "cuda"
        self.stream = torch.cuda.Stream() if self.on_gpu else None
        in_device = dict(initializer=torch.cuda.set_device, initargs=(vae.device,)) if self.on_gpu else {}  # not cuda:0
        self.thread, self.pool = ThreadPoolExecutor(1, **in_device), ThreadPoolExecutor()
        self.pending, self.after_first = None, None

    def images(self, latents: torch.Tensor) -> np.ndarray:
        """Latents (N, C, h, w) to images (N, H, W, 3) uint8. Raises ValueError where one is not finite."""

        def network(some):
            decoded = decode(self.vae, some).float()
            if not decoded.isfinite().all():
                raise ValueError(
                    "there are samples that are not finite numbers: try --precision bf16 or fp32, and "
                    "the same of --vae-precision"
                )
            return to_uint8(decoded).cpu()

        with torch.inference_mode():
            return in_batches(network, latents, 16 if self.on_gpu else 1).numpy()

    def __call__(self, indices: list[int], latents: torch.Tensor, places: list[int] | None = None) -> None:
        """Start to decode latents (N, C, h, w), and to write them, or those at places alone, as the PNGs of indices."""
        self.wait()  # for the batch before: at most one is pending
        if self.on_gpu:
            ready = torch.cuda.Event()
            ready.record()
            self.pending = self.thread.submit(self._decode_and_write, indices, latents, places, ready)
        else:
            self.pending = self.thread.submit(self._write, indices, self.images(latents), places)

    def _decode_and_write(self, indices, latents, places, ready):
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(ready)
            images = self.images(latents)
        self._write(indices, images, places)

    def _write(self, indices, images, places):
        images = images if places is None else images[places]
        list(self.pool.map(save_png, [png_path(self.folder, index) for index in indices], images))
        if self.after_first:
            self.after_first()
            self.after_first = None

    def wait(self) -> None:
        """Wait until all is written. Raises the exception that writing raised."""
        if self.pending:
            self.pending.result()
            self.pending = None


def save_strip(path: Path, pictures: int, seen: list[torch.Tensor], decoder: Decoder) -> None:
    """A strip of pictures of the x_0 (1, C, h, w) that a model saw at each step."""
    shown = np.linspace(0, len(seen) - 1, pictures).round().astype(int).tolist()
    images = decoder.images(torch.cat([seen[step] for step in shown]))
    save_png(path, image_grid(images, len(images), captions=[f"step {step + 1}" for step in shown]))


def write_npz(path: Path, folder: Path, count: int) -> None:
    """Stream PNGs 0..count-1 into path as arr_0 (count, S, S, 3) uint8, in index order, a few hundred at a time.

    Raises ValueError, naming the image, where one is broken or of another size, and OSError where one is missing; path
    is then not written.
    """
    shape = (count, *read_png(png_path(folder, 0)).shape)

    def images():
        bar = progress(total=count, desc="writing .npz", unit="img", delay=1)
        with ThreadPoolExecutor() as pool, bar:
            for start in range(0, count, ROWS_AT_ONCE):
                paths = [png_path(folder, index) for index in range(start, min(start + ROWS_AT_ONCE, count))]
                for name, image in zip(paths, pool.map(read_png, paths)):
                    if image.shape != shape[1:]:
                        raise ValueError(f"{name} has shape {image.shape}, wanted {shape[1:]}")
                    yield image
                    bar.update()

    write_images(path, shape, images())


def npz_rows(path: Path) -> int:
    """How many images an .npz holds, by its header alone; 0 where the file is missing or broken."""
    try:
        return image_shape(path)[0]
    except ValueError:
        return 0


def check_npz(path: str | Path, grid: bool = False) -> tuple[list[str], list[str]]:
    """What an .npz of samples holds, and what is wrong with it: two lists of lines. Raises ValueError if it is none.

    grid: write a contact sheet of the first images beside it, as FILE.npz.grid.png.
    """
    path, sheet = Path(path), Path(f"{path}.grid.png")
    if grid:
        check_output(sheet, "--grid", own=[SHEET])
    shape, keys = image_shape(path), one_line(", ".join(array_names(path)), 100)
    low, high, total, first, blank, twins, seen = 255, 0, 0.0, [], [], [], {}
    images = progress(read_images(path, 0, shape[0], 1), total=shape[0], desc="checking", delay=1)
    for index, (image,) in enumerate(images):
        low, high, total = min(low, image.min()), max(high, image.max()), total + image.mean()
        if index < GRID_IMAGES:
            first.append(image)
        if (image == image[0, 0]).all():
            blank.append(str(index))
        twin = seen.setdefault(hashlib.blake2b(image, digest_size=16).digest(), index)
        if twin != index:
            twins.append(f"{twin} = {index}")
    lines = [
        f"{path}: keys {keys}; arr_0 of uint8, shape {shape}",
        f"values {low} to {high}, mean {total / shape[0]:.1f}",
    ]
    if shape[0] < FEWEST_FOR_FID:
        few = f"FID of {shape[0]:,} images is unreliable"
        lines.append(f"warning: {few}: draw {FEWEST_FOR_FID:,} or more (papers: 50,000)")
    if grid:
        save_sheet(sheet, contact_sheet(dict(enumerate(first)), [""] * len(first), {}))
        lines.append(f"look at {sheet}")
    wrong = [
        f"{len(found)} {what}: {', '.join(found[:5])}{', …' if len(found) > 5 else ''}"
        for what, found in (("images of one colour", blank), ("images twice", twins))
        if found
    ]
    return lines, wrong
