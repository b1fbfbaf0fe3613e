import errno
import json
import os
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from conftest import fails, refusal

from dlc.data import KINDS, Features, FeatureWriter, Manifest, NpyRows, kind_dir
from dlc.data.inspection import problems
from dlc.data.manifest import ArrayKind
from dlc.data.store import as_stored

MANIFEST = Manifest(
    latents="sample", dtype="float16", image_size=64, L=3, V=5, classes=["a", "b\udcff"], images=10, vae_sha256="x"
)
RANDOM = np.random.default_rng(0)


def shard(rows):
    return dict(
        features=RANDOM.normal(size=(rows, 4, 8, 8)).astype(np.float16),
        sem=RANDOM.integers(0, 5, (rows, 3)).astype(np.uint8),
        labels=RANDOM.integers(0, 2, rows),
        path=np.array([f"a/{'x' * rows}{i}.png" for i in range(rows)], dtype=str),
    )


def write(root, manifest, shards, order=None):
    """Features of these shards; the writer."""
    writer = FeatureWriter(root, manifest)
    assert writer.start()
    for number in order or range(len(shards)):
        writer.write(number, shards[number], [["b\udcff/bad.png", "reason"]] if number == 2 else [])
    writer.finish(len(shards))
    return writer


@pytest.fixture
def written(tmp_path):
    """Four shards, one of them empty, and what was written."""
    shards = [shard(rows) for rows in (3, 5, 0, 2)]
    write(tmp_path, MANIFEST, shards, order=(2, 0, 3, 1))
    return tmp_path, {kind: np.concatenate([one[kind] for one in shards]) for kind in shards[0]}


def test_round_trip(written):
    root, arrays = written
    (root / "imagenet64_sem/._000001.npy").write_bytes(b"a Mac's")
    features = Features(root)
    features.validate()
    assert not list(problems(root))
    assert (features.count, features.L, features.V, features.num_classes, features.image_size) == (10, 3, 5, 2, 64)
    assert features.latent_shape == (4, 8, 8)
    rows = np.array([9, 0, 4, 4, 7, 2])
    for kind, stack in features.arrays.items():
        assert stack.array(1).dtype == arrays[kind].dtype or kind == "path"
        np.testing.assert_array_equal(stack.gather(rows), arrays[kind][rows])
        np.testing.assert_array_equal(stack.gather(np.arange(10)), arrays[kind])
    assert features.manifest.skipped == [["b\udcff/bad.png", "reason"]]
    assert features.manifest.classes == MANIFEST.classes
    assert not (root / "progress").exists()


def test_one_launch_at_a_time(tmp_path):
    """The second one waits, and finds the features complete, without what a killed one left."""
    first, second = FeatureWriter(tmp_path, MANIFEST), FeatureWriter(tmp_path, MANIFEST)
    (tmp_path / "imagenet64_sem").mkdir()
    (tmp_path / "imagenet64_sem" / f".000001.npy.{'0' * 32}.tmp").write_bytes(b"half")
    assert first.start() and not list(tmp_path.rglob("*.tmp"))
    first.write(0, shard(3), [])
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(second.start)
        time.sleep(0.3)
        assert not waiting.done()
        first.finish(1)
        assert waiting.result() is False
    folders = (f"imagenet64_{kind}" for kind in KINDS if kind != "tokens")
    assert {path.name for path in tmp_path.iterdir()} == {"manifest.json", *folders}


@pytest.mark.parametrize("call, number", [("fcntl.flock", errno.ENOLCK), ("os.fsync", errno.ENOTSUP)])
def test_disks_without_locks_or_sync(tmp_path, monkeypatch, capsys, call, number):
    """Each is warned of once, and the work goes on."""
    fails(monkeypatch, call, number)
    monkeypatch.setattr("dlc.machine.cli.WARNED", set())
    write(tmp_path, MANIFEST, [shard(3), shard(3)])
    assert Features(tmp_path).count == 6 and not (tmp_path / ".lock").exists()
    said = capsys.readouterr().err.splitlines()
    assert len({line.split("(")[0].split(" cannot ")[-1] for line in said}) == len(said) in (1, 2), said
    assert all(line.startswith(f"warning: the disk of {tmp_path}") for line in said)


