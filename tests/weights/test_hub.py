"""Names of weights that are ids on the hub, against a stand-in of it on loopback."""

import errno
import threading

import pytest
from hub_standin import point_at

from dlc.weights import hub as hub_module
from dlc.weights.hub import fetch, fetched_by_node, is_id

CONTENT = bytes(range(256)) * 400  # 102,400 bytes
FILES = {
    "config.json": b"{}",
    "model.safetensors": CONTENT,
    "model.bin": b"x" * 10,
    "code.py": b"raise SystemExit",
    "vae/config.json": b"{1}",
    "vae/onnx/config.json": b"{2}",
}
WANTED = ["config.json", ("*.safetensors", "*.bin")]


def downloads(hub):
    return [path for command, path, _ in hub.requests if command == "GET" and "/resolve/" in path]


def test_fetched_whole_and_only_what_is_wanted(hub, capsys):
    commit = hub.add("owner/name", FILES)
    folder = fetch("owner/name", WANTED, optional=["vae/*.json", "*.txt"], flag="--vae")
    assert {path: (folder / path).read_bytes() for path in ("config.json", "model.safetensors", "vae/config.json")} == {
        path: FILES[path] for path in ("config.json", "model.safetensors", "vae/config.json")
    }
    assert folder.name == commit and len(list(folder.rglob("*.*"))) == 3
    assert "fetching owner/name from the hub: 3 files" in capsys.readouterr().err
    assert len(downloads(hub)) == 3
    hub_module.FETCHED.clear()
    assert fetch("owner/name", WANTED) == folder and len(downloads(hub)) == 3  # all are in the cache
    assert capsys.readouterr().err == ""
    asked = len(hub.requests)
    assert fetch("owner/name", WANTED) == folder and len(hub.requests) == asked  # known to this process


def test_cut_off(hub, monkeypatch, tmp_path):
    """A download that ends early leaves nothing that passes for the file, and the next one completes it."""
    hub.add("owner/name", FILES)
    hub.break_off("model.safetensors", after=0, times=1000)
    with pytest.raises(ValueError, match=r"^--vae owner/name: .* failed \(\w+\): run again when the hub is in reach"):
        fetch("owner/name", WANTED, flag="--vae")
    point_at(hub.url, monkeypatch, tmp_path / "cache", offline=True)
    with pytest.raises(ValueError, match="does not have all of it, while HF_HUB_OFFLINE is set"):
        fetch("owner/name", WANTED)
    hub.broken.clear()
    point_at(hub.url, monkeypatch, tmp_path / "cache")
    assert (fetch("owner/name", WANTED) / "model.safetensors").read_bytes() == CONTENT
    assert downloads(hub).count("/owner/name/resolve/main/config.json") <= 1  # which was whole


def test_revision(hub, monkeypatch, tmp_path):
    new = hub.add("owner/name", FILES)
    old = hub.add("owner/name", dict(FILES, **{"config.json": b"old"}), revision="v1.0")
    assert (fetch("owner/name@v1.0", WANTED) / "config.json").read_bytes() == b"old"
    assert (fetch("owner/name", WANTED) / "config.json").read_bytes() == b"{}"
    assert (fetch(f"owner/name@{old}", WANTED).name, fetch(f"owner/name@{new}", WANTED).name) == (old, new)
    with pytest.raises(ValueError, match="--ckpt owner/name@v2: the hub has no revision 'v2' of it"):
        fetch("owner/name@v2", WANTED, flag="--ckpt")
    point_at(hub.url, monkeypatch, tmp_path / "cache", offline=True)
    for name, commit in {"owner/name@v1.0": old, "owner/name": new, f"owner/name@{old}": old}.items():
        assert fetch(name, WANTED).name == commit
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        fetch("owner/name@../v1", WANTED)


def test_missing_files(hub):
    hub.add("owner/name", {"config.json": b"{}", "code.py": b""})
    with pytest.raises(ValueError, match=r"at revision main, has no \*.safetensors or \*.bin$"):
        fetch("owner/name", WANTED)
    assert not downloads(hub)
    hub.add("owner/evil", {"../../config.json": b"{}"})  # leads out of the cache
    with pytest.raises(ValueError, match="has no config.json"):
        fetch("owner/evil", ["config.json"])
    with pytest.raises(ValueError, match=r"has no \.\./"):
        fetch("owner/evil", ["../../config.json"])


