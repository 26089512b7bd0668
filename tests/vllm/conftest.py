"""What the engine tests share: checkpoints in every form, and the truth to compare with."""

from __future__ import annotations

import json
import shutil
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
def text_only(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text half of ``tiny`` as a checkpoint of its own: ``MiniMaxM3SparseForCausalLM``, original form."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("tiny") / "text-only"
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors*", "config.json"))
    weights = {name: tensor for shard in tiny.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    text = {name.removeprefix("language_model."): weights[name] for name in weights if "language_model." in name}
    save_file(text, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((tiny / "config.json").read_text())["text_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def truth(tiny: Path) -> Any:
    """``tiny`` as ``transformers`` runs it, fp32."""
    return oracle.load(tiny)
