"""``--middleware msa_backend.vllm.anthropic_errors.AnthropicErrors``: errors of ``/v1/messages`` as Anthropic has them.

vLLM answers a request of the wrong shape with an error in OpenAI's form, which Anthropic's clients read no message
from, and 0.32 gives all others the names of its own exceptions.
"""

from __future__ import annotations

import json

from .asgi import App, Message, Receive, Scope, Send, reply

PREFIX = "/v1/messages"
NAMES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}


def in_anthropic_form(status: int, body: bytes) -> bytes:
    """The body of an error with Anthropic's name for its status, and the message that it has; itself if it has none."""
    try:
        found = json.loads(body)
    except ValueError:
        return body
    error = found.get("error", found) if isinstance(found, dict) else None
    message = error.get("message") or error.get("detail") if isinstance(error, dict) else error
    if not isinstance(message, str):
        return body
    name = NAMES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return json.dumps({"type": "error", "error": {"type": name, "message": message}}).encode()


class AnthropicErrors:
    """ASGI middleware; name it last, so that it sees the errors of the others."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and PREFIX in scope["path"]:
            send = _Rewritten(send)
        await self.app(scope, receive, send)


class _Rewritten:
    """``send`` that holds an error back until it is whole."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        self._body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] >= 400:
            self._start = message
        elif self._start is None:
            await self._send(message)
        else:
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                await reply(self._send, self._start, in_anthropic_form(self._start["status"], self._body))
