"""Listing images: a sane folder as torchvision does; of any other, what is left out, met twice or empty is said."""

import errno
import os
import shutil

import numpy as np
import pytest
from accelerate import PartialState
from conftest import IMAGE_SIZE, fails, refusal, save_images
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from dlc.data.images import open_source
from dlc.data.listing import ENDINGS
from dlc.machine import cli
from dlc.training.image_batches import Images


def make(root, *names):
    """Files of these names, in folders made for them; a name that ends in / is a folder."""
    for name in names:
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_text("")
    return root


def list_images(root):
    """Classes, the images' paths, their labels and remarks."""
    source = open_source(root)
    return source.classes, [source.name(index) for index in range(len(source))], source.labels, source.remarks


def torchvisions(root):
    folder = ImageFolder(str(root), allow_empty=True)
    return folder.classes, [os.path.relpath(path, root) for path, _ in folder.samples], folder.targets


def same_as_torchvisions(root):
    classes, paths, labels, _ = list_images(root)
    there = torchvisions(root)
    assert (classes, paths, labels.tolist()) == there and labels.dtype == np.int64
    assert len(paths) == len(labels)
    return paths


def only_line(root):
    *_, line = list_images(root)[3]
    assert len(line) < 300 and line.isprintable()
    return line


# ---------------------------------------------------------------------- as torchvision's


def test_a_sane_folder_is_listed_as_torchvision_does(tmp_path):
    assert set(ENDINGS) == set(IMG_EXTENSIONS)
    names = """n02/b.png n02/a.JPEG n02/10.jpg n02/9.jpg n02/B.WebP n01/x.tif N01/x.TIFF a/b/1.png a/b/c/1.png
        a/b-c/1.png a/b.c/1.png a/z.png a/b/C/1.png 10/1.bmp 9/1.ppm 9/1.pgm ünï/çà.png é/1.png z~/İ.JPG z~/ſ.jpg
        folder.png/named_as_an_image.jpg/1.png folder.png/1.png #tag/1.png @user/1.png $/1.png"""
    make(tmp_path, *names.split(), "a/b c/1.png", "with space/two\nlines.png", "ünï/çà 猫 🐈.png")
    (tmp_path / os.fsdecode(b"not utf-8 \xff")).mkdir()
    (tmp_path / os.fsdecode(b"not utf-8 \xff") / os.fsdecode(b"\xfe.png")).write_text("")
    paths = same_as_torchvisions(tmp_path)
    assert len(paths) == 29 and list_images(tmp_path)[3] == []


def test_links_are_followed(tmp_path):
    make(tmp_path / "elsewhere", "1.png", "sub/2.png", "whole class/3.png")
    root = make(tmp_path / "data", "cat/1.png", "dog/1.png", "cat/sub/2.png")
    (root / "dog/out.png").symlink_to(tmp_path / "elsewhere/1.png")
    (root / "dog/sub").symlink_to(tmp_path / "elsewhere/sub", target_is_directory=True)
    (root / "fox").symlink_to(tmp_path / "elsewhere/whole class", target_is_directory=True)
    (root / "dog/link to nowhere.png").symlink_to("nowhere.png")  # skipped, with the reason, when it is read
    (root / "dog/link to itself.jpg").symlink_to("link to itself.jpg")
    same_as_torchvisions(root)
    (root / "dog/in.png").symlink_to("../cat/1.png")
    (root / "all cats").symlink_to("cat", target_is_directory=True)  # a class of the same images
    same_as_torchvisions(root)
    assert list_images(root)[3] == []


# ---------------------------------------------------------------------- what is left out


def test_what_is_left_out_is_counted(tmp_path):
    """Hidden and system folders are no classes; empty classes stay classes."""
    for name in (".ipynb_checkpoints", "__MACOSX", "@eaDir"):
        root = make(tmp_path / name[1:], "ant/", "cat/1.png", "dog/sub/", "dog/deep/1.png", "dog/1.png", "eel/x/")
        make(root, f"{name}/1.png", f"dog/{name}/2.png", f"dog/deep/{name}/3.png")
        classes, paths, labels, _ = list_images(root)
        assert (classes, paths) == (["ant", "cat", "dog", "eel"], ["cat/1.png", "dog/1.png", "dog/deep/1.png"])
        assert labels.tolist() == [1, 2, 2]
        left = f"left out 3 hidden or system files and folders ({name}, …); 2 empty classes (ant, …)"
        assert only_line(root).endswith(left)
    root = make(tmp_path / "endings", "cat/1.png", "README.md", "dog/1.avif", "dog/README", "dog/LICENSE", "dog/dot.")
    counts = dict(GIF=("cat", 12), jfif=("dog/sub", 3), txt=("dog", 20))
    make(root, *(f"{folder}/{i}.{ending}" for ending, (folder, n) in counts.items() for i in range(n)))
    assert list_images(root)[1] == ["cat/1.png"]
    line = only_line(root)
    assert "left out 20 .txt (dog/0.txt, …), 12 .gif (" in line and "1 of other endings; 1 empty" in line


