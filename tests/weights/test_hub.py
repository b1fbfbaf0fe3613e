"""Names of weights that are ids on the hub, and DiT's published weights, against a stand-in of it on loopback."""

import errno
import io
import re
import types

import pytest
import torch
from conftest import refusal
from hub_standin import point_at
from tiny_weights import assert_same, tiny

from dlc.sampling.opening import open_model
from dlc.weights import hub as hub_module
from dlc.weights.hub import is_id, locate, published_dit

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
    averages = {"ema.safetensors": b"ours", "custom_checkpoint_0.pkl": b"the DLC project's"}
    commit = hub.add("owner/name", files := {**FILES, **averages})
    folder = locate("owner/name", "model", "--vae")
    wanted = ("config.json", "model.safetensors", "vae/config.json", *averages)
    assert {path: (folder / path).read_bytes() for path in wanted} == {path: files[path] for path in wanted}
    assert folder.name == commit and len(list(folder.rglob("*.*"))) == 5
    assert "fetching owner/name from the hub: 5 files" in capsys.readouterr().err
    assert len(downloads(hub)) == 5
    hub_module.fetched.cache_clear()
    assert locate("owner/name", "model") == folder and len(downloads(hub)) == 5  # all are in the cache
    assert capsys.readouterr().err == ""
    asked = len(hub.requests)
    assert locate("owner/name", "model") == folder and len(hub.requests) == asked  # known to this process


def test_cut_off(hub, monkeypatch, tmp_path, capsys):
    """A download that ends early leaves nothing that passes for the file, and the next one completes it."""
    hub.add("owner/name", FILES)
    hub.broken["model.safetensors"] = 0
    refusal(locate, "owner/name", "model", "--vae", words=r"^--vae owner/name: .* failed \(\w+: .*\): run again when")
    point_at(hub.url, monkeypatch, tmp_path / "cache", offline=True)
    refusal(locate, "owner/name", "model", words="does not have all of it, while HF_HUB_OFFLINE is set")
    hub.broken.clear()
    point_at(hub.url, monkeypatch, tmp_path / "cache")
    assert (locate("owner/name", "model") / "model.safetensors").read_bytes() == CONTENT
    assert downloads(hub).count("/owner/name/resolve/main/config.json") <= 1  # which was whole
    (locate("owner/name", "model") / "model.safetensors").resolve().write_bytes(CONTENT[:1000])
    hub_module.fetched.cache_clear()
    capsys.readouterr()
    before = len(downloads(hub))
    assert (locate("owner/name", "model") / "model.safetensors").read_bytes() == CONTENT
    assert len(downloads(hub)) == before + 1 and "1 files" in capsys.readouterr().err


def test_revision(hub, monkeypatch, tmp_path):
    new = hub.add("owner/name", FILES)
    old = hub.add("owner/name", dict(FILES, **{"config.json": b"old"}), revision="v1.0")
    assert (locate("owner/name@v1.0", "model") / "config.json").read_bytes() == b"old"
    assert (locate("owner/name", "model") / "config.json").read_bytes() == b"{}"
    assert [locate(f"owner/name@{commit}", "model").name for commit in (old, new)] == [old, new]
    refusal(locate, "owner/name@v2", "model", "--ckpt", words="^--ckpt owner/name@v2: the hub has no revision 'v2'")
    point_at(hub.url, monkeypatch, tmp_path / "cache", offline=True)
    for name, commit in {"owner/name@v1.0": old, "owner/name": new, f"owner/name@{old}": old}.items():
        assert locate(name, "model").name == commit
    refusal(locate, "owner/name@../v1", "model", words="HF_HUB_OFFLINE is set")
    commit = hub.add("owner/other", FILES)
    point_at(hub.url, monkeypatch, tmp_path / "cache")
    locate(f"owner/other@{commit}", "model")
    for url, words in ((hub.url, "does not have all of it, .*: fetch it once"), ("http://127.0.0.1:9", "failed")):
        point_at(url, monkeypatch, tmp_path / "cache", offline=url == hub.url)
        refusal(locate, "owner/other", "model", words=f"{words}.*; the cache has owner/other@{commit}")


def test_missing_files(hub):
    hub.add("owner/name", {"config.json": b"{}", "code.py": b""})
    refusal(locate, "owner/name", "model", words=r"at revision main, has no file of weights$")
    assert not downloads(hub)
    hub.add("owner/evil", {"../../model.safetensors": b"{}"})  # leads out of the cache
    refusal(locate, "owner/evil", "model", words="has no file of weights")


SEVERAL = {file: file.encode() for file in "a/model.safetensors a/config.json b/0400000.pt one.pt two.pt".split()}


