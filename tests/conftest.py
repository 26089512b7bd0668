"""What every test folder shares: how much of the machine a test may take, the checkpoints, and the truth about them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from . import balance
from .device import DTYPE

# Each engine has an environment of its own.
ENGINES = {"vllm", "sglang"}
MISSING = {engine for engine in ENGINES if not find_spec(engine)}
collect_ignore = [*MISSING, "engines"] if MISSING == ENGINES else [*MISSING]


def pytest_configure() -> None:
    """Keep to one core where a test process runs beside others.

    The tensors of a tiny model are too small to share. Threads of two processes on the same cores wait for each
    other at every operation, which costs ten times what it could gain.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker:
        cores = sorted(os.sched_getaffinity(0))
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(cores[int(worker.removeprefix("gw")) % len(cores)]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: balance.place(item.nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    return balance.scheduler(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint as MiniMax publishes: original form, several shards; fp32 on a CPU."""
    from msa_backend.tiny import write_tiny_checkpoint

    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "original", shards=3, dtype=DTYPE)


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of ``tiny`` in ``transformers``' own form."""
    from msa_backend.tiny import write_tiny_checkpoint

    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "native", form="transformers", dtype=DTYPE)


@pytest.fixture(scope="session")
def default(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of ``tiny`` as ``save_pretrained`` writes them unasked, sharded."""
    from msa_backend.tiny import write_tiny_checkpoint

    folder = tmp_path_factory.mktemp("tiny") / "default"
    return write_tiny_checkpoint(folder, form="transformers-default", shards=2, dtype=DTYPE)


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
    from . import oracle

    return oracle.load(tiny)


@pytest.fixture
def edited(tiny: Path, tmp_path: Path) -> Callable[..., Path]:
    """The tiny checkpoint with changes to the text section of its config.json."""

    def edit(change: Callable[[dict[str, Any]], None]) -> Path:
        shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
        config = json.loads((tmp_path / "config.json").read_text())
        change(config["text_config"])
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return edit


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has no MSA layers."""
    folder = tmp_path_factory.mktemp("llama")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | sizes | heads
    (folder / "config.json").write_text(json.dumps(config))
    return folder
