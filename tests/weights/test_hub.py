"""Names of weights that are ids on the hub, against a stand-in of it on loopback."""

import errno
from concurrent.futures import ThreadPoolExecutor

import pytest
from hub_standin import point_at

from dlc.weights import hub as hub_module
from dlc.weights.hub import is_id, locate, wanted_files

CONTENT = bytes(range(256)) * 400  # 102,400 bytes
FILES = {
    "config.json": b"{}",
    "model.safetensors": CONTENT,
    "pytorch_model.bin": b"x" * 10,
    "code.py": b"raise SystemExit",
    "vae/config.json": b"{1}",
    "vae/onnx/config.json": b"{2}",
}


def downloads(hub):
    return [path for command, path, _ in hub.requests if command == "GET" and "/resolve/" in path]


def test_fetched_whole_and_only_what_is_wanted(hub, capsys):
    commit = hub.add("owner/name", FILES)
    folder = locate("owner/name", "model", "--vae")
    wanted = ("config.json", "model.safetensors", "vae/config.json")
    assert {path: (folder / path).read_bytes() for path in wanted} == {path: FILES[path] for path in wanted}
    assert folder.name == commit and len(list(folder.rglob("*.*"))) == 3
    assert "fetching owner/name from the hub: 3 files" in capsys.readouterr().err
    assert len(downloads(hub)) == 3
    hub_module.FETCHED.clear()
    assert locate("owner/name", "model") == folder and len(downloads(hub)) == 3  # all are in the cache
    assert capsys.readouterr().err == ""
    asked = len(hub.requests)
    assert locate("owner/name", "model") == folder and len(hub.requests) == asked  # known to this process


def test_cut_off(hub, monkeypatch, tmp_path):
    """A download that ends early leaves nothing that passes for the file, and the next one completes it."""
    hub.add("owner/name", FILES)
    hub.break_off("model.safetensors", after=0, times=1000)
    with pytest.raises(ValueError, match=r"^--vae owner/name: .* failed \(\w+\): run again when the hub is in reach"):
        locate("owner/name", "model", "--vae")
    point_at(hub.url, monkeypatch, tmp_path / "cache", offline=True)
    with pytest.raises(ValueError, match="does not have all of it, while HF_HUB_OFFLINE is set"):
        locate("owner/name", "model")
    hub.broken.clear()
    point_at(hub.url, monkeypatch, tmp_path / "cache")
    assert (locate("owner/name", "model") / "model.safetensors").read_bytes() == CONTENT
    assert downloads(hub).count("/owner/name/resolve/main/config.json") <= 1  # which was whole


def test_a_file_of_the_cache_that_is_cut_is_fetched_again(hub, capsys):
    """Its size was listed; what is whole is not fetched again."""
    hub.add("owner/name", FILES)
    blob = (locate("owner/name", "model") / "model.safetensors").resolve()
    blob.write_bytes(CONTENT[:1000])
    hub_module.FETCHED.clear()
    assert (locate("owner/name", "model") / "model.safetensors").read_bytes() == CONTENT
    assert len(downloads(hub)) == 4 and "1 files" in capsys.readouterr().err


def test_revision(hub, monkeypatch, tmp_path):
    new = hub.add("owner/name", FILES)
    old = hub.add("owner/name", dict(FILES, **{"config.json": b"old"}), revision="v1.0")
    assert (locate("owner/name@v1.0", "model") / "config.json").read_bytes() == b"old"
    assert (locate("owner/name", "model") / "config.json").read_bytes() == b"{}"
    assert [locate(f"owner/name@{commit}", "model").name for commit in (old, new)] == [old, new]
    with pytest.raises(ValueError, match="--ckpt owner/name@v2: the hub has no revision 'v2' of it"):
        locate("owner/name@v2", "model", "--ckpt")
    point_at(hub.url, monkeypatch, tmp_path / "cache", offline=True)
    for name, commit in {"owner/name@v1.0": old, "owner/name": new, f"owner/name@{old}": old}.items():
        assert locate(name, "model").name == commit
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        locate("owner/name@../v1", "model")


