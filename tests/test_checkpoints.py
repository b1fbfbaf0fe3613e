import argparse
import json

import pytest
import torch

from dlc.weights.checkpoint import load_checkpoint, newest_checkpoint, resume_point, run_checkpoints, save_checkpoint
from dlc.weights.load import load_weights, model_from_weights, weights_sha256
from dlc.weights.meta import RunMeta, read_meta
from models import DiT_models


def tiny(name="DiTSEM-Ti/8", seed=0, **sizes):
    torch.manual_seed(seed)
    return DiT_models[name](input_size=8, **(sizes or dict(L=3, V=4)))


def meta_of(step, model="DiTSEM-Ti/8", **values):
    """A meta with all that a run of training knows."""
    return RunMeta(
        **{
            **dict(
                step=step,
                model=model,
                image_size=64,
                features_count=14,
                latents="sample",
                global_batch_size=8,
                global_seed=0,
                place=8 * step,
                logged=step,
                skipped=0,
                precision="fp32",
                lr=1e-4,
                weight_decay=0.0,
                ema_decay=0.9,
                versions={"torch": "2.6"},
            ),
            **values,
        }
    )


def test_round_trip(tmp_path):
    model, ema = tiny(seed=0), tiny(seed=1)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.zeros(2, 3, dtype=torch.long)).sum().backward()
    optimizer.step()
    path = save_checkpoint(tmp_path, meta_of(7), model=model, ema=ema, optimizer=optimizer)
    assert path == tmp_path / "checkpoints/0000007"
    other, other_ema = tiny(seed=2), tiny(seed=3)
    other_optimizer = torch.optim.AdamW(other.parameters())
    load_checkpoint(path, model=other, ema=other_ema, optimizer=other_optimizer)
    assert weights_sha256(other) == weights_sha256(model) != weights_sha256(ema) == weights_sha256(other_ema)
    for index, moments in optimizer.state_dict()["state"].items():
        for key, value in moments.items():
            assert torch.equal(other_optimizer.state_dict()["state"][index][key], value)


def test_only_whole_checkpoints_count(tmp_path):
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters())
    for step in (1, 2):
        save_checkpoint(tmp_path / "a", meta_of(step), model=model, ema=model, optimizer=optimizer)
    (tmp_path / "a/checkpoints/0000003.tmp").mkdir()
    (tmp_path / "a/checkpoints/0000003.tmp/meta.json").write_text("{}")
    assert [path.name for path in run_checkpoints(tmp_path / "a")] == ["0000001", "0000002"]
    assert newest_checkpoint(tmp_path / "a", "DiTSEM-Ti/8").name == "0000002"
    label_model = tiny("DiT-Ti/8", num_classes=3)
    save_checkpoint(tmp_path / "b", meta_of(1, "DiT-Ti/8"), model=label_model, ema=label_model, optimizer=optimizer)
    assert newest_checkpoint(tmp_path, "DiTSEM-Ti/8") == tmp_path / "a/checkpoints/0000002"
    with pytest.raises(ValueError, match="no checkpoint of DiT-S/2 .*some of DiT-Ti/8, DiTSEM-Ti/8"):
        newest_checkpoint(tmp_path, "DiT-S/2")


