"""The command a user runs, with ``--attention-backend msa``: over HTTP, under load and under abuse."""

from __future__ import annotations

import json
import random
import time
import urllib.error
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from msa_backend import cli

from ..compare import assert_same
from ..oracle import random_prompt
from .capabilities import Can, needs
from .conftest import Right
from .drivers import DRIVER
from .drivers.running import EngineServer

# What a client sees while others compete depends on who gets a core: with a second engine busy beside it on two
# cores, a request was seen to wait until a stream that it was to interrupt had ended.
pytestmark = [pytest.mark.alone, needs(Can.SERVE_TEXT)]

TEXT = {"messages": [{"role": "user", "content": "What do you see?"}], "max_tokens": 24}


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[EngineServer]:
    """Chunks of 512 tokens, and pages for 12,288 tokens: less than 50 requests want at once."""
    with DRIVER.server(tiny, context=4096, chunk=512, pages=96, prefix_caching=True) as running:
        yield running


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_completion_is_the_truth(server: EngineServer, right: Right):
    prompts = [random_prompt(length, seed=11) for length in (1, 130, 1500)]
    right([server.complete(prompt, 16) for prompt in prompts], prompts)


@needs(Can.FP32)
def test_openai_completion_is_the_same(server: EngineServer):
    prompt = random_prompt(300, seed=13)
    expected = server.complete(prompt, 16)
    choice = server.openai("completions", prompt=prompt, max_tokens=16, logprobs=1)
    assert_same(replace(expected, logprobs=choice["logprobs"]["token_logprobs"]), expected)
    assert choice["finish_reason"] == "length"


def test_streamed_chat_is_the_whole_chat(server: EngineServer):
    whole = server.openai("chat/completions", **TEXT)["message"]["content"]
    streamed = [choice["delta"].get("content") or "" for choice in server.stream("chat/completions", **TEXT)]
    assert whole
    assert "".join(streamed) == whole
    assert len(streamed) > 10


@needs(Can.PREEMPTION, Can.FP32)
def test_fifty_at_once(server: EngineServer):
    """Requests of random lengths, all at once in a cache too small for them, say what each says alone."""
    dice = random.Random(0)
    asked = [(random_prompt(dice.randint(1, 1500), seed=20 + i), dice.randint(1, 24)) for i in range(50)]
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(lambda request: server.complete(*request), asked))
    server.forget()
    for found, request in zip(together, asked, strict=True):
        assert_same(found, server.complete(*request))


@needs(Can.PREEMPTION, Can.FP32)
def test_a_client_that_hangs_up(server: EngineServer):
    """An aborted stream ends and frees its pages, and what is served meanwhile and afterwards is untouched."""
    prompt = random_prompt(700, seed=12)
    before = server.complete(prompt, 24)
    said = server.generated()
    stream = server.stream("chat/completions", **TEXT | {"max_tokens": 3000})
    for _ in range(5):
        next(stream)
    wait_until(lambda: server.running() == 1)
    meanwhile = server.complete(prompt, 24)
    assert meanwhile.cached > 0
    assert_same(meanwhile, before)
    stream.close()
    wait_until(lambda: server.running() == 0)
    assert server.generated() - said < 3000
    server.forget()
    again = server.complete(prompt, 24)
    assert again.cached == 0
    assert_same(again, before)


def test_a_probe_runs(server: EngineServer, tmp_path: Path):
    """Random weights find nothing; but each prompt is asked, measured, and found again in the prefix cache."""
    results = tmp_path / "out.json"
    options = ["--lengths", "700", "--depths", "0,100", "--retries", "0", "--json", str(results)]
    assert cli.main(["probe", server.http.url, *options]) == 1
    cells = json.loads(results.read_text())["cells"].values()
    assert [cell["score"] for cell in cells] == [0, 0]
    for cell in cells:
        assert cell["prompt_tokens"] == pytest.approx(700, rel=0.3)
        assert cell["seconds"] > 0


def test_an_image_is_refused_and_the_server_lives(server: EngineServer):
    image: Any = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.openai("chat/completions", messages=[{"role": "user", "content": [image]}], max_tokens=4)
    assert refused.value.code == 400
    assert DRIVER.no_images in refused.value.read().decode()
    assert server.complete([300], 1).tokens


def test_a_refusal_ends_the_command(tmp_path: Path, tiny: Path):
    """Not only the option parser: the command itself stops, soon, with the sentence as its last line."""
    (tmp_path / "config.json").write_text((tiny / "config.json").read_text())
    with pytest.raises(RuntimeError) as ended, DRIVER.server(tmp_path, page_size=64):
        pass
    assert f"{DRIVER.flag('page_size')} is 64, but MSA needs 128" in str(ended.value).strip().splitlines()[-1]
