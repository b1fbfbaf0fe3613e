"""REPA and iREPA: against REPA's own code; runs that resume, with several processes; both ways to the same targets."""

import json
import shutil

import numpy as np
import pytest
import torch
from accelerate import PartialState
from conftest import IMAGE_SIZE, extract_command, launch, refusal, save_images
from safetensors.torch import load_file
from test_flow import REPA, close, model_of
from tiny_weights import tiny
from torch import nn
from training_runs import metrics, same_run, tensors, train_command

from diffusion.flow import Flow
from diffusion.process_table import create_process
from dlc.data import Features
from dlc.data.images import center_crop, load_rgb
from dlc.data.inspection import problems
from dlc.training.alignment import ALIGNMENTS, Alignment, resized
from dlc.training.image_batches import ImageBatches, Images
from dlc.training.losses import Losses
from dlc.weights.load import load_model
from dlc.weights.networks import load_encoder
from train_diffusion import draws, losses_of

ALIGN = ("--align", "repa", "--align-block", 2)


def alignment_of(kind="repa", weight=0.5, shape=(16, 16), block=2, **more):
    return Alignment(kind, block, weight, None, shape, None, **more)


# ---------------------------------------------------------------------- the loss


@pytest.fixture(scope="module")
def network():
    """REPA's network, and the projector of its tokens after block 2, of another width than ours."""
    projector = nn.Sequential(nn.Linear(32, 24), nn.SiLU(), nn.Linear(24, 24), nn.SiLU(), nn.Linear(24, 16))
    name = "w/projectors.0."
    projector.load_state_dict({key[len(name) :]: value for key, value in REPA.items() if key.startswith(name)})
    return model_of(REPA, 3, False), projector


@torch.no_grad()
def test_agrees_with_repa(network):
    model, projector = network
    assert [*ALIGNMENTS["repa"].projector(32, 16).state_dict()] == [*projector.state_dict()]
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
    # the process's own loss is logged, too
    own, _ = losses_of(model, process, indices, x, y, **{**kept, "head": False})
    logged = Losses("images")
    assert not logged.begin(terms) and logged.by_quarter == "mse" and {*logged.names} == terms.keys()
    assert torch.equal(terms["mse"] + terms.get("vb", 0), own["loss"])
    without, _ = losses_of(model, process, indices, x, y, **kept, alignment=alignment)
    assert torch.equal(without["loss"], usual["loss"]) and not without["align"].any()


