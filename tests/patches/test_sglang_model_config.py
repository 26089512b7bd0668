"""patches/sglang_model_config.py: what the start-up step recorded is in the config that SGLang goes on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("sglang")


def resolved(model: Path, **options: Any) -> Any:
    """The options of a server after everything that happens to them before it starts a process."""
    from sglang.srt.server_args import ServerArgs

    server_args = ServerArgs(model_path=str(model), device="cpu", max_total_tokens=8192, **options)
    server_args.resolve_once()
    return server_args


def test_the_recorded_config_is_read(tiny: Path) -> None:
    from sglang.srt.arg_groups.model_override_base import model_config_of

    from msa_backend.sglang.model_config import recorded

    assert recorded(model_config_of(resolved(tiny)).hf_config).msa.block_size == 128


def test_other_models_are_read_once(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.configs.model_config import ModelConfig

    read = []
    original = ModelConfig.from_server_args
    monkeypatch.setattr(
        ModelConfig, "from_server_args", lambda *args, **kwargs: read.append(1) or original(*args, **kwargs)
    )
    resolved(llama, attention_backend="torch_native", skip_tokenizer_init=True)
    assert len(read) == 1


def test_start_up_sees_that_it_did_not_take(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.arg_groups import resolution_hooks

    from msa_backend.config import MSAError

    monkeypatch.setattr(resolution_hooks, "_HOOKS", {})
    with pytest.raises(MSAError, match=r"\(the patch sglang_model_config is not applied\).*MSA_DISABLE=1"):
        resolved(tiny)
