"""Wherever images lie, they are those of the folder: the same order, names, labels, pixels and features."""

import io
import json
import os
import pickle
import re
import shutil
import stat
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT, refusal, save_images
from PIL import Image

from dlc.data import FeatureWriter, Manifest
from dlc.data.extraction import BatchEncoder, batches_of, extract
from dlc.data.images import load_image, load_rgb, open_source
from dlc.data.views import Views, collate, flips_of
from dlc.machine.readers import read_ahead
from evaluation.sets import open_images

MEMBERS = ["cat/0.png", "cat/1.png", "cat/2.png", "dog/0.png", "dog/1.png", "dog/2.png"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """images/, and the same as archives: in.* of its inside, out.* of the folder, also as a Mac or a shell packs it."""
    root = tmp_path_factory.mktemp("sources")
    save_images(root / "images", per_class=3)
    (root / "images/dog/1.png").write_text("no image")
    pixels = Image.open(root / "images/cat/1.png").convert("RGBA")
    pixels.putalpha(99)
    pixels.save(root / "images/cat/1.png")
    for kind in ("zip", "tar"):
        shutil.make_archive(root / "in", kind, root / "images")
        shutil.make_archive(root / "out", kind, root, "images")
    with zipfile.ZipFile(root / "mac.zip", "w", zipfile.ZIP_STORED) as archive:
        for name in reversed(MEMBERS):
            archive.write(root / "images" / name, f"my pictures/{name}")
            archive.writestr(f"__MACOSX/my pictures/{os.path.dirname(name)}/._{os.path.basename(name)}", b"Mac OS X")
        archive.writestr("my pictures/.DS_Store", b"")
    (root / "shards").mkdir()
    for number in range(2):
        write_tar(root / f"shards/{number:06d}.tar", {name: root / "images" / name for name in MEMBERS[number::2]})
    labels = {f"{name[:-4]}.cls": str(int("dog" in name)).encode() for name in MEMBERS[::2]}
    texts = {f"{name[:-4]}.json": json.dumps(dict(label=int("dog" in name))).encode() for name in MEMBERS[1::2]}
    write_tar(root / "webdataset.tar", {name: root / "images" / name for name in MEMBERS} | labels | texts)
    return root


def write_tar(path, members):
    """A tar of files or bytes by name, as `tar cf path ./*` names them."""
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            content = content if isinstance(content, bytes) else content.read_bytes()
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


class Means:
    """In place of the networks: each latent is the mean of its crop's colours."""

    device, vae = torch.device("cpu"), None

    def moments(self, crops, batch_size):
        mean = crops.float().mean(dim=(2, 3))[..., None, None].expand(-1, -1, -1, 2, 2)
        return torch.cat([mean, torch.ones_like(mean)], dim=2)


def features_of(source, path, workers=0):
    """The digests of all shards, and what is skipped."""
    size = dict(image_size=16, latents="sample", dtype="float32", shard_size=4, L=None, V=None, latent_channels=3)
    manifest = Manifest(classes=source.classes, images=len(source), listing_sha256=source.sha256(), seed=0, **size)
    writer, batches = FeatureWriter(path, manifest), batches_of(range(2), len(source), 4, 2)
    writer.start()
    views = Views(source, flips_of("random", len(source), 0), 16, None)
    loaded = read_ahead(lambda batch: collate([views[index] for index in batch]), batches, workers)
    extract(BatchEncoder(Means(), views, source.labels, manifest, 2), zip(batches, loaded), writer, len(source))
    done = writer.finish(2)
    return [shard["sha256"] for shard in done.shards], done.skipped, done.transparent


def names_of(source):
    return [source.name(index) for index in range(len(source))]


@pytest.fixture(scope="module")
def folder(place, tmp_path_factory):
    """What the others have to give: the folder's source, and its features."""
    source = open_source(place / "images")
    return source, features_of(source, tmp_path_factory.mktemp("folder"))


def test_features_are_those_of_the_folder(place, folder, tmp_path):
    images, wanted = folder
    assert wanted[1] == [["dog/1.png", "UnidentifiedImageError: cannot identify image file"]] and wanted[2] == 1
    for name in ("in.zip", "out.zip", "mac.zip", "in.tar", "out.tar", "shards", "webdataset.tar"):
        source = pickle.loads(pickle.dumps(open_source(str(place / name))))  # as other processes get it
        assert names_of(source) == MEMBERS, name
        assert source.labels.tolist() == images.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert source.classes == (["0", "1"] if "web" in name else ["cat", "dog"])
        assert (source.sha256() == images.sha256()) != ("web" in name)  # of classes that names do not say
        assert not source.remarks or "left out 2 hidden" in source.remarks[0]
        assert features_of(source, tmp_path / name, 2 * (name in ("in.zip", "shards"))) == wanted


def test_other_doors(place):
    pixels = np.asarray(load_image(place / "images/cat/2.png"))
    for path in ("out.zip/images/cat/2.png", "in.tar/cat/2.png", "mac.zip/my pictures/cat/2.png"):
        np.testing.assert_array_equal(np.asarray(load_image(str(place / path))), pixels)
    refusal(load_image, str(place / "in.zip/cat/9.png"), words="in.zip has no cat/9.png")
    sets = [open_images(place / f"{path}/cat", "--reference", crop=16) for path in ("images", "in.zip", "in.tar")]
    assert [one.count for one in sets] == [3, 3, 3]
    wanted, *others = (next(one.batches(0, 3, 3)) for one in sets)
    assert all((other == wanted).all() for other in others)


def test_a_flat_folder_and_its_labels(place, tmp_path):
    flat = shutil.copytree(place / "images/cat", tmp_path / "flat")
    (flat / "sub").mkdir()
    (flat / "metadata.parquet").touch()  # a table beside images is none of them
    source = open_source(flat)
    assert source.classes == ["all"] and "there are no class folders: all images are one class" in source.remarks[0]
    shutil.copy(flat / "0.png", flat / "sub/\u00e9.png")
    table, names = tmp_path / "labels.csv", ["2.png", "0.png", "1.png", "sub/\u00e9.png"]

    def labelled(*labels, head="name,size,label\n", names=names):
        text = head + "".join(f"{name},1,{label}\n" for name, label in zip(names, labels))
        table.write_text(text, encoding="utf-8-sig")
        return open_source(flat, labels=str(table))

    source = labelled("é", "b", "b", "a")
    assert (source.classes, source.labels.tolist()) == (["a", "b", "é"], [1, 1, 2, 0])
    assert source.sha256() != labelled(*"aaaa").sha256()
    numbers = labelled(8, " 9", "10 ,,", 11, names=[*names[:3], "sub/e\u0301.png"])  # as people and a Mac write them
    floats = labelled("8.0", "9.0", "10.0", "11.0", head="name,size,label\n,,\n")
    assert "8 empty classes (0, …)" in numbers.remarks[0]
    assert len(numbers.classes) == 12 and numbers.labels.tolist() == floats.labels.tolist() == [9, 10, 8, 11]
    for text, message in (
        ("file,label\n", r"its first line names the columns \['file', 'label'\]: wanted the columns name and label"),
        ("name,label,label\n", "its first line names the columns"),
        ("", "its first line names the columns"),
        ("name,label\n0.png,tench, Tinca tinca\n", "line 2 has a comma too many: text with commas goes in quotes"),
        ("name,label\n0.png,a\nflat/1.png,b\n", "for '1.png' .one of 3.; .* not there, such as 'flat/1.png'"),
        ("name,label\n" + 2 * "0.png,a\n", "names twice '0.png'"),
    ):
        refusal(labelled, head=text, words=f"--labels {table}:? .*{message}")
    table.write_bytes(b"name,label\n0.png,k\xe4se\n")
    refusal(open_source, flat, labels=str(table), words=r"label 'k.udce4se': .* separated by commas, in UTF-8")


def test_members_that_cannot_be_read(tmp_path):
    content = io.BytesIO()
    Image.new("RGB", (20, 20), "red").save(content, "png")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for number in range(3):
            archive.writestr(f"a/{number}.png", content.getvalue())
    whole = (tmp_path / "a.zip").read_bytes()
    at = whole.index(b"a/1.png") + 60
    (tmp_path / "a.zip").write_bytes(whole[:at] + b"x" + whole[at + 1 :])
    views = Views(open_source(tmp_path / "a.zip"), np.zeros((3, 1), bool), 16, None)
    faults = [views[index][3] for index in range(3)]
    assert faults[0] is None is faults[2]
    assert "its bytes are not those that were written into the archive" in faults[1][1] and faults[1][2]
    (tmp_path / "a.zip").write_bytes(whole + b"\0")
    _, reason, is_broken = views[0][3]
    assert "has changed since it was indexed" in reason and not is_broken
    os.remove(tmp_path / "a.zip")
    assert not views[0][3][2]


def zipped(path, *names, **flags):
    with zipfile.ZipFile(path, "w", **flags) as archive:
        for name in names:
            archive.writestr(name, b"")
    return path


def encrypted(path):
    content = bytearray(zipped(path, "a/1.png").read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(content)
    return path


def linked(path):
    """A tar of links alone."""
    with tarfile.open(path, "w") as archive:
        for name in ("cat/1.png", "cat/2.png"):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, "/elsewhere.png"
            archive.addfile(member)
    return path


def cut(path, source, size):
    path.write_bytes(source.read_bytes()[:size])
    return path


def test_what_is_refused(place, tmp_path):
    here = tmp_path
    for name in ("twice", "gz"):
        (here / name).mkdir()
    for number in range(2):
        write_tar(here / f"twice/{number}.tar", {"cat/1.png": b"", f"cat/{number + 2}.png": b""})
    (here / "pointer.tar").write_text("version https://git-lfs.github.com/spec/v1\n")
    for source, message in (
        (cut(here / "cut.zip", place / "in.zip", -30), "cut.zip cannot be used .*not a zip"),
        (cut(here / "cut.tar", place / "in.tar", 9000), "cut.tar cannot be .*unexpected end"),
        (cut(here / "between.tar", place / "webdataset.tar", 512 + 21 * 512), "between.tar cannot be used"),
        (shutil.make_archive(here / "gz/a", "gztar", place / "images"), "a.tar.gz cannot be used .* not compressed"),
        (here / "gz", "a.tar.gz cannot be used .*a whole .tar that is not compressed"),
        (linked(here / "linked.tar"), "no images .*left out 2 links, in whose place tar -h packs files"),
        (encrypted(here / "encrypted.zip"), "'a/1.png' is encrypted"),
        (zipped(here / "lzma.zip", "a/1.png", compression=zipfile.ZIP_LZMA), "'a/1.png' is neither stored nor deflat"),
        (zipped(here / "deep.zip", "train/cat/1.png", "val/cat/3.png"), "not classes.* such as .*deep.zip/train$"),
        (here / "twice", "holds './cat/1.png' twice"),
        (here / "pointer.tar", "pointer.tar cannot be used .*a git-lfs pointer"),
        (write_tar(here / "some.tar", {"1.png": b"", "2.png": b"", "1.cls": b"4"}), "1 images, but none for 2.png"),
        (
            write_tar(here / "masks.tar", {"1.png": b"", "1.mask.png": b"", "1.cls": b"4"}),
            "one label for several image",
        ),
        (place / "in.zip/bird", "in.zip has no folder 'bird'"),
        (ROOT / "README.md", "README.md is not a folder, an archive"),
    ):
        refusal(open_source, source, words=message)


def test_names_are_those_of_the_folder(tmp_path):
    """Macs, and zip on Linux, store UTF-8 without saying so, and names that are none; links are counted."""
    names, path = ["é/猫.png", os.fsdecode(b"z\xe9/1.png")], tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        link = zipfile.ZipInfo("é/link.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        for name in (names[0], "z?/1.png", link):
            archive.writestr(name, b"")
    content = bytearray(path.read_bytes().replace(b"z?", b"z\xe9"))
    for header, flags in ((b"PK\3\4", 7), (b"PK\1\2", 9)):
        for found in re.finditer(re.escape(header), content):
            content[found.start() + flags] &= ~8
    path.write_bytes(content)
    source = open_source(tmp_path / "a.zip")
    assert names_of(source) == sorted(names) and len(source.classes) == 2
    assert "left out 1 links, in whose place tar -h packs files (é/link.png)" in source.remarks[-1]
    source = open_source(zipped(path, "../../1.png", "cat/../2.png", "/cat/3.png", "cat/./4.png"))
    assert source.names.tolist() == [b"cat/3.png", b"cat/4.png"] and source.classes == ["cat"]
    assert "left out 2 names that lead out of the archive (../../1.png, …)" in source.remarks[-1]


# ---------------------------------------------------------------------- datasets of other programs


@pytest.fixture(scope="module")
def tables(place, tmp_path_factory):
    """The folder as the package datasets keeps it."""
    datasets, root = pytest.importorskip("datasets"), tmp_path_factory.mktemp("tables")
    datasets.disable_progress_bars()
    images = [dict(bytes=(place / "images" / name).read_bytes(), path=name) for name in MEMBERS]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]))
    data = datasets.Dataset.from_dict(dict(image=images, label=[0, 0, 0, 1, 1, 1]), features)
    data.save_to_disk(root / "saved")
    datasets.DatasetDict(train=data, test=data.select([3, 1])).save_to_disk(root / "splits")
    data.to_parquet(root / "a.parquet")
    columns = dict(image=[one["bytes"] for one in images], label=list("bbabab"), other=[1] * 6)
    datasets.Dataset.from_dict(columns).to_parquet(root / "plain.parquet")
    datasets.Dataset.from_dict(dict(x=[1])).to_parquet(root / "wrong.parquet")
    datasets.Dataset.from_dict(dict(columns, label=[0, 1, 1, 0, -1, -1])).to_parquet(root / "unlabelled.parquet")
    paths = dict(image=[dict(bytes=None, path="/etc/passwd")])
    datasets.Dataset.from_dict(paths, datasets.Features(image=datasets.Image())).to_parquet(root / "paths.parquet")
    cut(root / "cut.parquet", root / "a.parquet", 3000)
    shutil.copy(root / "a.parquet", root / "a[1].parquet")
    return root


