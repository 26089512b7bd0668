"""One server for the official clients, whose answers are scripted."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from msa_backend.names import PARSER_NAME
from msa_backend.vllm import limits

from ...engines.drivers import DRIVER
from ...engines.drivers.running import EngineServer

FLAGS = {
    "reasoning_parser": PARSER_NAME,
    "tool_call_parser": PARSER_NAME,
    "enable_auto_tool_choice": True,
    "middleware": [
        "msa_backend.vllm.thinking.ThinkingMode",
        "msa_backend.vllm.request_limit.RequestLimit",
        "msa_backend.vllm.anthropic_errors.AnthropicErrors",
    ],
    "logits_processors": "scripted:Script",
}


@pytest.fixture(scope="package")
def calls_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where it is noted whom the server tried to reach; beside the modules that are put into its processes."""
    # A folder of its own: beside this file are modules with the names of packages.
    folder = tmp_path_factory.mktemp("modules")
    shutil.copy(Path(__file__).with_name("scripted.py"), folder)
    shutil.copy(Path(__file__).with_name("shut_in.py"), folder / "sitecustomize.py")
    notes = folder / "calls"
    notes.touch()
    return notes


@pytest.fixture(scope="package")
def server(tiny: Path, calls_out: Path) -> Iterator[EngineServer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(calls_out.parent), prepend=":")
        patch.setenv("MSA_TEST_CALLS", str(calls_out))
        patch.setenv(limits.REQUEST, "1")
        with DRIVER.server(tiny, context=4096, prefix_caching=True, own=FLAGS) as running:
            yield running


@pytest.fixture(scope="package")
def script(tiny: Path) -> Callable[[str], dict[str, Any]]:
    """Extra fields of a request whose answer is to be a text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny, local_files_only=True)

    def scripted(text: str) -> dict[str, Any]:
        return {"vllm_xargs": {"script": [*tokenizer.encode(text), tokenizer.eos_token_id]}}

    return scripted


@pytest.fixture(scope="package")
def openai(server: EngineServer) -> Any:
    from openai import OpenAI

    return OpenAI(base_url=f"{server.http.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="package")
def anthropic(server: EngineServer) -> Any:
    from anthropic import Anthropic

    return Anthropic(base_url=server.http.url, api_key="none", max_retries=0)
