"""Decode latents and write PNG files while the next batch is denoised."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from dlc.data.images import image_grid, save_png, to_uint8
from dlc.machine.exact import in_batches
from dlc.machine.processes import PRECISIONS
from dlc.nets.vae import decode
from dlc.sampling.pictures import png_path


class Decoder:
    """Decodes and writes PNGs while the next batch is denoised: on GPUs in a thread and a CUDA stream of its own.

    On the CPU, where decoding and denoising would share the cores, only the writing overlaps. Images are decoded 16
    at a time, so that memory does not grow with the batch, and one at a time on the CPU, where that is faster.

    after_first: called once, when the first batch has been written.
    """

    def __init__(
        self, vae: torch.nn.Module, folder: Path, precision: str = "fp32", after_first: Callable | None = None
    ):
        for part in filter(None, (vae.decoder, getattr(vae, "post_quant_conv", None))):
            part.to(dtype=PRECISIONS[precision], memory_format=torch.channels_last)
        self.vae, self.folder = vae, folder
        self.on_gpu = vae.device.type == "cuda"
        self.stream = torch.cuda.Stream() if self.on_gpu else None
        in_device = dict(initializer=torch.cuda.set_device, initargs=(vae.device,)) if self.on_gpu else {}  # not cuda:0
        self.thread = ThreadPoolExecutor(1, **in_device)
        self.pool, self.pending, self.after_first = ThreadPoolExecutor(), None, after_first

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


def save_strip(path: Path, pictures: int, num_steps: int, draw: Callable, decoder: Decoder) -> None:
    """A strip of the x_0 that a model sees in some of the num_steps steps by which draw(on_step) draws a sample."""
    shown, seen = np.linspace(0, num_steps - 1, pictures).round().astype(int).tolist(), []
    draw(lambda step, x, x_start: seen.append(x_start) if step in shown else None)
    images = decoder.images(torch.cat(seen))
    save_png(path, image_grid(images, len(images), captions=[f"step {step + 1}" for step in shown]))
