"""A server that cannot reach anybody answers, and does not try to reach anybody."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ...engines.drivers.running import EngineServer

ASKED: dict[str, Any] = {"model": EngineServer.MODEL, "messages": [{"role": "user", "content": "Hello"}]}


def test_nobody_is_called(openai: Any, anthropic: Any, calls_out: Path):
    """Not at start-up, and not by requests of either protocol; those of other tests count as well."""
    assert openai.chat.completions.create(**ASKED, max_tokens=3).choices[0].message
    assert anthropic.messages.create(**ASKED, max_tokens=3).content
    assert calls_out.read_text() == ""


@pytest.mark.parametrize(
    "call",
    [
        "socket.create_connection(('192.0.2.1', 80), timeout=1)",
        "urllib.request.urlopen('http://stats.example/', timeout=1)",
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'', ('192.0.2.1', 9))",
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.connect(('192.0.2.1', 9)); s.send(b'')",
    ],
)
def test_a_call_would_be_seen(call: str, calls_out: Path, tmp_path: Path):
    notes = tmp_path / "calls"
    modules = calls_out.parent
    done = subprocess.run(
        [sys.executable, "-c", f"import socket, urllib.request; {call}"],
        env={**os.environ, "PYTHONPATH": str(modules), "MSA_TEST_CALLS": str(notes)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert "shut in" in done.stderr and notes.read_text().strip() in ("192.0.2.1", "stats.example")