def test_folders_that_link_back(tmp_path):
    root = make(tmp_path / "data", "cat/1.png", "cat/deep/2.png", "dog/1.png")
    links = {"cat/deep/back": "..", "cat/root": "..", "cat/self": ".", "cat/dog": "../dog", "dog/cat": "../cat"}
    for link, target in (links | {"all": "."}).items():
        (root / link).symlink_to(target, target_is_directory=True)
    classes, paths, _, _ = list_images(root)
    assert classes == ["cat", "dog"] and len(paths) == 6  # cat's two and dog's one, from either side
    assert "links to a folder that they lie in (all, …)" in only_line(root)
    shutil.rmtree(root / "dog")
    (root / "cat/dog").unlink()
    (root / "cat/above").symlink_to(tmp_path, target_is_directory=True)
    (root / "cat/sub").symlink_to("nowhere")
    (root / "cat/loop").symlink_to("loop")
    os.mkfifo(root / "cat/pipe.png")  # opened, it would never end
    classes, paths, _, _ = list_images(root)
    assert classes == ["cat"] and paths == ["cat/1.png", "cat/deep/2.png"]
    assert "3 links to nowhere and special files (cat/loop, …)" in only_line(root)


# ---------------------------------------------------------------------- what stops a listing


@pytest.mark.parametrize("code, folder", [(errno.EACCES, "cat"), (errno.EIO, "cat/deep"), (errno.ENOENT, ".")])
def test_a_folder_that_the_disk_does_not_give(code, folder, tmp_path, monkeypatch):
    make(tmp_path, "ant/1.png", "cat/1.png", "cat/deep/2.png", "dog/1.png")
    fails(monkeypatch, "os.scandir", code, lambda path: os.path.relpath(path, tmp_path) == folder)
    words = f"{tmp_path / folder}.*{os.strerror(code)}|{os.strerror(code)}.*{tmp_path / folder}"
    refusal(list_images, tmp_path, words=words, error=OSError)


def test_a_class_that_is_a_link_to_nowhere(tmp_path):
    """As where the disk that holds it is not mounted: without it, every label after it would shift."""
    make(tmp_path, "ant/1.png", "dog/1.png")
    for target, reason in (("nowhere", "No such file"), ("cat", "Too many levels"), ("dog/1.png/x", "Not a dir")):
        (tmp_path / "cat").unlink(missing_ok=True)
        (tmp_path / "cat").symlink_to(target)
        refusal(list_images, tmp_path, words=f"cannot list '{tmp_path}/cat' \\({reason}", error=OSError)


def test_nothing_to_list(tmp_path):
    assert "nowhere is not a folder" in refusal(list_images, tmp_path / "nowhere")
    assert "file is not a folder" in refusal(list_images, make(tmp_path, "file") / "file")
    flat = make(tmp_path / "flat", "1.png", "2.png", ".hidden/1.png")
    classes, paths, labels, (said, left_out) = list_images(flat)
    assert (classes, paths, labels.tolist()) == (["all"], ["1.png", "2.png"], [0, 0])
    assert said.endswith("there are no class folders: all images are one class, 'all'") and "1 hidden" in left_out
    other = make(tmp_path / "other", "cat/1.gif", "cat/2.gif", "cat/3.avif", "dog/")
    assert "has no images (.jpg " in refusal(list_images, other)
    assert refusal(list_images, other).endswith("; left out 2 .gif (cat/1.gif, …), 1 .avif (cat/3.avif)")
    shards = make(tmp_path / "shards", "train/0.tar", "val/0.tar")
    words = "or one of archives alone; left out 2 .tar (train/0.tar, …)"
    assert words in refusal(list_images, shards)


def test_folders_that_are_no_classes(tmp_path):
    for number, (names, better) in enumerate(
        (
            ("train/cat/1.png train/dog/2.png val/cat/3.png val/dog/4.png", "train"),
            ("test/1.png train/n01/2.png train/n02/3.png val/4.png", "train"),  # ImageNet's: two of the parts are flat
            ("archive/cat/1.png archive/dog/2.png labels/", "archive"),
            ("images/00000/1.png labels.csv", "images"),
            ("a/data/cat/1.png b/data/dog/2.png", "a/data"),
        )
    ):
        root = make(tmp_path / f"{number}", *names.split())
        refusal(list_images, root, words=f"are not classes, since images lie deeper, as .* such as {root}/{better}$")
    for number, (names, remark) in enumerate(
        (
            ("train/1.png val/2.png", "its folders train, val are taken for classes"),
            (
                "images/1.png labels.csv",
                "its folders images are taken for classes, with images such as images/1.png: if",
            ),
            (
                "n01/images/1.png n02/images/2.png",
                "taken for classes, with images such as n01/images/1.png: if they are",
            ),
        )
    ):
        root = make(tmp_path / f"remark {number}", *names.split())
        assert remark in list_images(root)[3][0] and same_as_torchvisions(root)


def test_training_on_images_has_the_same_listing(tiny_models, tmp_path, monkeypatch, capsys):
    save_images(tmp_path, per_class=2)
    make(tmp_path, ".ipynb_checkpoints/0-checkpoint.png", "bee/", "cat/._0.png", "cat/anim.gif")
    monkeypatch.setattr(cli, "WARNED", set())
    for path in ("cat/0.png", "dog/1.png"):
        Image.new("RGBA", (70, 70), (9, 9, 9, 99)).save(tmp_path / path)
    images = Images(PartialState(cpu=True), tmp_path, image_size=IMAGE_SIZE, vae=tiny_models[0])
    assert images.num_classes == 3 and images.labels.gather(np.arange(4)).tolist() == [1, 1, 2, 2]
    said = capsys.readouterr().err
    assert "2 of 4 images that were looked at are transparent: they are blended on" in said
    left = (
        "left out 2 hidden or system files and folders (.ipynb_checkpoints, …), 1 .gif (cat/anim.gif); 1 empty classes"
    )
    assert said.count(left) == 1
