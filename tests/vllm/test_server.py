"""The command a user runs: ``vllm serve --attention-backend msa``, over HTTP, under load and under abuse."""

from __future__ import annotations

import json
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ..compare import Answer, PromptIds, assert_same, assert_true
from ..oracle import random_prompt
from ..server import Server
from .engines import started

MODEL = "m3"

# What a client sees while others compete depends on who gets a core: with a second engine busy beside it on two
# cores, a request was seen to wait until a stream that it was to interrupt had ended.
pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[Server]:
    """Chunks of 512 tokens, and blocks for 12,288 tokens: less than 50 requests want at once."""
    flags = ["--attention-backend", "msa", "--language-model-only", "--served-model-name", MODEL]
    flags += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "4096"]
    flags += ["--max-num-batched-tokens", "512", "--num-gpu-blocks-override", "96"]
    with started(tiny, flags) as running:
        yield running


def complete(server: Server, prompt: PromptIds, max_tokens: int) -> Answer:
    """The greedy continuation of token ids."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "return_token_ids": True, "logprobs": 0}
    choice = server.post("/v1/completions", sampling(body))["choices"][0]
    return Answer(choice["token_ids"], choice["logprobs"]["token_logprobs"], [], 0)


def sampling(body: dict[str, Any]) -> dict[str, Any]:
    return {"model": MODEL, "temperature": 0, "ignore_eos": True} | body


def chat(text: str, **more: Any) -> dict[str, Any]:
    return sampling({"messages": [{"role": "user", "content": text}], "max_tokens": 24} | more)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_completion_is_the_oracles(server: Server, truth: Any):
    for length in (1, 130, 1500):
        prompt = random_prompt(length, seed=11)
        assert_true(complete(server, prompt, 16), prompt, truth)


def test_streamed_chat_is_the_whole_chat(server: Server):
    whole = server.post("/v1/chat/completions", chat("What do you see?"))["choices"][0]["message"]["content"]
    streamed = [
        event["choices"][0]["delta"].get("content") or ""
        for event in server.stream("/v1/chat/completions", chat("What do you see?"))
    ]
    assert "".join(streamed) == whole
    assert len(streamed) > 10


def test_fifty_at_once(server: Server):
    """Requests of random lengths, all at once in a cache too small for them, say what each says alone."""
    dice = random.Random(0)
    asked = [(random_prompt(dice.randint(1, 1500), seed=20 + i), dice.randint(1, 24)) for i in range(50)]
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(lambda request: complete(server, *request), asked))
    server.post("/reset_prefix_cache", {}, parse=False)
    for found, request in zip(together, asked, strict=True):
        assert_same(found, complete(server, *request))


def test_a_client_that_hangs_up(server: Server):
    """An aborted stream frees its blocks, and what is served meanwhile and afterwards is untouched."""
    prompt = random_prompt(700, seed=12)
    before = complete(server, prompt, 24)
    said = server.metric("vllm:generation_tokens_total")
    stream = server.stream("/v1/chat/completions", chat("Tell me all.", max_tokens=3000))
    for _ in range(5):
        next(stream)
    wait_until(lambda: server.metric("vllm:num_requests_running") == 1)
    assert_same(complete(server, prompt, 24), before)
    stream.close()
    wait_until(lambda: server.metric("vllm:num_requests_running") == 0)
    assert server.metric("vllm:kv_cache_usage_perc") == 0
    assert server.metric("vllm:generation_tokens_total") - said < 3000
    assert_same(complete(server, prompt, 24), before)


def test_an_image_is_refused_and_the_server_lives(server: Server):
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    body = sampling({"messages": [{"role": "user", "content": [image]}], "max_tokens": 4})
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.post("/v1/chat/completions", body)
    assert refused.value.code == 400
    assert "multimodal" in json.loads(refused.value.read())["error"]["message"]
    assert complete(server, [300], 1).tokens


def test_a_refusal_ends_the_command(tmp_path: Path, tiny: Path):
    """Not only the option parser: the command itself stops, soon, with the sentence as its last line."""
    (tmp_path / "config.json").write_text((tiny / "config.json").read_text())
    with pytest.raises(RuntimeError) as ended, started(tmp_path, ["--attention-backend", "msa", "--block-size", "64"]):
        pass
    assert "--block-size is 64, but MSA needs 128" in str(ended.value).strip().splitlines()[-1]