def test_more_shards_than_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr("dlc.data.rows.most_open", lambda: 40)
    for index in range(200):
        np.save(tmp_path / f"{index}.npy", np.full((3, 2), index, order="CF"[index % 2]))
    rows, stack = RANDOM.permutation(600), NpyRows(tmp_path, [f"{index}.npy" for index in range(200)], 1)
    np.testing.assert_array_equal(stack.gather(rows)[:, 1], rows // 3)
    assert len(os.listdir("/dev/fd")) < 100


def test_a_file_that_goes_away_or_cannot_be_read(written, monkeypatch):
    features = Features(written[0])
    rows, before = np.arange(10), features.latents.gather(np.arange(10))
    path = kind_dir(written[0], 64, "features") / "000001.npy"

    def errors_of(features):
        for read in (lambda: features.latents.gather(rows), features.latents.check):
            with pytest.raises((ValueError, OSError), match=f"{path}") as error:
                read()
            yield error.value

    content = path.read_bytes()
    os.truncate(path, 200)
    assert all("was cut after it was opened" in str(error) for error in errors_of(features))
    path.write_bytes(content)
    with monkeypatch.context() as patched:
        fails(patched, "os.preadv", errno.EIO, lambda file, *_: os.path.samestat(os.fstat(file), os.stat(path)))
        for error in (*errors_of(features), *errors_of(Features(written[0]))):
            assert error.errno == errno.EIO and str(error) == f"cannot read {path} (Input/output error)"
    path.unlink()
    np.testing.assert_array_equal(features.latents.gather(rows), before)  # an open file stays readable
    refusal(Features, written[0], words="000001.npy is missing")


def test_memory_does_not_grow_with_the_rows(tmp_path):
    """ImageNet's 1,281,167 rows are read from. Each file is a header and a hole, which takes no room on the disk."""
    kinds = dict(features=((4, 32, 32), "<f2"), sem=((512,), "|u1"), labels=((), "<i8"), path=((), "<U40"))
    shards = [dict(name=f"{number:06d}", rows=min(16_384, 1_281_167 - 16_384 * number)) for number in range(79)]
    for kind, (shape, dtype) in kinds.items():
        kind_dir(tmp_path, 256, kind).mkdir()
        for one in shards:
            with open(kind_dir(tmp_path, 256, kind) / f"{one['name']}.npy", "wb") as file:
                header = dict(descr=dtype, fortran_order=False, shape=(one["rows"], *shape))
                np.lib.format.write_array_header_1_0(file, header)
                file.truncate(file.tell() + one["rows"] * int(np.prod(shape)) * np.dtype(dtype).itemsize)
    manifest = replace(MANIFEST, image_size=256, L=512, V=256, count=1_281_167, shards=shards)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest.to_json()))
    tracemalloc.start()
    features = Features(tmp_path)
    features.latents.gather(np.linspace(0, features.count - 1, 256).astype(int))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert features.count == 1_281_167 and peak < 2**23, peak  # the rows are 11 GB


def lone_files(root, **arrays):
    """A directory of the reference scripts: arrays by kind, whose samples have a leading 1 or not."""
    for kind, array in arrays.items():
        kind_dir(root, 64, kind).mkdir(parents=True)
        for index in range(len(array)):
            lone = array[index] if kind == "features" and index % 2 else array[index : index + 1]
            np.save(kind_dir(root, 64, kind) / f"{index}.npy", lone)


def test_directory_of_the_reference_scripts(tmp_path, monkeypatch):
    monkeypatch.setitem(KINDS, "text", ArrayKind(2, "f"))
    latents, text = RANDOM.normal(size=(12, 4, 8, 8)).astype(np.float32), RANDOM.normal(size=(12, 7, 16))
    codes, labels = RANDOM.integers(0, 9, (12, 3)), RANDOM.integers(0, 1000, 12)
    arrays = dict(features=latents, sem=codes, labels=labels, text=text)
    lone_files(tmp_path, **arrays)
    for kind in ("features", "sem"):
        (kind_dir(tmp_path, 64, kind) / "._0.npy").write_bytes(b"a Mac's")
    features, rows = Features(tmp_path, V=9), np.array([11, 2, 10])  # 2.npy comes before 10.npy
    for kind, array in arrays.items():
        np.testing.assert_array_equal(features.gather(kind, rows), array[rows])
    assert (features.count, features.L, features.num_classes) == (12, 3, 1000)
    words = r"imagenet64_sem.*\.npy, row 0: value \d outside 0\.\.3"
    refusal(Features(tmp_path, V=4).codes.gather, np.arange(12), words=words)
    (kind_dir(tmp_path, 64, "labels") / "7.npy").unlink()
    refusal(Features, tmp_path, words="7.npy is not in both")


