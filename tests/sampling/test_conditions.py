"""What samples are drawn for: codes from every kind of source, labels and vectors; and how samples.json says it."""

import json
import shutil
import types
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import L, V, refusal, save_checkpoint
from tiny_prior import save_prior

from dlc.data.images import save_png
from dlc.machine.cli import WARNED
from dlc.sampling.code_folder import open_codes
from dlc.sampling.conditions import CONDITIONINGS, ClassLabels, ComputedCodes, ComputedVectors
from dlc.sampling.opening import open_model
from dlc.sampling.pictures import npz_rows, png_path
from dlc.sampling.prior_draw import PriorDraw
from dlc.sampling.prior_options import PriorOptions
from dlc.sampling.samples_record import SampleFolder, SamplesRecord
from dlc.sampling.sampling_flags import sampling_parser
from dlc.weights.meta import RunMeta

MODEL = types.SimpleNamespace(sem_embedder=types.SimpleNamespace(L=L, V=V))
CODES = np.random.default_rng(0).integers(0, V, (24, L))


def asked(kind, *flags, seed=0, model=MODEL, meta=RunMeta()):  # noqa: B008
    """Conditions of a kind by the flags of its script."""
    args = sampling_parser("", kind.script, "").parse_args([*map(str, flags), f"--global-seed={seed}"])
    return kind(args, model, meta)


def of(source, order="sequential", seed=0):
    return asked(ComputedCodes, "--dlc-dir", source, "--dlc-order", order, seed=seed)


def of_vectors(source, order="random", seed=0):
    return asked(ComputedVectors, "--condition-path", source, "--dlc-order", order, seed=seed, model=CONT)


def of_labels(*flags, num_classes=10, seed=0, **noted):
    model = types.SimpleNamespace(y_embedder=types.SimpleNamespace(num_classes=num_classes))
    return asked(ClassLabels, *flags, model=model, meta=RunMeta(noted=noted), seed=seed)


@pytest.mark.parametrize("suffix", [".npy", ".pt"])
def test_codes_from_every_kind_of_source(tmp_path, suffix):
    def save(path, codes):
        np.save(path, codes) if suffix == ".npy" else torch.save(torch.from_numpy(codes), path)

    save(tmp_path / f"one{suffix}", CODES)
    # SEDD names batches by UUID: they come in the order of names
    for name, parts in (("parts", np.split(CODES, [10])), ("lone", CODES), ("of_several", CODES.reshape(2, 3, 4, L))):
        (tmp_path / name).mkdir()
        for number, part in enumerate(parts):
            save(tmp_path / name / (f"{number}f1c-b{suffix}" if name == "parts" else f"{number}{suffix}"), part)
    indices = np.array([0, 23, 24, 5, 47])
    for name in (f"one{suffix}", "parts", "lone", "of_several"):
        codes, random = of(tmp_path / name), of(tmp_path / name, "random", seed=3)
        np.testing.assert_array_equal(codes(indices), CODES[indices % 24], err_msg=name)
        rows = random.values(np.arange(48))
        assert sorted(rows[:24]) == list(range(24)) and (rows[:24] == rows[24:]).all()
        np.testing.assert_array_equal(random(np.arange(24)), CODES[rows[:24]])
        assert (rows != of(tmp_path / name, "random", seed=4).values(np.arange(48))).any()
        assert "24 codes" in codes.said and codes.said != random.said


class Evil:
    def __reduce__(self):
        return print, ("this was run",)


@pytest.mark.parametrize(
    "value, message",
    [
        # of the text-to-code model, whose ids less an offset nothing clips
        (torch.tensor([[0] * L, [V + 3] + [-2] * (L - 1)]), rf"row 1: value {V + 3} outside .*, the first of {L} such"),
        (torch.zeros(3, L), "codes.pt has values of type torch.float32, .*wanted integers"),
        ([torch.zeros(3, L)], "codes.pt holds a list, wanted a tensor"),
        (torch.zeros(3, L + 1, dtype=torch.int64), f"have L={L + 1}, but those of the checkpoint's model have L={L}"),
        (torch.zeros(0, L, dtype=torch.int64), "has no rows"),
        (Evil(), "codes.pt cannot be read as a tensor"),
    ],
)
def test_codes_that_are_refused(tmp_path, value, message, capsys):
    torch.save(value, tmp_path / "codes.pt")
    for source in (tmp_path / "codes.pt", tmp_path):
        with pytest.raises(ValueError, match=message):
            of(source)(np.arange(3))
    assert "this was run" not in capsys.readouterr().out
    np.save(tmp_path / "codes.npy", CODES)
    refusal(open_codes, tmp_path, words="both .npy and .pt")


