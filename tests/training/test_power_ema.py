"""EMAs of any length: against edm2's own functions, and a run that tracks, resumes, stores and rebuilds them."""

import argparse

import pytest
import torch
from conftest import golden, refusal, save_checkpoint
from safetensors.torch import load_file

from dlc.training.power_averages import PowerAverages, write_snapshot
from dlc.weights.load import describe, load_model
from dlc.weights.power_ema import coefficients, decay, exponent, rebuild, snapshots_of

VALUES = golden("ema")[0]
EXACT = dict(atol=1e-9, rtol=1e-9)


def test_agrees_with_edm2():
    lengths, batch = VALUES["std"].tolist(), int(VALUES["batch"])
    torch.testing.assert_close(torch.tensor([exponent(one) for one in lengths]).double(), VALUES["gamma"].double())
    assert max(abs(exponent(one) - gamma) for one, gamma in zip(lengths, VALUES["gamma"].tolist())) < 1e-9
    times = batch * torch.arange(1.0, 65, dtype=torch.float64)
    torch.testing.assert_close(decay(batch, times, exponent(0.05)), VALUES["betas_0.05"], **EXACT)
    averages, skip = PowerAverages(lengths, {"w": torch.zeros(5, dtype=torch.float64)}), torch.tensor(True)
    averages.update([torch.full((5,), 9.0, dtype=torch.float64)], batch, skip)  # before there is any
    for place, weights in enumerate(VALUES["trajectory"]):
        averages.update([weights], batch, ~skip)
        averages.update([weights + 1], batch, skip)  # neither the average nor the clock moves
        for length in lengths:
            expected = VALUES[f"tracked_{length:g}"][place]
            torch.testing.assert_close(averages.named(length)["w"], expected, **EXACT)
    assert averages.images == 64 * batch
    times, of = VALUES["snapshots"].T
    tracked = torch.stack([VALUES[f"tracked_{s:g}"][int(t) // batch - 1] for t, s in zip(times, of.tolist())])
    for place, length in enumerate(VALUES["wanted"].tolist()):
        found = torch.from_numpy(coefficients(times, of, 64 * batch, length))
        torch.testing.assert_close(found, VALUES["coefficients"][:, place], **EXACT)
        torch.testing.assert_close(found @ tracked, VALUES["reconstructed"][place], **EXACT)


def test_a_buffer_of_whole_numbers_is_that_of_the_last_snapshot(tmp_path):
    save_checkpoint(tmp_path / "run/checkpoints/0000001")
    for images in (8, 16):
        for length in (0.05, 0.1):
            tensors = dict(weight=torch.ones(2), count=torch.tensor([images]))
            write_snapshot(tmp_path / "run", images, length, 1, tensors)
    rebuild(argparse.Namespace(run=tmp_path / "run", out=tmp_path / "out", length=0.07, at=None))
    found = load_file(tmp_path / "out/model.safetensors")
    assert found["count"].tolist() == [16] and torch.allclose(found["weight"], torch.ones(2))


@pytest.mark.slow
def test_a_run_with_lengths(trained, refused, tmp_path):
    """Stopped and resumed it has the same averages and snapshots, to the bit; another length is rebuilt of them."""
    flags = ("--ema-lengths", 0.05, 0.1, "--ema-snapshot-every", 16, "--ckpt-every", 3, "--max-steps")
    for name, steps in (("parts", 3), ("parts", 6), ("whole", 6)):
        trained(name, *flags, steps)
    parts, whole, newest = tmp_path / "parts", tmp_path / "whole", "checkpoints/0000006"
    snapshots = {one.path.name: one.path.read_bytes() for one in snapshots_of(whole)}
    assert [name[9:12] for name in snapshots] == ["016", "016", "032", "032", "048", "048"]
    for name, content in snapshots.items():
        assert (parts / "ema" / name).read_bytes() == content
    for name in ("ema-0.05", "ema-0.1"):
        one, other = (run / newest / f"{name}.safetensors" for run in (parts, whole))
        assert one.read_bytes() == other.read_bytes()

    def rebuilt(out, run=whole, at=None):
        return rebuild(argparse.Namespace(run=run, out=tmp_path / out, length=0.1, at=at))

    (line,) = rebuilt("out")
    assert "EMA of length 0.1 at 48 images, step 6, of 6 snapshots" in line
    model, _, meta = load_model(tmp_path / "out")
    assert "EMA weights, step 6" in describe(meta) and meta.noted["ema_length"] == 0.1
    for name, value in load_file(whole / newest / "ema-0.1.safetensors").items():  # which is stored in 16 bits
        torch.testing.assert_close(model.state_dict()[name], value, atol=2e-3, rtol=2e-3)
    # and is the sum of the snapshots in float64, to float32's last bit
    (stored := snapshots_of(whole)).sort(key=lambda one: one.path.name)
    share = coefficients([one.images for one in stored], [one.length for one in stored], 48, 0.1)
    total = sum(load_file(one.path)["x_embedder.proj.weight"].double() * c for one, c in zip(stored, share))
    assert torch.equal(model.state_dict()["x_embedder.proj.weight"], total.float())
    refusal(rebuilt, "out", words="out exists")
    refusal(rebuilt, "early", at=15, words="no snapshots of EMAs until image 15: the first is of 16")
    refusal(rebuilt, "none", run=whole / newest, words="0000006 has no snapshots of EMAs: name the folder of a run")
    rebuilt("early", at=40)
    meta = load_model(tmp_path / "early")[2]
    assert (meta.step, meta.ema_images) == (4, 32)
    # a run that is refused loses nothing, and one that stops to track says so
    assert "has no ema-0.2.safetensors: an average of --ema-lengths" in refused("parts", *flags, 7, *flags[:1], 0.2)
    (parts / newest / "ema-0.1.safetensors").unlink()
    (parts / "metrics.jsonl").open("a").write('{"step": 9}\n')
    assert "has no ema-0.1.safetensors" in refused("parts", *flags, 7)
    assert '"step": 9' in (parts / "metrics.jsonl").read_text()
    assert "changed since: ema_lengths [0.05, 0.1] there, None here" in trained("parts", "--max-steps", 7)
    assert {one.path.name for one in snapshots_of(parts)} >= snapshots.keys()
    assert "--ema-snapshot-every goes with --ema-lengths" in refused("x", "--ema-snapshot-every", 9)
