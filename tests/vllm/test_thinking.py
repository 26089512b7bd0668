"""What each protocol's request asks of the chat template, and that a middleware writes it into the request."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from msa_backend.vllm.thinking import PATHS, ThinkingMode, with_thinking_mode

MESSAGES, COUNT, CHAT, RESPONSES = (
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/chat/completions",
    "/v1/responses",
)

ASKED = [
    (MESSAGES, {}, "disabled"),
    (MESSAGES, {"thinking": None}, "disabled"),
    (MESSAGES, {"thinking": {"type": "disabled"}}, "disabled"),
    (MESSAGES, {"thinking": {"type": "adaptive"}}, "adaptive"),
    (MESSAGES, {"thinking": {"type": "enabled", "budget_tokens": 2048}}, "enabled"),
    (COUNT, {"thinking": {"type": "enabled", "budget_tokens": 2048}}, "enabled"),
    (COUNT, {}, "disabled"),
    (CHAT, {}, None),
    (CHAT, {"reasoning_effort": None}, None),
    *[(CHAT, {"reasoning_effort": effort}, "disabled") for effort in ("none", "minimal")],
    *[(CHAT, {"reasoning_effort": effort}, "enabled") for effort in ("low", "medium", "high", "xhigh")],
    (RESPONSES, {}, None),
    (RESPONSES, {"reasoning": {"effort": "high"}}, "enabled"),
    (RESPONSES, {"reasoning": {"effort": "none"}}, "disabled"),
    (RESPONSES, {"reasoning": {"summary": "auto"}}, None),
    # Explicit wins.
    (MESSAGES, {"chat_template_kwargs": {"thinking_mode": "adaptive"}}, "adaptive"),
    (CHAT, {"reasoning_effort": "none", "chat_template_kwargs": {"thinking_mode": "enabled"}}, "enabled"),
    ("/v1/completions", {"reasoning_effort": "high"}, None),
    # What a request would be rendered as, and many at once.
    (MESSAGES + "/render", {}, "disabled"),
    (RESPONSES + "/render", {"reasoning": {"effort": "high"}}, "enabled"),
    *[(CHAT + more, {"reasoning_effort": "high"}, "enabled") for more in ("/render", "/batch")],
]


@pytest.mark.parametrize(("path", "body", "mode"), ASKED)
def test_what_a_request_asks_for(path: str, body: dict[str, Any], mode: str | None):
    found = with_thinking_mode(path, body)
    assert (found.get("chat_template_kwargs") or {}).get("thinking_mode") == mode
    assert {**found, "chat_template_kwargs": None} == {**body, "chat_template_kwargs": None}


def test_other_template_variables_stay():
    found = with_thinking_mode(CHAT, {"reasoning_effort": "low", "chat_template_kwargs": {"a": 1}})
    assert found["chat_template_kwargs"] == {"a": 1, "thinking_mode": "enabled"}


@pytest.mark.parametrize(
    "body", [None, [], "text", {"chat_template_kwargs": 3}, {"thinking": "on", "chat_template_kwargs": None}]
)
def test_what_is_no_request_is_left_for_vllm_to_refuse(body: Any):
    assert with_thinking_mode(MESSAGES, body) == body


def passed_on(parts: list[bytes], path: str = CHAT, **scope: Any) -> bytes:
    """The body that an application behind the middleware sees."""
    seen: list[Any] = []
    sent = [
        {"type": "http.request", "body": part, "more_body": number + 1 < len(parts)}
        for number, part in enumerate(parts)
    ]

    async def receive() -> Any:
        return sent.pop(0) if sent else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        raise AssertionError(message)

    async def application(scope: Any, receive: Any, send: Any) -> None:
        first, second = await receive(), await receive()
        assert second["type"] == "http.disconnect"
        seen.append(first["body"])

    asyncio.run(ThinkingMode(application)({"type": "http", "method": "POST", "path": path} | scope, receive, send))
    (body,) = seen
    return body


@pytest.mark.parametrize("scope", [{}, {"root_path": "/m3", "path": "/m3" + CHAT}, {"path": CHAT + "/"}])
def test_a_body_in_parts_is_rewritten(scope: dict[str, Any]):
    whole = json.dumps({"reasoning_effort": "high", "text": "\ud83d\ude00 \u00e9"}).encode()
    body = passed_on([whole[:7], whole[7:9], b"", whole[9:]], **scope)
    assert json.loads(body) == json.loads(whole) | {"chat_template_kwargs": {"thinking_mode": "enabled"}}


def test_vllm_has_these_paths():
    """So that a path which a later version renames does not pass unread."""
    from vllm.entrypoints.anthropic import api_router as anthropic
    from vllm.entrypoints.openai.chat_completion import api_router as chat
    from vllm.entrypoints.openai.responses import api_router as responses
    from vllm.entrypoints.scale_out.render import api_router as render

    known = {route.path for module in (anthropic, chat, responses, render) for route in module.router.routes}
    assert known >= PATHS


@pytest.mark.parametrize("body", [b"", b"{", b'{"model": "m3"}'])
def test_other_bodies_pass_untouched(body: bytes):
    assert passed_on([body]) == body


def test_a_client_that_hangs_up_is_passed_on():
    seen = []

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def application(scope: Any, receive: Any, send: Any) -> None:
        seen.append(await receive())

    asyncio.run(ThinkingMode(application)({"type": "http", "method": "POST", "path": CHAT}, receive, None))
    assert seen == [{"type": "http.disconnect"}]


def test_nothing_is_read_of_a_request_that_is_refused_by_its_headers():
    """As by vLLM's check of --api-key, which this middleware comes before."""

    async def receive() -> Any:
        raise AssertionError

    async def application(scope: Any, receive: Any, send: Any) -> None:
        pass

    asyncio.run(ThinkingMode(application)({"type": "http", "method": "POST", "path": CHAT}, receive, None))
