"""A stand-in for the Hugging Face hub: an HTTP server on loopback that serves the parts of its API that downloads use.

    with Hub() as hub:
        hub.add("owner/name", {"config.json": b"{}"})
        …                                                          # a client with HF_ENDPOINT=hub.url

It knows branches and commits, tokens, gated repositories, ranges of files, and connections that break.
"""

import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse


class Hub:
    """broken: the number of bytes of a file, by path, after which each connection is cut."""

    def __init__(self):
        self.repositories, self.requests, self.broken, self.token = {}, [], {}, None

    def add(self, name, files, revision="main", kind="model", access="open"):
        """Put files, a dict of bytes by path, on a revision of a repository; access: open, gated or private.

        Gives the commit.
        """
        commit = hashlib.sha1(repr((name, revision, sorted(files))).encode() + b"".join(files.values())).hexdigest()
        repository = self.repositories.setdefault((f"{kind}s", name), {})
        repository.update({revision: (commit, files, access), commit: (commit, files, access)})
        return commit

    def __enter__(self):
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self):
                hub.answer(self, body=False)

            def do_GET(self):
                hub.answer(self, body=True)

            def do_POST(self):
                content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                hub.answer(self, body=True, asked=urllib.parse.parse_qs(content.decode()))

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request, body, asked=None):
        url = urllib.parse.urlsplit(request.path)
        self.requests.append((request.command, url.path, request.headers.get("Range")))
        parts = [urllib.parse.unquote(part) for part in url.path.strip("/").split("/")]
        with contextlib.suppress(ConnectionError):
            if parts[0] == "api":
                kind, name, what = parts[1], "/".join(parts[2:4]), parts[4:]
                revision = what[1] if len(what) > 1 else "main"
            else:
                kind = parts.pop(0) if parts[0] == "datasets" else "models"
                name, what, revision = "/".join(parts[:2]), ["resolve", *parts[3:]], parts[3]
            found = self.repositories.get((kind, name))
            if found is None:
                return self.refuse(request, 401, "RepoNotFound")
            commit, files, access = found.get(revision) or (None, None, next(iter(found.values()))[2])
            authorized = self.token and request.headers.get("Authorization") == f"Bearer {self.token}"
            if access == "private" and not authorized:
                return self.refuse(request, 401, "RepoNotFound")
            if commit is None:
                return self.refuse(request, 404, "RevisionNotFound")
            if what[:1] == ["resolve"]:
                if access == "gated" and not authorized:
                    return self.refuse(request, 403, "GatedRepo")
                return self.send_file(request, "/".join(what[2:]), files, commit, body)
            entries = [dict(path=path, size=len(content), oid=digest(content)) for path, content in files.items()]
            if what[:1] == ["tree"]:
                recursive = urllib.parse.parse_qs(url.query).get("recursive", [""])[0].lower() == "true"
                return self.send_json(request, list(tree_of(entries, "/".join(what[2:]), recursive)))
            if what[:1] == ["paths-info"]:
                wanted = [entry for entry in entries if entry["path"] in asked.get("paths", [])]
                return self.send_json(request, [dict(entry, type="file") for entry in wanted])
            siblings = [dict(rfilename=entry["path"], size=entry["size"], blobId=entry["oid"]) for entry in entries]
            self.send_json(request, dict(id=name, sha=commit, siblings=siblings, private=False, tags=[], downloads=0))

    def send_file(self, request, path, files, commit, body):
        if path not in files:
            return self.refuse(request, 404, "EntryNotFound", commit)
        content, start = files[path], 0
        if body and request.headers.get("Range"):
            start, _, end = request.headers["Range"].removeprefix("bytes=").partition("-")
            start = int(start)
            content = content[: int(end) + 1] if end else content
        headers = {"ETag": f'"{digest(files[path])}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        headers["Content-Length"] = len(content) - start
        part = start or len(content) < len(files[path])
        if part:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(files[path])}"
        after = self.broken.get(path) if body else 0
        reply(request, 206 if part else 200, headers, content[start:][:after])
        request.close_connection |= body and after is not None  # with fewer bytes than promised

    def send_json(self, request, value):
        reply(request, 200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def refuse(self, request, status, code, commit=""):
        reply(request, status, {"X-Error-Code": code, "X-Error-Message": code, "X-Repo-Commit": commit})


def reply(request, status, headers, content=b""):
    request.send_response(status)
    for name, value in {"Content-Length": len(content), **headers}.items():
        request.send_header(name, str(value))
    request.end_headers()
    request.wfile.write(content)


def digest(content):
    return hashlib.sha1(content).hexdigest()


def tree_of(entries, folder, recursive):
    """What the hub lists of a folder: its files, and its folders; recursive: and what is in these."""
    seen = set()
    for entry in entries:
        if folder and not entry["path"].startswith(f"{folder}/"):
            continue
        inner = entry["path"][len(folder) + 1 if folder else 0 :].split("/")
        for depth in range(1, len(inner) if recursive else min(2, len(inner))):
            path = "/".join(([folder] if folder else []) + inner[:depth])
            if path not in seen:
                seen.add(path)
                yield dict(type="directory", path=path, oid=digest(path.encode()), size=0)
        if recursive or len(inner) == 1:
            yield dict(entry, type="file")


def point_at(url, monkeypatch, cache, offline=False):
    """Let huggingface_hub, which reads the environment at its import, use another hub and cache, as a new process."""
    from huggingface_hub import constants

    from dlc.weights.hub import fetched

    values = dict(ENDPOINT=url, HF_HUB_CACHE=str(cache), HF_HUB_OFFLINE=offline)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in dict(values, HUGGINGFACE_CO_URL_TEMPLATE=template).items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    fetched.cache_clear()
