"""What samples are drawn for: codes from every kind of source, labels and vectors; and how samples.json says it."""

import json
import shutil
import types
from dataclasses import replace

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


def of(source, order="sequential", seed=0):
    return ComputedCodes(source, MODEL, RunMeta(), order, seed)


@pytest.mark.parametrize("suffix", [".npy", ".pt"])
def test_codes_from_every_kind_of_source(tmp_path, suffix):
    def save(path, codes):
        if suffix == ".npy":
            np.save(path, codes)
        else:
            torch.save(torch.from_numpy(codes), path)

    save(tmp_path / f"one{suffix}", CODES)
    save(tmp_path / f"several_an_image{suffix}", CODES.reshape(6, 4, L))
    for name, parts in (("parts", np.split(CODES, [10])), ("lone", CODES), ("of_several", CODES.reshape(2, 3, 4, L))):
        (tmp_path / name).mkdir()
        for number, part in enumerate(parts):
            save(tmp_path / name / f"{number}{suffix}", part)
    indices = np.array([0, 23, 24, 5, 47])
    for name in (f"one{suffix}", f"several_an_image{suffix}", "parts", "lone", "of_several"):
        codes = of(tmp_path / name)
        np.testing.assert_array_equal(codes(indices), CODES[indices % 24], err_msg=name)
        random = of(tmp_path / name, "random", seed=3)
        rows = random.values(np.arange(48))
        assert sorted(rows[:24]) == list(range(24)) and (rows[:24] == rows[24:]).all()
        np.testing.assert_array_equal(random(np.arange(24)), CODES[rows[:24]])
        assert (rows != of(tmp_path / name, "random", seed=4).values(np.arange(48))).any()
        assert "24 codes" in codes.describe() and codes.describe() != random.describe()


class Evil:
    def __reduce__(self):
        return print, ("this was run",)


@pytest.mark.parametrize(
    "value, message",
    [
        (torch.full((3, L), V), f"codes.pt, row 0: value {V} outside 0..{V - 1}"),
        # of the text-to-code model, whose ids less an offset nothing clips
        (torch.tensor([[0] * L, [V + 3] + [-2] * (L - 1)]), rf"row 1: value {V + 3} outside .*, the first of {L} such"),
        (torch.zeros(3, L), "codes.pt has values of type torch.float32, .*wanted integers"),
        (torch.zeros(3, 2, 0, dtype=torch.int64), r"codes.pt has shape \(3, 2, 0\), wanted"),
        ([torch.zeros(3, L)], "codes.pt holds a list, wanted a tensor"),
        (torch.zeros(3, L + 1, dtype=torch.int64), f"have L={L + 1}, but those of the checkpoint's model have L={L}"),
        (torch.zeros(0, L, dtype=torch.int64), "has no rows"),
        (torch.zeros(2, 2, 2, L, dtype=torch.int64), "codes.pt has shape"),
        (Evil(), "codes.pt cannot be read as a tensor"),
    ],
)
def test_codes_that_are_refused(tmp_path, value, message, capsys):
    torch.save(value, tmp_path / "codes.pt")
    for source in (tmp_path / "codes.pt", tmp_path):
        with pytest.raises(ValueError, match=message):
            of(source)(np.arange(3))
    assert "this was run" not in capsys.readouterr().out


def test_codes_as_other_programs_save_them(tmp_path):
    """SEDD's folder of batches named by UUID; a tensor with torch's negative bit, whose values are what counts."""
    (tmp_path / "diffused_SEMs").mkdir()
    for name, part in (("9f1c-b", CODES[:16]), ("0a77-c", CODES[16:])):
        torch.save(torch.from_numpy(part.astype(np.int64)), tmp_path / f"diffused_SEMs/{name}.pt")
    codes = of(tmp_path / "diffused_SEMs")(np.arange(24))
    np.testing.assert_array_equal(codes, np.concatenate([CODES[16:], CODES[:16]]))  # in the order of names
    negative = torch._neg_view(-torch.from_numpy(CODES.astype(np.int64)))
    assert negative.is_neg()
    torch.save(negative, tmp_path / "negative.pt")
    np.testing.assert_array_equal(of(tmp_path / "negative.pt")(np.arange(24)), CODES)


def test_sources_that_are_none(tmp_path):
    (tmp_path / "broken.pt").write_bytes(b"PK\x03\x04")
    refusal(open_codes, tmp_path / "broken.pt", words="broken.pt cannot be read as a tensor")
    np.save(tmp_path / "codes.npy", CODES)
    refusal(open_codes, tmp_path, words="both .npy and .pt")