def test_datasets_are_the_folder(place, folder, tables, tmp_path):
    for name in ("saved", "splits", "a.parquet"):
        source = pickle.loads(pickle.dumps(open_source(tables / name)))
        assert names_of(source) == MEMBERS and source.classes == ["cat", "dog"]
        assert features_of(source, tmp_path / name, 2 * (name == "saved")) == folder[1]
    test = open_source(f"{tables}/splits:test")
    assert test.names.tolist() == [b"dog/0.png", b"cat/1.png"] and test.labels.tolist() == [1, 0]
    plain = open_source(tables / "plain.parquet")
    assert (plain.classes, plain.labels.tolist(), plain.name(2)) == (["a", "b"], [1, 1, 0, 1, 0, 1], "0000002")
    pixels = np.asarray(load_image(place / "images/cat/2.png"))
    np.testing.assert_array_equal(np.asarray(load_image(str(tables / "saved/cat/2.png"))), pixels)
    np.testing.assert_array_equal(np.asarray(load_rgb(plain.open(2))), pixels)
    (tmp_path / "labels.csv").write_text("name,label\n" + "".join(f"{row:07d},{row % 2 * 2}\n" for row in range(6)))
    named = open_source(tables / "unlabelled.parquet", labels=str(tmp_path / "labels.csv"))
    assert named.labels.tolist() == [0, 2] * 3 and named.remarks[0].endswith("unlabelled.parquet: 1 empty classes (1)")
    assert open_source(tables / "unlabelled.parquet", names=["0000003"]).open(0)


def test_datasets_that_are_refused(tables, monkeypatch):
    for name, message in (
        ("wrong.parquet", "wanted a column 'image' of images' bytes, there are x of int64"),
        ("unlabelled.parquet", "row 4 has no label .2 of 6 rows.: give --labels"),
        ("paths.parquet", "row 0 has no image, but at most a path"),
        ("a[1].parquet", "takes .* in a path for patterns: rename it"),
        ("cut.parquet", "cut.parquet.* Parquet magic bytes not found"),
        ("splits:val", "no split 'val': name one of train, test"),
    ):
        refusal(open_source, f"{tables}/{name}", words=message)
    monkeypatch.setitem(sys.modules, "datasets", None)
    refusal(open_source, "owner/name", words="owner/name needs the package datasets: pip install datasets$")
