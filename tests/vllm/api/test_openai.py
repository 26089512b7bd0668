"""The official OpenAI client: thoughts, tools, usage and errors, streamed and not."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from ...engines.calls import ARGUMENTS, FEW, PARAMETERS, calls, openai_tool
from ...engines.capabilities import Can, needs
from ...engines.chat import QUESTION, Said, both_ways, create, streamed, whole

pytestmark = needs(Can.CALLING)

Script = Callable[[str], dict[str, Any]]

FREE, STRICT = openai_tool("f", PARAMETERS), openai_tool("g", PARAMETERS, strict=True)
BOTH_CALLS = calls(("f", FEW), ("g", ARGUMENTS))


@both_ways
@pytest.mark.parametrize(
    ("effort", "script_text", "thought", "text"),
    [
        (None, "<mm:think> so</mm:think> yes", " so", " yes"),
        (None, " yes", "", " yes"),
        ("high", " so</mm:think> yes", " so", " yes"),
        ("none", " yes", "", " yes"),
    ],
)
def test_thinking(openai: Any, script: Script, ask: Any, effort: str | None, script_text: str, thought: str, text: str):
    options = {"reasoning_effort": effort} if effort else {}
    assert ask(openai, script(script_text), **options) == Said(thought, text, [], "stop")


@both_ways
def test_a_thought_cut_off(openai: Any, script: Script, ask: Any):
    found = ask(openai, script(" so it is</mm:think> yes"), reasoning_effort="low", max_tokens=2)
    assert found == Said(" so it", "", [], "length")


@both_ways
def test_a_thought_after_a_conversation_with_one(openai: Any, script: Script, ask: Any):
    messages = [QUESTION, {"role": "assistant", "content": "Yes.", "reasoning": "summer"}, QUESTION]
    found = ask(openai, script("<mm:think> so</mm:think> yes"), messages=messages)
    assert found == Said(" so", " yes", [], "stop")


def test_the_template_gets_the_mode(openai: Any, script: Script):
    """Its prefilled marker is a token more, and an explicit thinking_mode wins."""

    def length(**options: Any) -> int:
        extra = script(" yes") | options.pop("extra", {})
        return create(openai, extra, max_tokens=1, **options).usage.prompt_tokens

    plain = length()
    assert length(reasoning_effort="high") == length(reasoning_effort="minimal") == plain + 1
    assert length(reasoning_effort="high", extra={"chat_template_kwargs": {"thinking_mode": "adaptive"}}) == plain


@both_ways
@pytest.mark.parametrize(("choice", "effort"), [("auto", None), ("required", None), ("required", "high")])
def test_calls(openai: Any, script: Script, ask: Any, choice: str, effort: str | None):
    """Two, with nested arguments, behind a thought or not."""
    thought = " so" if effort else ""
    options: dict[str, Any] = {"tools": [FREE, STRICT], "tool_choice": choice}
    options |= {"reasoning_effort": effort} if effort else {}
    found = ask(openai, script((f"{thought}</mm:think>" if thought else "") + BOTH_CALLS), **options)
    assert found == Said(thought, "", [("f", FEW), ("g", ARGUMENTS)], "tool_calls")


@both_ways
@pytest.mark.parametrize("tool", [FREE, STRICT], ids=["free", "strict"])
def test_required_is_enforced(openai: Any, script: Script, ask: Any, tool: Any):
    """The model wants to say yes first."""
    name = tool["function"]["name"]
    found = ask(openai, script(" yes" + calls((name, FEW))), tools=[tool], tool_choice="required")
    assert found == Said("", "", [(name, FEW)], "tool_calls")


@both_ways
def test_a_named_function_is_enforced(openai: Any, script: Script, ask: Any):
    """The model wants to call the other one. A named call finishes as OpenAI's do, with stop."""
    named = {"type": "function", "function": {"name": "g"}}
    found = ask(openai, script(calls(("f", FEW))), tools=[FREE, STRICT], tool_choice=named)
    assert found.called == [("g", FEW)]
    assert found.finished in ("stop", "tool_calls")