def test_a_commit_that_the_cache_has_is_named(hub, monkeypatch, tmp_path):
    commit = hub.add("owner/name", FILES)
    locate(f"owner/name@{commit}", "model")
    point_at(hub.url, monkeypatch, tmp_path / "cache", offline=True)
    for url, words in ((hub.url, "does not have all of it, .*: fetch it once"), ("http://127.0.0.1:9", "failed")):
        point_at(url, monkeypatch, tmp_path / "cache", offline=url == hub.url)
        with pytest.raises(ValueError, match=f"{words}.*; the cache has owner/name@{commit}"):
            locate("owner/name", "model")
    point_at(hub.url, monkeypatch, tmp_path / "cache", offline=True)
    assert locate(f"owner/name@{commit}", "model").name == commit


def test_missing_files(hub):
    hub.add("owner/name", {"config.json": b"{}", "code.py": b""})
    with pytest.raises(ValueError, match=r"at revision main, has no file of weights$"):
        locate("owner/name", "model")
    assert not downloads(hub)
    hub.add("owner/evil", {"../../model.safetensors": b"{}"})  # leads out of the cache
    with pytest.raises(ValueError, match="has no file of weights"):
        locate("owner/evil", "model")


SEVERAL = {file: file.encode() for file in "a/model.safetensors a/config.json b/0400000.pt one.pt two.pt".split()}


@pytest.mark.parametrize(
    "inside, found",
    [
        ("", "has several files of weights: name one of one.pt, two.pt after a colon"),
        ("a", ["a/config.json", "a/model.safetensors"]),
        ("b", ["b/0400000.pt"]),
        ("b/0400000.pt", ["b/0400000.pt"]),
        ("one.pt", ["one.pt"]),
        ("c", "has no file of weights in c: name one of a/model.safetensors, b/0400000.pt, one.pt, two.pt after"),
    ],
)
def test_a_repository_of_several_checkpoints(hub, inside, found):
    """What is fetched is decided from the listing, and the name may say which."""
    hub.add("owner/name", SEVERAL)
    name = f"owner/name:{inside}".rstrip(":")
    if isinstance(found, str):
        with pytest.raises(ValueError, match=found):
            locate(name, "model")
        assert not downloads(hub)
    else:
        assert wanted_files(SEVERAL, "model", inside) == found
        path = locate(name, "model")
        assert path.as_posix().endswith(f"/{inside}") and path.exists() and len(downloads(hub)) == len(found)


def test_refused(hub, monkeypatch):
    with pytest.raises(ValueError, match="no such local path, and the hub has no such repository, or keeps it private"):
        locate("owner/nothing", "model")
    hub.add("owner/secret", FILES, access="private")
    with pytest.raises(ValueError, match=r"or keeps it private: then log in \(hf auth login, or HF_TOKEN\)"):
        locate("owner/secret", "model")
    hub.add("owner/gated", FILES, access="gated")
    with pytest.raises(ValueError, match="its owner gates it: accept the terms on its page on the hub, then log in"):
        locate("owner/gated", "model")
    hub.token = "hf_made_up"
    monkeypatch.setenv("HF_TOKEN", hub.token)
    for name in ("owner/secret", "owner/gated"):
        assert (locate(name, "model") / "config.json").is_file()


def test_out_of_reach(hub, monkeypatch, tmp_path, capsys):
    hub.add("owner/name", FILES)
    folder = locate("owner/name", "model")
    capsys.readouterr()
    for offline in (True, False):
        point_at("http://127.0.0.1:9", monkeypatch, tmp_path / "cache", offline)
        monkeypatch.setattr("dlc.machine.cli.WARNED", set())
        assert locate("owner/name", "model") == folder
        error = capsys.readouterr().err
        assert error == "" if offline else error.count("\n") == 1 and "its copy in the hub's cache is used" in error
        words = "HF_HUB_OFFLINE is set" if offline else r"failed \(Connect\w*\): run again"
        with pytest.raises(ValueError, match=words):
            locate("owner/other", "model")
    monkeypatch.setattr("dlc.machine.cli.WARNED", set())
    hub.repositories.clear()  # deleted on the hub: the cache still has it
    point_at(hub.url, monkeypatch, tmp_path / "cache")
    assert locate("owner/name", "model") == folder
    assert "no such repository" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["HTTP_PROXY", "ALL_PROXY"])