def test_a_repository_of_several_checkpoints(hub):
    hub.add("owner/name", SEVERAL)
    refusal(locate, "owner/name", "model", words="has several files of weights: name one of one.pt, two.pt after a")
    words = "has no file of weights in c: name one of a/model.safetensors, b/0400000.pt, one.pt, two.pt after"
    refusal(locate, "owner/name:c", "model", words=words)
    assert not downloads(hub)
    for inside, found in (
        ("a", ["a/config.json", "a/model.safetensors"]),
        ("b", ["b/0400000.pt"]),
        ("b/0400000.pt", []),  # which is there
        ("one.pt", ["one.pt"]),
    ):
        before, path = len(downloads(hub)), locate(f"owner/name:{inside}", "model")
        assert path.as_posix().endswith(f"/{inside}") and path.exists()
        assert sorted(one.split("/", 5)[5] for one in downloads(hub)[before:]) == found


def test_refused(hub, monkeypatch):
    private = r"the hub has no such repository, or keeps it private: then log in \(hf auth login, or HF_TOKEN\)"
    hub.add("owner/secret", FILES, access="private")
    hub.add("owner/gated", FILES, access="gated")
    for name, words in (
        ("owner/nothing", private),
        ("owner/secret", private),
        ("owner/gated", "its owner gates it: accept the terms on its page on the hub, then log in"),
    ):
        refusal(locate, name, "model", words=words)
    monkeypatch.setenv("HF_TOKEN", "hf_made_up")
    hub.token = "hf_made_up"
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
        words = "HF_HUB_OFFLINE is set" if offline else r"failed \(Connect\w*: .*\): run again"
        refusal(locate, "owner/other", "model", words=words)
    monkeypatch.setattr("dlc.machine.cli.WARNED", set())
    hub.repositories.clear()  # deleted on the hub: the cache still has it
    point_at(hub.url, monkeypatch, tmp_path / "cache")
    assert locate("owner/name", "model") == folder
    assert "no such repository" in capsys.readouterr().err


