"""REPA and iREPA: against REPA's own code; runs that resume, with several processes; both ways to the same targets."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import IMAGE_SIZE, L, V, extract_command, launch
from safetensors.torch import load_file
from test_flow import REPA, close
from tiny_weights import tiny
from torch import nn
from training_runs import metrics, same_run, tensors, train_command

from diffusion.flow import Flow
from diffusion.process_table import create_process
from dlc.data import Features
from dlc.data.images import center_crop, load_rgb
from dlc.data.inspection import problems
from dlc.training.alignment import ALIGNMENTS, Alignment, resized
from dlc.weights.load import load_model, load_pretrained
from dlc.weights.networks import load_encoder
from models import DiT
from train_diffusion import draws, losses_of

ALIGN = ("--align", "repa", "--align-block", 2)
AT_2, AT_4 = (f"checkpoints/000000{step}/projector.safetensors" for step in (2, 4))


def alignment_of(kind="repa", weight=0.5, shape=(16, 16), block=2, **more):
    return Alignment(kind, block, weight, None, shape, None, **more)


# ---------------------------------------------------------------------- the loss


@torch.no_grad()
def test_agrees_with_repa():
    """Its network, and the projector of its tokens after block 2, of another width than ours."""
    model = DiT(8, 2, hidden_size=32, depth=3, num_heads=2, num_classes=7, learn_sigma=False).eval()
    weights = {key[2:]: value for key, value in REPA.items() if key.startswith("w/") and "projectors" not in key}
    model.load_state_dict(weights)
    projector = nn.Sequential(nn.Linear(32, 24), nn.SiLU(), nn.Linear(24, 24), nn.SiLU(), nn.Linear(24, 16))
    assert [*ALIGNMENTS["repa"].projector(32, 16).state_dict()] == [*projector.state_dict()]
    projector.load_state_dict({key: REPA[f"w/projectors.0.{key}"] for key in projector.state_dict()})
    out, tokens = model(REPA["x"], REPA["t"], REPA["y"], tap=2)
    assert torch.equal(out, model(REPA["x"], REPA["t"], REPA["y"]))
    close(out, REPA["out"])
    close(projector(tokens), REPA["projected"])
    flow, (data, t, noise) = Flow(), (REPA[f"loss_{name}"] for name in ("data", "t", "noise"))
    alignment = alignment_of(project=projector)
    _, tokens = model(flow.q_sample(data, t, noise), t, REPA["y"], tap=2)
    close(alignment(tokens, REPA["targets"]).mean(), REPA["projection_loss"])
    close(alignment(tokens, REPA["targets"].half()).mean(), REPA["projection_loss"], 1e-3)


@torch.no_grad()
@pytest.mark.parametrize("process", ["gaussian", "flow"])
def test_loss_of_a_step(process):
    """It is added to the usual loss, beside an intermediate head's, which keeps its value; without targets it is 0."""
    process = create_process(process)
    model = tiny("DiT-Ti/2", num_classes=7, intermediate_head=3, **process.model_arguments)
    projector = ALIGNMENTS["repa"].projector(192, 16)
    indices, x, y = torch.arange(4), REPA["x"], REPA["y"]
    kept = dict(seed=0, dropout=0.5, draw_latents=False, head=True)
    usual, t = losses_of(model, process, indices, x, y, **kept)
    alignment = alignment_of(project=projector)
    terms, _ = losses_of(model, process, indices, x, y, **kept, alignment=alignment, targets=REPA["targets"])
    _, noise, drop = draws(0, indices, x, process, 0.5)
    told = getattr(process, "told", lambda t: t)(t)
    _, tokens = model(process.q_sample(x, t, noise), told, y, drop, tap=2)
    unit = [one / one.norm(dim=2, keepdim=True) for one in (projector(tokens), REPA["targets"])]
    torch.testing.assert_close(terms["align"], -(unit[0] * unit[1]).sum(dim=2).mean(dim=1))
    torch.testing.assert_close(terms["loss"], usual["loss"] + 0.5 * terms["align"])
    assert terms.keys() == {*usual, "align"} and torch.equal(terms["head"], usual["head"])
    without, _ = losses_of(model, process, indices, x, y, **kept, alignment=alignment)
    assert torch.equal(without["loss"], usual["loss"]) and not without["align"].any()


