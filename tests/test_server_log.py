"""tests/server.py: what a server printed is in its log, whether it started or not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from .server import running

SERVER = """\
import http.server, sys
print("begins", flush=True)
if "--die" in sys.argv:
    sys.exit("dies")

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"fine")

http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def test_a_log_is_kept(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    with running([sys.executable, "-c", SERVER], [], {}, 30, log) as server:
        assert server.get("/asked") == "fine"
        assert log.read_text().startswith("begins\n"), "it can be read while the server runs"
    assert '"GET /asked HTTP/1.1" 200' in log.read_text()


@pytest.mark.parametrize("kept", [True, False])
def test_why_it_did_not_start(tmp_path: Path, kept: bool) -> None:
    log = tmp_path / "server.log" if kept else None
    with (
        pytest.raises(RuntimeError, match="^begins\ndies\n$"),
        running([sys.executable, "-c", SERVER], ["--die"], {}, 30, log),
    ):
        pass
    assert log is None or log.read_text() == "begins\ndies\n"