def test_refused(hub, monkeypatch):
    with pytest.raises(ValueError, match="no such local path, and the hub has no such repository, or keeps it private"):
        fetch("owner/nothing", WANTED)
    hub.add("owner/secret", FILES, access="private")
    with pytest.raises(ValueError, match=r"or keeps it private: then log in \(hf auth login, or HF_TOKEN\)"):
        fetch("owner/secret", WANTED)
    hub.add("owner/gated", FILES, access="gated")
    with pytest.raises(ValueError, match="its owner gates it: accept the terms on its page on the hub, then log in"):
        fetch("owner/gated", WANTED)
    hub.token = "hf_made_up"
    monkeypatch.setenv("HF_TOKEN", hub.token)
    for name in ("owner/secret", "owner/gated"):
        assert (fetch(name, WANTED) / "config.json").is_file()


def test_out_of_reach(hub, monkeypatch, tmp_path, capsys):
    hub.add("owner/name", FILES)
    folder = fetch("owner/name", WANTED)
    capsys.readouterr()
    for offline in (True, False):
        point_at("http://127.0.0.1:9", monkeypatch, tmp_path / "cache", offline)
        monkeypatch.setattr("dlc.machine.cli.WARNED", set())
        assert fetch("owner/name", WANTED) == folder
        error = capsys.readouterr().err
        assert error == "" if offline else error.count("\n") == 1 and "its copy in the hub's cache is used" in error
        with pytest.raises(
            ValueError, match="HF_HUB_OFFLINE is set" if offline else r"failed \(Connect\w*\): run again"
        ):
            fetch("owner/other", WANTED)
    monkeypatch.setattr("dlc.machine.cli.WARNED", set())
    hub.repositories.clear()  # deleted on the hub: the cache still has it
    point_at(hub.url, monkeypatch, tmp_path / "cache")
    assert fetch("owner/name", WANTED) == folder
    assert "no such repository" in capsys.readouterr().err


def test_full_disk(hub, monkeypatch):
    hub.add("owner/name", FILES)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(
        ValueError, match=r"cannot be written \(No space left on device\): free the disk, or set HF_HOME"
    ):
        fetch("owner/name", WANTED)


def test_names(hub, tmp_path):
    (tmp_path / "owner/here").mkdir(parents=True)
    for name in ("owner/name", "owner/name@v1", "a/b.c-d_e", "owner/name@refs/pr/1"):
        assert is_id(name)
    for name in (
        "owner/here",
        "name",
        "a/b/c",
        "../b",
        "/a/b",
        "a/b.pth",
        "a/B.SAFETENSORS",
        "a/b c",
        "a/..",
        "a--b/c",
        "",
        "/",
    ):
        assert not is_id(name)
    assert fetch("owner/here", WANTED).is_dir() and not hub.requests
    with pytest.raises(ValueError, match="--vae a/b.pth does not exist: it is no file or folder, nor a hub id"):
        fetch("a/b.pth", WANTED, flag="--vae")


def test_one_process_of_a_node_fetches_first(hub, monkeypatch):
    """The others ask the hub for nothing; if the first one fails, all of them say so."""
    hub.add("owner/name", FILES)
    gathered, barrier = [None, None], threading.Barrier(2)
    rank = threading.local()

    def gather(value):
        gathered[rank.index] = value
        barrier.wait(10)
        return list(gathered)

    monkeypatch.setattr(hub_module, "from_all", gather)
    monkeypatch.setattr(hub_module, "is_first_of_node", lambda: rank.index == 0)
    results, asked = [{}, {}], []

    def process(index, name):
        rank.index = index

        def fetch_all(ask):
            if index:
                asked.append(len(hub.requests))
                hub_module.FETCHED.clear()  # another process
            results[index] = fetch(name, WANTED, ask=ask)

        try:
            fetched_by_node(None, fetch_all)
        except ValueError as error:
            results[index] = str(error)

    def both(name):
        threads = [threading.Thread(target=process, args=(index, name)) for index in (1, 0)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)

    both("owner/name")
    assert results[0] == results[1] and (results[0] / "model.safetensors").is_file()
    assert asked == [len(hub.requests)]
    both("owner/nothing")
    assert results[0] == results[1] and "no such repository" in results[0]
