"""sample_prior.py and --prior: the same codes by any processes, resumed, infilled, by class; usage; mistaken flags."""

import json

import numpy as np
import pytest
import torch
from conftest import L, V, launch, refusal, save_checkpoint
from forked import Run
from test_prior_training import write_features
from tiny_prior import save_prior

from dlc.sampling.code_folder import SHARD, CodesRecord, open_codes
from dlc.sampling.prior_draw import BATCH, PriorDraw, newest_prior, resolved
from dlc.sampling.prior_options import PriorOptions
from dlc.sampling.samples_record import SamplesRecord
from dlc.sampling.usage import usage
from evaluation.agreement import DrawnCodes

NUM = 2 * SHARD + 30


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    return save_prior(tmp_path_factory.mktemp("prior") / "results_prior/checkpoints/0000003", num_classes=3)


@pytest.fixture(scope="module")
def codes(prior, tmp_path_factory):
    """A folder of codes, by torchrun."""
    root = tmp_path_factory.mktemp("codes")
    command = ("torchrun", 1, "sample_prior.py", "--ckpt", prior, "--num-codes", NUM, "--out", "codes")
    return root / "codes", launch(command, root).stdout


@pytest.fixture
def run(said_by, monkeypatch, tmp_path):
    """Call sample_prior's main with flags in this process; gives what it said."""
    monkeypatch.chdir(tmp_path)
    return lambda *flags: said_by("sample_prior", *flags)


def read(folder):
    codes = open_codes(folder)
    return codes.gather(np.arange(len(codes)), V)


# ---------------------------------------------------------------------- the same codes