def test_labels():
    indices = np.arange(5000)
    equal, random = of_labels("--label-sampling", "equal"), of_labels()
    assert np.bincount(equal.values(indices)).tolist() == [500] * 10
    counts = np.bincount(random.values(indices), minlength=10)
    assert len(counts) == 10 and counts.std() > 5 and counts.min() > 400
    assert (random.values(indices)[[7, 4000]] == random.values(np.array([7, 4000]))).all()
    assert (random.values(indices) != of_labels(seed=1).values(indices)).any()


# ---------------------------------------------------------------------- vectors

CONT = types.SimpleNamespace(y_embedder=types.SimpleNamespace(embedding_table=torch.nn.Linear(5, 8, bias=False)))
VECTORS = np.random.default_rng(1).normal(size=(7, 5))


@pytest.fixture
def vectors(tmp_path):
    """7 rows in three files, the tenth after the second, of two precisions."""
    folder = tmp_path / "{my} %d vectors"  # a path is no format
    folder.mkdir()
    for name, part in (("1", VECTORS[:3].astype(np.float16)), ("2", VECTORS[3:4]), ("10", VECTORS[4:])):
        np.save(folder / f"{name}.npy", part)
        (folder / f"._{name}.npy").write_bytes(b"a Mac's")
    return folder


def test_vectors_by_their_rows(vectors):
    stored = np.concatenate([VECTORS[:3].astype(np.float16), VECTORS[3:]]).astype(np.float32)
    sequential = of_vectors(vectors, "sequential")
    indices = np.array([0, 6, 7, 3, 20])
    assert sequential(indices).dtype == torch.float32
    np.testing.assert_array_equal(sequential(indices), stored[indices % 7])
    one, other = (of_vectors(vectors, seed=seed) for seed in (3, 4))
    np.testing.assert_array_equal(one(np.arange(14)), stored[one.values(np.arange(14))])
    assert one.said == f"7 vectors of {vectors} in random order" and one.said != sequential.said
    digest = one.digest(9)
    assert digest == one.digest(9) != other.digest(9)
    np.save(vectors / "10.npy", VECTORS[4:] + 1)
    assert of_vectors(vectors, seed=3).digest(9) != digest
    lone = vectors / "2.npy"
    np.testing.assert_array_equal(of_vectors(lone)(indices)[0], stored[3])
    for value, words in (
        (np.zeros((3, 4)), "in_dim=4, the checkpoint's"),
        (np.array([[0, 0, 0, 0, 1e39]]), "row 0: .*not finite"),
        (np.array([[None] * 5]), "values of type object"),
    ):
        np.save(lone, value)
        refusal(lambda: of_vectors(lone).digest(7), words=words)


# ---------------------------------------------------------------------- samples.json

RECORD = SamplesRecord(
    **dict(model="DiT-Ti/4", checkpoint="/a", weights_sha256="0" * 64, step=None, weights="ema", image_size=64),
    **dict(vae="ema", vae_sha256="1" * 64, vae_precision="fp32", sampler="heun", num_sampling_steps=25, eta=None),
    **dict(cfg_scale=1.5, cfg_channels=3, t_min=0, t_max=999, precision="fp32", tf32=True, global_seed=0),
    conditions=dict(kind="labels", num_classes=10, order="equal", sha256="2" * 64),
    num_fid_samples=21,
    runs=[dict(images=21)],
)


def test_record_of_samples(tmp_path):
    def read(**changes):
        (tmp_path / "samples.json").write_text(json.dumps(RECORD.to_json() | changes))
        return SamplesRecord.read(tmp_path / "samples.json")

    assert read() == RECORD == read(labels=[1, 2], other=None)
    moved = replace(RECORD, checkpoint="/b", vae="/c", weights="model", num_fid_samples=3, runs=[])
    assert RECORD.difference(moved) == ""
    assert replace(RECORD, t_max=998).difference(RECORD) == "t_max 999 there, 998 here"
    for name, value in (("num_fid_samples", 0), ("conditions", dict(order="equal")), ("runs", [1]), ("eta", 2)):
        refusal(read, **{name: value}, words=rf"samples.json\S* {name} is ")


