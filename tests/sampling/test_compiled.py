"""What is compiled is compiled once: no graph breaks, and after the first step nothing is compiled again.

Dynamo's part is the same for every backend, so that of these tests only counts the graphs it is given.
"""

from functools import partial

import numpy as np
import pytest
import torch
import torch._dynamo
from conftest import tiny_vae
from drawing import draw, tiny_model
from test_fake_cuda import L, N, V, prior_training, training
from tiny_prior import save_prior
from torch._dynamo.utils import counters

from dlc.nets.encoder import SEMEncoder
from dlc.nets.pixels import PixelEncoder
from dlc.sampling import command
from dlc.sampling.prior_draw import PriorDraw
from dlc.sampling.prior_options import PriorOptions

CPU = torch.device("cpu")


@pytest.fixture
def graphs(monkeypatch):
    """graphs(): how many were made until now, without a break between them."""
    made, compile_module = [], torch.nn.Module.compile

    def count(graph, inputs, options=None):
        made.append(graph)
        return graph.forward

    def number():
        assert not counters["graph_break"] and counters["frames"]["ok"] == counters["frames"]["total"] == len(made)
        return len(made)

    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: compile_module(self, backend=count, **options)
    )
    yield number
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("prior", [False, True])
def test_training(graphs, prior):
    flags, options = ("--compile", "--grad-accum", "2"), dict(device=CPU, steps=3)
    more = ("--checkpoint-activations", "--grad-clip", "1")
    dit = partial(training, "DiTSEM", "bf16", *flags, *more, **options)
    for step in prior_training(7, False, "bf16", *flags, **options, depth=10) if prior else dit():
        step()
        assert graphs() == 1


@pytest.mark.slow
def test_sampling(graphs, monkeypatch, tmp_path):
    """A graph for a batch with its null half and one for a batch without it, both made in the first batch."""
    sampling_steps, made = command.sampling_steps, []

    def counted(*args, **options):
        yield from sampling_steps(*args, **options)
        made.append(graphs())

    monkeypatch.setattr(command, "sampling_steps", counted)
    draw(tmp_path, tiny_model(), tiny_vae(), compile=True, interval=(300, 700), sampler="heun")
    assert made == [2, 2, 2]


@pytest.mark.slow
def test_sampling_codes(graphs, tmp_path):
    options = PriorOptions(sampler="corrector", steps=4, classes=[0, 2], cfg_scale=2.0)
    draw = PriorDraw(save_prior(tmp_path / "prior", num_classes=3), True, options, seed=0).to(CPU, compiled=True)
    for wanted in (range(4), range(4, 6), range(9, 13)):
        assert draw.draw(np.array(wanted), batch=4).shape[0] == len(wanted) and graphs() == 1


@pytest.mark.slow
def test_extraction(graphs):
    sizes = dict(embed_dim=24, depth=10, num_heads=2, reg_tokens=2)
    encoder = SEMEncoder("vit_tiny_patch16_224", 32, L, V, backbone_args=sizes).eval()
    encode = PixelEncoder(tiny_vae(), encoder, CPU, "bf16", compile=True)
    for count in (N, N, 1):
        crops, views = (torch.randint(255, (count, size, size, 3), dtype=torch.uint8) for size in (16, 32))
        encode.moments(crops.unsqueeze(1), N)
        encode.codes(views, N)
        assert graphs() == 2
