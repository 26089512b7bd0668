"""tools/serve.py against a stand-in for an engine: what it shows, when it fails, and that it leaves nobody behind.

The stand-in starts a child as an engine starts its workers; the real servers are run by `.ci/run`.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SERVE = Path(__file__).parents[2] / "tools" / "serve.py"

FAKE_ENGINE = """\
import http.server, json, os, subprocess, sys, time

if "--die" in sys.argv:
    sys.exit("the engine could not start")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"])
open("child.pid", "w").write(str(child.pid))
open("command", "w").write(json.dumps(sys.argv[1:]))

class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["stream"] and asked["model"] == "some-model"
        self.send_response(200)
        self.end_headers()
        for text, reason in (("word ", None), ("salad", None), ("", "length"))[: 1 if "--break-off" in sys.argv else 3]:
            event = {"choices": [{"delta": {"content": text}, "finish_reason": reason}]}
            self.wfile.write(f"data: {json.dumps(event)}\\n\\n".encode())
        self.wfile.write(b"data: [DONE]\\n\\n")

port = int(sys.argv[sys.argv.index("--port") + 1])
try:
    http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
except KeyboardInterrupt:
    if "--orphan" not in sys.argv:
        child.kill()
        child.wait()
"""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A Python with the engines' commands beside it, as in an environment."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "python").symlink_to(sys.executable)
    vllm = folder / "vllm"
    vllm.write_text(f"#!{sys.executable}\n{FAKE_ENGINE}")
    vllm.chmod(0o755)
    modules = tmp_path / "modules" / "sglang"
    modules.mkdir(parents=True)
    (modules / "__init__.py").touch()
    (modules / "launch_server.py").write_text(FAKE_ENGINE)
    return folder / "python"


@contextmanager
def running(python: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [python, SERVE, *arguments],
        cwd=python.parents[1],
        env=os.environ | {"PYTHONPATH": str(python.parents[1] / "modules")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def finish(process: subprocess.Popen[str]) -> str:
    return process.communicate(timeout=30)[0]


def child_is_gone(folder: Path) -> bool:
    """Ended, or a zombie that nobody collects because the container has no init."""
    pid = int((folder / "child.pid").read_text())
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize(
    ("engine", "title", "command"),
    [("vllm", "vLLM", ["serve", "some-model"]), ("sglang", "SGLang", ["--model-path", "some-model"])],
)
def test_once_prints_the_answer_and_stops_the_server_and_its_children(
    python: Path, tmp_path: Path, engine: str, title: str, command: list[str]
) -> None:
    with running(python, "--engine", engine, "--once", "some-model") as process:
        shown = finish(process)
    assert process.returncode == 0, shown
    assert f"Starting {title} with some-model" in shown
    assert "word salad" in shown
    given = json.loads((tmp_path / "command").read_text())
    assert given[:2] == command
    # The parsers are vLLM's to load; docs/calling-m3.md has the flags.
    assert ("msa_minimax_m3" in given) == (engine == "vllm")
    assert child_is_gone(tmp_path)


def test_children_that_the_server_leaves_behind_are_ended(python: Path, tmp_path: Path) -> None:
    with running(python, "--once", "some-model", "--", "--orphan") as process:
        finish(process)
    assert process.returncode == 0
    assert child_is_gone(tmp_path)


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_serves_until_it_is_told_to_stop(python: Path, tmp_path: Path, signal_number: signal.Signals) -> None:
    with running(python, "some-model") as process:
        assert process.stdout
        shown = iter(process.stdout.readline, "")
        assert any("curl http://127.0.0.1:" in line for line in shown)
        assert any("Ctrl-C" in line for line in shown)
        assert process.poll() is None
        process.send_signal(signal_number)
        finish(process)
    assert process.returncode == 0
    assert child_is_gone(tmp_path)


def test_a_server_that_dies_is_reported_at_once_with_its_log(python: Path) -> None:
    started = time.monotonic()
    with running(python, "--once", "some-model", "--", "--die") as process:
        shown = finish(process)
    assert process.returncode == 1
    assert "the engine could not start" in shown
    assert "status 1" in shown
    # It would otherwise be waited for until the start-up limit, minutes later.
    assert time.monotonic() - started < 60


def test_an_answer_without_an_end_fails(python: Path, tmp_path: Path) -> None:
    with running(python, "--once", "some-model", "--", "--break-off") as process:
        shown = finish(process)
    assert process.returncode == 1
    assert "without an end" in shown
    assert child_is_gone(tmp_path)


def test_a_taken_port_is_passed_over(python: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with running(python, "--once", "--port", str(port), "some-model") as process:
            shown = finish(process)
    assert process.returncode == 0, shown
    assert f"Port {port} is taken" in shown
