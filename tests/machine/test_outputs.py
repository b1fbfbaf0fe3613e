"""No command writes over what it reads, or over a file that is not its own; by any name or link."""

import errno
import json
import os
import shutil

import numpy as np
import pytest
from conftest import fails, refusal
from tiny_networks import pixels

from dlc.data.images import save_png
from dlc.machine.files import check_output, write_new
from dlc.sampling.pictures import check_npz

MADE = dict(arr_0=pixels(5), mu=np.zeros(2), sigma=np.eye(2), network="inception", network_sha256="0" * 64)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Files and folders of several kinds, in the working directory. In the end they have to be as they were."""
    monkeypatch.chdir(tmp_path)
    np.savez("made.npz", **MADE)
    np.savez("samples.npz", arr_0=pixels(5))
    os.symlink("made.npz", "link.npz")
    os.link("made.npz", "hard.npz")
    for name in ("codes", "results_prior", "sweep", "run"):
        os.mkdir(name)
    np.save("codes/0.npy", np.zeros((4, 2), np.uint8))
    (tmp_path / "sweep/sweep.txt").write_text("mine")
    for name in ("mine.json", "run/args.json", "samples.metrics.json"):
        (tmp_path / name).write_text(json.dumps(dict(format_version=1, mine=True)))

    def content():
        return {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}

    before = content()
    yield tmp_path
    assert content() == before


READ, OTHER = "is read by this command", "exists, and was not written by this command: name another file, or move it"
MAKE = "evaluate make-reference {} {} --image-size 16 --num-images 0"


@pytest.mark.parametrize(
    "command, words",
    [
        *((MAKE.format("made.npz", name), f"OUT.npz {name} {READ}") for name in ("made.npz", "link.npz", "hard.npz")),
        (MAKE.format("made.npz", "samples.npz"), f"OUT.npz samples.npz {OTHER}"),
        ("evaluate samples.npz --reference made.npz --output hard.npz", f"--output hard.npz {READ}"),
        ("evaluate samples.npz --metrics is --output made.npz", f"--output made.npz {OTHER}"),
        ("evaluate samples.npz --metrics is", f"samples.metrics.json {OTHER}"),
        ("evaluate samples.npz --metrics is --output /dev/null", f"--output /dev/null {OTHER}"),
        ("evaluate sweep --cfg-scale 1 --metrics is --out sweep -- --ckpt x", f"--out sweep/sweep.txt {OTHER}"),
        ("evaluate sweep --cfg-scale 1 --reference codes --out codes -- --ckpt x", f"--out codes {READ}"),
        ("sample_prior --out results_prior", f"--out results_prior {READ}"),
        ("sample_ddp_computed_dlc --dlc-dir codes --sample-dir ./codes", f"--sample-dir ./codes {READ}"),
    ],
)
def test_outputs_that_are_refused(place, error_of, command, words):
    assert words in error_of(*command.split())


def test_other_outputs_that_are_refused(place, tool):
    """Features that are converted onto their source, and the picture of an .npz; this program's own is replaced."""
    assert READ in tool("pack", "codes", f"../{place.name}/codes", "--V", 4)[2]
    (place / "new").mkdir()
    for count in (5, 6):
        np.savez("new/x.npz", arr_0=pixels(count))
        check_npz("new/x.npz", grid=True)
    save_png(place / "new/x.npz.grid.png", pixels(1)[0])
    before = (place / "new/x.npz.grid.png").read_bytes()
    refusal(check_npz, place / "new/x.npz", grid=True, words=f"--grid .*x.npz.grid.png {OTHER}")
    assert (place / "new/x.npz.grid.png").read_bytes() == before
    shutil.rmtree("new")


def test_the_disk_is_tried_before_the_work(monkeypatch, tmp_path):
    fails(monkeypatch, "builtins.open", errno.EROFS)
    words = f"--output {tmp_path}/x.json cannot be written: a trial in {tmp_path} failed: .*{os.strerror(errno.EROFS)}"
    refusal(check_output, tmp_path / "x.json", "--output", words=words)
    assert not list(tmp_path.iterdir())


def test_own_files_are_replaced_and_new_ones_written(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, **MADE)
    check_output(path, "--out", ["nowhere", None], own=("mu", "sigma"))
    check_output(tmp_path / "other.npz", "--out", [path], own=("mu",))
    write_new(tmp_path / "codes.npy", b"codes", "--out")
    write_new(tmp_path / "codes.npy", b"codes", "--out")
    refusal(write_new, tmp_path / "codes.npy", b"other", "--out", words="codes.npy exists, and holds something else")
    assert (tmp_path / "codes.npy").read_bytes() == b"codes"
