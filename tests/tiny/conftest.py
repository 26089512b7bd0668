from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from msa_backend.tiny import write_tiny_checkpoint
from tests import oracle


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "original")


@pytest.fixture(scope="session")
def model(original: Path) -> Any:
    return oracle.load(original)
