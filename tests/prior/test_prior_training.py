"""train_prior.py: what it holds out, draws, logs and keeps; resumed, killed, by several processes; mistaken flags."""

import signal
import time

import numpy as np
import pytest
import torch
from conftest import IMAGE_SIZE, launch, refusal
from conftest import L as TOKENS
from conftest import V as VALUES
from forked import Run
from grids import grid_cells
from tiny_prior import save_prior
from training_runs import metrics, same_run, tensors

from diffusion.masked import MaskedDiffusion
from dlc.data import Features, FeatureWriter, Manifest
from dlc.training.batches import TrainingBatches, gather
from dlc.training.heldout import heldout_bounds, independent_nats
from dlc.training.split import split_codes, split_rows
from dlc.weights.load import load_prior, process_of
from dlc.weights.meta import run_checkpoints
from train_prior import STRATA, draws


def write_features(path, codes, labels=None, V=4, flip="none", encoder="e" * 64):
    """A features directory of these codes (n, L), whose latents are noise."""
    n, L = codes.shape
    known = dict(latents="sample", dtype="float32", classes=["a", "b"], encoder_sha256=encoder)
    writer = FeatureWriter(path, Manifest(image_size=8, L=L, V=V, images=n, flip=flip, **known))
    writer.start()
    labels = np.zeros(n, int) if labels is None else labels
    arrays = dict(features=np.zeros((n, 4, 1, 1), np.float32), labels=labels, sem=codes.astype(np.uint8))
    writer.write(0, dict(arrays, path=np.full(n, "a/0.png")), [])
    writer.finish(1)
    return path


@pytest.fixture(scope="module")
def code_features(tmp_path_factory):
    """96 codes of 6 tokens out of 4, each token equal to the one before it or the next value."""
    rng = np.random.default_rng(0)
    codes = (rng.integers(0, 4, (96, 1)) + rng.integers(0, 2, (96, 6)).cumsum(axis=1)) % 4
    return write_features(tmp_path_factory.mktemp("codes") / "features", codes, codes[:, 0] % 2)


@pytest.fixture
def train(code_features, tmp_path):
    """train(name, flags…, processes=N, fault=…): a started run into that folder of tmp_path."""

    def start(name, *flags, processes=1, fault=None):
        flags = (
            *("--model", "DLCPrior-Ti", "--features-path", code_features, "--results-dir", tmp_path / name),
            *("--global-batch-size", 8, "--lr", 3e-3, "--warmup-steps", 4, "--ema-decay", 0.9, "--num-workers", 0),
            *(() if "--holdout" in flags else ("--holdout", 0.2, "--eval-every", 4, "--eval-levels", 3)),
            *flags,
        )
        return Run("train_prior", flags, tmp_path / f"{time.time_ns()}.txt", processes, fault=fault)

    return start


# ---------------------------------------------------------------------- rows, draws, bounds


