"""How much a process grows, in one of its own: memory that this one has once held would hide it."""

from __future__ import annotations

import subprocess
import sys

import pytest

measured = pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux alone")


def growth(script: str) -> int:
    """Bytes that ``script`` says it grew by: the difference of two ``ru_maxrss``, which it prints."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout) * 1024
