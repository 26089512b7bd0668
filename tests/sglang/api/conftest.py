"""One server of SGLang's, with its own parsers for M3, whose answers are scripted."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from ...engines.drivers import DRIVER
from ...engines.drivers.running import EngineServer

FLAGS = {
    "reasoning_parser": "minimax-m3",
    "tool_call_parser": "minimax-m3",
    "enable_cache_report": True,
    "enable_custom_logit_processor": True,
    # Else the processor runs before it can know which token was said last.
    "disable_overlap_schedule": True,
}
PLUGIN = "[sglang.srt.plugins]\nscripts = sglang_script:answer_messages\n"


@pytest.fixture(scope="package")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """What makes a model say a script, as a field of a request; the server finds it by its module's name."""
    folder = tmp_path_factory.mktemp("modules")
    shutil.copy(Path(__file__).with_name("sglang_script.py"), folder)
    installed = folder / "sglang_script-1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang_script\nVersion: 1\n")
    (installed / "entry_points.txt").write_text(PLUGIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", str(folder), prepend=":")
        yield import_module("sglang_script").Script.to_str()


@pytest.fixture(scope="package")
def server(tiny: Path, processor: str) -> Iterator[EngineServer]:
    with DRIVER.server(tiny, context=4096, prefix_caching=True, own=FLAGS) as running:
        yield running


@pytest.fixture(scope="package")
def script(tiny: Path, processor: str) -> Callable[[str], dict[str, Any]]:
    """Extra fields of a request whose answer is to be a text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny, local_files_only=True)

    def scripted(text: str) -> dict[str, Any]:
        tokens = [*tokenizer.encode(text), tokenizer.eos_token_id]
        return {"custom_logit_processor": processor, "custom_params": {"script": tokens}}

    return scripted


@pytest.fixture(scope="package")
def openai(server: EngineServer) -> Any:
    from openai import OpenAI

    return OpenAI(base_url=f"{server.http.url}/v1", api_key="none", max_retries=0)
