"""A chat through the official OpenAI client: what a model said, which is the same streamed and not."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest

from .drivers import DRIVER

QUESTION = {"role": "user", "content": "Is it warm?"}


@dataclass
class Said:
    thought: str = ""
    text: str = ""
    called: list[tuple[str, Any]] = field(default_factory=list)
    finished: str | None = None


def thought(message: Any) -> str:
    """Of a message, or of a piece of one."""
    return getattr(message, DRIVER.thought, None) or ""


def create(openai: Any, extra: dict[str, Any], **options: Any) -> Any:
    asked: dict[str, Any] = {"model": "m3", "messages": [QUESTION], "max_tokens": 250, "temperature": 0}
    return openai.chat.completions.create(**asked | options, extra_body=extra)


def whole(openai: Any, extra: dict[str, Any], **options: Any) -> Said:
    (choice,) = create(openai, extra, **options).choices
    message = choice.message
    called = [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or []]
    return Said(thought(message), message.content or "", called, choice.finish_reason)


def streamed(openai: Any, extra: dict[str, Any], **options: Any) -> Said:
    said = Said()
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    for event in create(openai, extra, **options, stream=True):
        for choice in event.choices:
            said.thought += thought(choice.delta)
            said.text += choice.delta.content or ""
            said.finished = choice.finish_reason or said.finished
            for call in choice.delta.tool_calls or []:
                names[call.index] = names.get(call.index, "") + (call.function.name or "")
                arguments[call.index] = arguments.get(call.index, "") + (call.function.arguments or "")
    said.called = [(name, json.loads(arguments[index])) for index, name in names.items()]
    return said


both_ways = pytest.mark.parametrize("ask", [whole, streamed])
