"""Images and videos over HTTP: both protocols, one after another, and what is refused, after which the server lives."""

from __future__ import annotations

import base64
import io
import json
import struct
import urllib.error
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ..engines.capabilities import Can, needs
from ..engines.drivers import DRIVER
from ..engines.drivers.running import EngineServer
from ..images import picture

pytest.importorskip("torchvision", reason="vLLM's processors of MiniMax-M3 need it")
pytestmark = needs(Can.IMAGES)

LIMIT = 2
QUESTION = "What do you see?"
LOADING = "an image or video of the request cannot be loaded: "


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[EngineServer]:
    takes_images = {"language_model_only": False, "limit_mm_per_prompt": {"image": LIMIT, "video": 1}}
    with DRIVER.server(tiny, context=4096, prefix_caching=True, own=takes_images) as running:
        yield running


def png(seed: int, height: int = 112, width: int = 168) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture(height, width, seed)).save(file, "PNG")
    return file.getvalue()


def huge_png(side: int) -> bytes:
    """A PNG that announces as many pixels as no server should unpack, and holds none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def mp4(frames: int, folder: Path) -> bytes:
    """A video of one frame a second."""
    import cv2

    file = folder / "video.mp4"
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter.fourcc(*"mp4v"), 1, (168, 112))
    for seed in range(frames):
        writer.write(picture(112, 168, seed))
    writer.release()
    return file.read_bytes()


def data_url(file: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(file).decode()}"


def ask(server: EngineServer, *urls: str, kind: str = "image", question: str = QUESTION) -> str:
    """What is said to images, or to a video."""
    shown = [{"type": f"{kind}_url", f"{kind}_url": {"url": url}} for url in urls]
    messages = [{"role": "user", "content": [*shown, {"type": "text", "text": question}]}]
    return server.openai("chat/completions", messages=messages, max_tokens=16)["message"]["content"]


def ask_anthropic(server: EngineServer, source: dict[str, str]) -> str:
    content = [{"type": "image", "source": source}, {"type": "text", "text": QUESTION}]
    messages: Any = [{"role": "user", "content": content}]
    return server.http.post("/v1/messages", server.body(messages=messages, max_tokens=16))["content"][0]["text"]


def refusal(server: EngineServer, call: Callable[..., str], *args: Any, **options: Any) -> str:
    """What a 400 says, after which the server answers still."""
    with pytest.raises(urllib.error.HTTPError) as refused:
        call(server, *args, **options)
    assert refused.value.code == 400
    assert server.complete([300], 1).tokens
    return json.loads(refused.value.read())["error"]["message"]


def test_the_answer_is_to_the_image(server: EngineServer):
    """Also a second time, when both images come from caches."""
    said = [ask(server, data_url(png(seed))) for seed in (1, 2, 1, 2)]
    assert said[0] != said[1]
    assert said[:2] == said[2:]


def test_the_order_of_images_counts(server: EngineServer):
    one, other = data_url(png(1)), data_url(png(2))
    assert ask(server, one, other) != ask(server, other, one)


def test_anthropic_is_the_same(server: EngineServer):
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(png(1)).decode()}
    assert ask_anthropic(server, source) == ask(server, data_url(png(1)))


def test_a_tools_result_may_be_an_image(server: EngineServer):
    """Over the Anthropic protocol, where the answer is to this image."""

    def ask_about(seed: int) -> str:
        source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(png(seed)).decode()}
        result = {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "image", "source": source}]}
        messages: Any = [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "look", "input": {"at": "it"}}]},
            {"role": "user", "content": [result]},
        ]
        return server.http.post("/v1/messages", server.body(messages=messages, max_tokens=16))["content"][0]["text"]

    one, other = ask_about(1), ask_about(2)
    assert one != other


def test_the_answer_is_to_the_video(server: EngineServer, tmp_path: Path):
    said = [ask(server, data_url(mp4(frames, tmp_path), "video/mp4"), kind="video") for frames in (3, 5, 3)]
    assert said[0] == said[2] != said[1]


BROKEN = {
    "no picture": (data_url(b"AAAA"), "cannot identify image file"),
    "cut off": (data_url(png(1)[:300]), "truncated"),
    "another type": (data_url(b"%PDF-1.7", "application/pdf"), "cannot identify image file"),
    "no base64": ("data:image/png,AAAA", "Only base64 data URLs"),
    "wrong base64": ("data:image/png;base64,!", "base64"),
    "too many pixels": (data_url(huge_png(20_000)), "exceeds limit"),
    "a file": ("file:///etc/hostname", "without `--allowed-local-media-path`"),
    "another scheme": ("ftp://127.0.0.1/picture.png", "HTTP, data or file URL"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_an_image_that_cannot_be_loaded(server: EngineServer, what: str):
    url, said = BROKEN[what]
    message = refusal(server, ask, url)
    assert message.startswith(LOADING)
    assert said in message


@pytest.mark.parametrize("url", ["file:///etc/hostname", data_url(b"AAAA", "video/mp4"), data_url(png(1))])
def test_a_video_that_cannot_be_loaded(server: EngineServer, url: str):
    assert refusal(server, ask, url, kind="video").startswith(LOADING)


def test_a_video_without_frames(server: EngineServer, tmp_path: Path):
    """So OpenCV reads one that it wrote of a single frame."""
    message = refusal(server, ask, data_url(mp4(1, tmp_path), "video/mp4"), kind="video")
    assert message == "no frame of video 0 could be read; send another, or its frames as images"


@pytest.mark.parametrize(
    "source",
    [
        {"type": "base64", "media_type": "image/png", "data": "AAAA"},
        {"type": "url", "url": "file:///etc/hostname"},
        {"type": "base64", "media_type": "image/png", "data": base64.b64encode(huge_png(20_000)).decode()},
    ],
    ids=["no picture", "a file", "too many pixels"],
)
def test_anthropic_refuses_the_same(server: EngineServer, source: dict[str, str]):
    assert refusal(server, ask_anthropic, source).startswith(LOADING)


def test_an_image_that_is_too_narrow(server: EngineServer):
    message = refusal(server, ask, data_url(png(1)), data_url(png(2, 1, 201)))
    assert message.startswith(
        "image 1 is 201 x 1 pixels, but MiniMax-M3 takes no side of more than 200 times the other"
    )
    assert ask(server, data_url(png(2, 1, 200)))


def test_too_many_images_are_refused(server: EngineServer):
    assert f"At most {LIMIT} image(s)" in refusal(server, ask, *[data_url(png(seed)) for seed in range(LIMIT + 1)])


def test_more_tokens_than_the_context(server: EngineServer):
    assert "maximum context length" in refusal(server, ask, data_url(png(1)), question=" sugar" * 4096)


def test_another_kind_of_media(server: EngineServer):
    assert "At most 0 audio(s)" in refusal(server, ask, data_url(b"AAAA", "audio/wav"), kind="audio")