def test_labels():
    model = types.SimpleNamespace(y_embedder=types.SimpleNamespace(num_classes=10))
    indices = np.arange(5000)
    equal, random = (ClassLabels(model, sampling, 0) for sampling in ("equal", "random"))
    assert np.bincount(equal.values(indices)).tolist() == [500] * 10
    counts = np.bincount(random.values(indices), minlength=10)
    assert len(counts) == 10 and counts.std() > 5 and counts.min() > 400
    assert (random.values(indices)[[7, 4000]] == random.values(np.array([7, 4000]))).all()
    assert (random.values(indices) != ClassLabels(model, "random", 1).values(indices)).any()


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
    sequential = ComputedVectors(vectors, CONT, "sequential", 0)
    indices = np.array([0, 6, 7, 3, 20])
    assert sequential(indices).dtype == torch.float32
    np.testing.assert_array_equal(sequential(indices), stored[indices % 7])
    one, other = (ComputedVectors(vectors, CONT, "random", seed) for seed in (3, 4))
    rows = one.values(np.arange(14))
    assert sorted(rows[:7]) == list(range(7)) and (rows[:7] == rows[7:]).all()
    assert (rows != other.values(np.arange(14))).any()
    np.testing.assert_array_equal(one(np.arange(14)), stored[rows])
    assert one.describe() == f"7 vectors of {vectors} in random order" and one.describe() != sequential.describe()
    digest = one.digest(9)
    assert digest == one.digest(9) != other.digest(9)
    np.save(vectors / "10.npy", VECTORS[4:] + 1)
    assert ComputedVectors(vectors, CONT, "random", 3).digest(9) != digest
    np.testing.assert_array_equal(ComputedVectors(vectors / "2.npy", CONT, "random", 0)(indices)[0], stored[3])


@pytest.mark.parametrize(
    "harm, message",
    [
        (lambda folder: np.save(folder / "10.npy", np.full((3, 5), np.nan)), "10.npy, row 0: .*not finite"),
        (lambda folder: np.save(folder / "2.npy", np.array([[0, 0, 0, 0, 1e39]])), "2.npy, row 0: .*not finite"),
        (lambda folder: np.save(folder / "1.npy", np.zeros((3, 5), int)), "values of type int64, wanted floats"),
        (lambda folder: np.save(folder / "10.npy", np.zeros((3, 6))), "10.npy has rows of shape|10.npy has shape"),
        (lambda folder: [np.save(file, np.zeros((3, 4))) for file in folder.iterdir()], "in_dim=4, the checkpoint's"),
        (lambda folder: [np.save(file, np.zeros((0, 5))) for file in folder.iterdir()], "has no rows"),
        (lambda folder: [np.save(file, np.zeros((3, 0))) for file in folder.iterdir()], "has empty vectors"),
        (lambda folder: [file.unlink() for file in folder.iterdir()], "has no .npy files"),
        (lambda folder: folder.rename(folder.with_name("elsewhere")), "--condition-path .*vectors does not exist"),
        (lambda folder: np.save(folder / "1.npy", np.array([[None] * 5])), "1.npy .*holds pickled objects"),
    ],
)
def test_vectors_that_are_refused(vectors, harm, message):
    harm(vectors)
    with pytest.raises(ValueError, match=message):
        ComputedVectors(vectors, CONT, "sequential", 0).digest(7)


# ---------------------------------------------------------------------- samples.json

RECORD = SamplesRecord(
    **dict(model="DiT-Ti/4", checkpoint="/a", weights_sha256="0" * 64, step=None, weights="ema", image_size=64),
    **dict(vae="ema", vae_sha256="1" * 64, vae_precision="fp32", sampler="heun", num_sampling_steps=25, eta=None),
    **dict(cfg_scale=1.5, cfg_channels=3, t_min=0, t_max=999, precision="fp32", tf32=True, global_seed=0),
    conditions=dict(kind="labels", num_classes=10, order="equal", sha256="2" * 64),
    num_fid_samples=21,
    runs=[dict(images=21)],
)


def write_record(path, **changes):
    values = {**RECORD.to_json(), **changes}
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))
    return path


