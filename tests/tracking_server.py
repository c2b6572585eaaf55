"""A real MLflow server on loopback, and a gate in front of it that can be shut or lose answers."""

import os
import select
import socket
import socketserver
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any


def eventually(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait until the condition holds; an AssertionError after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)


def free_port() -> int:
    """A port of loopback that nothing listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """`mlflow server` with a SQLite store in `folder`; the port stays the same over restarts."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, free_port()
        self.store = f"sqlite:///{folder / 'server.db'}"
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Returns when it answers."""
        command = ["server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        stores = ["--backend-store-uri", self.store, "--artifacts-destination", str(self.folder / "files")]
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", *command, *stores],
                stdout=log,
                stderr=log,
                env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                start_new_session=True,
            )
        eventually(self._answers, 120)

    def _answers(self) -> bool:
        assert self._process.poll() is None, (self.folder / "server.log").read_text()[-2000:]
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def kill(self) -> None:
        """SIGKILL to it and its workers."""
        os.killpg(self._process.pid, 9)
        self._process.wait()


class Gate(socketserver.ThreadingTCPServer):
    """Passes connections on to a port. shut: closes them at once; losing: an answer is lost, then it is shut."""

    allow_reuse_address = daemon_threads = True

    def __init__(self, port: int):
        super().__init__(("127.0.0.1", 0), _Passage)
        self.target, self.shut, self.losing, self.refused = port, False, b"", 0
        self.uri = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def lose(self, request: bytes) -> None:
        """Lose the answer to the next request whose head contains `request`; the gate is shut then."""
        self.losing = request


class _Passage(socketserver.BaseRequestHandler):
    server: Gate

    def handle(self) -> None:
        gate = self.server
        if gate.shut:
            gate.refused += 1
            return
        with socket.create_connection(("127.0.0.1", gate.target)) as inner:
            lost = False
            while True:
                ready, _, _ = select.select([self.request, inner], [], [], 0.05)
                if gate.shut:
                    return
                for end in ready:
                    chunk = end.recv(1 << 16)
                    if not chunk:
                        return
                    if end is self.request:
                        lost = lost or bool(gate.losing and gate.losing in chunk)
                        inner.sendall(chunk)
                    elif lost:
                        gate.losing, gate.shut = b"", True
                        return
                    else:
                        self.request.sendall(chunk)


def history(client: Any, run_id: str, key: str) -> Counter[int]:
    """Step -> how often the store has a point of the metric."""
    return Counter(metric.step for metric in client.get_metric_history(run_id, key))
