"""The benchmark of shared scoring runs without a GPU, if to no purpose but this."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "shared_scoring.py"


def test_every_part_is_timed(tmp_path: Path) -> None:
    words = [
        "--device",
        "cpu",
        "--cases",
        "decode:3072,prefill:2560",
        "--ranks",
        "2,8",
        "--json",
        str(tmp_path / "out"),
    ]
    done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out").read_text())
    assert [(row["case"].split(",")[0], row["ranks"]) for row in found["rows"]] == [
        ("decode", 2), ("decode", 8), ("prefill", 2), ("prefill", 8),
    ]  # fmt: skip
    assert all(row[part] > 0 for row in found["rows"] for part in ("alone", "share", "merge"))
    assert len(done.stdout.splitlines()) == 4
