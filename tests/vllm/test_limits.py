"""How large a request, an image and a video may be, and how errors of ``/v1/messages`` look."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError

from msa_backend.config import MSAError
from msa_backend.vllm import limits
from msa_backend.vllm.anthropic_errors import AnthropicErrors
from msa_backend.vllm.media import M3MediaConnector, use_own_connector
from msa_backend.vllm.request_limit import RequestLimit

MB = limits.MB


def answer(middleware: Any, parts: list[bytes], path: str = "/v1/messages", announced: int | None = None) -> Any:
    """Status, headers and body of what a client gets for a body in ``parts`` from an application that says its size."""
    sent = [{"type": "http.request", "body": part, "more_body": i + 1 < len(parts)} for i, part in enumerate(parts)]
    got: list[Any] = []

    async def receive() -> Any:
        return sent.pop(0) if sent else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        got.append(message)

    async def application(scope: Any, receive: Any, send: Any) -> None:
        size, more, status = 0, True, 200
        while more:
            message = await receive()
            status = 400 if message["type"] == "http.disconnect" else status
            size, more = size + len(message.get("body", b"")), message.get("more_body", False)
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"3")]})
        await send({"type": "http.response.body", "body": b"%d" % size})

    headers = [] if announced is None else [(b"content-length", b"%d" % announced)]
    scope = {"type": "http", "path": path, "headers": headers}
    asyncio.run(middleware(application)(scope, receive, send))
    start, *rest = got
    return start["status"], dict(start["headers"]), b"".join(message["body"] for message in rest)


@pytest.mark.parametrize("announced", [True, False], ids=["announced", "in chunks"])
@pytest.mark.parametrize(("size", "status"), [(MB, 200), (MB + 1, 413)])
def test_a_request_over_the_limit(size: int, status: int, announced: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(limits.REQUEST, "1")
    parts = [b"x" * 1000, b"x" * (size - 1000)]
    found, headers, body = answer(RequestLimit, parts, announced=size if announced else None)
    assert found == status
    if status == 413:
        assert "this server takes 1 MB at most" in json.loads(body)["error"]["message"]
        assert headers[b"content-length"] == b"%d" % len(body)
    else:
        assert body == b"%d" % size


def test_nothing_is_read_of_a_request_that_announces_too_much(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(limits.REQUEST, "1")
    sent: list[Any] = []

    async def unread(*_: Any) -> Any:
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "path": "/v1/messages", "headers": [(b"content-length", b"%d" % (MB + 1))]}
    asyncio.run(RequestLimit(unread)(scope, unread, send))
    assert sent[0]["status"] == 413


def test_no_limit_unless_set(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(limits.REQUEST, raising=False)
    assert answer(RequestLimit, [b"x" * 3 * MB], announced=3 * MB)[0] == 200


@pytest.mark.parametrize("given", ["", "0", "-1", "64 MB", "nan", "inf"])
@pytest.mark.parametrize("variable", [limits.REQUEST, limits.IMAGE, limits.VIDEO])
def test_a_limit_that_is_no_number(variable: str, given: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(variable, given)
    with pytest.raises(MSAError, match=f"{variable} is '{given}', but must be a positive number of MB"):
        RequestLimit(None) if variable == limits.REQUEST else use_own_connector()


def error_of(status: int, body: bytes, path: str = "/v1/messages") -> Any:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"Content-Length", b"%d" % len(body)), (b"retry-after", b"1")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body[:5], "more_body": True})
        await send({"type": "http.response.body", "body": body[5:]})

    got: list[Any] = []

    async def send(message: Any) -> None:
        got.append(message)

    asyncio.run(AnthropicErrors(application)({"type": "http", "path": path, "headers": []}, None, send))
    headers = {name.lower(): value for name, value in got[0]["headers"]}
    found = b"".join(message["body"] for message in got[1:])
    assert headers == {b"content-length": b"%d" % len(found), b"retry-after": b"1"}
    assert got[0]["status"] == status
    return found


@pytest.mark.parametrize(
    ("status", "name"),
    [(400, "invalid_request_error"), (401, "authentication_error"), (404, "not_found_error"),
     (422, "invalid_request_error"), (429, "rate_limit_error"), (500, "api_error"), (503, "overloaded_error")],
)  # fmt: skip
@pytest.mark.parametrize(
    "said",
    [
        {"error": {"message": "why", "type": "BadRequestError", "code": 400}},  # OpenAI's
        {"type": "error", "error": {"type": "BadRequestError", "message": "why"}},  # Anthropic's, but for the name
        {"error": "why"},
        {"detail": "why"},
    ],
)
def test_errors_in_anthropics_form(status: int, name: str, said: dict[str, Any]):
    found = json.loads(error_of(status, json.dumps(said).encode(), "/m3/v1/messages/count_tokens"))
    assert found == {"type": "error", "error": {"type": name, "message": "why"}}


@pytest.mark.parametrize(
    ("status", "body", "path"),
    [
        (400, b'{"error": {"message": "why"}}', "/v1/chat/completions"),
        (200, b'{"error": {"message": "an answer"}}', "/v1/messages"),
        (502, b"<html>bad gateway</html>", "/v1/messages"),
        (500, b"[1, 2]", "/v1/messages"),
    ],
)
def test_what_is_left_as_it_is(status: int, body: bytes, path: str):
    assert error_of(status, body, path) == body


class Loaded:
    """A loader of vLLM's that unpacks nothing."""

    def get_max_bytes(self) -> None:
        return None

    def load_base64(self, media_type: str, data: str) -> str:
        return "loaded"

    load_bytes = load_file = lambda self, data: "loaded"


@pytest.mark.parametrize(("size", "fits"), [(MB, True), (MB + 1, False), (MB + 2, False)])
@pytest.mark.parametrize("way", ["data", "file"])
def test_an_image_over_the_limit(way: str, size: int, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import base64

    monkeypatch.setenv(limits.IMAGE, "1")
    file = tmp_path / "image"
    file.write_bytes(b"x" * size)
    data = f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"
    connector = M3MediaConnector(allowed_local_media_path=str(tmp_path))
    url = data if way == "data" else f"file://{file}"
    if fits:
        assert connector.load_from_url(url, Loaded()) == "loaded"
    else:
        with pytest.raises(VLLMValidationError, match="the image is 1.0 MB, but this server takes 1 MB at most"):
            connector.load_from_url(url, Loaded())


def test_a_video_has_a_limit_of_its_own(monkeypatch: pytest.MonkeyPatch):
    from vllm.multimodal.media import VideoMediaIO

    class Video(VideoMediaIO):
        def __init__(self) -> None:
            pass

        def load_base64(self, media_type: str, data: str) -> Any:
            return "loaded"

    monkeypatch.setenv(limits.IMAGE, "0.125")
    monkeypatch.setenv(limits.VIDEO, "0.25")
    url = "data:video/mp4;base64," + "A" * 300_000
    assert M3MediaConnector().load_from_url(url, Video()) == "loaded"
    with pytest.raises(VLLMValidationError, match="the video is 0.3 MB, but this server takes 0.25 MB at most"):
        M3MediaConnector().load_from_url(url + "A" * 100_000, Video())
