"""Fetching a file of weights from a public address: whole and checked, or not there."""

import http.server
import threading

import pytest

from dlc.weights.hub import fetch_file


@pytest.fixture
def server():
    """A file server on this machine: server.content, and after how many bytes it stops. It counts requests."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests += 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(server.content)))
            self.end_headers()
            self.wfile.write(server.content[: server.stops_after])

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.content, server.stops_after, server.requests = bytes(range(256)) * 40, None, 0
    server.url = f"http://127.0.0.1:{server.server_port}/weights.pth"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_what_is_fetched_is_whole_and_passes_the_check(server, tmp_path):
    def check(part):
        if part.read_bytes() != server.content:
            raise ValueError("another file")

    path = tmp_path / "cache/weights.pth"
    server.stops_after = 1000
    with pytest.raises(ValueError, match="another file"):
        fetch_file(server.url, path, check)
    assert not [one for one in path.parent.iterdir() if one.suffix != ".lock"]
    server.stops_after = None
    path.with_name(".weights.pth.part.0.partial").write_bytes(b"of a process that was killed")
    assert fetch_file(server.url, path, check).read_bytes() == server.content and server.requests == 2
    assert fetch_file(server.url, path, check) == path and server.requests == 2  # it is there
    assert [one for one in path.parent.iterdir() if one.suffix != ".lock"] == [path]
    with pytest.raises(ValueError, match="out of reach"):
        fetch_file("http://127.0.0.1:9/nothing", tmp_path / "cache/other.pth", check)
