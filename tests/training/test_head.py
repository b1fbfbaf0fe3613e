"""The intermediate head: its output, its loss, training it alone on a frozen trunk, and what reads such weights."""

import pytest
import torch
from conftest import L, V, refusal, save_checkpoint
from safetensors.torch import load_file
from tiny_weights import tiny
from training_runs import metrics

from diffusion.process_table import create_process
from dlc.weights.load import load_model, load_pretrained
from models import DiTSEM
from train_diffusion import HEAD_WEIGHT, draws, losses_of

CODES = dict(L=L, V=V)


def with_head(**more):
    return tiny("DiTSEM-Ti/4", intermediate_head=2, **CODES, **more)


@pytest.mark.parametrize("process, learn_sigma", [("gaussian", True), ("flow", False)])
def test_output_and_loss(process, learn_sigma):
    """The head's prediction is that of a model that ends there, and its loss is the squared error of the target."""
    model, process = with_head(learn_sigma=learn_sigma), create_process(process)
    x, y, indices = torch.randn(3, 4, 8, 8), torch.randint(V, (3, L)), torch.arange(3)
    t, noise, drop = draws(0, indices, x, process, 0.5)
    short = DiTSEM(input_size=8, patch_size=4, hidden_size=192, depth=2, num_heads=3, learn_sigma=False, **CODES).eval()
    weights = {name.replace("intermediate_", "last_"): value for name, value in model.state_dict().items()}
    short.load_state_dict({name: weights[name.replace("final_", "last_")] for name in short.state_dict()})
    settings = dict(seed=0, dropout=0.5, draw_latents=False)
    with torch.no_grad():
        both, plain = (model(x, t * 1.0, y, head=head) for head in (True, False))
        assert torch.equal(both[:, :-4], plain)
        torch.testing.assert_close(both[:, -4:], short(x, t * 1.0, y))
        terms, _ = losses_of(model, process, indices, x, y, head=True, **settings)
        usual, _ = losses_of(model, process, indices, x, y, **settings)
        head = short(process.q_sample(x, t, noise), t, y, drop) - process.target(x, noise, t)
    head = head.square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(terms["head"], head)
    torch.testing.assert_close(terms["loss"], usual["loss"] + HEAD_WEIGHT * head)
    assert terms.keys() == {*usual, "mse", "head"}
    refusal(tiny, "DiTSEM-Ti/4", intermediate_head=6, **CODES, words="after block 1 to 5, not 6")


def test_a_head_is_optional(tmp_path):
    old = save_checkpoint(tmp_path / "old")
    new = save_checkpoint(tmp_path / "new", sizes=dict(intermediate_head=2, **CODES))
    assert load_model(new)[0].intermediate_head == 2 and load_model(old)[0].intermediate_head is None
    assert "new: intermediate_layer.adaLN_modulation.1.bias" in load_pretrained(old, with_head())
    plain = tiny("DiTSEM-Ti/4", **CODES)
    assert "left out: intermediate_layer.adaLN_modulation.1.bias" in load_pretrained(new, plain)
    moved = tiny("DiTSEM-Ti/4", intermediate_head=4, **CODES)
    assert "its model was built with intermediate_head 2 there, 4 here" in load_pretrained(new, moved)
    # a trunk that is to stay as it is has to be all there
    frozen = with_head().requires_grad_(False)
    frozen.intermediate_layer.requires_grad_(True)
    assert "new: intermediate_layer" in load_pretrained(old, frozen, create_process("gaussian").config, "head")
    with pytest.raises(ValueError, match="process 'gaussian' there, 'flow' here.*leave out --train-only"):
        load_pretrained(old, frozen, create_process("flow").config, "head")
    assert "learned anew" in load_pretrained(old, frozen, create_process("flow").config)  # frozen by its own code
    labels = save_checkpoint(tmp_path / "labels", "DiT-Ti/4", dict(num_classes=5))
    with pytest.raises(ValueError, match="no sem_embedder.embedding_table of this shape"):
        load_pretrained(labels, frozen, create_process("gaussian").config, "head")
    model = with_head()
    model.drop_head()
    assert model.state_dict().keys() == plain.state_dict().keys() and model.config == plain.config


@pytest.mark.slow
def test_a_head_on_a_frozen_trunk(trained, refused, features, tmp_path):
    """Continued, and by two processes."""
    trunk, run = save_checkpoint(tmp_path / "trunk", features_path=features), tmp_path / "run"
    head = ("--intermediate-head", 2, "--max-steps", 4)
    flags = (*head, "--pretrained-path", trunk, "--train-only", "head")
    trained("run", *flags, "--max-steps", 2)
    trained("run", *flags)
    trained("two", *flags, processes=2)
    before = load_file(trunk / "ema.safetensors")
    for name in ("model", "ema"):
        after = load_file(run / f"checkpoints/0000004/{name}.safetensors")
        assert all(torch.equal(after[key], value) for key, value in before.items())
        assert after.keys() - before.keys() and after["intermediate_layer.linear.weight"].any()
    one, two = ([line["head"] for line in metrics(tmp_path / name)] for name in ("run", "two"))
    assert len(one) == 4 and min(one) > 0 and one == pytest.approx(two, rel=1e-4)
    # without --train-only more is trained: refused, whatever is allowed, and the record of the run stays
    record = (run / "args.json").read_bytes()
    words = "holds the state of AdamW of 4 parameters"
    assert words in refused("run", *head, "--allow-change", "--max-steps", 6)
    assert (run / "args.json").read_bytes() == record
