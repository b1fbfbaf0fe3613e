import argparse
import json

import pytest
import torch

from dlc.checkpoints.run import load_checkpoint, newest_checkpoint, run_checkpoints, save_checkpoint
from dlc.checkpoints.weights import load_weights, model_from_weights, weights_sha256
from models import DiT_models


def tiny(name="DiTSEM-Ti/8", seed=0, **sizes):
    torch.manual_seed(seed)
    return DiT_models[name](input_size=8, **(sizes or dict(L=3, V=4)))


def test_round_trip(tmp_path):
    model, ema = tiny(seed=0), tiny(seed=1)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.zeros(2, 3, dtype=torch.long)).sum().backward()
    optimizer.step()
    path = save_checkpoint(tmp_path, dict(step=7, model="DiTSEM-Ti/8"), model, ema, optimizer)
    assert path == tmp_path / "checkpoints/0000007"
    other, other_ema = tiny(seed=2), tiny(seed=3)
    other_optimizer = torch.optim.AdamW(other.parameters())
    load_checkpoint(path, other, other_ema, other_optimizer)
    assert weights_sha256(other) == weights_sha256(model) != weights_sha256(ema) == weights_sha256(other_ema)
    for index, moments in optimizer.state_dict()["state"].items():
        for key, value in moments.items():
            assert torch.equal(other_optimizer.state_dict()["state"][index][key], value)


def test_only_whole_checkpoints_count(tmp_path):
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters())
    for step in (1, 2):
        save_checkpoint(tmp_path / "a", dict(step=step, model="DiTSEM-Ti/8"), model, model, optimizer)
    (tmp_path / "a/checkpoints/0000003.tmp").mkdir()
    (tmp_path / "a/checkpoints/0000003.tmp/meta.json").write_text("{}")
    assert [path.name for path in run_checkpoints(tmp_path / "a")] == ["0000001", "0000002"]
    assert newest_checkpoint(tmp_path / "a", "DiTSEM-Ti/8").name == "0000002"
    label_model = tiny("DiT-Ti/8", num_classes=3)
    save_checkpoint(tmp_path / "b", dict(step=1, model="DiT-Ti/8"), label_model, label_model, optimizer)
    assert newest_checkpoint(tmp_path, "DiTSEM-Ti/8") == tmp_path / "a/checkpoints/0000002"
    with pytest.raises(ValueError, match="no checkpoint of DiT-S/2 .*some of DiT-Ti/8, DiTSEM-Ti/8"):
        newest_checkpoint(tmp_path, "DiT-S/2")


@pytest.mark.parametrize("name, sizes", [("DiT-Ti/8", dict(num_classes=5)), ("DiTSEM-Ti/4", dict(L=3, V=4)),
                                         ("DiTCONT-Ti/2", dict(in_dim=6)),
                                         ("DiT-Ti/2", dict(num_classes=5, learn_sigma=False))])
def test_files_of_other_repositories(tmp_path, name, sizes):
    """A bare state dict, and a training checkpoint with its arguments beside; wrapped by DDP or torch.compile."""
    model, ema = tiny(name, 0, **sizes), tiny(name, 1, **sizes)
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    torch.save(dict(model={f"module._orig_mod.{key}": value for key, value in model.state_dict().items()},
                    ema=ema.state_dict(), opt={}, args=argparse.Namespace(lr=1e-4)), tmp_path / "training.pt")
    for file, use_ema, expected in (("bare.pt", True, model), ("training.pt", False, model), ("training.pt", True, ema)):
        weights, meta = load_weights(tmp_path / file, use_ema)
        loaded, found = model_from_weights(weights, file)
        kind = "as in the file" if file == "bare.pt" else "ema" if use_ema else "raw"
        assert found == name and meta == dict(weights=kind) and not loaded.training
        assert weights_sha256(loaded) == weights_sha256(expected)


@pytest.mark.parametrize("value", [{1: torch.zeros(1)}, {"ema": torch.zeros(1)}, {"model": 3}, [torch.zeros(1)],
                                   {"pos_embed": torch.zeros(3)}, {"x_embedder.proj.weight": torch.zeros(2, 2)}])
def test_other_files_are_refused(tmp_path, value):
    torch.save(value, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt"):
        model_from_weights(load_weights(tmp_path / "other.pt")[0], tmp_path / "other.pt")


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "touched"), "w"))
    torch.save(dict(model=Evil()), tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt cannot be read as weights"):
        load_weights(tmp_path / "evil.pt")
    assert not (tmp_path / "touched").exists()


def test_meta_is_readable(tmp_path):
    model = tiny()
    path = save_checkpoint(tmp_path, dict(step=1, lr=1e-4), model, model, torch.optim.AdamW(model.parameters()))
    assert json.loads((path / "meta.json").read_text()) == dict(step=1, lr=1e-4)