@pytest.mark.parametrize(
    "name, sizes",
    [
        ("DiT-Ti/8", dict(num_classes=5)),
        ("DiTSEM-Ti/4", dict(L=3, V=4)),
        ("DiTCONT-Ti/2", dict(in_dim=6)),
        ("DiT-Ti/2", dict(num_classes=5, learn_sigma=False)),
    ],
)
def test_files_of_other_repositories(tmp_path, name, sizes):
    """A bare state dict, and a training checkpoint with its arguments beside; wrapped by DDP or torch.compile."""
    model, ema = tiny(name, 0, **sizes), tiny(name, 1, **sizes)
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    torch.save(
        dict(
            model={f"module._orig_mod.{key}": value for key, value in model.state_dict().items()},
            ema=ema.state_dict(),
            opt={},
            args=argparse.Namespace(lr=1e-4),
        ),
        tmp_path / "training.pt",
    )
    for file, use_ema, expected in (
        ("bare.pt", True, model),
        ("training.pt", False, model),
        ("training.pt", True, ema),
    ):
        weights, meta = load_weights(tmp_path / file, use_ema)
        loaded, found = model_from_weights(weights, file)
        kind = "as in the file" if file == "bare.pt" else "ema" if use_ema else "raw"
        assert found == name and meta.weights == kind and not loaded.training
        assert weights_sha256(loaded) == weights_sha256(expected)


@pytest.mark.parametrize(
    "value",
    [
        {1: torch.zeros(1)},
        {"ema": torch.zeros(1)},
        {"model": 3},
        [torch.zeros(1)],
        {"pos_embed": torch.zeros(3)},
        {"x_embedder.proj.weight": torch.zeros(2, 2)},
    ],
)
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


@pytest.mark.parametrize(
    "values",
    [
        dict(L=3, V=4, code_init="dlc", features_path="features"),
        dict(num_classes=5, data_path="images", scaling_factor=0.18),
    ],
)
def test_meta_is_readable_and_read_back(values, tmp_path):
    """Keys that do not apply are left out."""
    model, meta = tiny(), meta_of(1, **values)
    path = save_checkpoint(tmp_path, meta, model=model, ema=model, optimizer=torch.optim.AdamW(model.parameters()))
    written = json.loads((path / "meta.json").read_text())
    assert written["step"] == 1 and written["lr"] == 1e-4 and written["format_version"] == 1
    assert {"L", "V", "code_init", "num_classes", "in_dim", "data_path", "features_path"} & written.keys() == (
        values.keys() - {"scaling_factor"}
    )
    assert read_meta(path) == meta


def test_meta_says_from_where_a_run_goes_on():
    assert RunMeta(step=3, place=24, logged=0).missing() == "skipped"
    meta = meta_of(1, L=3, V=4, code_init="unit")
    assert meta.missing() is None and meta.differences(dict(L=3, code_init="unit")) == ""
    assert meta.differences(dict(L=3, code_init="dlc")) == "code_init 'unit' there, 'dlc' here"


def test_resume_point(tmp_path):
    """Another model is another run; other data need to be allowed."""
    model = tiny()
    identity, settings = dict(model="DiTSEM-Ti/8"), dict(global_seed=0)
    begin = RunMeta(step=0, place=0, logged=0, skipped=0)
    assert resume_point(tmp_path, identity, settings, False) == (None, begin, "")
    optimizer = torch.optim.AdamW(model.parameters())
    path = save_checkpoint(tmp_path, meta_of(2), model=model, ema=model, optimizer=optimizer)
    assert resume_point(tmp_path, identity, settings, False) == (path, meta_of(2), "")
    with pytest.raises(ValueError, match="another run: model 'DiTSEM-Ti/8' there, 'DiT-Ti/8' here; give another"):
        resume_point(tmp_path, dict(model="DiT-Ti/8"), settings, True)
    with pytest.raises(ValueError, match="another run: global_seed 0 there, 1 here; .*--allow-change"):
        resume_point(tmp_path, identity, dict(global_seed=1), False)
    assert resume_point(tmp_path, identity, dict(global_seed=1), True)[2] == "global_seed 0 there, 1 here"


def test_a_name_twice(tmp_path):
    """With and without a wrapper's prefix: neither is taken for the other in silence."""
    weights = tiny().state_dict()
    name = next(iter(weights))
    torch.save({**weights, f"module.{name}": weights[name] + 1}, tmp_path / "twice.pt")
    with pytest.raises(ValueError, match="twice.pt holds tensors of one name twice"):
        load_weights(tmp_path / "twice.pt")