def test_record_of_samples(tmp_path):
    path = tmp_path / "samples.json"
    assert SamplesRecord.read(write_record(path)) == RECORD
    assert SamplesRecord.read(write_record(path, labels=[1, 2], other=None)) == RECORD
    moved = replace(RECORD, checkpoint="/b", vae="/c", weights="model", num_fid_samples=3, runs=[])
    assert RECORD.difference(moved) == ""
    assert replace(RECORD, t_max=998).difference(RECORD) == "t_max 999 there, 998 here"
    for name, value in (
        *(("num_fid_samples", value) for value in (..., "21", None, 0)),
        *(("conditions", value) for value in (..., "10 labels", dict(order="equal"))),
        *(("runs", [1]), ("eta", 2), ("format_version", 99)),
    ):
        with pytest.raises(ValueError, match=rf"samples.json\S* (has |is of )?{name.removesuffix('_version')}"):
            SamplesRecord.read(write_record(path, **{name: value}))


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_a_folder_lists_what_its_samples_are_drawn_for(tmp_path, vectors, conditioning):
    np.save(tmp_path / "codes.npy", CODES)
    model = types.SimpleNamespace(y_embedder=types.SimpleNamespace(num_classes=10))
    conditions = dict(
        labels=ClassLabels(model, "equal", 0),
        vectors=ComputedVectors(vectors, CONT, "sequential", 0),
        codes=of(tmp_path / "codes.npy"),
    )[conditioning]

    def recorded(count):
        return {**conditions.recorded, "sha256": conditions.digest(count)}

    record = replace(RECORD, num_fid_samples=4, conditions=recorded(4), runs=[])
    folder = SampleFolder(tmp_path / "samples", conditions)
    assert folder.open(record, dict(date="now")) == [0, 1, 2, 3]
    folder.lock.release()
    values = json.loads((folder.path / "samples.json").read_text())
    assert values[conditions.key] == [0, 1, 2, 3] and values["runs"] == [dict(date="now", images=4)]
    assert values["format_version"] == 1 and list(values)[-1] == conditions.key
    more = replace(record, num_fid_samples=6, conditions=recorded(6))
    assert folder.open(more, dict(date="later")) == [0, 1, 2, 3, 4, 5]
    folder.lock.release()
    assert [run["images"] for run in SamplesRecord.read(folder.path / "samples.json").runs] == [4, 6]
    save_png(png_path(folder.path, 0), np.zeros((8, 8, 3), np.uint8))
    for changes, message in (
        (dict(conditions={**recorded(6), "sha256": "3" * 64}), "conditions.sha256 "),
        (dict(conditions={**recorded(6), "order": "other"}), "conditions.order '(equal|sequential)' there, 'other'"),
        (dict(t_min=1), "t_min 0 there, 1 here"),
        (dict(num_fid_samples=5), "is a set of 6 samples"),
    ):
        refusal(folder.open, replace(more, **changes), {}, words=message)
        assert not (folder.path / ".lock").exists()


@pytest.fixture
def label_set(tmp_path):
    """label_set(count, PNGs to write, changes…): the folder and record of so many samples for labels, opened."""
    model = types.SimpleNamespace(y_embedder=types.SimpleNamespace(num_classes=10))
    labels = ClassLabels(model, "equal", 0)

    def start(count, **changes):
        conditions = {**labels.recorded, "sha256": labels.digest(count)}
        record = replace(RECORD, num_fid_samples=count, conditions=conditions, runs=[], **changes)
        folder = SampleFolder(tmp_path / "samples/set", labels)
        missing = folder.open(record, dict(date="now"))
        for index in missing:
            save_png(png_path(folder.path, index), np.full((8, 8, 3), index, np.uint8))
        return folder, missing

    return start


def test_an_npz_outlives_its_pngs(label_set):
    folder, _ = label_set(4)
    folder.finish(4)
    assert SamplesRecord.read(folder.about).num_fid_samples == 4 and npz_rows(folder.npz) == 4
    first = folder.npz.read_bytes()
    for remove in (lambda: shutil.rmtree(folder.path), lambda: [path.unlink() for path in folder.path.glob("*.png")]):
        remove()
        again, missing = label_set(4)
        again.finish(4)
        assert missing == [] and folder.npz.read_bytes() == first and not list(folder.path.glob("*.png"))
    more, missing = label_set(6)
    assert len(missing) == 6 and folder.npz.read_bytes() == first and SamplesRecord.read(folder.about).runs[0]
    more.lock.release()  # killed here, and nothing is missing but the .npz
    more, missing = label_set(6)
    more.finish(6)
    assert missing == [] and npz_rows(folder.npz) == 6
    shutil.rmtree(folder.path)
    for count, changes, message in (
        (6, dict(t_min=1), "set.npz holds samples made with other settings: t_min 0 there, 1 here"),
        (5, {}, "set.npz is a set of 6 samples, more than 5"),
        (6, {}, "set.npz is there, but no set.json to say what it holds"),
    ):
        if "no set.json" in message:
            folder.about.unlink()
        refusal(label_set, count, **changes, words=message)
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
    model = types.SimpleNamespace(y_embedder=types.SimpleNamespace(num_classes=3))

    def drawn(*flags, names=names):
        args = sampling_parser("", ClassLabels.script, "").parse_args(flags)
        return ClassLabels.open(args, model, RunMeta(noted=dict(classes=names)))

    asked = drawn("--class", "dog", "1")
    assert asked.values(np.arange(5)).tolist() == [2, 1, 2, 1, 2]
    assert asked.words(np.arange(2)) == ["dog", "cat"]  # on the contact sheet
    assert drawn("--class", "2", names=["of another", "run"]).words(np.arange(1)) == ["class 2"]
    assert asked.recorded["given"] == [2, 1] and asked.describe() == "class 2 'dog', 1 'cat' of 3 classes"
    assert "given" not in drawn("--label-sampling", "equal").recorded
    for flags, known, words in (
        (("--class", "3"), names, "--class 3: the model's classes are 0 to 2, or names such as 1"),
        (("--class", "0", "cat"), None, "--class cat: .* and their names are not known"),
        (("--class", "0", "--label-sampling", "equal"), None, "give one of them"),
    ):
        refusal(drawn, *flags, names=known, words=words)
