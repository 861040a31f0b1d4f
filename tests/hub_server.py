"""A small hub on loopback that speaks the routes that huggingface_hub asks, and faults that it can show."""

import base64
import contextlib
import functools
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants, file_download
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars


class Hub(ThreadingHTTPServer):
    """Repositories of files by revision, what was asked for, and faults to show."""

    daemon_threads = False  # joined when the server closes

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.asked: list[tuple[str, str, str | None]] = []  # method, path, Range
        self.tokens: set[str | None] = set()
        self.refusal: tuple[int, dict[str, str]] | None = None
        self.refused_paths = re.compile(".*")
        self.cuts: dict[str, list[str]] = {}  # file -> how its next transfers break: "closed", "reset"
        self.large: dict[str, bytes] = {}  # SHA-256 -> what was put there
        self.private: set[str] = set()
        self.commits: list[str] = []  # messages

    def bodies(self) -> set[str]:
        return {path.split("/resolve/")[1].partition("/")[2] for method, path, _ in self.asked if is_body(method, path)}

    def refuse(self, status: int, paths: str = ".*", **headers: str) -> None:
        self.refusal = (status, {name.replace("_", "-"): value for name, value in headers.items()})
        self.refused_paths = re.compile(paths)


def is_body(method: str, path: str) -> bool:
    return method == "GET" and "/resolve/" in path


@functools.lru_cache
def digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def commit(files: dict[str, bytes]) -> str:
    return digest(repr(sorted((name, digest(content)) for name, content in files.items())).encode())


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if self.refused(path):
            return
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            if (files := self.find(match[1], match[2] or "main")) is not None:
                siblings = [{"rfilename": name} for name in files]
                self.reply_json({"id": match[1], "sha": commit(files), "siblings": siblings})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            if (files := self.find(match[1], match[2])) is not None:
                self.reply_json([{"type": "file", "path": n, "size": len(b), "oid": n} for n, b in files.items()])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if (files := self.find(match[1], match[2])) is not None:
                self.reply_file(match[3], files)
        else:
            self.reply(404, b"", {})

    def do_POST(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self.read_body()
        if self.refused(path):
            return
        repos = self.server.repos
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            if repo in repos:
                self.reply_json({"url": f"{self.server.endpoint}/{repo}"}, 409)
                return
            repos[repo] = {"main": {}}
            if asked.get("visibility") == "private":
                self.server.private.add(repo)
            self.reply_json({"url": f"{self.server.endpoint}/{repo}"})
        elif path == "/api/validate-yaml":
            self.reply_json({"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", path):
            known = match[2] in repos[match[1]]
            repos[match[1]].setdefault(match[2], dict(repos[match[1]]["main"]))
            self.reply_json({}, 409 if known else 201)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", path):
            if self.find(match[1], match[2]) is not None:
                names = [file["path"] for file in json.loads(body)["files"]]
                modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
                files = [{"path": n, "uploadMode": mode, "shouldIgnore": False} for n, mode in modes.items()]
                self.reply_json({"files": files})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for part in objects:
                part["actions"] = {"upload": {"href": f"{self.server.endpoint}/large/{part['oid']}"}}
            self.reply_json({"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            files = repos[match[1]][match[2]]
            for line in map(json.loads, body.splitlines()):
                match line["key"], line["value"]:
                    case "header", value:
                        self.server.commits.append(value["summary"])
                    case "file", value:
                        files[value["path"]] = base64.b64decode(value["content"])
                    case "lfsFile", value:
                        files[value["path"]] = self.server.large[value["oid"]]
            oid = commit(files)
            self.reply_json({"commitUrl": f"{self.server.endpoint}/{match[1]}/commit/{oid}", "commitOid": oid})
        else:
            self.reply(404, b"", {})

    def do_PUT(self) -> None:
        path, body = urlsplit(self.path).path, self.read_body()
        if not self.refused(path):
            self.server.large[hashlib.sha256(body).hexdigest()] = body
            self.reply(200, b"", {})

    def read_body(self) -> bytes:
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def refused(self, path: str) -> bool:
        """Writes down what was asked; whether the answer was a refusal."""
        self.server.asked.append((self.command, path, self.headers["Range"]))
        self.server.tokens.add(self.headers["Authorization"])
        if self.server.refusal and self.server.refused_paths.fullmatch(path):
            status, headers = self.server.refusal
            self.reply(status, b"", headers)
            return True
        return False

    def find(self, repo: str, revision: str) -> dict[str, bytes] | None:
        revisions = self.server.repos.get(repo)
        if revisions is None:
            self.reply(404, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
            return None
        for name, files in revisions.items():
            if revision in (name, commit(files)):
                return files
        self.reply(404, b"", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev id: {revision}"})
        return None

    def reply_json(self, content: object, status: int = 200) -> None:
        self.reply(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def reply_file(self, name: str, files: dict[str, bytes]) -> None:
        if name not in files:
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Error-Message": f"Entry not found: {name}"})
            return
        body = files[name]
        headers = {"ETag": f'"{digest(body)}"', "X-Repo-Commit": commit(files)}
        start = int(match[1]) if (match := re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")) else None
        if start is not None:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            self.reply(206, body[start:], headers)
        elif self.command == "GET" and (cuts := self.server.cuts.get(name)):
            self.reply(200, body, headers, cut=cuts.pop(0))
        else:
            self.reply(200, body, headers)

    def reply(self, status: int, body: bytes, headers: dict[str, str], cut: str | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut == "reset":  # closing without lingering sends RST instead of FIN
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def log_message(self, format: str, *args: object) -> None:
        """Keeps quiet."""


@contextlib.contextmanager
def serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A running hub, and huggingface_hub pointed at it with an empty cache and no login."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_FILE", "UNCLIP_JAX_NO_MIRRORS"):
        monkeypatch.delenv(name, raising=False)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between attempts
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "stored_tokens"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        disable_progress_bars()
        huggingface_hub.close_session()
        try:
            yield server
        finally:
            enable_progress_bars()
            huggingface_hub.close_session()
            server.shutdown()
            thread.join()
