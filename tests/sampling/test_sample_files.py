"""PNGs, the .npz and its check, and where codes and labels come from; no network in any of it."""

import json
import struct
import types
import zipfile
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from conftest import L, V
from PIL import Image

from dlc.data.images import save_png
from dlc.sampling.__main__ import main
from dlc.sampling.conditions import CONDITIONINGS, ClassLabels, ComputedCodes, ComputedVectors, open_codes
from dlc.sampling.pictures import check_npz, missing_indices, npz_rows, png_path, write_npz
from dlc.sampling.sample_folder import SampleFolder
from dlc.sampling.samples_record import SamplesRecord
from dlc.weights.meta import RunMeta


@pytest.fixture
def folder(tmp_path):
    """300 PNGs of noise, more than are read at once."""
    images = np.random.default_rng(0).integers(0, 256, (300, 8, 8, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    for index, image in enumerate(images):
        save_png(png_path(tmp_path / "images", index), image)
    return tmp_path / "images", images


def streamed(path, rows):
    """arr_0 as ADM's evaluator streams it: a member of a zip, a version 1 header, then so many rows a read."""
    parts = []
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive, archive.open("arr_0.npy") as member:
        assert member.read(8) == b"\x93NUMPY\x01\x00"
        header = eval(member.read(struct.unpack("<H", member.read(2))[0]))  # a dict's literal
        assert header["descr"] == "|u1" and header["fortran_order"] is False
        count, *shape = header["shape"]
        for start in range(0, count, rows):
            n = min(rows, count - start)
            parts.append(np.frombuffer(member.read(n * int(np.prod(shape))), np.uint8).reshape(n, *shape))
        assert member.read(1) == b""
    return np.concatenate(parts)


def test_npz_is_the_images_in_order(folder, tmp_path):
    path = tmp_path / "images.npz"
    write_npz(path, folder[0], 300)
    with np.load(path) as archive:
        assert archive.files == ["arr_0"]
        np.testing.assert_array_equal(archive["arr_0"], folder[1])
    np.testing.assert_array_equal(streamed(path, 64), folder[1])
    assert npz_rows(path) == 300
    first = path.read_bytes()
    write_npz(path, folder[0], 300)
    assert path.read_bytes() == first  # no time of day in it


@pytest.mark.parametrize(
    "harm, message",
    [
        (lambda path: path.unlink(), "000123.png is missing or no whole PNG"),
        (lambda path: path.write_bytes(path.read_bytes()[:60]), "000123.png is missing or no whole PNG"),
        (
            lambda path: save_png(path, np.zeros((8, 9, 3), np.uint8)),
            r"000123.png has shape \(8, 9, 3\), wanted \(8, 8, 3\)",
        ),
    ],
)
def test_npz_is_refused_for_a_missing_or_odd_image(folder, tmp_path, harm, message):
    harm(png_path(folder[0], 123))
    with pytest.raises(ValueError, match=message):
        write_npz(tmp_path / "images.npz", folder[0], 300)
    assert [path.name for path in tmp_path.iterdir()] == ["images"] and npz_rows(tmp_path / "images.npz") == 0


def test_missing_indices(folder):
    png_path(folder[0], 7).unlink()
    png_path(folder[0], 9).write_bytes(b"")
    png_path(folder[0], 11).write_bytes(png_path(folder[0], 11).read_bytes()[:-1])
    assert missing_indices(folder[0], 302) == [7, 9, 11, 300, 301]


def test_check(folder, tmp_path):
    path = tmp_path / "images.npz"
    write_npz(path, folder[0], 300)
    lines, wrong = check_npz(path, grid=True)
    assert lines[0] == f"{path}: keys arr_0; arr_0 of uint8, shape (300, 8, 8, 3)"
    assert lines[1] == f"values 0 to 255, mean {folder[1].mean():.1f}"
    assert lines[2].startswith("warning: FID of 300 images") and not wrong
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "images.grid.png"))[:8, 8:16], folder[1][1])

    odd = folder[1].copy()
    odd[5], odd[299] = (1, 2, 3), odd[17]
    np.savez(path, odd, more=np.zeros(3))
    lines, wrong = check_npz(path)
    assert "arr_0" in lines[0] and "more" in lines[0]
    assert wrong == ["1 images of one colour: 5", "1 images twice: 17 = 299"]
    np.savez(path, np.zeros((2048, 8, 8, 3)))
    with pytest.raises(ValueError, match="is float64, wanted uint8"):
        check_npz(path)
    np.savez(path, np.tile(folder[1], (7, 1, 1, 1))[:2048])
    assert not any("warning" in line for line in check_npz(path)[0])


