"""A running engine, in this process, in children of it or behind HTTP, and what can be asked of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from ...compare import Answer, PromptIds
from ...server import Server


class Engine(ABC):
    """A running engine without a server."""

    @abstractmethod
    def ask(self, prompts: Sequence[PromptIds], max_tokens: int, prompt_logprobs: bool = False) -> list[Answer]:
        """The greedy continuation of each prompt, ``max_tokens`` long; asked for together."""

    @abstractmethod
    def preemptions(self) -> int:
        """How often a running request was thrown out so far."""

    def drafted(self) -> int:
        """Draft tokens that were verified so far."""
        raise NotImplementedError


class EngineServer(ABC):
    """A running server."""

    MODEL = "m3"

    def __init__(self, http: Server) -> None:
        self.http = http

    @abstractmethod
    def complete(self, prompt: PromptIds, max_tokens: int) -> Answer:
        """The greedy continuation of token ids."""

    @abstractmethod
    def forget(self) -> None:
        """Empty the prefix cache, which takes that no request holds a page."""

    @abstractmethod
    def running(self) -> int:
        """Requests that are being computed."""

    @abstractmethod
    def generated(self) -> int:
        """Tokens of answers so far."""

    def openai(self, path: str, **body: Any) -> Any:
        """One greedy choice of the OpenAI interface."""
        return self.http.post(f"/v1/{path}", self.body(**body))["choices"][0]

    def stream(self, path: str, **body: Any) -> Iterator[Any]:
        """The same as events; closing the iterator hangs up."""
        for event in self.http.stream(f"/v1/{path}", self.body(**body)):
            yield event["choices"][0]

    def body(self, **more: Any) -> dict[str, Any]:
        return {"model": self.MODEL, "temperature": 0, "ignore_eos": True} | more