def test_rows_that_are_held_out():
    train, heldout = split_rows(1000, 0.01)
    assert len(heldout) == 10 and sorted([*train, *heldout]) == list(range(1000))
    np.testing.assert_array_equal(heldout, split_rows(1000, 0.01)[1])
    assert [[len(part) for part in split_rows(30, share)] for share in (0.001, 0)] == [[29, 1], [30, 0]]
    train, heldout = split_rows(1000, 0.1, copies=2)
    assert len(train) == 900 and len(heldout) == 50 and not set(heldout // 2) & set(train // 2)
    refusal(split_rows, 1, 0.5, words="leaves none to train on")


def test_draws_belong_to_samples():
    indices = torch.arange(4 * STRATA)
    t, u, drop = draws(7, indices, 5, 0.25)
    for whole, part in zip((t, u, drop), draws(7, indices[100:110], 5, 0.25)):
        assert torch.equal(whole[100:110], part)
    for block in t.view(-1, STRATA):
        assert ((block.sort().values * STRATA - torch.arange(STRATA)) < 1 + 1e-3 * STRATA).all()
    assert t.min() >= 1e-3 and t.max() < 1
    assert u.shape == (256, 5) and len(u.unique()) > 1270 and abs(drop.double().mean() - 0.25) < 0.1
    assert not torch.equal(t, draws(8, indices, 5)[0]) and not draws(7, indices, 5)[2].any()


def test_batches_are_the_training_codes(code_features):
    split = split_codes(code_features, None, 0.25)
    arrays = dict(codes=split.features.codes, labels=split.features.labels)
    batches = TrainingBatches(split.features, arrays, only=split.rows, seed=0, global_batch=24)
    batches = [batches[step] for step in range(3)]
    indices, seen, seen_labels = (torch.cat([one[name] for one in batches]) for name in ("indices", "codes", "labels"))
    assert torch.equal(indices, torch.arange(72))
    all_rows = gather(arrays, split.rows)["codes"]
    assert sorted(map(tuple, seen.tolist())) == sorted(map(tuple, all_rows.tolist()))
    assert torch.equal(seen_labels, seen[:, 0] % 2) and seen_labels.max() == 1


def test_bounds_of_models_that_are_known(code_features):
    """A uniform model's is ln V, that of frequencies `independent_nats`, whatever part of the codes a process has."""
    split = split_codes(code_features, None, 0.25)
    trained, tokens = (
        gather(dict(codes=split.features.codes), one)["codes"].long() for one in (split.rows, split.heldout)
    )
    diffusion = MaskedDiffusion(4, time_conditioning=False)
    indices = torch.arange(len(tokens))

    def uniform(x, sigma):
        return torch.zeros(*x.shape, 5)

    bounds = heldout_bounds(uniform, diffusion, tokens, indices, 3)
    np.testing.assert_allclose(bounds, 6 * np.log(4), rtol=1e-6)
    counts = 1 + torch.stack([(trained == value).sum(dim=0) for value in range(4)], dim=1)  # (L, V)
    log_p = (counts / counts.sum(dim=1, keepdim=True)).log()

    def frequencies(x, sigma):
        return torch.nn.functional.pad(log_p, (0, 1)).expand(len(x), -1, -1)

    tokens, indices = tokens.repeat(200, 1), torch.arange(200 * len(tokens))  # each code with many masks
    bounds = heldout_bounds(frequencies, diffusion, tokens, indices, 6)
    assert bounds.mean().item() / 6 == pytest.approx(independent_nats(split), rel=3e-3)
    parts = [heldout_bounds(frequencies, diffusion, tokens[i::2], indices[i::2], 6) for i in range(2)]
    assert torch.equal(torch.stack(parts, dim=1).flatten(), bounds)


# ---------------------------------------------------------------------- runs


@pytest.mark.slow
def test_killed_and_resumed_is_the_same_run(train, trained, tmp_path):
    """Killed at named points; the best weights are kept; a change of what is measured or trained is refused."""
    flags = ("--max-steps", 10, "--log-every", 3, "--grad-accum", 2, "--class-conditional", "--label-dropout", 0.3)
    flags += ("--ckpt-every", 2, "--eval-every", 2)
    kills = ("signalled,SIGKILL,checkpoints/,2", "signalled,SIGKILL,best/,1", "killed_syncing,best,1")
    for fault in (*kills, "killed_syncing,checkpoints,1"):
        run = train("run", *flags, fault=fault)
        assert not run.wait() and run.ranks[0].exitcode == -signal.SIGKILL, run.said()
    run = train("run", *flags, "--label-dropout", 0.2, "--eval-levels", 4)
    words = "eval_levels 3 there, 4 here; label_dropout 0.3 there, 0.2 here; give another"
    assert not run.wait() and words in run.said()
    trained("run", *flags)
    said = trained("whole", *flags)
    assert same_run(tmp_path / "whole", tmp_path / "run", 10)
    measured = [line for line in metrics(tmp_path / "whole") if "heldout_nats" in line]
    assert [line["step"] for line in measured] == [2, 4, 6, 8, 10]
    assert measured[0]["uniform_nats"] == pytest.approx(np.log(4)) and measured[0]["heldout_error"] > 0
    assert measured[-1]["heldout_no_class_nats"] != measured[-1]["heldout_nats"] < measured[0]["heldout_nats"]
    (best,), (other,) = ((tmp_path / name / "best").iterdir() for name in ("whole", "run"))
    assert best.name == other.name == f"{min(measured, key=lambda line: line['heldout_nats'])['step']:07d}"
    same = tmp_path / f"whole/checkpoints/{best.name}/ema.safetensors"
    assert (best / "ema.safetensors").read_bytes() == same.read_bytes()
    assert "held-out bound: lowest at step" in said and "codes/s" in said
    lines = [line for line in metrics(tmp_path / "whole") if "lr" in line]
    assert [line["lr"] for line in lines] == pytest.approx([3e-3 * 3 / 4, 3e-3, 3e-3]) and lines[0]["codes_per_second"]


@pytest.mark.slow
def test_processes_train_alike(trained, tmp_path):
    """Without dropout, from weights whose gradients are not mere rounding, as some of a new run are."""
    prior = save_prior(tmp_path / "prior", 0.2, num_classes=2, L=6, V=4)
    flags = ("--pretrained-path", prior, "--class-conditional", "--dropout", 0, "--log-every", 1, "--max-steps", 3)
    trained("one", *flags, "--eval-every", 3)
    trained("two", *flags, "--eval-every", 3, processes=2)
    losses = [
        [line[key] for line in metrics(tmp_path / name) for key in ("loss", "heldout_nats") if key in line]
        for name in ("one", "two")
    ]
    np.testing.assert_allclose(*losses, rtol=2e-4)  # products of fewer rows round otherwise


@pytest.mark.slow
def test_the_published_kind(trained, tmp_path):
    kind = ("--shared-embedding", "--score-entropy", "--holdout", 0)
    trained("sedd", "--max-steps", 2, "--log-every", 1, *kind)
    checkpoint = run_checkpoints(tmp_path / "sedd")[-1]
    model, meta = load_prior(checkpoint)
    assert model.shared_embedding and model.scale_by_sigma and model.config["arguments"]["dropout"] == 0.1
    diffusion = process_of(meta)
    assert diffusion.time_conditioning and diffusion.score_entropy and diffusion.masking == "counted"
    assert not (tmp_path / "sedd/best").exists() and "heldout_nats" not in str(metrics(tmp_path / "sedd"))
    said = trained("begun", "--max-steps", 1, "--lr", 0, *kind, "--pretrained-path", checkpoint)
    assert f"tensors from {checkpoint}" in said and "not taken" not in said
    ours, theirs = tensors(tmp_path / "begun/checkpoints/0000001"), tensors(checkpoint)
    assert all(torch.equal(ours[key], theirs[f"ema/{key[6:]}"]) for key in ours if key.startswith("model/"))


@pytest.mark.slow
def test_by_its_launcher_with_pictures(workplace, tiny_models, tmp_path):
    command = (
        *("accelerate", 1, "train_prior.py", "--model", "DLCPrior-Ti", "--features-path", "features"),
        *("--results-dir", tmp_path / "run", "--max-steps", 2, "--global-batch-size", 4, "--num-workers", 1),
        *("--holdout", 0.1, "--sample-every", 2, "--preview-ckpt", "results"),
    )
    said = launch(command, workplace).stdout
    assert f"L={TOKENS}, V={VALUES}" in said and "13 codes of features" in said and "held out: 1 codes" in said
    assert len(grid_cells(tmp_path / "run/previews/0000002.png", IMAGE_SIZE, 8)) == 3
    meta = load_prior(run_checkpoints(tmp_path / "run")[-1])[1]
    features = Features(workplace / "features")
    assert meta.features_path == str(workplace / "features") and meta.holdout == 0.1
    assert meta.encoder_sha256 == features.manifest.encoder_sha256


# ---------------------------------------------------------------------- mistakes


def test_mistakes_are_one_line(error_of, code_features, tmp_path):
    write_features(tmp_path / "other", np.zeros((5, 6), int), V=3)
    write_features(tmp_path / "foreign", np.zeros((5, 6), int), encoder="f" * 64)
    (tmp_path / "half/progress").mkdir(parents=True)
    for flags, message in (
        ("--features-path nowhere", "features path nowhere does not exist"),
        ("--features-path half", "half-written"),
        ("--V 5", "--V 5: "),
        ("--holdout 0.999", "must be 0 to 0.9"),
        ("--heldout-path nowhere", "nowhere does not exist"),
        ("--heldout-path other --holdout 0.01", "--holdout does not go with --heldout-path"),
        ("--label-dropout 0.1", "--label-dropout goes with --class-conditional"),
        ("--holdout 0 --eval-levels 8", "--eval-levels needs held-out codes, but --holdout is 0"),
        ("--heldout-path other", "have V=3, but those of"),
        ("--heldout-path foreign", "another encoder"),
        ("--sample-every 5", "previews need the --preview-ckpt"),
        ("--sample-every 5 --preview-ckpt nowhere", "nowhere does not exist"),
        ("--pretrained-path nowhere", "nowhere does not exist"),
        ("--global-batch-size 9 --grad-accum 2", "is not a multiple of 1 processes x 2 micro-batches"),
    ):
        flags = ("--num-workers", 0, "--features-path", code_features, *flags.split())
        assert message in error_of("train_prior", "--model", "DLCPrior-Ti", *flags), flags
