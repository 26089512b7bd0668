"""What SGLang's own server and parsers do with M3, asked by the official OpenAI client.

Nothing of this package is in it: where SGLang does not enforce something, the test states what it does, so that
docs/calling-m3.md names it and a version that mends it is noticed.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

from ...engines.calls import ANSWER, ARGUMENTS, FEW, PARAMETERS, calls, openai_tool
from ...engines.capabilities import Can, needs
from ...engines.chat import QUESTION, Said, both_ways, create, streamed, whole
from ...engines.drivers.running import EngineServer

pytestmark = needs(Can.CALLING)

Script = Callable[[str], dict[str, Any]]

FREE, STRICT = openai_tool("f", PARAMETERS), openai_tool("g", PARAMETERS, strict=True)
BOTH_CALLS = calls(("f", FEW), ("g", ARGUMENTS))
JSON = {"type": "json_schema", "json_schema": {"name": "answer", "schema": ANSWER, "strict": True}}
CONVERSATION = [QUESTION, {"role": "assistant", "content": "Yes.", "reasoning_content": "summer"}, QUESTION]


def mode(value: str) -> dict[str, Any]:
    return {"chat_template_kwargs": {"thinking_mode": value}}


@both_ways
@pytest.mark.parametrize(
    ("extra", "script_text", "thought"),
    [
        ({}, "<mm:think> so</mm:think> yes", " so"),
        ({}, " yes", ""),
        (mode("adaptive"), "<mm:think> so</mm:think> yes", " so"),
        (mode("enabled"), " so</mm:think> yes", " so"),
        (mode("disabled"), " yes", ""),
        ({"thinking": {"type": "enabled"}}, " so</mm:think> yes", " so"),
        ({"messages": CONVERSATION}, "<mm:think> so</mm:think> yes", " so"),
    ],
)
def test_thinking(openai: Any, script: Script, ask: Any, extra: dict[str, Any], script_text: str, thought: str):
    assert ask(openai, script(script_text) | extra) == Said(thought, " yes", [], "stop")


@both_ways
def test_a_thought_cut_off(openai: Any, script: Script, ask: Any):
    found = ask(openai, script(" so it is</mm:think> yes") | mode("enabled"), max_tokens=2)
    assert found == Said(" so it", "", [], "length")


def test_the_template_gets_the_mode(openai: Any, script: Script):
    """Its prefilled marker is a token more. An effort turns thinking off, but not on."""

    def length(**extra: Any) -> int:
        return create(openai, script(" yes") | extra, max_tokens=1).usage.prompt_tokens

    plain = length()
    more = [mode("enabled"), mode("disabled"), {"thinking": {"type": "enabled"}}]
    more += [{"reasoning_effort": "none"}, {"reasoning_effort": "minimal"}]
    assert [length(**extra) for extra in more] == [plain + 1] * len(more)
    assert length(reasoning_effort="high") == length(**mode("adaptive")) == plain


@pytest.mark.parametrize(("ask", "thought"), [(whole, ""), (streamed, " so")])
def test_calls(openai: Any, script: Script, ask: Any, thought: str):
    """Two, with nested arguments, behind a thought or not."""
    extra = script(f"{thought}</mm:think>{BOTH_CALLS}") | mode("enabled") if thought else script(BOTH_CALLS)
    found = ask(openai, extra, tools=[FREE, STRICT])
    assert found == Said(thought, "", [("f", FEW), ("g", ARGUMENTS)], "tool_calls")


NAMED = {"type": "function", "function": {"name": "g"}}
CALL_IN_JSON = json.dumps([{"name": "g", "parameters": {"at": "x"}}])


@both_ways
@pytest.mark.parametrize(("choice", "thought"), [("required", ""), ("required", " so"), (NAMED, "")])
def test_required_and_named_are_enforced(openai: Any, script: Script, ask: Any, choice: Any, thought: str):
    """The model wants to say yes first."""
    text = f" yes{CALL_IN_JSON}"
    extra = script(f"{thought}</mm:think>{text}") | mode("enabled") if thought else script(text)
    found = ask(openai, extra, tools=[STRICT], tool_choice=choice)
    assert found == Said(thought, "", [("g", {"at": "x"})], "tool_calls")


def test_required_takes_json_alone(openai: Any, script: Script):
    """What M3 was trained to write is forbidden, and cut off the JSON is content."""
    found = whole(openai, script(BOTH_CALLS), tools=[FREE, STRICT], tool_choice="required", max_tokens=10)
    assert found.text.startswith("[") and "minimax" not in found.text
    assert (found.called, found.finished) == ([], "length")


@both_ways
def test_strict_is_not_enforced_for_auto(openai: Any, script: Script, ask: Any):
    one = {"type": "object", "properties": {"u": {"enum": ["C"]}}, "required": ["u"]}
    found = ask(openai, script(calls(("g", {"u": "K"}))), tools=[openai_tool("g", one, strict=True)])
    assert found.called == [("g", {"u": "K"})]


@both_ways
def test_parallel_off_is_ignored(openai: Any, script: Script, ask: Any):
    extra = script(calls(("f", FEW), ("g", FEW)))
    found = ask(openai, extra, tools=[FREE, STRICT], parallel_tool_calls=False)
    assert [name for name, _ in found.called] == ["f", "g"]


def test_a_block_of_calls_cut_off(openai: Any, script: Script):
    """The call that is complete comes when streamed; else all of it is content."""
    cut = {"tools": [FREE, STRICT], "max_tokens": 50}
    assert streamed(openai, script(BOTH_CALLS), **cut) == Said("", "", [("f", FEW)], "length")
    found = whole(openai, script(BOTH_CALLS), **cut)
    assert BOTH_CALLS.startswith(found.text.rstrip()) and found.text
    assert (found.called, found.finished) == ([], "length")


@both_ways
def test_without_tools(openai: Any, script: Script, ask: Any):
    """A call comes as text with ``none``, and as a call where no tool was offered."""
    call = calls(("f", FEW))
    found = ask(openai, script(call), tools=[FREE], tool_choice="none")
    assert found == Said("", call, [], "stop")
    assert ask(openai, script(call)) == Said("", "", [("f", FEW)], "tool_calls")


def test_a_call_of_what_was_not_offered(openai: Any, script: Script):
    """Comes when streamed, and is dropped when not."""
    extra = script(calls(("h", FEW)))
    assert streamed(openai, extra, tools=[FREE]) == Said("", "", [("h", FEW)], "tool_calls")
    assert whole(openai, extra, tools=[FREE]) == Said("", "", [], "stop")


def test_a_conversation_with_a_result(openai: Any, script: Script):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": json.dumps(ARGUMENTS)}}
    messages = [
        QUESTION,
        {"role": "assistant", "content": None, "reasoning_content": "look", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "22"},
    ]
    assert whole(openai, script(" yes"), messages=messages, tools=[FREE]).text == " yes"


@both_ways
@pytest.mark.parametrize(
    ("value", "messages"),
    [("disabled", [QUESTION]), ("adaptive", CONVERSATION), ("enabled", [QUESTION]), ("enabled", CONVERSATION)],
)
def test_json_from_the_first_token(openai: Any, script: Script, ask: Any, value: str, messages: Any):
    """The model wants to chat, and after a thought, too."""
    thought = " cold is" if value == "enabled" else ""
    says = (f"{thought}</mm:think>" if thought else "") + ' sugar{"yes": "y"}'
    found = ask(openai, script(says) | mode(value), messages=messages, response_format=JSON)
    assert (found.thought, json.loads(found.text), found.finished) == (thought, {"yes": "y"}, "stop")


@both_ways
@pytest.mark.parametrize("extra", [{}, mode("adaptive")], ids=["unsaid", "adaptive"])
def test_json_suppresses_a_thought_that_is_not_prefilled(openai: Any, script: Script, ask: Any, extra: Any):
    found = ask(openai, script('<mm:think> cold is</mm:think>{"yes": "y"}') | extra, response_format=JSON)
    assert (found.thought, json.loads(found.text)) == ("", {"yes": "y"})


@both_ways
@pytest.mark.parametrize("thought", ["", " so"])
def test_regex(openai: Any, script: Script, ask: Any, thought: str):
    extra = script(f"{thought}</mm:think> sugaryes") | mode("enabled") if thought else script(" sugaryes")
    found = ask(openai, extra | {"regex": "yes|no"})
    assert found == Said(thought, "yes", [], "stop")


def test_usage_tells_what_was_cached(openai: Any, script: Script):
    long = [{"role": "user", "content": " warm" * 700}]
    first, second = (create(openai, script(" yes"), messages=long).usage for _ in range(2))
    assert (first.completion_tokens, first.total_tokens) == (2, first.prompt_tokens + 2)
    assert second.prompt_tokens_details.cached_tokens == first.prompt_tokens // 128 * 128 > 0


def test_thoughts_are_counted_with_their_marker(openai: Any, script: Script):
    usage = create(openai, script(" so it</mm:think> yes") | mode("enabled")).usage
    assert usage.completion_tokens_details.reasoning_tokens == 3


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "an image": ({"messages": [{"role": "user", "content": [IMAGE]}]}, "only supports text input"),
    # With the place in the server's source.
    "an unknown tool_choice": ({"tools": [FREE], "tool_choice": "sometimes"}, "sometimes.*http_server.py"),
    "an unknown function": ({"tools": [FREE], "tool_choice": NAMED}, "'g' not found"),
    "required without tools": ({"tool_choice": "required"}, "Tools cannot be empty"),
    "an unknown effort": ({"reasoning_effort": "huge"}, "huge"),
    "an unknown mode": (mode("on"), "enabled, disabled or adaptive, not on"),
    "an unknown thinking": ({"thinking": {"type": "on"}}, "thinking.type must be"),
    "no regex": ({"regex": "("}, "parenthesis"),
    "too long": ({"messages": [{"role": "user", "content": " warm" * 5000}]}, "4096"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_errors(openai: Any, script: Script, mistake: str):
    from openai import BadRequestError

    extra, says = MISTAKES[mistake]
    with pytest.raises(BadRequestError, match=says):
        create(openai, script(" yes") | extra)
    assert whole(openai, script(" yes")).text == " yes"


@pytest.mark.parametrize(("body", "code"), [(b"{", 400), (b"[]", 500)], ids=["no JSON", "no object"])
def test_a_body_that_is_no_request(server: EngineServer, openai: Any, script: Script, body: bytes, code: int):
    request = urllib.request.Request(
        f"{server.http.url}/v1/chat/completions", body, {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=30)
    assert refused.value.code == code
    assert whole(openai, script(" yes")).text == " yes"


def test_an_unknown_model_is_answered(openai: Any, script: Script):
    assert whole(openai, script(" yes"), model="m4").text == " yes"
