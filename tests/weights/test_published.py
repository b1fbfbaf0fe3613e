"""DiT's published weights, from a stand-in of the hub and from one of their public address, both on loopback."""

import http.server
import threading
import types

import pytest
import torch
from hub_standin import point_at
from tiny_weights import assert_same, tiny

from dlc.sampling.opening import open_model
from dlc.weights import hub as published
from dlc.weights.hub import published_dit

NAME, REPOSITORY, TINY = "DiT-XL-2-256x256.pt", "facebook/DiT-XL-2-256", ("DiT-Ti/4", 64)


class Server(http.server.ThreadingHTTPServer):
    """Serves one file. cut: bytes after which a connection breaks, or None."""

    def __init__(self, content):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.cut, self.asked = content, None, []
        threading.Thread(target=self.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.asked.append(self.path)
        if self.path != f"/models/{NAME}":
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()
        self.wfile.write(self.server.content[: self.server.cut])


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The address, in a working directory of its own, with a small model in the place of the large one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(published.PUBLISHED, TINY, (REPOSITORY, NAME))
    torch.save(tiny(num_classes=1000).state_dict(), tmp_path / "served.pt")
    server = Server((tmp_path / "served.pt").read_bytes())
    monkeypatch.setattr(published, "ADDRESS", f"http://127.0.0.1:{server.server_address[1]}/models")
    yield server
    server.shutdown()
    server.server_close()


def left():
    return sorted(path.name for path in published.FOLDER.glob("*") if not path.name.endswith(".lock"))


def test_the_hub_then_the_address_then_the_file(server, hub, monkeypatch, tmp_path, capsys):
    """What sample_ddp.py opens without --ckpt and without a run."""
    flags = dict(model=None, ckpt=None, results_dir="results", ema=True, diffusers_time=None, objective=None)
    flags = types.SimpleNamespace(**flags, image_size=64, vae=None)

    def opened():
        path, model, meta = open_model(types.SimpleNamespace(**vars(flags)), "sample_ddp.py", TINY[0])
        assert_same(model, tiny(num_classes=1000))
        return path, meta

    hub.add(REPOSITORY, {"model.pt": server.content})
    assert str(opened()[0]) == REPOSITORY and not server.asked and not published.FOLDER.exists()
    assert "no checkpoint of DiT-Ti/4 under --results-dir results: train one" in capsys.readouterr().out
    hub.repositories.clear()
    point_at(hub.url, monkeypatch, tmp_path / "other_cache")
    published.FOLDER.mkdir()
    (published.FOLDER / f".{NAME}.part.0.partial").write_bytes(b"of a process that was killed")
    asked = []
    for _ in range(2):
        path, meta = opened()
        assert path == published.FOLDER / NAME and meta.weights == "as in the file"
        asked.append(len(hub.requests))
    assert server.asked == [f"/models/{NAME}"] and left() == [NAME] and asked[0] == asked[1]


def test_what_is_not_the_model_is_refused(server, monkeypatch, tmp_path):
    """From a mirror, which is asked in place of the hub: names, shapes and finiteness before the file gets its name."""
    monkeypatch.setenv(published.ADDRESS_VARIABLE, f"{published.ADDRESS}/")
    monkeypatch.setattr(published, "ADDRESS", "http://127.0.0.1:9")
    monkeypatch.setattr(published, "locate", pytest.fail)
    right, content = tiny(num_classes=1000).state_dict(), server.content
    nan = {**right, "pos_embed": right["pos_embed"] * torch.nan}
    for weights, fault in (
        (nan, "has values that are NaN"),
        ({**right, "more": torch.zeros(1)}, "has unknown more"),
        (tiny(num_classes=10).state_dict(), "has other shapes: y_embedder"),
        (None, "cut off or damaged"),
        ("<html>", "cannot be read as weights: it is a web page"),
    ):
        if isinstance(weights, dict):
            torch.save(weights, tmp_path / "served.pt")
            server.content = (tmp_path / "served.pt").read_bytes()
        server.cut = None if weights else 10_000  # a connection that breaks
        server.content = weights.encode() if isinstance(weights, str) else server.content
        with pytest.raises(ValueError, match=f"did not send the weights of DiT-Ti/4 .*{fault}.*put the file at"):
            published_dit(*TINY)
        assert left() == []
    server.content = content
    assert published_dit(*TINY) == published.FOLDER / NAME
    published.PUBLISHED[TINY] = REPOSITORY, "other.pt"
    with pytest.raises(ValueError, match=r"is out of reach \(status 404\): put the file at pretrained_models.other.pt"):
        published_dit(*TINY)


def test_offline(error_of):
    """One line that says where to put the file; a file that is there is taken."""
    error = error_of("sample_ddp")
    assert f"{REPOSITORY}: no such local path" in error and "HF_HUB_OFFLINE is set" in error
    assert f"or put DiT's {NAME} at pretrained_models/{NAME}" in error
    assert "DiT-XL-2-512x512.pt" in error_of("sample_ddp", "--image-size", 512)
    assert "no checkpoint of DiT-XL/2" in error_of("sample_ddp", "--image-size", 128)
    assert "no checkpoint of DiT-S/2" in error_of("sample_ddp", "--model", "DiT-S/2")
    published.FOLDER.mkdir(exist_ok=True)
    (published.FOLDER / NAME).write_bytes(b"junk")
    assert f"{NAME} cannot be read as weights" in error_of("sample_ddp")