def test_a_proxy_that_does_not_answer_is_named(hub, monkeypatch, tmp_path):
    monkeypatch.setenv("ALL_PROXY", "http://user:secret@127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "")
    point_at("http://127.0.0.1:9", monkeypatch, tmp_path / "cache")
    assert "secret" not in refusal(locate, "owner/name", "model", words="by the proxy that ALL_PROXY names")


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
            refusal(locate, name, kind, words=f"has its weights, but no {file}, which decides what they are")
        else:
            assert locate(name, kind) == path
        point_at(hub.url, monkeypatch, tmp_path / "cache")


def test_what_the_hub_answered_is_said(hub, monkeypatch):
    hub.add("owner/name", FILES)
    answer, wanted = hub.answer, []

    def failing(request, body, asked=None):
        part, status, _ = wanted
        if part not in request.path:
            return answer(request, body, asked)
        request.send_response(status)
        request.send_header("Content-Length", "6")
        request.end_headers()
        request.wfile.write(b"<html>" if body else b"")

    monkeypatch.setattr(hub, "answer", failing)
    for wanted in (
        ("/api/", 429, r"takes no more requests from here for now \(status 429\): wait some minutes, or log in"),
        ("/resolve/", 403, r"refuses access \(status 403\): log in"),
        ("/resolve/", 404, r"failed \(status 404\)"),
        ("/api/", 200, r"failed \(JSONDecodeError: .*\): run again"),
    ):
        refusal(locate, "owner/name", "model", words=wanted[2])
    for error, words in ((OSError(errno.ENOSPC, "x"), ": free the disk, or"), (OSError(errno.EACCES, "x", "c"), ":")):
        words = rf"cannot be written \([NP]\w+ .*\){words} set HF_HOME"
        assert re.search(words, hub_module.refusal_of(error, "main"))


def test_names(hub, tmp_path):
    (tmp_path / "owner/here").mkdir(parents=True)
    for name in ("owner/name", "owner/name@v1", "a/b.c-d_e", "owner/name@refs/pr/1", "a/b:c.pt", "a/b@v1:c/d.pt"):
        assert is_id(name)
    others = "owner/here name a/b/c ../b /a/b a/b.pth a/B.SAFETENSORS a/.. a--b/c / a/b:../c".split()
    assert not any(map(is_id, [*others, "a/b c", ""]))
    assert locate("owner/here", "model").is_dir() and not hub.requests
    for name in ("a/b.pth", "\x1b[31m", "x" * 3000, "nobody/nothing\0", "http://localhost/x"):
        refusal(
            locate, name, "vae", "--vae", words="^--vae .*does not exist: it is neither a file or folder nor a hub id"
        )


# ---------------------------------------------------------------------- DiT's published weights

NAME, REPOSITORY, TINY = "DiT-XL-2-256x256.pt", "facebook/DiT-XL-2-256", ("DiT-Ti/4", 64)


@pytest.fixture
def serve(hub, monkeypatch):
    """serve(weights): the public address has these, in the place of the large model's; gives the file's bytes."""
    monkeypatch.setitem(hub_module.PUBLISHED, TINY, (REPOSITORY, NAME))
    monkeypatch.setattr(hub_module, "ADDRESS", f"{hub.url}/dit/published/resolve/main")

    def call(weights):
        torch.save(weights, file := io.BytesIO())
        hub.add("dit/published", {NAME: file.getvalue()})
        return file.getvalue()

    return call


def left():
    return sorted(path.name for path in hub_module.FOLDER.glob("*") if not path.name.endswith(".lock"))


def test_the_hub_then_the_address_then_the_file(serve, hub, monkeypatch, tmp_path, capsys):
    flags = dict(model=None, ckpt=None, results_dir="results", ema=True, diffusers_time=None, objective=None)
    flags = types.SimpleNamespace(**flags, image_size=64, vae=None)

    def opened():
        path, model, meta = open_model(types.SimpleNamespace(**vars(flags)), "sample_ddp.py", TINY[0])
        assert_same(model, tiny(num_classes=1000))
        return path, meta

    def asked():
        return [path for _, path, _ in hub.requests if path.startswith("/dit/published/")]

    hub.add(REPOSITORY, {"model.pt": serve(tiny(num_classes=1000).state_dict())})
    assert str(opened()[0]) == REPOSITORY and not asked() and not hub_module.FOLDER.exists()
    assert "no checkpoint of DiT-Ti/4 under --results-dir results: train one" in capsys.readouterr().out
    del hub.repositories["models", REPOSITORY]
    point_at(hub.url, monkeypatch, tmp_path / "other_cache")
    hub_module.FOLDER.mkdir()
    (hub_module.FOLDER / f".{NAME}.part.0.partial").write_bytes(b"of a process that was killed")
    requests = []
    for _ in range(2):
        path, meta = opened()
        assert path == hub_module.FOLDER / NAME and meta.weights == "as in the file"
        requests.append(len(hub.requests))
    assert len(asked()) == 1 and left() == [NAME] and requests[0] == requests[1]


def test_what_is_not_the_model_is_refused(serve, hub, monkeypatch):
    """From a mirror, which is asked in place of the hub: names, shapes and finiteness before the file gets its name."""
    monkeypatch.setenv(hub_module.ADDRESS_VARIABLE, f"{hub_module.ADDRESS}/")
    monkeypatch.setattr(hub_module, "ADDRESS", "http://127.0.0.1:9")
    monkeypatch.setattr(hub_module, "locate", pytest.fail)
    right = tiny(num_classes=1000).state_dict()
    for weights, cut, fault in (
        ({**right, "pos_embed": right["pos_embed"] * torch.nan}, None, "has values that are NaN"),
        ({**right, "more": torch.zeros(1)}, None, "has unknown more"),
        (tiny(num_classes=10).state_dict(), None, "has other shapes: y_embedder"),
        (right, 10_000, "cut off or damaged"),
    ):
        serve(weights)
        hub.broken = {NAME: cut}  # a connection that breaks
        refusal(published_dit, *TINY, words=f"did not send the weights of DiT-Ti/4 .*{fault}.*put the file at")
        assert left() == []
    hub.broken = {}
    assert published_dit(*TINY) == hub_module.FOLDER / NAME
    hub_module.PUBLISHED[TINY] = REPOSITORY, "other.pt"
    refusal(published_dit, *TINY, words=r"is out of reach \(status 404\): put the file at pretrained_models.other.pt")


def test_offline(error_of):
    error = error_of("sample_ddp")
    assert f"{REPOSITORY}: no such local path" in error and "HF_HUB_OFFLINE is set" in error
    assert f"or put DiT's {NAME} at pretrained_models/{NAME}" in error
    assert "DiT-XL-2-512x512.pt" in error_of("sample_ddp", "--image-size", 512)
    assert "no checkpoint of DiT-XL/2" in error_of("sample_ddp", "--image-size", 128)
    assert "no checkpoint of DiT-S/2" in error_of("sample_ddp", "--model", "DiT-S/2")
    hub_module.FOLDER.mkdir(exist_ok=True)
    (hub_module.FOLDER / NAME).write_bytes(b"junk")
    assert f"{NAME} cannot be read as weights" in error_of("sample_ddp")
