"""Images over HTTP: both protocols, one after another, and what is refused."""

from __future__ import annotations

import base64
import io
import urllib.error
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from ..engines.capabilities import Can, needs
from ..engines.drivers import DRIVER
from ..engines.drivers.running import EngineServer
from ..images import picture

pytest.importorskip("torchvision", reason="vLLM's processors of MiniMax-M3 need it")
pytestmark = [pytest.mark.alone, needs(Can.IMAGES)]

LIMIT = 2
QUESTION = {"type": "text", "text": "What do you see?"}


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[EngineServer]:
    takes_images = {"language_model_only": False, "limit_mm_per_prompt": {"image": LIMIT, "video": 0}}
    with DRIVER.server(tiny, context=4096, prefix_caching=True, own=takes_images) as running:
        yield running


def png(seed: int) -> str:
    """A picture as a file, in base64."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture(112, 168, seed)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def ask(server: EngineServer, files: Sequence[str]) -> str:
    images = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{file}"}} for file in files]
    messages = [{"role": "user", "content": [*images, QUESTION]}]
    return server.openai("chat/completions", messages=messages, max_tokens=16)["message"]["content"]


def refusal(server: EngineServer, files: Sequence[str]) -> str:
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(server, files)
    assert refused.value.code == 400
    assert server.http.is_healthy()
    return refused.value.read().decode()


def test_the_answer_is_to_the_image(server: EngineServer):
    """Also a second time, when both images come from caches."""
    said = [ask(server, [png(seed)]) for seed in (1, 2, 1, 2)]
    assert said[0] != said[1]
    assert said[:2] == said[2:]


def test_the_order_of_images_counts(server: EngineServer):
    assert ask(server, [png(1), png(2)]) != ask(server, [png(2), png(1)])


def test_anthropic_is_the_same(server: EngineServer):
    source = {"type": "base64", "media_type": "image/png", "data": png(1)}
    messages: Any = [{"role": "user", "content": [{"type": "image", "source": source}, QUESTION]}]
    reply = server.http.post("/v1/messages", server.body(messages=messages, max_tokens=16))
    assert reply["content"][0]["text"] == ask(server, [png(1)])


def test_a_broken_image_is_refused(server: EngineServer):
    refusal(server, ["AAAA"])


def test_too_many_images_are_refused(server: EngineServer):
    assert f"At most {LIMIT} image(s)" in refusal(server, [png(seed) for seed in range(LIMIT + 1)])
