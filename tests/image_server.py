"""A small server of images on loopback, with the faults that servers have."""

import contextlib
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class ImageServer(ThreadingHTTPServer):
    """files: what lies at which path. moved: a path -> where it is instead."""

    daemon_threads = False  # joined when the server closes

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.files: dict[str, bytes] = {}
        self.moved: dict[str, str] = {}
        self.statuses: dict[str, int] = {}
        self.slow: dict[str, str] = {}  # "head" or "body"
        self.endless: set[str] = set()
        self.cut: set[str] = set()
        self.asked: list[str] = []
        self.closing = threading.Event()


class Handler(BaseHTTPRequestHandler):
    server: ImageServer

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.server.asked.append(self.path)
        with contextlib.suppress(ConnectionError):
            if where := self.server.moved.get(path):
                self.send_response(302)
                self.send_header("Location", where)
                self.send_header("Content-Length", "0")
                self.end_headers()
            elif path in self.server.endless:
                self.begin(200, {})
                while not self.server.closing.is_set():
                    self.wfile.write(bytes(1 << 16))
            elif slow := self.server.slow.get(path):
                if slow == "body":
                    self.begin(200, {})
                while not self.server.closing.is_set():
                    self.wfile.write(b"x")
                    self.wfile.flush()
                    time.sleep(0.02)
            elif path in self.server.files:
                body = self.server.files[path]
                self.begin(self.server.statuses.get(path, 200), {"Content-Length": str(len(body))})
                self.wfile.write(body[: len(body) // 2] if path in self.server.cut else body)
            else:
                self.begin(self.server.statuses.get(path, 404), {"Content-Length": "0"})

    def begin(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Keeps quiet."""


@contextlib.contextmanager
def serving() -> Iterator[ImageServer]:
    with ImageServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.closing.set()
            server.shutdown()
            thread.join()
