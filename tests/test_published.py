"""DiT's published weights, fetched from a stand-in of their address on loopback."""

import http.server
import re
import threading
import types

import pytest
import torch
from test_layouts import assert_same, tiny

from dlc.sampling.command import open_model
from dlc.weights import download, published

NAME = "DiT-XL-2-256x256.pt"


class Server(http.server.ThreadingHTTPServer):
    """Serves one file. cut: bytes after which a connection breaks, or None; ranges: whether parts can be asked for."""

    def __init__(self, content):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.cut, self.ranges, self.version, self.asked = content, None, True, '"1"', []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/models"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.asked.append((self.path, asked))
        if self.path != f"/models/{NAME}":
            return self.send_error(404)
        start = 0
        if asked and server.ranges and self.headers.get("If-Range", server.version) == server.version:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            if start >= len(server.content):
                return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(server.content) - start))
        if server.version:
            self.send_header("ETag", server.version)
        self.end_headers()
        self.wfile.write(server.content[start:][: server.cut])


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The stand-in, in a working directory of its own, with a small model in the place of the large one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(published, "PUBLISHED", {NAME: ("DiT-Ti/4", 64)})
    monkeypatch.setattr(download, "CHUNK", 2**16)
    torch.save(tiny(num_classes=1000).state_dict(), tmp_path / "served.pt")
    server = Server((tmp_path / "served.pt").read_bytes())
    monkeypatch.setenv(published.ADDRESS_VARIABLE, server.url)
    yield server
    server.shutdown()
    server.server_close()


def left():
    return sorted(path.name for path in published.FOLDER.glob("*") if not path.name.startswith(".lock"))


def arguments(**values):
    """The flags of sample_ddp.py that the choice of weights depends on."""
    flags = dict(model=None, ckpt=None, results_dir="results", ema=True, diffusers_time=None, image_size=64, vae=None)
    return types.SimpleNamespace(**{**flags, **values})


def test_fetched_whole_and_once(server, tmp_path, capsys):
    """sample_ddp.py without --ckpt and without a run: the published weights, which are then there."""
    for _ in range(2):
        path, model, meta = open_model(arguments(), "sample_ddp.py", "DiT-Ti/4")
        assert_same(model, tiny(num_classes=1000))
        assert path == published.FOLDER / NAME and meta.weights == "as in the file"
        assert "no checkpoint of DiT-Ti/4 under --results-dir results: train one" in capsys.readouterr().out
    assert server.asked == [(f"/models/{NAME}", None)] and left() == [NAME]
    assert path.read_bytes() == server.content


def test_a_download_that_is_cut_off_continues(server):
    """Within one command as long as something arrives, then by the same command; the file is whole or not there."""
    server.cut = len(server.content) // 10
    with pytest.raises(ValueError, match="the connection was cut off after .* are kept: run the same command again"):
        published.published_weights(NAME)
    kept = 4 * server.cut
    assert left() == [f".{NAME}.part", f".{NAME}.part.version"] and len(server.asked) == download.TRIES
    assert server.asked[1:] == [(f"/models/{NAME}", f"bytes={number * server.cut}-") for number in (1, 2, 3)]
    server.cut = None
    path = published.published_weights(NAME)
    assert server.asked[4:] == [(f"/models/{NAME}", f"bytes={kept}-")]
    assert path.read_bytes() == server.content and left() == [NAME]


@pytest.mark.parametrize("changed", ["version", "no ranges", "too long"])
def test_a_part_of_another_file_is_begun_anew(server, changed):
    published.FOLDER.mkdir()
    part = published.FOLDER / f".{NAME}.part"
    part.write_bytes(b"x" * (10**8 if changed == "too long" else 1000))
    download.validator_of(part).write_text('"0"' if changed == "version" else server.version)
    server.ranges = changed != "no ranges"
    assert published.published_weights(NAME).read_bytes() == server.content and left() == [NAME]


def test_what_is_not_the_model_is_refused(server, tmp_path):
    """Names, shapes and finiteness are compared before the file gets its name."""
    right = tiny(num_classes=1000).state_dict()
    nan = {**right, "pos_embed": right["pos_embed"] * torch.nan}
    for weights, fault in (
        (nan, "has values that are NaN"),
        ({**right, "more": torch.zeros(1)}, "has unknown more"),
        (tiny(num_classes=10).state_dict(), "has other shapes: y_embedder"),
    ):
        torch.save(weights, tmp_path / "served.pt")
        server.content = (tmp_path / "served.pt").read_bytes()
        with pytest.raises(ValueError, match=f"did not send the weights of DiT-Ti/4 .*{fault}.*: nothing is kept"):
            published.published_weights(NAME)
        assert f".{NAME}.part" not in left()
    server.content = b"<html>sign in</html>"
    with pytest.raises(ValueError, match="did not send the weights"):
        published.published_weights(NAME)
    with pytest.raises(ValueError, match=r"is out of reach \(status 404\): put the file at pretrained_models.other.pt"):
        published.PUBLISHED["other.pt"] = published.PUBLISHED[NAME]
        published.published_weights("other.pt")


def test_offline(monkeypatch, error_of):
    """One line that says where to put the file; a file that is there is taken."""
    error = error_of("sample_ddp")
    assert f"put the file at pretrained_models/{NAME}, or name weights with --ckpt" in error
    assert "HF_HUB_OFFLINE is set" in error and f"{published.ADDRESS}/{NAME}" in error
    assert "DiT-XL-2-512x512.pt" in error_of("sample_ddp", "--image-size", 512)
    assert "no checkpoint of DiT-XL/2" in error_of("sample_ddp", "--image-size", 128)
    assert "no checkpoint of DiT-S/2" in error_of("sample_ddp", "--model", "DiT-S/2")
    monkeypatch.setenv(published.ADDRESS_VARIABLE, "http://127.0.0.1:9")
    assert f"put the file at pretrained_models/{NAME}" in error_of("sample_ddp")
    published.FOLDER.mkdir(exist_ok=True)
    (published.FOLDER / NAME).write_bytes(b"junk")
    assert f"{NAME} cannot be read as weights" in error_of("sample_ddp")
