"""One meaning for each protocol's way of asking MiniMax-M3 to think: the ``thinking_mode`` of its chat template.

vLLM turns Anthropic's ``thinking`` and OpenAI's ``reasoning_effort`` into variables that M3's template does not read,
and forgets on the way whether ``thinking`` was given at all. So the request is read as it comes in, by a middleware
(``--middleware msa_backend.vllm.thinking.ThinkingMode``), and what it asks for is written into its
``chat_template_kwargs``. From there vLLM hands it to the template and to the reasoning parser alike.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from .asgi import App, Message, Receive, Scope, Send

ENABLED, DISABLED = "enabled", "disabled"


def _of_anthropic(body: dict[str, Any]) -> str | None:
    """``thinking.type``, whose names are M3's; absent is disabled, as at MiniMax's own endpoint."""
    thinking = body.get("thinking")
    if thinking is None:
        return DISABLED
    return thinking.get("type") if isinstance(thinking, dict) else None


def _of_chat(body: dict[str, Any]) -> str | None:
    return _of_effort(body.get("reasoning_effort"))


def _of_responses(body: dict[str, Any]) -> str | None:
    reasoning = body.get("reasoning")
    return _of_effort(reasoning.get("effort")) if isinstance(reasoning, dict) else None


def _of_effort(effort: Any) -> str | None:
    """M3 thinks or does not, and knows no levels; absent leaves the choice to the template."""
    if effort is None:
        return None
    return DISABLED if effort in ("none", "minimal") else ENABLED


_ASKED: dict[str, Callable[[dict[str, Any]], str | None]] = {
    "/v1/messages": _of_anthropic,
    "/v1/messages/count_tokens": _of_anthropic,
    "/v1/messages/render": _of_anthropic,
    "/v1/chat/completions": _of_chat,
    "/v1/chat/completions/batch": _of_chat,
    "/v1/chat/completions/render": _of_chat,
    "/v1/responses": _of_responses,
    "/v1/responses/render": _of_responses,
}

PATHS = frozenset(_ASKED)
"""Of vLLM's server, behind which a chat template is rendered for a conversation."""


def with_thinking_mode(path: str, body: Any) -> Any:
    """The body of a request to ``path`` with the ``thinking_mode`` that it asks for; itself where nothing is to do.

    What a client says in ``chat_template_kwargs.thinking_mode`` wins. What is no valid request stays as it is, for
    vLLM to refuse.
    """
    asked = _ASKED.get(path)
    if asked is None or not isinstance(body, dict):
        return body
    given = body.get("chat_template_kwargs")
    given = {} if given is None else given
    if not isinstance(given, dict) or given.get("thinking_mode") is not None:
        return body
    mode = asked(body)
    return body if mode is None else body | {"chat_template_kwargs": given | {"thinking_mode": mode}}


class ThinkingMode:
    """ASGI middleware that rewrites the requests which :func:`with_thinking_mode` knows."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and (path := _route(scope)) in PATHS:
            # Only once somebody reads it: this middleware is the outermost, and an API key is checked further in.
            receive = _Rewritten(path, receive)
        await self.app(scope, receive, send)


def _route(scope: Scope) -> str:
    """The path behind ``--root-path``, which a server that knows it may or may not be given."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "")).rstrip("/")


class _Rewritten:
    """``receive`` of a request to ``path`` whose body comes in one part, rewritten.

    The header content-length still says what the client sent; nothing behind it counts again.
    """

    def __init__(self, path: str, receive: Receive) -> None:
        self.path = path
        self.receive = receive
        self.is_read = False

    async def __call__(self) -> Message:
        if self.is_read:
            return await self.receive()
        parts = []
        more = True
        while more:
            message = await self.receive()
            if message["type"] != "http.request":
                return message  # the client hung up
            parts.append(message.get("body", b""))
            more = message.get("more_body", False)
        self.is_read = True
        return {"type": "http.request", "body": _rewrite(self.path, b"".join(parts)), "more_body": False}


def _rewrite(path: str, content: bytes) -> bytes:
    try:
        body = json.loads(content)
    except ValueError:
        return content
    new_body = with_thinking_mode(path, body)
    return content if new_body is body else json.dumps(new_body).encode()