@both_ways
def test_strict_is_enforced_for_auto(openai: Any, script: Script, ask: Any):
    """The model wants a unit that does not exist."""
    one = {"type": "object", "properties": {"u": {"enum": ["C"]}}, "required": ["u"]}
    found = ask(openai, script(calls(("g", {"u": "K"}))), tools=[openai_tool("g", one, strict=True)])
    assert found.called == [("g", {"u": "C"})]


@pytest.mark.parametrize(("ask", "choice"), [(whole, "auto"), (streamed, "required")])
def test_parallel_off(openai: Any, script: Script, ask: Any, choice: str):
    tools = {"tools": [FREE, STRICT], "tool_choice": choice, "parallel_tool_calls": False}
    found = ask(openai, script(BOTH_CALLS), **tools)
    assert found == Said("", "", [("f", FEW)], "tool_calls")


def test_a_call_cut_off(openai: Any, script: Script):
    """No half arguments; the reason says why."""
    found = create(openai, script(BOTH_CALLS), tools=[FREE, STRICT], tool_choice="required", max_tokens=50)
    (choice,) = found.choices
    assert choice.finish_reason == "length"
    assert all(json.loads(call.function.arguments) is not None for call in choice.message.tool_calls or [])


@both_ways
def test_no_tool(openai: Any, script: Script, ask: Any):
    assert ask(openai, script(" yes"), tools=[FREE], tool_choice="none") == Said("", " yes", [], "stop")


def test_a_conversation_with_a_result(openai: Any, script: Script):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": json.dumps(ARGUMENTS)}}
    messages = [
        QUESTION,
        {"role": "assistant", "content": None, "reasoning": "look", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "22"},
    ]
    assert whole(openai, script(" yes"), messages=messages, tools=[FREE]).text == " yes"


def test_usage_tells_what_was_cached(openai: Any, script: Script):
    long = [{"role": "user", "content": " warm" * 700}]
    first, second = (create(openai, script(" yes"), messages=long).usage for _ in range(2))
    assert (first.completion_tokens, first.total_tokens) == (2, first.prompt_tokens + 2)
    assert second.prompt_tokens_details.cached_tokens == first.prompt_tokens // 128 * 128 > 0


def test_thoughts_are_counted(openai: Any, script: Script):
    usage = create(openai, script(" so it</mm:think> yes"), reasoning_effort="high").usage
    assert usage.completion_tokens_details.reasoning_tokens == 2


def test_responses(openai: Any, script: Script):
    extra = script(" so</mm:think> yes")
    found = openai.responses.create(
        model="m3", input="Is it warm?", reasoning={"effort": "high"}, max_output_tokens=60, extra_body=extra
    )
    assert [item.type for item in found.output] == ["reasoning", "message"]
    assert found.output_text == " yes"


ANYTHING = openai_tool("anything", {"type": "object", "properties": {"a": {}}}, strict=True)
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "a schema without grammar": ({"tools": [ANYTHING], "tool_choice": "required"}, "leave strict out"),
    "an unknown effort": ({"reasoning_effort": "huge"}, "huge"),
    "an unknown mode": (
        {"extra": {"chat_template_kwargs": {"thinking_mode": "on"}}},
        "enabled, disabled or adaptive, not on",
    ),
    "an unknown function": (
        {"tools": [FREE], "tool_choice": {"type": "function", "function": {"name": "other"}}},
        "tool_choice",
    ),
    "too long": ({"messages": [{"role": "user", "content": " warm" * 5000}]}, "4096"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_errors(openai: Any, script: Script, mistake: str):
    from openai import BadRequestError

    options, says = MISTAKES[mistake]
    options = dict(options)
    with pytest.raises(BadRequestError, match=says):
        create(openai, script(" yes") | options.pop("extra", {}), **options)
    assert whole(openai, script(" yes")).text == " yes"


def test_an_unknown_model(openai: Any):
    from openai import NotFoundError

    with pytest.raises(NotFoundError, match="m4"):
        create(openai, {}, model="m4")
