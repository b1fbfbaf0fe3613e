"""Images are written while the next batch is denoised: by order of events, which no clock decides."""

import itertools
import threading

import torch
from conftest import tiny_vae
from drawing import STEPS, draw, tiny_model

from dlc.data.images import read_png
from dlc.sampling.decoder import Decoder
from dlc.sampling.pictures import png_path

BATCH, BATCHES, PATIENCE = 2, 3, 60  # seconds, after which there is no overlap


def test_a_batch_is_written_during_the_next_one(monkeypatch, tmp_path):
    """And before the one after that is given to the writer."""
    torch.manual_seed(0)
    model, order, steps, writes = tiny_model(), [], itertools.count(), itertools.count()
    begun, denoise, write = [threading.Event() for _ in range(BATCHES)], model.denoise, Decoder._write

    def denoising(*args):
        batch, step = divmod(next(steps), STEPS)
        if step == 0:
            order.append(f"denoise {batch}")
            begun[batch].set()
        return denoise(*args)

    def writing(*args):
        """Ends only once the next batch is being denoised."""
        batch = next(writes)
        assert begun[min(batch + 1, BATCHES - 1)].wait(PATIENCE), f"batch {batch + 1} waits until {batch} is written"
        write(*args)
        order.append(f"write {batch}")

    model.denoise = denoising
    monkeypatch.setattr(Decoder, "_write", writing)
    draw(tmp_path, model, tiny_vae(), batch=BATCH, batches=BATCHES)
    assert order == ["denoise 0", "denoise 1", "write 0", "denoise 2", "write 1", "write 2"]
    assert all(read_png(png_path(tmp_path, index)).shape == (8, 8, 3) for index in range(BATCH * BATCHES))
