"""vLLM's own client takes what ``msa-backend bench serve`` asks it."""

from __future__ import annotations

import json
from pathlib import Path

from msa_backend import cli
from msa_backend.bench import serve

from ...engines.drivers.running import EngineServer


def test_a_server(server: EngineServer, tiny: Path, tmp_path: Path):
    out = tmp_path / "out.json"
    words = ["--model", server.MODEL, "--tokenizer", str(tiny), "--lengths", "100,300", "--concurrency", "2"]
    words += ["--output", "4", "--rounds", "1", "--json", str(out)]
    assert cli.main(["bench", "serve", f"ours={server.http.url}", *words]) == 0
    cells = json.loads(out.read_text())["cells"]
    assert [cell["tokens"] for cell in cells] == [100, 300]
    assert all(cell["servers"]["ours"][figure] > 0 for cell in cells for figure in serve.FIGURES)