def arrays(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.npy")}


@pytest.mark.slow
def test_processes_and_kills_do_not_matter(codes, prior, tmp_path):
    folder, said = codes
    assert f"{NUM} codes into codes, 3 of 3 shards to draw, on 1 x cpu; sampler first-hitting, steps 6, " in said
    assert "these codes" in said and "no comparison" not in said
    assert [np.load(path).shape for path in sorted(folder.glob("*.npy"))] == [(SHARD, L), (SHARD, L), (30, L)]
    assert len(np.unique(read(folder), axis=0)) > 0.99 * NUM
    flags = ("--ckpt", prior, "--num", NUM, "--out", tmp_path / "killed", "--no-usage")
    for point in ("codes.json,1", "000000.npy,1", "000002.npy,1", "codes.json,2"):
        Run("sample_prior", flags, tmp_path / f"{point}.txt", fault=f"signalled,SIGKILL,{point}").dies()
    refusal(open_codes, tmp_path / "killed", words="does not have all of its 542 codes yet")
    for number in (1, 2):
        (tmp_path / f"killed/00000{number}.npy").unlink()
    launch(("forked", 3, "sample_prior.py", *flags), tmp_path)
    assert arrays(tmp_path / "killed") == arrays(folder) and len(list((tmp_path / "killed").iterdir())) == 4
    one, other = (CodesRecord.read(where / "codes.json") for where in (folder, tmp_path / "killed"))
    assert one.codes_sha256 == other.codes_sha256 and not one.difference(other)


@pytest.mark.slow
def test_the_same_command_again(codes, prior, run, tmp_path):
    whole, again = arrays(codes[0]), tmp_path / "again"
    command = ("--ckpt", prior, "--out", "again", "--no-usage", "--num")
    run(*command, 40)
    assert np.array_equal(read("again"), read(codes[0])[:40])
    assert "3 of 3 shards" in run(*command, NUM)
    assert arrays(again) == whole
    (again / "000001.npy").write_bytes(whole["000001.npy"][:-1])
    (again / "000002.npy").unlink()
    (again / f".000002.npy.{'0' * 32}.tmp").write_text("of a process that was killed")
    assert "2 of 3 shards" in run(*command, NUM) and arrays(again) == whole and not list(again.glob(".*"))
    written = (again / "000001.npy").stat().st_mtime_ns
    assert "0 of 3 shards" in run(*command, NUM) and (again / "000001.npy").stat().st_mtime_ns == written
    (again / "000000.npy").write_bytes(whole["000001.npy"])  # whole, but another one
    words = "codes of again are not those that were drawn, by the digest in its codes"
    refusal(open_codes, "again", words=words)
    assert "3 of 3 shards" in run(*command, NUM) and arrays(again) == whole
    record = CodesRecord.read(again / "codes.json")
    assert [one["shards"] for one in record.runs] == [1, 3, 2, 3]
    assert record.codes_sha256 == CodesRecord.read(codes[0] / "codes.json").codes_sha256


# ---------------------------------------------------------------------- what is drawn how


def drawn(prior, indices=range(BATCH), seed=0, **options):
    return PriorDraw(prior, True, PriorOptions(**options), seed=seed).draw(np.array(indices))


def test_each_option_changes_the_codes(tmp_path):
    """And they are all whole codes; temperature 0 and a tiny nucleus are the likeliest tokens."""
    prior = save_prior(tmp_path / "prior", 0.4, num_classes=3)  # whose tokens depend on each other
    kinds = dict(
        plain={},
        analytic=dict(sampler="analytic", steps=20),
        corrector=dict(sampler="corrector", steps=20, eta=0.3),
        confidence=dict(sampler="confidence", steps=3),
        fewer=dict(steps=2),
        cold=dict(temperature=0.5),
        nucleus=dict(top_p=0.5),
        classes=dict(classes=[0, 2]),
        guided=dict(classes=[0, 2], cfg_scale=3.0),
    )
    found = {name: drawn(prior, **options) for name, options in kinds.items()}
    for name, one in found.items():
        assert one.shape == (BATCH, L) and one.min() >= 0 and one.max() < V
        for other in found:
            assert other == name or not np.array_equal(one, found[other]), (name, other)
    assert np.array_equal(drawn(prior, temperature=0), drawn(prior, top_p=1e-6))
    assert np.array_equal(drawn(prior, range(5, 9)), found["plain"][5:9])
    assert not np.array_equal(drawn(prior, seed=1), found["plain"])


def test_infilling_keeps_what_it_is_to_keep(prior, run, tmp_path):
    given = np.random.default_rng(0).integers(0, V, (7, L))
    np.save(tmp_path / "given.npy", given)
    codes = drawn(prior, given=tmp_path / "given.npy", keep_tokens=4)
    same = codes == given[np.arange(BATCH) % 7]
    assert (same.sum(axis=1) >= 4).all() and same.mean() < 0.75 and (same.mean(axis=0) < 0.9).all()
    assert np.array_equal(drawn(prior, given=tmp_path / "given.npy", keep_tokens=L), given[np.arange(BATCH) % 7])
    infill = ("--ckpt", prior, "--num", 9, "--out", "infilled", "--no-usage", "--given", "given.npy")
    infill = (*infill, "--given-rows", 3, "--keep-places", "0-2", 5)
    assert "given_rows [3], keep_places [0, 1, 2, 5]" in run(*infill)
    same = read("infilled") == given[3]
    assert same[:, [0, 1, 2, 5]].all() and same[:, 3:5].mean() < 0.5
    np.save(tmp_path / "given.npy", np.roll(given, 1, axis=0))
    with pytest.raises(AssertionError, match="given"):
        run(*infill)


def test_classes_are_recorded(prior, run, tmp_path):
    assert "classes [0, 1, 2]" in run("--ckpt", prior, "--num", 5, "--out", "all", "--class", "all", "--no-usage")
    record = CodesRecord.finished(tmp_path / "all")
    assert record.labels == [0, 1, 2, 0, 1] and record.V == V and record.num == 5


def test_which_prior_is_taken(tmp_path):
    first = save_prior(tmp_path / "runs/a/checkpoints/0000010")
    assert newest_prior(tmp_path / "runs") == first == resolved(tmp_path / "runs/a") and resolved(first) == first
    best = save_prior(tmp_path / "runs/a/best/0000004", weights=["ema"])
    assert newest_prior(tmp_path / "runs/a") == best
    assert newest_prior(tmp_path / "runs/a", use_ema=False) == first
    assert resolved(tmp_path / "runs") == best
    refusal(newest_prior, tmp_path / "runs/a/best", words="no prior under --results-dir")
    save_prior(tmp_path / "runs/b/checkpoints/0000003")
    for choose in (newest_prior, resolved):
        refusal(choose, tmp_path / "runs", words=r"2 runs under .* have a prior: .*a \(step 10\), .*b \(step 3\); name")


# ---------------------------------------------------------------------- usage of codes


def test_usage_by_hand():
    rng = np.random.default_rng(0)
    train, new = rng.integers(0, 3, (40, 5)), rng.integers(0, 3, (12, 5))
    train[7], new[3], new[4], new[9] = train[2], train[2], new[1], train[11]
    found = usage(new, 3, train, new)
    apart = (new[:, None] != train).sum(axis=2)
    assert found["samples"]["copies"] == (apart.min(axis=1) == 0).mean() >= 2 / 12
    assert found["samples"]["repeated"] == pytest.approx(1 - len(np.unique(new, axis=0)) / 12)
    assert found["samples"]["nearest_mean"] == apart.min(axis=1).mean() and found["samples"]["nearest_least"] == 0
    assert found["heldout"] == found["samples"]
    own = (train[:, None] != train).sum(axis=2) + 9 * np.eye(40, dtype=int)
    assert found["training"]["copies"] == (own.min(axis=1) == 0).mean() >= 2 / 40
    assert found["training"]["nearest_mean"] == own.min(axis=1).mean()
    shares = [np.bincount(column, minlength=3) / 12 for column in new.T]
    expected = [np.exp(-sum(p * np.log(p) for p in one if p)) for one in shares]
    np.testing.assert_allclose(found["samples"]["perplexity"], expected, atol=1e-3)
    assert usage(new, 3)["samples"].keys().isdisjoint({"copies", "nearest_mean"})


def test_compared_with_the_codes_it_was_trained_on(tmp_path, run):
    codes = np.random.default_rng(0).integers(0, 4, (50, 3))
    features = write_features(tmp_path / "features", codes)
    prior = save_prior(tmp_path / "prior", L=3, V=4, features_path=str(features), holdout=0.2, encoder_sha256="e" * 64)
    said = run("--ckpt", prior, "--num", 100, "--out", "codes")
    assert "training codes" in said and "held-out codes" in said and " 40 " in said and " 10\n" in said
    kept = CodesRecord.finished(tmp_path / "codes").usage
    assert kept["samples"]["count"] == 100 and 0 < kept["samples"]["copies"] <= 1
    assert 3 <= kept["samples"]["mean_perplexity"] <= 4 and len(kept["training"]["perplexity"]) == 3
    (tmp_path / "features").rename(tmp_path / "moved")
    assert "no comparison with the training codes" in run("--ckpt", prior, "--num", 100, "--out", "codes")
    assert "training codes" in run("--ckpt", prior, "--num", 100, "--out", "codes", "--features-path", "moved")


# ---------------------------------------------------------------------- images of its codes

DRAW = ("sample_ddp_computed_dlc", "--model", "DiTSEM-Ti/4", "--num-sampling-steps", 2, "--cfg-scale", 1)


@pytest.mark.slow
def test_images_for_a_priors_codes(workplace, prior, codes, said_by, monkeypatch, tmp_path):
    monkeypatch.chdir(workplace)

    def draw(name, *flags):
        return said_by(DRAW[0], *DRAW[1:], "--sample-dir", tmp_path / name, *flags)

    draw("one", "--prior", prior, "--num-fid-samples", 3)
    said = draw("one", "--prior", prior, "--num-fid-samples", 5)
    assert f"codes drawn from DLCPrior-Ti of {prior}: first-hitting, 6 steps; 2 of 5 images" in said
    draw("one", "--prior", prior, "--num-fid-samples", 5, "--progressive", 2)  # only a strip to draw
    flags = ("--prior", prior, "--num-fid-samples", 5, "--per-proc-batch-size", 2, "--sample-dir", tmp_path / "two")
    launch(("forked", 2, f"{DRAW[0]}.py", *DRAW[1:], *flags), workplace)
    for name in ("one", "two"):
        (folder,) = (tmp_path / name).glob("*.codes")
        assert np.array_equal(read(folder), read(codes[0])[:5])
    folder = next(path for path in (tmp_path / "one").iterdir() if path.is_dir() and path.suffix != ".codes")
    record = SamplesRecord.read(folder / "samples.json")
    drawn = record.conditions["prior"]
    assert drawn["options"]["sampler"] == "first-hitting" and drawn["weights_sha256"]
    assert json.loads((folder / "samples.json").read_text())["code_rows"] == list(range(5))
    assert torch.equal(DrawnCodes(folder, record)(np.arange(5)), torch.from_numpy(read(codes[0])[:5]))
    said = draw("listed", "--dlc-dir", codes[0], "--dlc-order", "sequential", "--num-fid-samples", 5)
    assert f"{NUM} codes of {codes[0]} in sequential order" in said
    images = [np.load(next((tmp_path / name).glob("*.npz")))["arr_0"].astype(int) for name in ("one", "two", "listed")]
    assert np.abs(images[0] - images[1]).max() <= 1 and np.abs(images[0] - images[2]).max() <= 1


# ---------------------------------------------------------------------- mistakes


@pytest.mark.slow
def test_mistakes_are_one_line(error_of, prior, codes, tmp_path):
    for name, values in (("short", np.zeros((2, L - 1))), ("given", np.zeros((2, L))), ("far", np.full((2, L), V))):
        np.save(tmp_path / f"{name}.npy", values.astype(int))
    write_features(tmp_path / "other", np.zeros((5, 6), int), V=3)
    (tmp_path / "foreign").mkdir()
    np.save(tmp_path / "foreign/0.npy", np.zeros((2, L), int))
    (tmp_path / "drawn").symlink_to(codes[0])
    (tmp_path / "prior").symlink_to(prior)
    save_prior(tmp_path / "plain")
    for flags, message in (
        ("--results-dir nowhere", "no prior under --results-dir nowhere: train one with train_prior.py"),
        ("--results-dir x --ckpt prior", "--ckpt names one: give one of them"),
        ("--features-path other --no-usage", "leave out --no-usage"),
        ("--out given.npy", "it is a file"),
        ("--out foreign", "holds codes but no codes.json"),
        ("--eta 0.1", "--eta 0.1: --sampler first-hitting has none, corrector has"),
        ("--cfg-scale 2", "guidance needs a --class"),
        ("--class 3", "the model's classes are 0 to 2"),
        ("--class all 1", "--class all draws every class: leave the others out"),
        ("--ckpt plain --class 1", "has no classes"),
        ("--keep-tokens 2", "--keep-tokens goes with --given: give that as well"),
        ("--given given.npy", "say what to keep of it, by --keep-tokens or --keep-places"),
        ("--given given.npy --keep-tokens 2 --keep-places 1", "--keep-tokens does not go with --keep-places"),
        ("--given given.npy --keep-tokens 0 --keep-places 1", "--keep-tokens does not go with --keep-places"),
        (f"--given given.npy --keep-tokens {L + 1}", f"cannot keep {L + 1} tokens of codes of {L} tokens"),
        (f"--given given.npy --keep-places {L}", f"cannot keep the token at {L} of codes of {L} tokens"),
        ("--given given.npy --keep-tokens 1 --given-rows 2", "has rows 0 to 1"),
        ("--given short.npy --keep-tokens 1", f"have L={L - 1}, but those of the prior have L={L}"),
        ("--given far.npy --keep-tokens 1", f"outside 0..{V - 1}"),
        ("--given other --keep-tokens 1", f"V=3, but those of the prior have V={V}"),
        ("--out drawn --num 5", "is a set of 542 codes, more than 5"),
        (f"--out drawn --num {NUM} --steps 2", "options.steps 6 there, 2 here"),
        (f"--out drawn --num {NUM} --ckpt plain", "weights_sha256"),
    ):
        flags = flags if "--ckpt" in flags or "--results-dir" in flags else f"--ckpt prior {flags}"
        assert message in error_of("sample_prior", *flags.split()), flags
    save_checkpoint(tmp_path / "results/checkpoints/0000001")
    save_prior(tmp_path / "six", V=6)
    for flags, message in (
        ("--prior-steps 2", "name it with --prior"),
        ("--prior prior --dlc-dir drawn", "--dlc-dir does not go with --prior"),
        ("--prior prior --dlc-order random", "with --prior, sample i gets code i"),
        ("--prior nowhere", "nowhere"),
        ("--prior six", f"V=6, but those of the checkpoint's model have V={V}"),
        ("--model DiT-Ti/4 --prior prior", "not conditioned on codes"),
    ):
        assert message in error_of(DRAW[0], "--model", "DiTSEM-Ti/4", "--results-dir", "results", *flags.split()), flags