def test_check_of_what_is_no_whole_file(folder, tmp_path, monkeypatch, capsys):
    path = tmp_path / "images.npz"
    write_npz(path, folder[0], 300)
    whole = path.read_bytes()

    def command():
        monkeypatch.setattr("sys.argv", ["check", "check", str(path)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr()

    assert command()[0] == 0
    for harmed in (whole[:-30], whole[:300] + bytes([whole[300] ^ 1]) + whole[301:], b"", b"text"):
        path.write_bytes(harmed)
        code, said = command()
        assert code == 2 and said.err.splitlines()[-1].startswith("python -m dlc.sampling: error: ")
        assert str(path) in said.err
    np.savez(path, other=folder[1])
    assert "has no arr_0, which holds the images: its keys are other" in command()[1].err
    np.savez(path, np.zeros((3, 8, 8, 3), np.uint8))
    code, said = command()
    assert code == 1 and "wrong: 3 images of one colour" in said.out
    path.unlink()
    assert command()[0] == 2


#################################################################################
#                               Codes and labels                                #
#################################################################################

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
        (torch.full((3, 2, L), -1), f"codes.pt, row 0: value -1 outside 0..{V - 1}"),
        # of the text-to-code model, whose ids less an offset nothing clips
        (
            torch.tensor([[0] * L, [V + 3] + [-2] * (L - 1), [1] * L]),
            rf"codes.pt, row 1: value {V + 3} outside 0..{V - 1}, the first of {L} such values",
        ),
        (torch.zeros(3, L), "codes.pt has values of type torch.float32, .*wanted integers"),
        (torch.zeros(3, L, dtype=torch.int64).to_sparse(), "codes.pt has values of type torch.int64, .*dense"),
        (torch.tensor(3), r"codes.pt has shape \(\), wanted"),
        (torch.zeros(3, 2, 0, dtype=torch.int64), r"codes.pt has shape \(3, 2, 0\), wanted"),
        ([torch.zeros(3, L)], "codes.pt holds a list, wanted a tensor"),
        (torch.zeros(3, L + 1, dtype=torch.int64), f"have L={L + 1}, but those of the checkpoint's model have L={L}"),
        (torch.zeros(0, L, dtype=torch.int64), "has no rows"),
        (torch.zeros(2, 2, 2, L, dtype=torch.int64), "codes.pt has shape"),
        (Evil(), "codes.pt cannot be read as a tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore:Validating sparse")
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
    with pytest.raises(ValueError, match="broken.pt cannot be read as a tensor"):
        open_codes(tmp_path / "broken.pt")
    np.save(tmp_path / "codes.npy", CODES)
    with pytest.raises(ValueError, match="both .npy and .pt"):
        open_codes(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        open_codes(tmp_path / "nothing")
    np.save(tmp_path / "objects.npy", np.array([Evil()]))
    with pytest.raises(ValueError, match="objects.npy holds pickled objects"):
        open_codes(tmp_path / "objects.npy")


def test_labels():
    model = types.SimpleNamespace(y_embedder=types.SimpleNamespace(num_classes=10))
    indices = np.arange(5000)
    equal, random = (ClassLabels(model, sampling, 0) for sampling in ("equal", "random"))
    assert np.bincount(equal.values(indices)).tolist() == [500] * 10
    counts = np.bincount(random.values(indices), minlength=10)
    assert len(counts) == 10 and counts.std() > 5 and counts.min() > 400
    assert (random.values(indices)[[7, 4000]] == random.values(np.array([7, 4000]))).all()
    assert (random.values(indices) != ClassLabels(model, "random", 1).values(indices)).any()


#################################################################################
#                                    Vectors                                    #
#################################################################################

CONT = types.SimpleNamespace(y_embedder=types.SimpleNamespace(embedding_table=torch.nn.Linear(5, 8, bias=False)))
VECTORS = np.random.default_rng(1).normal(size=(7, 5))


@pytest.fixture
def vectors(tmp_path):
    """7 rows in three files, the tenth after the second, of two precisions."""
    folder = tmp_path / "vectors"
    folder.mkdir()
    for name, part in (("1", VECTORS[:3].astype(np.float16)), ("2", VECTORS[3:4]), ("10", VECTORS[4:])):
        np.save(folder / f"{name}.npy", part)
    return folder


def test_vectors_by_their_rows(vectors):
    """Row i in file order, or by a seeded permutation, cycling; the digest is of the order, the seed and the values."""
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
        (
            lambda folder: [np.save(file, np.zeros((3, 4))) for file in folder.iterdir()],
            "in_dim=4, the checkpoint's .*=5",
        ),
        (lambda folder: [np.save(file, np.zeros((0, 5))) for file in folder.iterdir()], "has no rows"),
        (lambda folder: [np.save(file, np.zeros((3, 0))) for file in folder.iterdir()], "vectors of no numbers"),
        (lambda folder: [file.unlink() for file in folder.iterdir()], "has no .npy files"),
        (lambda folder: folder.rename(folder.with_name("elsewhere")), "--condition-path .*vectors does not exist"),
        (lambda folder: np.save(folder / "1.npy", np.array([[None] * 5])), "1.npy holds pickled objects"),
    ],
)
def test_vectors_that_are_refused(vectors, harm, message):
    harm(vectors)
    with pytest.raises(ValueError, match=message):
        ComputedVectors(vectors, CONT, "sequential", 0).digest(7)


@pytest.mark.slow
def test_what_could_not_be_compared_is_said(tmp_path, features):
    np.save(tmp_path / "codes.npy", CODES)
    assert "do not say which encoder" in of(tmp_path / "codes.npy").notes[0]
    assert "the checkpoint does not say" in ComputedCodes(features, MODEL, RunMeta(), "random", 0).notes[0]


#################################################################################
#                                 samples.json                                  #
#################################################################################

RECORD = SamplesRecord(
    model="DiT-Ti/4",
    checkpoint="/a",
    weights_sha256="0" * 64,
    step=None,
    weights="ema",
    conditions=dict(kind="labels", num_classes=10, order="equal", sha256="2" * 64),
    image_size=64,
    vae="ema",
    vae_sha256="1" * 64,
    vae_precision="fp32",
    sampler="heun",
    num_sampling_steps=25,
    eta=None,
    cfg_scale=1.5,
    cfg_channels=3,
    t_min=0,
    t_max=999,
    precision="fp32",
    tf32=True,
    global_seed=0,
    num_fid_samples=21,
    runs=[dict(images=21)],
)
KEYS = [one.name for one in fields(SamplesRecord)]


def write_record(path, **changes):
    values = {**RECORD.to_json(), **changes}
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))
    return path


