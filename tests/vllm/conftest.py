"""What the engine tests share: checkpoints in every form, and the truth to compare with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .. import oracle


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of ``tiny`` in ``transformers``' own form."""
    from msa_backend.tiny import write_tiny_checkpoint

    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "native", form="transformers")


@pytest.fixture(scope="session")
def default(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of ``tiny`` as ``save_pretrained`` writes them unasked, sharded."""
    from msa_backend.tiny import write_tiny_checkpoint

    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "default", form="transformers-default", shards=2)


@pytest.fixture(scope="session")
def truth(tiny: Path) -> Any:
    """``tiny`` as ``transformers`` runs it, fp32."""
    return oracle.load(tiny)
