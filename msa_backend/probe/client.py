"""Requests to an OpenAI-compatible server, with the standard library: a probe runs where nothing is installed."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from msa_backend.config import MSAError

PAUSE = 2.0
"""Seconds before the first retry; twice as long before each further one."""
WORTH_ANOTHER_TRY = (408, 429, 500, 502, 503, 504)


class ProbeError(MSAError):
    """The server cannot be probed. The message is one sentence to act on."""


@dataclass(frozen=True)
class Answer:
    """What a server said.

    Attributes:
        text: without the thought before it, if the server parts the two.
        prompt_tokens: as the server counts them.
        cached_tokens: of them, found in its prefix cache; None if it does not say.
        seconds: from the request to the whole answer.
    """

    text: str
    prompt_tokens: int
    cached_tokens: int | None
    seconds: float


@dataclass(frozen=True)
class Client:
    """
    Attributes:
        url: up to and without ``/v1``.
        model: as the server calls it.
        timeout: seconds for one request.
        retries: of a request that timed out, found nobody, or was turned away for the moment.
        key: sent as the bearer token.
        more: laid over the body of every request.
    """

    url: str
    model: str = ""
    timeout: float = 600
    retries: int = 2
    key: str | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    def models(self) -> list[dict[str, Any]]:
        """What the server serves; vLLM and SGLang say ``max_model_len``."""
        return self._send("/v1/models")["data"]

    def ask(self, prompt: str | Sequence[int], max_tokens: int) -> Answer:
        """Greedily. A string is a user's message; tokens are completed as they are.

        Raises:
            ProbeError: no answer after all retries.
        """
        body: dict[str, Any] = {"model": self.model, "max_tokens": max_tokens, "temperature": 0}
        started = time.monotonic()
        if isinstance(prompt, str):
            reply = self._send("/v1/chat/completions", body | {"messages": [{"role": "user", "content": prompt}]})
            text = reply["choices"][0]["message"].get("content") or ""
        else:
            reply = self._send("/v1/completions", body | {"prompt": list(prompt)})
            text = reply["choices"][0]["text"]
        usage = reply.get("usage") or {}
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        return Answer(text, usage.get("prompt_tokens", 0), cached, time.monotonic() - started)

    def tokenize(self, text: str) -> list[int]:
        """Raises ProbeError where the server has no ``/tokenize``, which is not part of OpenAI's interface."""
        return self._send("/tokenize", {"model": self.model, "prompt": text, "add_special_tokens": False})["tokens"]

    def _send(self, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        data = None if body is None else json.dumps(body | dict(self.more)).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        pause = PAUSE
        for left in range(self.retries, -1, -1):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    return json.loads(reply.read())
            except urllib.error.HTTPError as error:
                said = error.read().decode(errors="replace")[:300].replace("\n", " ")
                if error.code not in WORTH_ANOTHER_TRY or not left:
                    raise ProbeError(f"{self.url}{path} answered {error.code}: {said}") from None
            except (OSError, ValueError) as error:  # no connection, a timeout, or no JSON
                if not left:
                    raise ProbeError(f"{self.url}{path} gave no answer ({error}); is the server up?") from None
            time.sleep(pause)
            pause *= 2
        raise AssertionError("the last try returns or raises")
