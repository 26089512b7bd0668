"""An engine's server process for tests, and HTTP requests to it with the standard library."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
START_LIMIT = 180
REQUEST_LIMIT = 300


class Server:
    """Requests to a running server."""

    def __init__(self, url: str) -> None:
        self.url = url

    def is_healthy(self) -> bool:
        try:
            self.get("/health")
        except OSError:
            return False
        return True

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=REQUEST_LIMIT) as reply:
            return reply.read().decode()

    def post(self, path: str, body: dict[str, Any], parse: bool = True) -> Any:
        with self._open(path, body) as reply:
            text = reply.read().decode()
        return json.loads(text) if parse else text

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a streamed answer; closing the iterator hangs up."""
        with self._open(path, body | {"stream": True}) as reply:
            for line in reply:
                name, _, data = line.decode().strip().partition(":")
                if name == "data" and data.strip() != "[DONE]":
                    yield json.loads(data)

    def metric(self, name: str) -> float:
        """The sum of a gauge over its labels."""
        found = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", self.get("/metrics"), re.MULTILINE)
        return sum(map(float, found))

    def _open(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        return urllib.request.urlopen(request, timeout=REQUEST_LIMIT)


@contextlib.contextmanager
def running(
    command: Sequence[str | Path],
    flags: Sequence[str],
    environment: Mapping[str, str],
    limit: float = START_LIMIT,
    log_file: Path | None = None,
) -> Iterator[Server]:
    """A server until it is healthy; stopped, with its children, at the end.

    Args:
        command: what starts it.
        flags: what follows host and port.
        environment: variables beside those of this process.
        limit: seconds it may take to get healthy.
        log_file: to keep what it prints; None keeps nothing.

    Raises:
        RuntimeError: it ended, or was not healthy in time; the message is what it printed.
    """
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    with log_file.open("w+") if log_file else tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, "--host", HOST, "--port", str(port), *flags],
            env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            server = Server(f"http://{HOST}:{port}")
            deadline = time.monotonic() + limit
            while not server.is_healthy():
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(log.read())
                time.sleep(0.3)
            yield server
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
