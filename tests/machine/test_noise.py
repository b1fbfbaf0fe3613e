import torch

from diffusion.process_table import create_process
from dlc.machine import noise
from dlc.machine.noise import LOW, StepNoise, Stream, integers, normal, permutation, random_words, uniforms
from train_diffusion import draws


def test_philox_agrees_with_its_published_vectors():  # Random123's known answers for philox4x32-10
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0]
    for counter, key, expected in [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([LOW] * 4, [LOW] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (pi[:4], pi[4:], "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ]:
        words = noise.philox([torch.tensor([word]) for word in counter], key)
        assert " ".join(f"{word.item():08x}" for word in words) == expected


def close(one, other):
    torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def test_numbers_belong_to_the_sample():
    """Words and integers to the bit; of normals, a logarithm may round otherwise in a row of another length."""
    everyone = torch.arange(50)
    some = torch.tensor([41, 3, 17])
    for numbers in (random_words, integers):
        assert torch.equal(numbers(7, Stream.POSTERIOR, everyone, 6)[some], numbers(7, Stream.POSTERIOR, some, 6))
    for shape in ((4, 8, 8), (3,), ()):
        close(normal(7, Stream.POSTERIOR, everyone, shape)[some], normal(7, Stream.POSTERIOR, some, shape))


def test_noise_of_steps(monkeypatch):
    """Step s of n is draw n - s, in whichever order it is asked for and however many are made at once."""
    some = torch.tensor([41, 3, 17])
    for numbers in (1, 3 * 32 * 2, 10**6):  # one step at once, two, and all
        monkeypatch.setattr(StepNoise, "AT_ONCE", numbers)
        made = StepNoise(7, Stream.SAMPLE_NOISE, some, (4, 8), 5)
        for step in (0, 1, 4, 2, 2, 3):
            close(made(step), normal(7, Stream.SAMPLE_NOISE, some, (4, 8), 5 - step))


def test_seed_stream_draw_and_index_all_count():
    base = dict(seed=0, stream=Stream.FLIP, indices=torch.tensor([5]), count=8, draw=0)
    others = [dict(seed=1), dict(seed=2**32), dict(stream=Stream.POSTERIOR), dict(draw=1)]
    others += [dict(indices=torch.tensor([index])) for index in (6, 5 + 2**32)]
    words = [tuple(random_words(**{**base, **other}).flatten().tolist()) for other in [{}, *others]]
    assert len(set(words)) == len(words)
    assert len(set(words[0])) == 8


def test_streams_in_one_call_are_what_they_are_alone():
    """Training draws a step's times, noise and dropped conditions from one call of the generator."""
    x, indices = torch.empty(5, 3, 3, 3), torch.tensor([0, 1, 7, 2**31, 2**40 + 3])
    t, normals, drop = draws(4, indices, x, create_process("gaussian"), 0.5)
    assert torch.equal(t, integers(4, Stream.TRAIN_TIMESTEP, indices, 1000))
    assert torch.equal(normals, normal(4, Stream.TRAIN_NOISE, indices, x.shape[1:]))
    assert torch.equal(drop, uniforms(4, Stream.TRAIN_DROP, indices, 1)[:, 0] < 0.5)


def test_distributions():
    n = 200_000
    sample = normal(3, Stream.TRAIN_NOISE, torch.arange(n // 100), (100,)).flatten().double()
    assert abs(sample.mean()) < 5 / n**0.5
    assert abs(sample.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((sample**4).mean() - 3) < 5 * (96 / n) ** 0.5
    quantiles = torch.distributions.Normal(0, 1).cdf(sample.sort().values.float())
    assert (quantiles - (torch.arange(n) + 0.5) / n).abs().max() < 2 / n**0.5  # Kolmogorov-Smirnov
    counts = integers(3, Stream.TRAIN_TIMESTEP, torch.arange(n), 1000).bincount(minlength=1000)
    assert len(counts) == 1000 and ((counts - n / 1000) ** 2 / (n / 1000)).sum() < 1000 + 5 * 2000**0.5
    assert abs((uniforms(3, Stream.TRAIN_DROP, torch.arange(n), 1) < 0.1).double().mean() - 0.1) < 5 * (0.09 / n) ** 0.5


def test_uniform_numbers_are_below_1():
    """The largest words, as float32, would be rounded up: a draw of 1 takes a token that has no probability."""
    assert noise.in_unit_interval(torch.tensor([0, 2**31, LOW])).tolist() == [0, 0.5, 1 - 2**-24]


def test_permutation():
    keys = [(seed, Stream.TRAIN_ORDER, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    orders = [permutation(*key, 100) for key in (*keys, (0, Stream.SAMPLE_ORDER, 0))]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert (permutation(0, Stream.TRAIN_ORDER, 1, 100) == orders[1]).all()
    assert len({tuple(order) for order in orders}) == len(orders)
