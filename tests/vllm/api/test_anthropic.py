"""The official Anthropic client: blocks, thinking, tools, usage and errors, streamed and not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ...engines.calls import ARGUMENTS, CONVERSATION, FEW, PARAMETERS, anthropic_tool, calls
from ...engines.capabilities import Can, needs
from ...engines.drivers.running import EngineServer

pytestmark = needs(Can.CALLING)

Script = Callable[[str], dict[str, Any]]

QUESTION = {"role": "user", "content": "Is it warm?"}
FREE, STRICT = anthropic_tool("f", PARAMETERS), anthropic_tool("g", PARAMETERS, strict=True)
BOTH_CALLS = calls(("f", FEW), ("g", ARGUMENTS))
ENABLED = {"type": "enabled", "budget_tokens": 1024}
LIMIT = 1100
"""More than a budget, which is 1,024 at least."""


def create(anthropic: Any, extra: dict[str, Any], **options: Any) -> Any:
    asked: dict[str, Any] = {"model": "m3", "messages": [QUESTION], "max_tokens": LIMIT}
    return anthropic.messages.create(**asked | options, extra_body=extra | {"temperature": 0})


def stream(anthropic: Any, extra: dict[str, Any], **options: Any) -> Any:
    asked: dict[str, Any] = {"model": "m3", "messages": [QUESTION], "max_tokens": LIMIT}
    with anthropic.messages.stream(**asked | options, extra_body=extra | {"temperature": 0}) as events:
        return events.get_final_message()


both_ways = pytest.mark.parametrize("ask", [create, stream])


def said(message: Any) -> list[Any]:
    """What each block holds."""
    held = {
        "text": lambda block: block.text,
        "thinking": lambda block: [block.thinking],
        "tool_use": lambda block: (block.name, block.input),
    }
    return [held[block.type](block) for block in message.content]


@both_ways
@pytest.mark.parametrize(
    ("thinking", "script_text", "blocks"),
    [
        (None, " yes", [" yes"]),
        ({"type": "disabled"}, " yes", [" yes"]),
        ({"type": "adaptive"}, " yes", [" yes"]),
        ({"type": "adaptive"}, "<mm:think> so</mm:think> yes", [[" so"], " yes"]),
        (ENABLED, " so</mm:think> yes", [[" so"], " yes"]),
    ],
)
def test_thinking(anthropic: Any, script: Script, ask: Any, thinking: Any, script_text: str, blocks: list[Any]):
    message = ask(anthropic, script(script_text), **({"thinking": thinking} if thinking else {}))
    assert said(message) == blocks
    assert message.stop_reason == "end_turn"


def test_the_template_gets_the_mode(anthropic: Any):
    """A prefilled marker is a token more; count_tokens counts what a request will have."""

    def counted(**options: Any) -> int:
        return anthropic.messages.count_tokens(model="m3", messages=[QUESTION], **options).input_tokens

    adaptive = counted(thinking={"type": "adaptive"})
    assert counted() == counted(thinking={"type": "disabled"}) == counted(thinking=ENABLED) == adaptive + 1
    assert create(anthropic, {}, max_tokens=1).usage.input_tokens == adaptive + 1
    assert counted(tools=[FREE]) > adaptive + 1


@pytest.mark.parametrize(("ask", "choice"), [(create, "auto"), (stream, None), (stream, "any")])
def test_calls(anthropic: Any, script: Script, ask: Any, choice: str | None):
    options: dict[str, Any] = {"tools": [FREE, STRICT]} | ({"tool_choice": {"type": choice}} if choice else {})
    message = ask(anthropic, script(BOTH_CALLS), **options)
    assert said(message) == [("f", FEW), ("g", ARGUMENTS)]
    assert message.stop_reason == "tool_use"


@both_ways
def test_a_thought_before_a_call(anthropic: Any, script: Script, ask: Any):
    extra = script(" so</mm:think>" + calls(("g", FEW)))
    message = ask(anthropic, extra, tools=[STRICT], tool_choice={"type": "any"}, thinking=ENABLED)
    assert said(message) == [[" so"], ("g", FEW)]


@both_ways
def test_any_is_enforced(anthropic: Any, script: Script, ask: Any):
    """The model wants to say yes first."""
    found = ask(anthropic, script(" yes" + calls(("f", FEW))), tools=[FREE], tool_choice={"type": "any"})
    assert said(found) == [("f", FEW)]


@both_ways
def test_a_named_tool_is_enforced(anthropic: Any, script: Script, ask: Any):
    """The model wants to call the other one."""
    named = {"type": "tool", "name": "g"}
    assert said(ask(anthropic, script(calls(("f", FEW))), tools=[FREE, STRICT], tool_choice=named)) == [("g", FEW)]


@pytest.mark.parametrize(("ask", "choice"), [(create, "any"), (stream, "auto")])
def test_parallel_off(anthropic: Any, script: Script, ask: Any, choice: str):
    once = {"type": choice, "disable_parallel_tool_use": True}
    message = ask(anthropic, script(BOTH_CALLS), tools=[FREE, STRICT], tool_choice=once)
    assert said(message) == [("f", FEW)]


@both_ways
def test_a_call_cut_off(anthropic: Any, script: Script, ask: Any):
    message = ask(anthropic, script(BOTH_CALLS), tools=[FREE], tool_choice={"type": "any"}, max_tokens=50)
    assert message.stop_reason == "max_tokens"


def test_a_conversation_of_blocks(anthropic: Any, script: Script):
    """Text, thinking, a call and its result."""
    system = [{"type": "text", "text": "Be brief."}]
    message = create(anthropic, script(" yes"), messages=CONVERSATION, system=system, tools=[FREE])
    assert said(message) == [" yes"]


def test_a_stop_sequence(anthropic: Any, script: Script):
    message = create(anthropic, script(" yes it is"), stop_sequences=[" it"])
    assert (said(message), message.stop_reason) == ([" yes"], "stop_sequence")


def test_events(anthropic: Any, script: Script):
    extra = script("<mm:think> so</mm:think> yes" + calls(("f", FEW)))
    options = {"tools": [FREE], "thinking": {"type": "adaptive"}}
    events = list(create(anthropic, extra, **options, stream=True))
    kinds = [event.type for event in events]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    started = [event.content_block.type for event in events if event.type == "content_block_start"]
    assert started == ["thinking", "text", "tool_use"]
    assert kinds.count("content_block_stop") == len(started)


def test_usage_tells_what_was_cached(anthropic: Any, script: Script):
    """Read from the cache, or written to it, or neither; the sum is the prompt."""
    long = [{"role": "user", "content": " cold" * 700}]
    first, second = (create(anthropic, script(" yes"), messages=long).usage for _ in range(2))
    assert first.output_tokens == second.output_tokens == 2
    prompt = first.input_tokens + first.cache_creation_input_tokens
    assert second.cache_read_input_tokens == prompt // 128 * 128 > 0
    assert second.input_tokens + second.cache_read_input_tokens == prompt


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "an image, where there is text only": ({"messages": [{"role": "user", "content": [IMAGE]}]}, "image|multimodal"),
    "a budget that is too small": ({"thinking": {"type": "enabled", "budget_tokens": 3}}, "1024"),
    "too long": ({"messages": [{"role": "user", "content": " warm" * 5000}]}, "4096"),
    "an unknown thinking": ({"thinking": {"type": "on"}}, "thinking"),
    "a document, which is no block of vLLM's": (
        {"messages": [{"role": "user", "content": [{"type": "document"}]}]},
        "document|type",
    ),
    "no tokens": ({"max_tokens": 0}, "max_tokens"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_errors(anthropic: Any, script: Script, mistake: str):
    """Of Anthropic's form, also where vLLM answers in OpenAI's."""
    from anthropic import BadRequestError

    options, says = MISTAKES[mistake]
    with pytest.raises(BadRequestError, match=says) as refused:
        create(anthropic, script(" yes"), **options)
    assert error_type(refused.value) == "invalid_request_error"
    assert said(create(anthropic, script(" yes"))) == [" yes"]


def test_an_unknown_model(anthropic: Any):
    from anthropic import NotFoundError

    with pytest.raises(NotFoundError, match="m4") as refused:
        create(anthropic, {}, model="m4")
    assert error_type(refused.value) == "not_found_error"


def test_a_request_over_the_limit(anthropic: Any, openai: Any, script: Script):
    """One MB here."""
    from anthropic import APIStatusError
    from openai import APIStatusError as OpenAIStatusError

    messages = [{"role": "user", "content": "x" * 1_100_000}]
    says = "the request is 1.0 MB, but this server takes 1 MB at most"
    with pytest.raises(APIStatusError, match=says) as refused:
        create(anthropic, {}, messages=messages)
    assert (refused.value.status_code, error_type(refused.value)) == (413, "request_too_large")
    with pytest.raises(OpenAIStatusError, match=says):
        openai.chat.completions.create(model=EngineServer.MODEL, messages=messages, max_tokens=3)
    assert said(create(anthropic, script(" yes"))) == [" yes"]


def error_type(error: Any) -> str:
    assert error.body["type"] == "error"
    return error.body["error"]["type"]
