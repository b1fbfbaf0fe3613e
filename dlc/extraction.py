"""Extraction's parts: the two networks, and work done in threads but kept in order."""
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import torch

from dlc.images import IMAGENET_MEAN, IMAGENET_STD, normalize
from dlc.runtime import PRECISIONS, cores_per_process, in_batches, set_numerics
from dlc.vae import posterior


class Networks:
    """Crops to latents and views to codes on a device, in the given precision, by batches of one size.

    On the CPU every operation runs on one thread, and batches side by side (`threads`): the sums that a convolution
    takes depend on how many threads share it, and cores each at a batch of its own get more done.

    Args:
        vae, encoder (or None): float32, on the CPU; are changed in place.
        batch_size: images that every batch is filled up to.
        precision: a key of PRECISIONS, for the VAE's encoder and the SEM encoder's backbone.
    """

    def __init__(self, vae, encoder, device, batch_size, precision="fp32", compile=False):
        self.vae, self.encoder, self.device, self.batch_size = vae.to(device), encoder, device, batch_size
        self.threads = 2 if device.type == "cuda" else cores_per_process()    # 2: the GPU always has work waiting
        torch.set_num_threads(1)        # on GPUs, too: pinning's thread sets it, and compiled code would be made anew
        set_numerics(tf32=False, deterministic=True)
        dtype = PRECISIONS[precision]
        for part in filter(None, (vae.encoder, vae.quant_conv)):
            part.to(dtype=dtype, memory_format=torch.channels_last)
        if encoder:
            encoder.to(device).backbone.to(dtype)
        if compile:
            vae.encoder.compile()
            for block in encoder.backbone.blocks if encoder else ():
                block.compile()

    def pool(self):
        """The threads that work on batches side by side."""
        on_gpu = self.device.type == "cuda"             # a thread's own device would be the first one
        return ThreadPoolExecutor(self.threads, initializer=torch.cuda.set_device if on_gpu else None,
                                  initargs=(self.device,) if on_gpu else ())

    def _run(self, network, pixels, places):
        with torch.inference_mode():
            return in_batches(network, pixels.to(self.device, non_blocking=True), self.batch_size, places)

    def moments(self, crops, places=None):
        """Crops (n, k, S, S, 3) uint8 to the scaled posterior's mean and std (n, k, 2, 4, S/8, S/8), float32.

        places: see `in_batches`.
        """
        def network(pixels):
            images = normalize(pixels.flatten(0, 1)).contiguous(memory_format=torch.channels_last)
            return torch.stack(posterior(self.vae, images), dim=1).unflatten(0, pixels.shape[:2])
        return self._run(network, crops, places)

    def codes(self, views, places=None):
        """Views (n, s, s, 3) uint8 to codes (n, L) int64. places: see `in_batches`."""
        return self._run(lambda pixels: self.encoder.codes(normalize(pixels, IMAGENET_MEAN, IMAGENET_STD)), views,
                         places)


def in_order(pool, function, items, ahead):
    """function(item) of each item in turn, computed by the pool's threads for up to `ahead` items ahead."""
    futures = deque()
    for item in items:
        futures.append(pool.submit(function, item))
        if len(futures) > ahead:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()