@torch.no_grad()
def test_irepa():
    """Targets lose their image's mean and scale; the projector sees a token's neighbours, and only these."""
    targets = torch.randn(3, 16, 5) * 7 + 3
    prepared = ALIGNMENTS["irepa"].prepared(targets)
    torch.testing.assert_close(prepared.mean(dim=1), torch.zeros(3, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(prepared.std(dim=1), torch.ones(3, 5))
    projector, tokens = ALIGNMENTS["irepa"].projector(8, 5), torch.randn(1, 16, 8)
    changed = tokens.clone()
    changed[:, 0] += 1  # the first corner of 4 x 4
    different = (projector(tokens) != projector(changed)).any(dim=2)[0]
    assert different.nonzero().flatten().tolist() == [0, 1, 4, 5]
    alike = alignment_of("irepa", project=lambda tokens: prepared)
    torch.testing.assert_close(alike(tokens, targets), -torch.ones(3))


def test_other_grids():
    ramp = torch.arange(8.0).expand(8, 8).reshape(1, 64, 1)
    halved, doubled = resized(ramp, 16), resized(ramp, 256)
    assert (halved.view(4, 4).diff(dim=1) > 1.5).all() and (doubled.view(16, 16).diff(dim=1) >= 0).all()
    torch.testing.assert_close(halved.mean(), ramp.mean())
    assert resized(ramp, 64) is ramp


# ---------------------------------------------------------------------- targets on disk


@pytest.mark.slow
def test_stored_tokens_are_those_of_the_images(both_data, tiny_models, tmp_path):
    """Of both flips, by two processes; one image is broken."""
    images, both = shutil.copytree(both_data / "images", tmp_path / "images"), tmp_path / "both"
    (images / "cat/3.png").write_text("no image")
    command = extract_command("forked", 2, images, both, tiny_models, "--flip", "both", "--store-tokens")
    assert "patch tokens: 4 of 24 numbers in float16 per row, " in launch(command, tmp_path).stdout
    features, encoder = Features(both), load_encoder(tiny_models[1])
    assert (features.manifest.tokens, features.manifest.tokens_norm) == ([4, 24], "plain") and features.count == 26
    paths = [images / name for name in features.paths.gather(np.arange(26))]
    views = [np.array(center_crop(load_rgb(path), 32)) for path in paths]
    views = np.stack([view[:, ::-1] if row % 2 else view for row, view in enumerate(views)])
    with torch.no_grad():
        seen = encoder.patch_tokens(torch.from_numpy(views))
    there = features.arrays["tokens"].gather(np.arange(26))
    assert there.dtype == np.float16 and (there[::2] != there[1::2]).any(axis=(1, 2)).all()
    np.testing.assert_allclose(there, seen, atol=2e-3, rtol=2e-3)
    np.testing.assert_allclose(there.astype(np.float32).std(axis=2), 1, atol=1e-2)  # by a plain final norm
    np.save(both / "imagenet64_tokens/000001.npy", np.full_like(there[:8], np.nan))
    assert [line for line in problems(both) if "000001.npy, row 0: values that are not finite numbers" in line]


# ---------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def features(both_data):
    """What conftest's fixtures train on here."""
    return both_data / "features"


@pytest.fixture
def run(trained, tmp_path):
    """run(name, flags…): a run on the features into that folder of tmp_path; gives the folder."""
    return lambda name, *flags, **options: trained(name, *flags, **options) and tmp_path / name


@pytest.mark.slow
def test_a_run_resumes_and_leaves_the_model_alone(run, refused, tmp_path):
    flags = (*ALIGN, "--align-until", 3, "--ckpt-every", 2, "--max-steps")
    run("stopped", *flags, 2)
    stopped, whole = run("stopped", *flags, 4), run("whole", *flags, 4)
    assert same_run(stopped, whole, 4)
    two, *fours = ((run / name).read_bytes() for run, name in ((whole, AT_2), (whole, AT_4), (stopped, AT_4)))
    assert fours[0] == fours[1] != two
    *aligned, last = [line["align"] for line in metrics(whole)]
    assert all(-1 <= value <= 1 for value in aligned) and aligned[-1] < aligned[0] and last == 0
    words = "alignment: repa, weight 0.5, of 2 x 2 tokens after block 2 with the encoder's 2 x 2 of 24 numbers; "
    assert words in (whole / "log.txt").read_text()
    meta = json.loads((whole / "checkpoints/0000004/meta.json").read_text())
    assert meta["compared"]["alignment"] == dict(kind="repa", block=2, weight=0.5, until=3)
    # what is read of it is a model like any other
    (whole / AT_4).unlink()
    model = tiny("DiTSEM-Ti/4", L=L, V=V)
    assert load_model(whole)[0].config == model.config and "not taken" not in load_pretrained(whole, model)
    # and the run itself
    assert "has no projector.safetensors" in refused("whole", *flags, 5)
    assert "alignment some there, None here" in refused("stopped", "--max-steps", 5)
    assert "alignment.weight 0.5 there, 0.25 here" in refused("stopped", *flags, 5, "--align-weight", 0.25)


@pytest.mark.slow
def test_without_weight_it_changes_nothing(run, refused):
    """To the bit, clipping included."""
    flags = ("--max-steps", 3, "--grad-clip", 0.5, "--objective", "flow")
    plain, zero = run("plain", *flags), run("zero", *flags, *ALIGN, "--align-weight", 0)
    there, here = (tensors(run / "checkpoints/0000003") for run in (plain, zero))
    assert all(torch.equal(here[key], value) for key, value in there.items())
    for one, other in zip(metrics(plain), metrics(zero), strict=True):  # which has a loss beside the flow's
        assert (one["loss"], one["grad_norm"]) == (other["loss"], other["grad_norm"])
        assert one["loss_by_quarter_of_t"] == other["mse_by_quarter_of_t"]
    assert all(line["align"] != 0 for line in metrics(zero))
    line = refused("plain", *flags, *ALIGN, "--max-steps", 5, "--allow-change")
    assert "has no projector.safetensors: an average of --ema-lengths, or the projector of --align, begins with" in line


def assert_alike(one, other):
    for key in ("loss", "align"):
        values = [[line[key] for line in metrics(run)] for run in (one, other)]
        np.testing.assert_allclose(*values, rtol=2e-3, atol=2e-4)
    here, there = (load_file(max((run / "checkpoints").iterdir()) / "projector.safetensors") for run in (one, other))
    assert all((here[key] - there[key]).norm() <= 1e-3 * there[key].norm() for key in there)


@pytest.mark.slow
def test_processes_and_options(run):
    """Two processes, and sharded ones, train as one does: iREPA, an intermediate head and recomputed activations."""
    flags = ("--intermediate-head", 3, "--checkpoint-activations", "--align", "irepa", "--align-block", 4)
    one = run("one", *flags, "--max-steps", 3)
    flags = (*flags, "--max-steps", 3, "--grad-accum", 2)
    assert_alike(run("two", *flags, processes=2), one)
    environment = dict(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    assert_alike(run("sharded", *flags, processes=2, environment=environment), one)


@pytest.mark.slow
def test_on_images(both_data, tiny_models, run, tmp_path):
    """Of a model that has no use for the encoder's codes."""
    flags = ("--model", "DiT-Ti/2", *ALIGN, "--max-steps", 3)
    images = ("--data-path", both_data / "images", "--image-size", IMAGE_SIZE, "--vae", tiny_models[0])
    images = (*images, "--encoder", tiny_models[1], "--flip", "none")
    launch(train_command(1, None, tmp_path / "images", *flags, *images), tmp_path)
    assert_alike(run("features", *flags), tmp_path / "images")
    resized = "of 4 x 4 tokens after block 2 with the encoder's 2 x 2 of 24 numbers, resized to 4 x 4"
    assert resized in (tmp_path / "images/log.txt").read_text()