def test_record_of_samples(tmp_path):
    """Read as written; keys of the conditionings and others are passed over."""
    path = tmp_path / "samples.json"
    assert SamplesRecord.read(write_record(path)) == RECORD
    assert SamplesRecord.read(write_record(path, labels=[1, 2], other=None)) == RECORD
    moved = replace(RECORD, checkpoint="/b", vae="/c", weights="model", num_fid_samples=3, runs=[])
    assert RECORD.difference(moved) == ""
    assert replace(RECORD, t_max=998).difference(RECORD) == "t_max 999 there, 998 here"


@pytest.mark.parametrize("name", KEYS)
def test_record_without_a_key(tmp_path, name):
    with pytest.raises(ValueError, match=f"samples.json: {name} is missing, wanted "):
        SamplesRecord.read(write_record(tmp_path / "samples.json", **{name: ...}))


@pytest.mark.parametrize(
    "name, value",
    [
        *(("num_fid_samples", value) for value in ("21", None, True, 21.0, 0, -1, [21], {}, 2**70)),
        ("runs", {}),
        ("runs", [1]),
        ("step", "3"),
        ("tf32", 1),
        ("eta", 2),
        ("cfg_scale", "1.5"),
        ("model", None),
        ("conditions", "10 labels"),
        ("conditions", dict(order="equal")),
        ("t_max", -1),
        ("format_version", "2"),
        ("format_version", None),
    ],
)
def test_record_with_a_value_of_another_kind(tmp_path, name, value):
    with pytest.raises(ValueError, match=rf"samples.json\S* (has )?{name} "):
        SamplesRecord.read(write_record(tmp_path / "samples.json", **{name: value}))


def test_record_of_a_newer_program(tmp_path):
    with pytest.raises(ValueError, match="samples.json is of format 99, this program knows format 1: update it"):
        SamplesRecord.read(write_record(tmp_path / "samples.json", format_version=99))


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_a_folder_lists_what_its_samples_are_drawn_for(tmp_path, vectors, conditioning):
    """By the conditioning's own key; a launch that would draw more goes on, one of other conditions is refused."""
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
        (
            dict(conditions={**recorded(6), "order": "other"}),
            "conditions.order '(equal|sequential)' there, 'other' here",
        ),
        (dict(t_min=1), "t_min 0 there, 1 here"),
        (dict(num_fid_samples=5), "is a set of 6 samples"),
    ):
        with pytest.raises(ValueError, match=message):
            folder.open(replace(more, **changes), {})
        assert not (folder.path / ".lock").exists()
