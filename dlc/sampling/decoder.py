"""Latents to PNG files while the next batch is denoised."""
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from dlc.images import image_grid, save_png, to_uint8
from dlc.runtime import autocast, in_batches
from dlc.sampling.files import png_path
from dlc.vae import decode


class Decoder:
    """Latents to PNG files behind the denoising of the next batch: on GPUs in a thread and a stream of its own.

    On the CPU, where both would share the cores, only the writing is behind. Images are decoded a few at a time, so
    that memory does not grow with the batch, and one at a time on the CPU, where that is faster.

    Args:
        precision: of the VAE, "fp32", "bf16" or "fp16".
        after_first: called once, when the first batch is written.
    """

    def __init__(self, vae, folder, precision="fp32", after_first=None):
        self.vae, self.folder, self.precision = vae.to(memory_format=torch.channels_last), folder, precision
        self.on_gpu = vae.device.type == "cuda"
        self.stream = torch.cuda.Stream() if self.on_gpu else None
        # a thread's own device would be the first one
        self.thread = (ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(vae.device,)) if self.on_gpu
                       else ThreadPoolExecutor(1))
        self.pool, self.pending, self.after_first = ThreadPoolExecutor(), None, after_first

    def images(self, latents, places=None):
        """Latents (N, 4, h, w) to images (N, H, W, 3) uint8 NumPy: all, or those at places, int64 on the CPU.

        Raises ValueError where one is not finite.
        """
        def network(some):
            decoded = decode(self.vae, some).float()
            if not decoded.isfinite().all():
                raise ValueError("there are samples that are not finite numbers: try --precision bf16 or fp32, and "
                                 "the same of --vae-precision")
            return to_uint8(decoded).cpu()
        with torch.inference_mode(), autocast(latents.device, self.precision):
            rows = latents if places is None else latents[places]
            return in_batches(network, rows, 16 if self.on_gpu else 1, places).numpy()

    def __call__(self, indices, latents, places=None):
        """Write latents (N, 4, h, w), all or those at places, as the PNGs of indices, soon."""
        self.wait()                                                 # at most one batch behind
        if self.on_gpu:
            ready = torch.cuda.Event()
            ready.record()
            self.pending = self.thread.submit(self._decode_and_write, indices, latents, places, ready)
        else:
            self.pending = self.thread.submit(self._write, indices, self.images(latents, places))

    def _decode_and_write(self, indices, latents, places, ready):
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(ready)
            images = self.images(latents, places)
        self._write(indices, images)

    def _write(self, indices, images):
        list(self.pool.map(save_png, [png_path(self.folder, index) for index in indices], images))
        if self.after_first:
            self.after_first()
            self.after_first = None

    def wait(self):
        """Until all is written. Raises what went wrong with it."""
        if self.pending:
            self.pending.result()
            self.pending = None


def save_strip(path, pictures, sampler, draw, decoder):
    """A strip of how one sample is denoised: what the model takes for the image, from the first step to the last.

    draw(on_step) draws that sample; pictures is how many steps are shown.
    """
    shown = np.linspace(0, len(sampler.times) - 1, pictures).round().astype(int).tolist()
    seen = []
    draw(lambda step, x, x_start: seen.append(x_start) if step in shown else None)
    images = decoder.images(torch.cat(seen))
    save_png(path, image_grid(images, len(images)))
