"""Structured outputs over HTTP: the first token is as bound as any, and thoughts are neither lost nor forced."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from ...engines.calls import ANSWER
from ...engines.capabilities import Can, needs

pytestmark = needs(Can.CALLING)

Script = Callable[[str], dict[str, Any]]

JSON = {"type": "json_schema", "json_schema": {"name": "answer", "schema": ANSWER, "strict": True}}
THOUGHT_BEFORE = [
    {"role": "user", "content": "Hot?"},
    {"role": "assistant", "content": "Yes.", "reasoning": "summer"},
    {"role": "user", "content": "Cold?"},
]
ONE = [{"role": "user", "content": "Cold?"}]


def ask(
    openai: Any, messages: list[dict[str, Any]], extra: dict[str, Any], **options: Any
) -> tuple[str | None, str | None]:
    """Thought and answer, which are the same streamed."""
    asked: dict[str, Any] = {
        "model": "m3",
        "messages": messages,
        "max_tokens": 60,
        "temperature": 0,
        "extra_body": extra,
    }
    message = openai.chat.completions.create(**asked, **options).choices[0].message
    thought, answer = "", ""
    for event in openai.chat.completions.create(**asked, **options, stream=True):
        for choice in event.choices:
            thought += getattr(choice.delta, "reasoning", None) or ""
            answer += choice.delta.content or ""
    assert (getattr(message, "reasoning", None) or "", message.content or "") == (thought, answer)
    return thought, answer


@pytest.mark.parametrize(
    ("messages", "effort"),
    [(ONE, None), (ONE, "none"), (ONE, "high"), (THOUGHT_BEFORE, None), (THOUGHT_BEFORE, "high")],
)
def test_json_from_the_first_token(openai: Any, script: Script, messages: Any, effort: str | None):
    """The model wants to chat, and after a thought, too."""
    says = (" cold is</mm:think>" if effort == "high" else "") + ' sugar{"yes": "y"}'
    options = {"response_format": JSON} | ({"reasoning_effort": effort} if effort else {})
    thought, answer = ask(openai, messages, script(says), **options)
    assert json.loads(answer) == {"yes": "y"}
    assert thought == (" cold is" if effort == "high" else "")


@pytest.mark.parametrize("messages", [ONE, THOUGHT_BEFORE], ids=["one", "thought before"])
@pytest.mark.parametrize("mode", [None, "adaptive"])
def test_a_thought_before_json_if_the_model_likes(openai: Any, script: Script, messages: Any, mode: str | None):
    extra = script('<mm:think> cold is</mm:think>{"yes": "y"}') | {"chat_template_kwargs": {"thinking_mode": mode}}
    assert ask(openai, messages, extra, response_format=JSON) == (" cold is", '{"yes": "y"}')


def test_a_budget_ends_the_thought(openai: Any, script: Script):
    """What follows it is bound as behind any thought."""
    extra = script(' so it is so{"yes": "y"}') | {"thinking_token_budget": 2}
    thought, answer = ask(openai, ONE, extra, response_format=JSON, reasoning_effort="high")
    assert (thought, json.loads(answer)) == (" so it", {"yes": "y"})


def test_disabled_is_no_thought(openai: Any, script: Script):
    extra = script('<mm:think> cold is</mm:think>{"yes": "y"}')
    thought, answer = ask(openai, ONE, extra, response_format=JSON, reasoning_effort="none")
    assert (thought, json.loads(answer)) == ("", {"yes": "y"})


@pytest.mark.parametrize("effort", [None, "none", "high"])
def test_regex(openai: Any, script: Script, effort: str | None):
    says = (" so</mm:think>" if effort == "high" else "") + " sugaryes"
    options = {"reasoning_effort": effort} if effort else {}
    extra = script(says) | {"structured_outputs": {"regex": "yes|no"}}
    thought, answer = ask(openai, ONE, extra, **options)
    assert answer == "yes"
    assert thought == (" so" if effort == "high" else "")


@pytest.mark.parametrize(("thinking", "streamed"), [(None, False), ({"type": "adaptive"}, False), (None, True)])
def test_anthropic_output_config(anthropic: Any, script: Script, thinking: Any, streamed: bool):
    asked: dict[str, Any] = {
        "model": "m3",
        "max_tokens": 60,
        "messages": ONE,
        "extra_body": script(' sugar{"yes": "y"}')
        | {"temperature": 0, "output_config": {"format": {"type": "json_schema", "schema": ANSWER}}},
    } | ({"thinking": thinking} if thinking else {})
    if streamed:
        with anthropic.messages.stream(**asked) as stream:
            message = stream.get_final_message()
    else:
        message = anthropic.messages.create(**asked)
    (block,) = message.content
    assert json.loads(block.text) == {"yes": "y"}
