"""``--middleware msa_backend.vllm.request_limit.RequestLimit``: a request larger than MSA_MAX_REQUEST_MB is a 413."""

from __future__ import annotations

import json

from .asgi import App, Message, Receive, Scope, Send, reply
from .limits import REQUEST, limit, too_large


class RequestLimit:
    """ASGI middleware that counts a request's body before anything reads it whole.

    By its length header where there is one, else as it comes: then what read the request is left with a client that
    hung up, and its answer is replaced.
    """

    def __init__(self, app: App) -> None:
        self.app = app
        self.allowed = limit(REQUEST)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self.allowed is None:
            await self.app(scope, receive, send)
        elif (announced := _content_length(scope)) > self.allowed:
            await _refuse(send, announced, self.allowed)
        else:
            counted = _Counted(receive, send, self.allowed)
            await self.app(scope, counted.receive, counted.send)
            if counted.is_too_large and not counted.has_answered:
                await _refuse(send, counted.size, self.allowed)


class _Counted:
    def __init__(self, receive: Receive, send: Send, allowed: int) -> None:
        self._receive, self._send, self._allowed = receive, send, allowed
        self.size = 0
        self.has_answered = False

    @property
    def is_too_large(self) -> bool:
        return self.size > self._allowed

    async def receive(self) -> Message:
        message = await self._receive()
        self.size += len(message.get("body", b""))
        return {"type": "http.disconnect"} if self.is_too_large else message

    async def send(self, message: Message) -> None:
        if not self.is_too_large or self.has_answered:
            self.has_answered = True
            await self._send(message)


def _content_length(scope: Scope) -> int:
    found = dict(scope["headers"]).get(b"content-length", b"0")
    return int(found) if found.isdigit() else 0


async def _refuse(send: Send, size: int, allowed: int) -> None:
    error = {"message": too_large("the request", size, allowed), "type": "RequestTooLarge", "code": 413}
    start = {"type": "http.response.start", "status": 413, "headers": [(b"content-type", b"application/json")]}
    await reply(send, start, json.dumps({"error": error}).encode())
