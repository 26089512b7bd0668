"""The command a user runs: ``python -m sglang.launch_server --attention-backend msa``, under load and under abuse."""

from __future__ import annotations

import json
import random
import time
import urllib.error
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ..compare import Answer, PromptIds, assert_same, assert_true
from ..oracle import random_prompt
from ..server import Server
from .engines import read, started

MODEL = "m3"

# What a client sees while others compete depends on who gets a core.
pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[Server]:
    """Chunks of 512 tokens, and pages for 12,288 tokens: less than 30 requests want at once."""
    flags = ["--attention-backend", "msa", "--served-model-name", MODEL, "--context-length", "4096"]
    flags += ["--chunked-prefill-size", "512", "--max-total-tokens", "12288", "--enable-metrics"]
    # Admit as many as fit now, as if answers took no room, and show at once in the metrics what runs.
    flags += ["--schedule-conservativeness", "0.01", "--decode-log-interval", "1"]
    with started(tiny, flags) as running:
        yield running


def complete(server: Server, prompt: PromptIds, max_tokens: int) -> Answer:
    """The greedy continuation of token ids."""
    sampling = {"temperature": 0, "ignore_eos": True, "max_new_tokens": max_tokens}
    return read(server.post("/generate", {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}))


def openai(body: dict[str, Any]) -> dict[str, Any]:
    return {"model": MODEL, "temperature": 0, "ignore_eos": True} | body


def chat(text: str, **more: Any) -> dict[str, Any]:
    return openai({"messages": [{"role": "user", "content": text}], "max_tokens": 24} | more)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_completion_is_the_oracles(server: Server, truth: Any):
    for length in (1, 130, 1500):
        prompt = random_prompt(length, seed=11)
        assert_true(complete(server, prompt, 16), prompt, truth)


def test_openai_completion_is_the_same(server: Server):
    prompt = random_prompt(300, seed=13)
    expected = complete(server, prompt, 16)
    choice = server.post("/v1/completions", openai({"prompt": prompt, "max_tokens": 16, "logprobs": 1}))["choices"][0]
    found = choice["logprobs"]["token_logprobs"]
    assert_same(Answer(expected.tokens, found, [], 0), expected)
    assert choice["finish_reason"] == "length"


def test_streamed_chat_is_the_whole_chat(server: Server):
    whole = server.post("/v1/chat/completions", chat("What do you see?"))["choices"][0]["message"]["content"]
    streamed = [
        event["choices"][0]["delta"].get("content") or ""
        for event in server.stream("/v1/chat/completions", chat("What do you see?"))
    ]
    assert whole
    assert "".join(streamed) == whole
    assert len(streamed) > 10


def test_thirty_at_once(server: Server):
    """Requests of random lengths, all at once in a cache too small for them, say what each says alone."""
    dice = random.Random(0)
    asked = [(random_prompt(dice.randint(1, 1500), seed=20 + i), dice.randint(1, 24)) for i in range(30)]
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(lambda request: complete(server, *request), asked))
    server.post("/flush_cache", {}, parse=False)
    for found, request in zip(together, asked, strict=True):
        assert_same(found, complete(server, *request))


def test_a_client_that_hangs_up(server: Server):
    """An aborted stream ends, and what is served meanwhile and afterwards is untouched."""
    prompt = random_prompt(700, seed=12)
    before = complete(server, prompt, 24)
    said = server.metric("sglang:generation_tokens_total")
    stream = server.stream("/v1/chat/completions", chat("Tell me all.", max_tokens=3000))
    for _ in range(5):
        next(stream)
    wait_until(lambda: server.metric("sglang:num_running_reqs") == 1)
    assert_same(complete(server, prompt, 24), before)
    stream.close()
    wait_until(lambda: server.metric("sglang:num_running_reqs") == 0)
    assert server.metric("sglang:generation_tokens_total") - said < 3000
    # The cache lets go of everything only if no request holds a page.
    server.post("/flush_cache", {}, parse=False)
    again = complete(server, prompt, 24)
    assert again.cached == 0
    assert_same(again, before)


def test_an_image_is_refused_and_the_server_lives(server: Server):
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    body = openai({"messages": [{"role": "user", "content": [image]}], "max_tokens": 4})
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.post("/v1/chat/completions", body)
    assert refused.value.code == 400
    assert json.loads(refused.value.read())["message"]
    assert complete(server, [300], 1).tokens


def test_a_refusal_ends_the_command(tmp_path: Path, tiny: Path):
    """Not only the option parser: the command itself stops, soon, with the sentence as its last line."""
    (tmp_path / "config.json").write_text((tiny / "config.json").read_text())
    with pytest.raises(RuntimeError) as ended, started(tmp_path, ["--attention-backend", "msa", "--page-size", "64"]):
        pass
    assert "--page-size is 64, but MSA needs 128" in str(ended.value).strip().splitlines()[-1]