@torch.no_grad()
def test_irepa():
    """Targets lose their image's mean and scale; the projector sees a token's neighbours, and only these."""
    targets = torch.randn(3, 16, 5) * 7 + 3
    prepared = ALIGNMENTS["irepa"].prepared(targets)
    torch.testing.assert_close(prepared.mean(dim=1), torch.zeros(3, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(prepared.std(dim=1), torch.ones(3, 5))
    torch.testing.assert_close(ALIGNMENTS["irepa"].prepared(2 * targets + 1), prepared, atol=1e-4, rtol=1e-4)
    projector, tokens = ALIGNMENTS["irepa"].projector(8, 5), torch.randn(1, 16, 8)
    changed = tokens.clone()
    changed[:, 0] += 1  # the first corner of 4 x 4
    different = (projector(tokens) != projector(changed)).any(dim=2)[0]
    assert different.nonzero().flatten().tolist() == [0, 1, 4, 5]
    alignment = alignment_of("irepa", project=projector)
    alike = alignment_of("irepa", project=lambda tokens: prepared)
    torch.testing.assert_close(alike(tokens, targets), -torch.ones(3))
    assert alignment(tokens.expand(3, -1, -1), targets).shape == (3,)


def test_other_grids():
    ramp = torch.arange(8.0).expand(8, 8).reshape(1, 64, 1)
    halved, doubled = resized(ramp, 16), resized(ramp, 256)
    assert (halved.view(4, 4).diff(dim=1) > 1.5).all() and (doubled.view(16, 16).diff(dim=1) >= 0).all()
    torch.testing.assert_close(halved.mean(), ramp.mean())
    torch.testing.assert_close(resized(torch.full((1, 64, 2), 3.0), 16), torch.full((1, 16, 2), 3.0))
    assert resized(ramp, 64) is ramp


# ---------------------------------------------------------------------- targets on disk


@pytest.fixture(scope="module")
def stored(both_data, tiny_models, tmp_path_factory):
    """Images of which one is broken, and features of both flips."""
    root = tmp_path_factory.mktemp("stored")
    shutil.copytree(both_data / "images", root / "one_broken")
    (root / "one_broken/cat/3.png").write_text("no image")
    flags = ("--flip", "both", "--store-tokens")
    said = launch(extract_command("forked", 2, root / "one_broken", root / "both", tiny_models, *flags), root).stdout
    assert "patch tokens: 4 of 24 numbers in float16 per row, " in said
    return root


@pytest.mark.slow
def test_stored_tokens_are_those_of_the_images(stored, tiny_models, tmp_path):
    features, encoder = Features(stored / "both"), load_encoder(tiny_models[1])
    assert (features.manifest.tokens, features.manifest.tokens_norm) == ([4, 24], "plain") and features.count == 26
    paths = [stored / "one_broken" / name for name in features.paths.gather(np.arange(26))]
    views = [np.array(center_crop(load_rgb(path), 32)) for path in paths]
    views = np.stack([view[:, ::-1] if row % 2 else view for row, view in enumerate(views)])
    with torch.no_grad():
        seen = encoder.patch_tokens(torch.from_numpy(views))
    there = features.arrays["tokens"].gather(np.arange(26))
    assert there.dtype == np.float16 and (there[::2] != there[1::2]).any(axis=(1, 2)).all()
    np.testing.assert_allclose(there, seen, atol=2e-3, rtol=2e-3)
    # normalised: a plain final norm
    np.testing.assert_allclose(there.astype(np.float32).std(axis=2), 1, atol=1e-2)
    assert list(problems(stored / "both")) == []
    copy = shutil.copytree(stored / "both", tmp_path / "copy")
    np.save(copy / "imagenet64_tokens/000000.npy", there[:5])
    np.save(copy / "imagenet64_tokens/000001.npy", np.full_like(there[:8], np.nan))
    lines = list(problems(copy))
    assert "000000.npy has shape (5, 4, 24), wanted 6 row(s)" in lines[0]
    assert "000001.npy, row 0: values that are not finite numbers" in lines[1]
    (copy / "imagenet64_tokens/000001.npy").unlink()
    refusal(Features, copy, words="tokens/000001.npy is missing, though the manifest lists it")


# ---------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def features(both_data):
    """What conftest's fixtures train on here."""
    return both_data / "features"


@pytest.fixture
def train(features, tmp_path):
    """train(name, flags…): a run on the features into that folder of tmp_path; gives the folder."""

    def run(name, *flags, processes=1, launcher="forked"):
        launch(train_command(processes, features, tmp_path / name, *flags, launcher=launcher), tmp_path)
        return tmp_path / name

    return run


def projector_of(run, step):
    return (run / f"checkpoints/{step:07d}/projector.safetensors").read_bytes()


@pytest.mark.slow
def test_a_run_resumes_and_leaves_the_model_alone(train, refused, tiny_models, tmp_path):
    flags = (*ALIGN, "--ckpt-every", 2, "--max-steps")
    train("stopped", *flags, 2)
    stopped, whole = train("stopped", *flags, 4), train("whole", *flags, 4)
    assert same_run(stopped, whole, 4) and projector_of(stopped, 4) == projector_of(whole, 4)
    assert projector_of(whole, 2) != projector_of(whole, 4)
    aligned = [line["align"] for line in metrics(whole)]
    assert all(-1 <= value <= 1 for value in aligned) and aligned[-1] < aligned[0]
    line = (whole / "log.txt").read_text()
    assert "alignment: repa, weight 0.5, of 2 x 2 tokens after block 2 with the encoder's 2 x 2 of 24 numbers; " in line
    meta = json.loads((whole / "checkpoints/0000004/meta.json").read_text())
    assert meta["compared"]["alignment"] == dict(kind="repa", block=2, weight=0.5, until=None)
    # what is read of it is a model like any other
    plain = train("plain", "--ckpt-every", 2, "--max-steps", 4)
    for name in ("model", "ema"):
        here, there = (load_file(run / f"checkpoints/0000004/{name}.safetensors") for run in (whole, plain))
        assert here.keys() == there.keys()
    assert load_model(whole)[0].config == load_model(plain)[0].config
    sample = ("--vae", tiny_models[0], "--num-fid-samples", 2, "--num-sampling-steps", 2, "--results-dir", whole)
    (whole / "checkpoints/0000004/projector.safetensors").unlink()
    said = launch(("forked", 1, "sample_ddp_computed_dlc.py", "--model", "DiTSEM-Ti/4", *sample), tmp_path).stdout
    assert "done: 2 images" in said
    begun = train("begun", "--pretrained-path", whole, *ALIGN, "--max-steps", 1)
    assert (begun / "checkpoints/0000001/projector.safetensors").is_file()
    # and the run itself
    assert "has no projector.safetensors" in refused("whole", *flags, 5)
    assert "alignment some there, None here" in refused("stopped", "--max-steps", 5)
    assert "alignment.weight 0.5 there, 0.25 here" in refused("stopped", *ALIGN, "--align-weight", 0.25)
    line = refused("plain", *ALIGN, "--max-steps", 5, "--allow-change")
    assert "has no projector.safetensors: an average of --ema-lengths, or the projector of --align, begins with" in line


@pytest.mark.slow
def test_without_weight_it_changes_nothing(train):
    """To the bit, clipping included; and after --align-until the blocks train as if it had not been."""
    flags = ("--max-steps", 3, "--grad-clip", 0.5, "--objective", "flow")
    plain, zero = train("plain", *flags), train("zero", *flags, *ALIGN, "--align-weight", 0)
    there, here = (tensors(run / "checkpoints/0000003") for run in (plain, zero))
    assert all(torch.equal(here[key], value) for key, value in there.items())
    for one, other in zip(metrics(plain), metrics(zero), strict=True):  # which has a loss beside the flow's
        assert (one["loss"], one["grad_norm"]) == (other["loss"], other["grad_norm"])
        assert one["loss_by_quarter_of_t"] == other["mse_by_quarter_of_t"]
    assert all(line["align"] != 0 for line in metrics(zero))
    ended = train("ended", *flags, *ALIGN, "--align-until", 2)
    assert [line["align"] != 0 for line in metrics(ended)] == [True, True, False]
    resumed = train("resumed", *flags, *ALIGN, "--align-until", 2, "--max-steps", 2, "--max-steps", 2)
    assert same_run(train("resumed", *flags, *ALIGN, "--align-until", 2), ended, 3) and resumed


@pytest.mark.slow
def test_processes_and_options(train):
    more = ("--intermediate-head", 3, "--checkpoint-activations", "--align", "irepa", "--align-block", 4)
    for name, flags in (("repa", ALIGN), ("irepa", more)):
        one = train(name, *flags, "--max-steps", 3)
        two = train(f"{name}2", *flags, "--max-steps", 3, "--grad-accum", 2, processes=2)
        sharded = dict(processes=2, launcher="fsdp")
        for run in (two, train("sharded", *flags, "--max-steps", 3, **sharded)) if name == "repa" else (two,):
            for key in ("loss", "align"):
                values = [[line[key] for line in metrics(of)] for of in (one, run)]
                np.testing.assert_allclose(*values, rtol=2e-3, atol=2e-4)
            here, there = (load_file(of / "checkpoints/0000003/projector.safetensors") for of in (run, one))
            assert all((here[key] - there[key]).norm() <= 1e-3 * there[key].norm() for key in there)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["DiTSEM-Ti/2", "DiT-Ti/4"])
def test_on_images(model, both_data, tiny_models, train, tmp_path):
    flags = ("--model", model, *ALIGN, "--max-steps", 3)
    on_features = train("features", *flags)
    images = ("--data-path", both_data / "images", "--image-size", IMAGE_SIZE, "--vae", tiny_models[0])
    images = (*images, "--encoder", tiny_models[1], "--flip", "none")
    launch(train_command(1, None, tmp_path / "images", *flags, *images), tmp_path)
    for key in ("loss", "align"):
        values = [[line[key] for line in metrics(run)] for run in (on_features, tmp_path / "images")]
        np.testing.assert_allclose(*values, rtol=2e-3, atol=2e-4)
    resized = "of 4 x 4 tokens after block 2 with the encoder's 2 x 2 of 24 numbers, resized to 4 x 4"
    assert (resized in (tmp_path / "images/log.txt").read_text()) == (model == "DiTSEM-Ti/2")


def test_views_are_flipped_as_the_crops_are(tiny_models, images, tmp_path):
    save_images(tmp_path / "images")
    data = Images(
        PartialState(cpu=True), tmp_path / "images", image_size=32, vae=tiny_models[0], encoder=tiny_models[1]
    )
    batch = ImageBatches(data, dict(codes=None, tokens=None), seed=0, global_batch=14)[0]
    assert torch.equal(batch["images"], batch["tokens"])  # of one size here
    flipped = (batch["codes"] != batch["tokens"]).flatten(1).any(dim=1)
    assert 0 < flipped.sum() < 14
    assert torch.equal(batch["codes"][flipped].flip(2), batch["tokens"][flipped])


# ---------------------------------------------------------------------- mistakes


@pytest.mark.slow
def test_targets_that_are_not_there(error_of, images, tiny_models, workplace):
    flags = ("--data-path", images, "--vae", tiny_models[0], "--image-size", IMAGE_SIZE, "--model", "DiT-Ti/4")
    assert "--align with --data-path needs an --encoder" in error_of("train_diffusion", *flags, *ALIGN)
    flags = (*flags, "--features-path", "f", "--encoder", "none", "--store-tokens")
    assert "--store-tokens stores what an --encoder makes" in error_of("extract_features_withdlc", *flags)
    command = extract_command("", 0, images, workplace / "features", tiny_models, "--store-tokens")
    assert "tokens None there, [4, 24] here" in error_of("extract_features_withdlc", *command[3:])