def test_a_proxy_that_does_not_answer_is_named(name, hub, monkeypatch, tmp_path):
    monkeypatch.setenv(name, "http://user:secret@127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "")
    point_at("http://127.0.0.1:9", monkeypatch, tmp_path / "cache")
    with pytest.raises(ValueError, match=f"by the proxy that {name} names") as error:
        locate("owner/name", "model")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("kind, file", [("model", "config.json"), ("vae", "vae/config.json")])
def test_what_decides_is_needed_without_the_hub(hub, monkeypatch, tmp_path, kind, file):
    """A cache with weights alone is refused, unless the hub was once seen to have no config.json beside them."""
    folder = file.rpartition("/")[0]
    weights = f"{folder}/diffusion_pytorch_model.safetensors".lstrip("/")
    for name, files in (("owner/with", {file: b"{}", weights: b"x"}), ("owner/without", {weights: b"x"})):
        hub.add(name, files)
        path = locate(name, kind)
        (path / file).unlink(missing_ok=True)  # as `hf download owner/with FILE` leaves it
        point_at(hub.url, monkeypatch, tmp_path / "cache", offline=True)
        if name == "owner/with":
            with pytest.raises(ValueError, match=f"has its weights, but no {file}, which decides what they are"):
                locate(name, kind)
        else:
            assert locate(name, kind) == path
        point_at(hub.url, monkeypatch, tmp_path / "cache")


@pytest.mark.parametrize(
    "part, status, words",
    [
        ("/api/", 429, r"takes no more requests from here for now \(status 429\): wait some minutes, or log in"),
        ("/resolve/", 403, r"refuses access \(status 403\): log in"),
        ("/resolve/", 404, r"failed \(status 404\)"),
        ("/api/", 200, "its answer is not a hub's, but perhaps a login page's"),
    ],
)
def test_what_the_hub_answered_is_said(hub, monkeypatch, part, status, words):
    hub.add("owner/name", FILES)
    answer = hub.answer

    def failing(request, body, asked=None):
        if part not in request.path:
            return answer(request, body, asked)
        request.send_response(status)
        request.send_header("Content-Length", "6")
        request.end_headers()
        request.wfile.write(b"<html>" if body else b"")

    monkeypatch.setattr(hub, "answer", failing)
    with pytest.raises(ValueError, match=words):
        locate("owner/name", "model")


@pytest.mark.parametrize(
    "number, words",
    [(errno.ENOSPC, ": free the disk, or set"), (errno.EACCES, ": set HF_HOME"), (errno.ENOTDIR, ": set HF_HOME")],
)
def test_a_cache_that_cannot_be_written(hub, monkeypatch, number, words):
    hub.add("owner/name", FILES)

    def fail(*_, **__):
        raise OSError(number, "x", None if number == errno.ENOSPC else "cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ValueError, match=rf"cannot be written \([NP]\w+ .*\){words}"):
        locate("owner/name", "model")


def test_names(hub, tmp_path):
    (tmp_path / "owner/here").mkdir(parents=True)
    for name in ("owner/name", "owner/name@v1", "a/b.c-d_e", "owner/name@refs/pr/1", "a/b:c.pt", "a/b@v1:c/d.pt"):
        assert is_id(name)
    others = "owner/here name a/b/c ../b /a/b a/b.pth a/B.SAFETENSORS a/.. a--b/c / a/b:../c".split()
    assert not any(map(is_id, [*others, "a/b c", ""]))
    assert locate("owner/here", "model").is_dir() and not hub.requests
    with pytest.raises(ValueError, match="--vae a/b.pth does not exist: it is no file or folder, nor a hub id"):
        locate("a/b.pth", "vae", "--vae")


def test_processes_of_a_node_fetch_a_file_once(hub):
    """The library's locks have the others wait for it; threads have a lock each, as processes do."""
    hub.add("owner/name", FILES)
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(hub_module._fetch, ["owner/name"] * 4, ["model"] * 4))
    assert len({*folders}) == 1 and (folders[0] / "model.safetensors").read_bytes() == CONTENT
    assert len(downloads(hub)) == len({*downloads(hub)}) == 3
