"""A Hub on the loopback: the routes that ``huggingface_hub`` uses, real HTTP, and faults that can be switched on.

As on the real one, small files come from the Hub itself with their git blob id as ETag, and large ones
(``*.safetensors`` and ``tokenizer.json``) by a redirect to another host, which must not see the account's token.
"""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_test_token"
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass
class Fault:
    """What happens to requests whose path contains ``path``; ``times`` counts down, None is for ever.

    ``kind``: a status (int), ``cut`` (the connection ends after ``after`` bytes), ``other-bytes``, ``no-range`` (the
    whole file, whatever was asked), ``longer`` (bytes after the end).
    """

    path: str
    kind: int | str
    times: int | None = 1
    after: int = 100
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Repo:
    """Files by commit; ``branches`` name commits. Without the token ``gated`` refuses files, ``private`` everything."""

    commits: dict[str, dict[str, bytes]]
    branches: dict[str, str]
    gated: bool = False
    private: bool = False


@dataclass
class HubServer:
    endpoint: str = ""
    cdn: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, repo_id: str, files: dict[str, bytes], *, branch: str = "main", **flags: bool) -> str:
        """Commit ``files`` to ``branch``; returns the commit."""
        tree = json.dumps({name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())})
        commit = hashlib.sha1(tree.encode()).hexdigest()
        repo = self.repos.setdefault(repo_id, Repo({}, {}, **flags))
        repo.commits[commit], repo.branches[branch] = files, commit
        return commit

    def downloads(self) -> list[str]:
        """Names of files whose bytes were asked for, in order."""
        paths = [path for method, path, _ in list(self.requests) if method == "GET" and "/resolve/" in path]
        return [path.rsplit("/", 1)[1] for path in paths]

    def fault(self, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.path in path and fault.times != 0:
                    fault.times = None if fault.times is None else fault.times - 1
                    return fault
        return None


def is_large(name: str) -> bool:
    return name.endswith(".safetensors") or name == "tokenizer.json"


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def hub_server() -> Iterator[HubServer]:
    hub = HubServer()
    sha256 = functools.cache(lambda data: hashlib.sha256(data).hexdigest())  # large files, listed often
    sha1 = functools.cache(git_sha1)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def do_POST(self) -> None:
            """What ``create_commit`` sends: which way each file goes, then all of them."""
            body = self.rfile.read(int(self.headers["Content-Length"]))
            match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", self.path)
            if match is None or not self.has_token():
                self.refuse(404 if match is None else 401, "", "no such route, or no token")
            elif match[2] == "preupload":
                ways = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in json.loads(body)["files"]
                ]
                self.send(200, {"Content-Type": "application/json"}, json.dumps({"files": ways}).encode())
            else:
                lines = [json.loads(line) for line in body.splitlines()]
                files = [line["value"] for line in lines if line["key"] == "file"]
                repo = hub.repos[match[1]]
                known = repo.commits[repo.branches["main"]]
                commit = hub.add(match[1], known | {f["path"]: base64.b64decode(f["content"]) for f in files})
                told = {"commitUrl": f"{hub.endpoint}/{match[1]}/commit/{commit}", "commitOid": commit}
                self.send(200, {"Content-Type": "application/json"}, json.dumps(told).encode())

        def answer(self) -> None:
            url = urlsplit(self.path)
            path = unquote(url.path)
            with hub.lock:
                hub.requests.append((self.command, path, dict(self.headers)))
            fault = hub.fault(path)
            if fault and isinstance(fault.kind, int):
                self.refuse(fault.kind, "", "by order of the test", fault.headers)
                return
            if path.startswith("/cdn/"):
                self.cdn(path, fault)
                return
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)", path):
                self.listing(*match.groups(), with_blobs="blobs" in parse_qs(url.query))
                return
            if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self.resolve(*match.groups(), fault)
                return
            self.refuse(404, "", "no such route")

        def repo(self, repo_id: str, revision: str) -> tuple[Repo, str] | None:
            repo = hub.repos.get(repo_id)
            if repo is None or (repo.private and not self.has_token()):
                # The real Hub says 401 to strangers, so as not to tell which private models exist.
                self.refuse(404 if self.has_token() else 401, "RepoNotFound", "Repository not found")
                return None
            commit = repo.branches.get(revision, revision)
            if commit not in repo.commits:
                self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
                return None
            return repo, commit

        def listing(self, repo_id: str, kind: str, revision: str, *, with_blobs: bool) -> None:
            found = self.repo(repo_id, revision)
            if found is None:
                return
            repo, commit = found
            entries: list[dict[str, Any]] = []
            for name, data in repo.commits[commit].items():
                lfs = {"size": len(data), "sha256": sha256(data), "pointerSize": 134}
                entry: dict[str, Any] = {"size": len(data)} | ({"lfs": lfs} if is_large(name) else {})
                if kind == "tree":
                    lfs = {"oid": lfs["sha256"], "size": len(data), "pointerSize": 134}
                    entries.append(entry | {"type": "file", "path": name, "oid": sha1(data), "lfs": lfs})
                else:
                    entries.append({"rfilename": name} | (entry | {"blobId": sha1(data)} if with_blobs else {}))
            info = {"_id": "1", "id": repo_id, "modelId": repo_id, "sha": commit, "private": repo.private}
            info |= {"gated": "manual" if repo.gated else False, "tags": [], "downloads": 0, "likes": 0}
            body = entries if kind == "tree" else info | {"siblings": entries}
            self.send(200, {"Content-Type": "application/json"}, json.dumps(body).encode())

        def resolve(self, repo_id: str, revision: str, name: str, fault: Fault | None) -> None:
            found = self.repo(repo_id, revision)
            if found is None:
                return
            repo, commit = found
            if repo.gated and not self.has_token():
                self.refuse(401, "GatedRepo", f"Access to model {repo_id} is restricted.")
                return
            data = repo.commits[commit].get(name)
            if data is None:
                self.refuse(404, "EntryNotFound", "Entry not found")
                return
            headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
            if not is_large(name):
                self.content(data, headers | {"ETag": f'"{git_sha1(data)}"'}, fault)
                return
            etag = sha256(data)
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data)), "ETag": f'"{etag}"'}
            self.send(302, headers | {"Location": f"{hub.cdn}/cdn/{repo_id}/{commit}/{name}"}, b"")

        def cdn(self, path: str, fault: Fault | None) -> None:
            if "Authorization" in self.headers:
                self.refuse(400, "", "Only one auth mechanism allowed")
                return
            _, _, owner, model, commit, name = path.split("/", 5)
            self.content(hub.repos[f"{owner}/{model}"].commits[commit][name], {"Accept-Ranges": "bytes"}, fault)

        def content(self, data: bytes, headers: dict[str, str], fault: Fault | None) -> None:
            kind, start, status = fault.kind if fault else "", 0, 200
            if "ETag" in headers and "gzip" in self.headers.get("Accept-Encoding", ""):  # small files are text
                data, headers["Content-Encoding"] = gzip.compress(data), "gzip"
            match = _RANGE.fullmatch(self.headers.get("Range", ""))
            if match and kind != "no-range":
                start, status = int(match[1]), 206
                end = min(int(match[2] or len(data)), len(data) - 1)
                headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
                data = data[: end + 1]
            body = data[start:]
            if kind == "other-bytes":
                body = body[:-1] + bytes([body[-1] ^ 1])
            if kind == "longer":
                body += b"more"
            self.send(status, headers, body, cut_after=fault.after if fault and kind == "cut" else None)

        def has_token(self) -> bool:
            return self.headers.get("Authorization") == f"Bearer {TOKEN}"

        def refuse(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
            body = json.dumps({"error": message}).encode()
            named = {"X-Error-Code": code} if code else {}
            self.send(
                status, {"Content-Type": "application/json", "X-Error-Message": message} | named | (headers or {}), body
            )

        def send(self, status: int, headers: dict[str, str], body: bytes, *, cut_after: int | None = None) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body if cut_after is None else body[:cut_after])
            if cut_after is not None:
                self.close_connection = True

    servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
    hub.endpoint, hub.cdn = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    threads = [threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()
