"""The scales of an fp8 cache that are written beside the measured model are those that are checked and served."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from engine import checkpoint

from msa_backend.model.checkpoint import check_checkpoint
from msa_backend.model.config import M3Config
from msa_backend.tiny import write_tiny_checkpoint


def test_every_layer_has_scales(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_tiny_checkpoint(tmp_path / "m3", shards=2)
    config = M3Config.from_text_config(json.loads((folder / "config.json").read_text())["text_config"])
    check_checkpoint(folder, config, fp8_cache=True)
    assert "lacks scales of an fp8 KV cache for 4 of 4 layers" in caplog.text
    caplog.clear()
    checkpoint.add_cache_scales(folder, config.num_layers)
    with caplog.at_level(logging.WARNING):
        check_checkpoint(folder, config, fp8_cache=True)
    assert not caplog.text
