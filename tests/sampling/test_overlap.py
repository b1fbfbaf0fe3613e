"""Images are decoded and written while the next batch is denoised: by order of events, which no clock decides."""

import contextlib
import threading

import pytest
import torch
from conftest import tiny_vae
from drawing import STEPS, draw, tiny_model

from dlc.data.images import read_png
from dlc.sampling import decoder
from dlc.sampling.pictures import png_path

BATCH, BATCHES, PATIENCE = 2, 3, 60  # seconds, after which there is no overlap


class Watched:
    """A model's denoise, and what is to wait until the next batch is being denoised."""

    def __init__(self):
        self.calls, self.begun, self.order = 0, [threading.Event() for _ in range(BATCHES)], []

    def denoising(self, denoise):
        def call(*args):
            if self.calls % STEPS == 0:
                self.order.append(f"denoise {self.calls // STEPS}")
                self.begun[self.calls // STEPS].set()
            self.calls += 1
            return denoise(*args)

        return call

    def held(self, name, function):
        """function, whose call for a batch's first image ends only once the next batch is being denoised."""
        calls = iter(range(BATCHES))

        def call(*args):
            batch = next(calls)
            if batch + 1 < BATCHES:
                assert self.begun[batch + 1].wait(PATIENCE), f"batch {batch + 1} waits for {name} of batch {batch}"
            out = function(*args)
            self.order.append(f"{name} {batch}")
            return out

        return call


@pytest.fixture
def on_gpu(monkeypatch):
    """The decoder takes the GPU's way: streams and events, which the CPU does not have, do nothing."""

    class Nothing:
        def __init__(self, *_):
            self.waited = []

        def record(self):
            pass

        def wait_event(self, event):
            self.waited.append(event)

    for name in ("Stream", "Event"):
        monkeypatch.setattr(torch.cuda, name, Nothing)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", lambda index: None, raising=False)
    create = decoder.Decoder.__init__

    def created(self, vae, *args):
        with monkeypatch.context() as changed:
            changed.setattr(type(vae), "device", torch.device("cuda", 0))
            create(self, vae, *args)
        assert self.on_gpu

    monkeypatch.setattr(decoder.Decoder, "__init__", created)


def drawn(monkeypatch, folder, part):
    """The order of events where `part` of the decoder is held up."""
    torch.manual_seed(0)
    watched, model = Watched(), tiny_model()
    model.denoise = watched.denoising(model.denoise)
    monkeypatch.setattr(decoder.Decoder, part, watched.held(part, getattr(decoder.Decoder, part)))
    draw(folder, model, tiny_vae(), batch=BATCH, batches=BATCHES)
    assert all(read_png(png_path(folder, index)).shape == (8, 8, 3) for index in range(BATCH * BATCHES))
    return watched.order


def test_writing_overlaps_on_a_cpu(monkeypatch, tmp_path):
    """A batch is written during the next one, and before the one after that is given to the writer."""
    order = drawn(monkeypatch, tmp_path, "_write")
    assert order == ["denoise 0", "denoise 1", "_write 0", "denoise 2", "_write 1", "_write 2"]


def test_decoding_overlaps_on_a_gpu(monkeypatch, tmp_path, on_gpu):
    order = drawn(monkeypatch, tmp_path, "_decode_and_write")
    assert order == [
        "denoise 0", "denoise 1", "_decode_and_write 0", "denoise 2", "_decode_and_write 1", "_decode_and_write 2"
    ]  # fmt: skip