@pytest.fixture
def sample_set(tmp_path):
    """sample_set(conditions, count, changes…): the folder of so many samples, opened, and those that are missing."""

    def start(conditions, count, changes=(), of_conditions=()):
        recorded = {**conditions.recorded, "sha256": conditions.digest(count), **dict(of_conditions)}
        record = replace(RECORD, num_fid_samples=count, conditions=recorded, runs=[], **dict(changes))
        folder = SampleFolder(tmp_path / "samples/set", conditions)
        return folder, folder.open(record, dict(date="now"))

    return start


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_a_folder_lists_what_its_samples_are_drawn_for(tmp_path, vectors, sample_set, conditioning):
    np.save(tmp_path / "codes.npy", CODES)
    conditions = dict(
        labels=of_labels("--label-sampling", "equal"),
        vectors=of_vectors(vectors, "sequential"),
        codes=of(tmp_path / "codes.npy"),
    )[conditioning]
    for count, runs in ((4, [4]), (6, [4, 6])):
        folder, missing = sample_set(conditions, count)
        folder.lock.release()
        values = json.loads((folder.path / "samples.json").read_text())
        assert values[conditions.key] == missing == list(range(count)) and list(values)[-1] == conditions.key
        assert values["runs"] == [dict(date="now", images=images) for images in runs] and values["format_version"] == 1
    save_png(png_path(folder.path, 0), np.zeros((8, 8, 3), np.uint8))
    for count, changes, of_conditions, message in (
        (6, {}, dict(sha256="3" * 64), "conditions.sha256 "),
        (6, {}, dict(order="other"), "conditions.order '(equal|sequential)' there, 'other'"),
        (6, dict(t_min=1), {}, "t_min 0 there, 1 here"),
        (5, {}, {}, "is a set of 6 samples"),
    ):
        refusal(sample_set, conditions, count, changes, of_conditions, words=message)
        assert not (folder.path / ".lock").exists()


def test_an_npz_outlives_its_pngs(sample_set):
    labels = of_labels("--label-sampling", "equal")

    def drawn(count):
        folder, missing = sample_set(labels, count)
        for index in missing:
            save_png(png_path(folder.path, index), np.full((8, 8, 3), index, np.uint8))
        return folder, missing

    folder, _ = drawn(4)
    folder.finish(4)
    assert SamplesRecord.read(folder.about).num_fid_samples == 4 and npz_rows(folder.npz) == 4
    first = folder.npz.read_bytes()
    for remove in (lambda: shutil.rmtree(folder.path), lambda: [path.unlink() for path in folder.path.glob("*.png")]):
        remove()
        again, missing = drawn(4)
        again.finish(4)
        assert missing == [] and folder.npz.read_bytes() == first and not list(folder.path.glob("*.png"))
    more, missing = drawn(6)
    assert len(missing) == 6 and folder.npz.read_bytes() == first
    more.lock.release()  # killed here, and nothing is missing but the .npz
    more, missing = drawn(6)
    more.finish(6)
    assert missing == [] and npz_rows(folder.npz) == 6
    shutil.rmtree(folder.path)
    refusal(sample_set, labels, 6, dict(t_min=1), words="set.npz holds samples made with other settings: t_min 0 there")
    refusal(sample_set, labels, 5, words="set.npz is a set of 6 samples, more than 5")
    folder.about.unlink()
    refusal(sample_set, labels, 6, words="set.npz is there, but no set.json to say what it holds")
    assert npz_rows(folder.npz) == 6 and not folder.path.exists()


@pytest.mark.parametrize("share, warned", [(0.97, True), (0.04, False)])
def test_an_ema_that_is_still_the_start_is_warned_of(share, warned, tmp_path, capsys):
    model = save_checkpoint(tmp_path / "model/checkpoints/0000001", settings=dict(ema_start=share))
    shutil.copyfile(model / "ema.safetensors", model / "model.safetensors")
    for flags in (("--ckpt", tmp_path / "model"), ("--ckpt", model), ("--ckpt", model, "--no-ema")):
        WARNED.clear()
        args = sampling_parser("", ComputedCodes.script, "").parse_args([*map(str, flags)])
        assert open_model(args, ComputedCodes.script, "")[0] == model
        assert ("97% of the EMA weights" in capsys.readouterr().err) == (warned and "--no-ema" not in flags)
    PriorDraw(save_prior(tmp_path / "prior", ema_start=share), True, PriorOptions(), seed=0)
    assert ("97% of the EMA weights" in capsys.readouterr().err) == warned


def test_classes_that_are_asked_for():
    names = ["1", "cat", "dog"]  # class 0 is called 1, which stays the number 1
    drawn = partial(of_labels, num_classes=3)
    labels = drawn("--class", "dog", "1", classes=names)
    assert labels.values(np.arange(5)).tolist() == [2, 1, 2, 1, 2]
    assert labels.words(np.arange(2)) == ["dog", "cat"]  # on the contact sheet
    assert drawn("--class", "2", classes=["of another", "run"]).words(np.arange(1)) == ["class 2"]
    assert labels.recorded["given"] == [2, 1] and labels.said == "class 2 'dog', 1 'cat' of 3 classes"
    assert "given" not in drawn("--label-sampling", "equal", classes=names).recorded
    for flags, known, words in (
        ("--class 3", names, "--class 3: the model's classes are 0 to 2, or names such as 1"),
        ("--class 0 cat", None, "--class cat: .* and their names are not known"),
        ("--class 0 --label-sampling equal", None, "give one of them"),
    ):
        refusal(drawn, *flags.split(), classes=known, words=words)