def test_another_kind_of_array(written, monkeypatch):
    monkeypatch.setitem(KINDS, "text", ArrayKind(2, "f"))
    root, rows = written[0], np.array([9, 0, 4])
    text, folder = RANDOM.normal(size=(10, 7, 16)).astype(np.float16), kind_dir(root, 64, "text")
    refusal(Features(root).gather, "text", rows, words="has no imagenet64_text")
    folder.mkdir()
    for number, part in enumerate(np.split(text, [3, 8, 8])):
        np.save(folder / f"{number:06d}.npy", part)
    np.testing.assert_array_equal(Features(root).gather("text", rows), text[rows])
    assert not list(problems(root))
    np.save(folder / "000003.npy", text[:1])
    assert "000003.npy has shape" in " ".join(problems(root))


@pytest.mark.parametrize(
    "kind, shard, change, words",
    [
        ("sem", 1, lambda array: array + 5 * (np.arange(5)[:, None] == 2), "row 2: value [5-9] outside 0..4"),
        ("labels", 3, lambda array: np.array([0, -1]), "row 1: value -1 outside"),
        ("sem", 1, lambda array: array.astype(float), "wanted integers"),
        # NumPy would spread a row of one value over the whole row
        ("sem", 1, lambda array: array[:, :1], r"has rows of shape \(1,\), .*000000.npy of \(3,\)"),
        ("features", 3, lambda array: array[:, :, :4, :4], r"has rows of shape \(4, 4, 4\)"),
    ],
)
def test_a_file_that_does_not_fit_is_named(kind, shard, change, words, written):
    path = kind_dir(written[0], 64, kind) / f"{shard:06d}.npy"
    np.save(path, change(np.load(path)))
    for read in (Features(written[0]).validate, lambda: Features(written[0]).gather(kind, np.array([9, 5]))):
        refusal(read, words=f"imagenet64_{kind}/{path.name}.*{words}")


def test_whose_shards_they_are(written, tmp_path_factory):
    root, _ = written
    assert not FeatureWriter(root, MANIFEST).start()  # complete
    assert not FeatureWriter(root, replace(MANIFEST, vae="elsewhere")).start()  # where it lies does not count
    refusal(Features, root, V=6, words="--V 6: .* says 5")
    refusal(Features, root / "nowhere", words="does not exist")

    begun = tmp_path_factory.mktemp("begun")
    refusal(Features, begun, words="has no features")
    (begun / "imagenet64_features").mkdir()
    np.save(begun / "imagenet64_features/0.npy", np.zeros(3))
    refusal(FeatureWriter(begun, MANIFEST).start, words="holds .npy files but no manifest.json to say what they are")
    (begun / "imagenet64_features/0.npy").unlink()
    assert FeatureWriter(begun, replace(MANIFEST, V=6)).start()  # without shards its settings do not count
    classes = [f"n{i:08d}" for i in range(1000)]
    writer = FeatureWriter(begun, replace(MANIFEST, classes=classes, listing_sha256="0" * 64))
    assert writer.start()
    refusal(Features, begun, words="half-written")
    writer.write(0, shard(3), [])
    with pytest.raises(ValueError, match=r"classes \['n00000000.{1,40}… there, \['a', 'b.*'\] here.*\(the names of"):
        FeatureWriter(begun, replace(MANIFEST, listing_sha256="1" * 64)).start()
    path = writer.shard_path("labels", 0)
    content = path.read_bytes()
    path.unlink()
    assert not writer.is_done(0)  # its record is there, its file is not
    path.write_bytes(content)
    writer.finish(1)
    path.unlink()
    refusal(FeatureWriter(begun, writer.manifest).start, words="labels/000000.npy is missing, though the manifest")


def test_a_batch_of_broken_images_alone_has_no_rows():
    assert as_stored(np.zeros((0, 4, 2, 2)), "float16", str, "").shape == (0, 4, 2, 2)
