"""Real servers on loopback that fail, cut short or never finish a part of the requests."""

import contextlib
import hashlib
import json
import random
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PASSING = ("error", "cut", "flip")
# Never an answer; more bytes announced than come, on a connection that stays open; a bit now and then.
HANGING = ("silent", "longer", "trickle")


class Faults:
    """Which request fails how; seeded, so that a run can be repeated up to thread timing."""

    def __init__(self, share: float, kinds: tuple[str, ...] = PASSING, seed: int = 0):
        self.share, self.kinds, self.random, self.lock = share, kinds, random.Random(seed), threading.Lock()
        self.requests = self.failed = 0
        self.closed = threading.Event()  # ends the answers that never end

    def draw(self) -> str:
        """'' (fine) or one of the kinds."""
        with self.lock:
            self.requests += 1
            if self.random.random() >= self.share:
                return ""
            self.failed += 1
            return self.random.choice(self.kinds)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder: Path
    faults: Faults
    ranges: bool
    seen: list[str]

    def log_message(self, *args):
        """Quiet."""

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        self.seen.append(self.path)
        path = self.folder / self.asked()
        fault = self.faults.draw()
        if fault == "silent":
            self.faults.closed.wait()
            return
        if fault == "error" or not path.is_file():
            self.send_response(503 if fault else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data, status = path.read_bytes(), 200
        tag = hashlib.md5(data).hexdigest()
        span = self.headers.get("Range")
        if span and self.ranges:
            low, high = span.removeprefix("bytes=").split("-")
            data, status = data[int(low) : int(high) + 1 if high else None], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) + 1000 * (fault == "longer")))
        self.send_header("ETag", f'"{tag}"')
        if self.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if not body:
            return
        if fault == "flip" and len(data) > 600:
            data = data[:600] + bytes([data[600] ^ 1]) + data[601:]
        if fault == "trickle":
            piece = max(1, len(data) // 60)
            for start in range(0, len(data), piece):  # three seconds
                if self.faults.closed.wait(0.05):
                    return
                self.wfile.write(data[start : start + piece])
            return
        self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
        if fault == "cut":
            self.close_connection = True
        if fault == "longer":
            self.faults.closed.wait()

    def asked(self) -> str:
        """Path of the request below the folder."""
        return urllib.parse.unquote(self.path.split("?")[0]).lstrip("/")


class HubHandler(_Handler):
    """What `hf://datasets/me/acts/...` and `gs://bucket/...` ask of their services. Only the bytes of files fail."""

    REPOSITORY = "/api/datasets/me/acts"
    OBJECTS = "/storage/v1/b/bucket/o/"
    FILES: tuple[str, ...] = ("/datasets/me/acts/resolve/main/", "/download" + OBJECTS)

    def do_GET(self):
        path = "/" + super().asked()
        if path == self.REPOSITORY:
            self.describe({"id": "me/acts", "_id": "1", "sha": "0" * 40, "private": False, "tags": [], "siblings": []})
        elif path.startswith(f"{self.REPOSITORY}/tree/main/"):
            folder = path.removeprefix(f"{self.REPOSITORY}/tree/main/")
            self.describe([self.entry(file, folder) for file in sorted((self.folder / folder).iterdir())])
        elif path.startswith(self.OBJECTS) and (self.folder / path.removeprefix(self.OBJECTS)).is_file():
            name = path.removeprefix(self.OBJECTS)
            data, date = (self.folder / name).read_bytes(), "2026-01-01T00:00:00.000Z"
            dates = {"updated": date, "timeCreated": date}
            tag = hashlib.md5(data).hexdigest()
            self.describe({"bucket": "bucket", "name": name, "size": str(len(data)), "etag": tag, **dates})
        else:
            super().do_GET()

    @staticmethod
    def entry(file: Path, folder: str) -> dict[str, object]:
        data = file.read_bytes()
        return {
            "type": "file",
            "path": f"{folder}/{file.name}",
            "size": len(data),
            "oid": hashlib.sha1(data).hexdigest(),
        }

    def describe(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)

    def asked(self) -> str:
        path = "/" + super().asked()
        return next((path.removeprefix(start) for start in self.FILES if path.startswith(start)), path.lstrip("/"))


@contextlib.contextmanager
def http_server(
    folder: Path,
    share: float = 0.0,
    ranges: bool = True,
    kind: type[_Handler] = _Handler,
    faults: tuple[str, ...] = PASSING,
) -> Iterator[tuple[str, Faults, list[str]]]:
    """Serves a folder; yields its URL, the fault counters and the list of requested paths."""
    counters, seen = Faults(share, faults), list[str]()
    handler = type("Handler", (kind,), {"folder": folder, "faults": counters, "ranges": ranges, "seen": seen})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    # A client that hangs up on a server that hangs is no news.
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", counters, seen
    finally:
        counters.closed.set()
        server.shutdown()
        server.server_close()


class FaultyApplication:
    """WSGI middleware: fails or cuts short a share of the GET requests of another application."""

    def __init__(self, application, faults: Faults):
        self.application, self.faults = application, faults

    def __call__(self, environ, start_response):
        fault = self.faults.draw() if environ["REQUEST_METHOD"] == "GET" else ""
        if fault == "error":
            start_response("500 Internal Server Error", [("Content-Length", "0")])
            return [b""]
        body = self.application(environ, start_response)
        if fault == "cut":
            return self.half(body)
        return body

    @staticmethod
    def half(body) -> Iterator[bytes]:
        data = b"".join(body)
        yield data[: len(data) // 2]


@contextlib.contextmanager
def s3_server(share: float = 0.0) -> Iterator[tuple[str, Faults]]:
    """moto's S3 server behind the middleware; yields its URL. Faults begin when `faults.share` is set."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    faults = Faults(share)
    application = FaultyApplication(DomainDispatcherApplication(create_backend_app), faults)
    server = make_server("127.0.0.1", 0, application, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", faults
    finally:
        server.shutdown()
