"""What SGLang's own ``/v1/messages`` does with M3, over plain HTTP: its environment has no Anthropic client."""

from __future__ import annotations

import json
import urllib.error
from collections.abc import Callable
from typing import Any

import pytest

from ...engines.calls import ANSWER, ARGUMENTS, CONVERSATION, FEW, PARAMETERS, anthropic_tool, calls
from ...engines.capabilities import Can, needs
from ...engines.drivers.running import EngineServer

pytestmark = needs(Can.CALLING)

Script = Callable[[str], dict[str, Any]]

QUESTION = {"role": "user", "content": "Is it warm?"}
FREE, STRICT = anthropic_tool("f", PARAMETERS), anthropic_tool("g", PARAMETERS, strict=True)
BOTH_CALLS = calls(("f", FEW), ("g", ARGUMENTS))
ENABLED = {"type": "enabled", "budget_tokens": 1024}


def request(script: dict[str, Any], **options: Any) -> dict[str, Any]:
    asked: dict[str, Any] = {"model": "m3", "messages": [QUESTION], "max_tokens": 250, "temperature": 0}
    return asked | {"metadata": script} | options


def create(server: EngineServer, script: dict[str, Any], **options: Any) -> Any:
    return server.http.post("/v1/messages", request(script, **options))


def said(message: Any) -> list[Any]:
    """What each block holds."""
    held = {
        "text": lambda block: block["text"],
        "thinking": lambda block: [block["thinking"]],
        "tool_use": lambda block: (block["name"], block["input"]),
    }
    return [held[block["type"]](block) for block in message["content"]]


@pytest.mark.parametrize(("text", "blocks"), [(" yes", [" yes"]), ("<mm:think> so</mm:think> yes", [[" so"], " yes"])])
def test_a_thought_is_a_block(server: EngineServer, script: Script, text: str, blocks: list[Any]):
    message = create(server, script(text))
    assert (said(message), message["stop_reason"]) == (blocks, "end_turn")


@pytest.mark.parametrize("thinking", [ENABLED, {"type": "adaptive"}], ids=["enabled", "adaptive"])
def test_thinking_is_ignored(server: EngineServer, script: Script, thinking: Any):
    """The prompt is the same, and the parser does not expect a thought."""
    message = create(server, script(" so</mm:think> yes"), thinking=thinking, max_tokens=1100)
    assert said(message) == [" so</mm:think> yes"]
    assert message["usage"]["input_tokens"] == create(server, script(" yes"))["usage"]["input_tokens"]


def test_calls(server: EngineServer, script: Script):
    message = create(server, script(BOTH_CALLS), tools=[FREE, STRICT])
    assert (said(message), message["stop_reason"]) == ([("f", FEW), ("g", ARGUMENTS)], "tool_use")


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "g"}], ids=["any", "named"])
def test_any_and_named_are_enforced(server: EngineServer, script: Script, choice: Any):
    """The model wants to say yes first; the call is JSON, not what M3 was trained to write."""
    text = " yes" + json.dumps([{"name": "g", "parameters": {"at": "x"}}])
    assert said(create(server, script(text), tools=[STRICT], tool_choice=choice)) == [("g", {"at": "x"})]


def test_events(server: EngineServer, script: Script):
    asked = request(script("<mm:think> so</mm:think> yes" + BOTH_CALLS), tools=[FREE, STRICT])
    events = list(server.http.stream("/v1/messages", asked))
    kinds = [event["type"] for event in events]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    started = [event["content_block"]["type"] for event in events if event["type"] == "content_block_start"]
    assert started == ["thinking", "text", "tool_use", "tool_use"]
    pieces = [event for event in events if event["type"] == "content_block_delta"]
    called = [
        "".join(piece["delta"].get("partial_json", "") for piece in pieces if piece["index"] == at) for at in (2, 3)
    ]
    assert [json.loads(arguments) for arguments in called] == [FEW, ARGUMENTS]
    assert "".join(piece["delta"].get("text", "") for piece in pieces) == " yes"


def test_a_conversation_of_blocks(server: EngineServer, script: Script):
    system = [{"type": "text", "text": "Be brief."}]
    assert said(create(server, script(" yes"), messages=CONVERSATION, system=system, tools=[FREE])) == [" yes"]


def test_output_config(server: EngineServer, script: Script):
    """The model wants to chat."""
    form = {"format": {"type": "json_schema", "schema": ANSWER}}
    (text,) = said(create(server, script(' sugar{"yes": "y"}'), output_config=form))
    assert json.loads(text) == {"yes": "y"}


def test_a_stop_sequence_is_the_end_of_a_turn(server: EngineServer, script: Script):
    message = create(server, script(" yes it is"), stop_sequences=[" it"])
    assert (said(message), message["stop_reason"]) == ([" yes"], "end_turn")


def test_usage_tells_what_was_cached(server: EngineServer, script: Script):
    long = [{"role": "user", "content": " cold" * 700}]
    first, second = (create(server, script(" yes"), messages=long)["usage"] for _ in range(2))
    counted = server.http.post("/v1/messages/count_tokens", {"model": "m3", "messages": long})
    assert first == {"input_tokens": counted["input_tokens"], "output_tokens": 2}
    assert second["cache_read_input_tokens"] == first["input_tokens"] // 128 * 128 > 0
    assert second["input_tokens"] + second["cache_read_input_tokens"] == first["input_tokens"]


INVALID = "invalid_request_error"
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
MISTAKES: dict[str, tuple[dict[str, Any], str, str]] = {
    "an image": ({"messages": [{"role": "user", "content": [IMAGE]}]}, INVALID, "only supports text input"),
    "a document": ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, INVALID, "document"),
    "no thinking": ({"thinking": {"type": "disabled"}}, INVALID, "always-on and cannot be disabled"),
    "a budget that is too small": ({"thinking": {"type": "enabled", "budget_tokens": 3}}, INVALID, "1024"),
    "an unknown choice": ({"tools": [FREE], "tool_choice": {"type": "sometimes"}}, INVALID, "'any'"),
    "no tokens": ({"max_tokens": 0}, INVALID, "max_tokens"),
    # Not a name of Anthropic's.
    "too long": ({"messages": [{"role": "user", "content": " warm" * 5000}]}, "BadRequestError", "4096"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_errors(server: EngineServer, script: Script, mistake: str):
    options, kind, says = MISTAKES[mistake]
    with pytest.raises(urllib.error.HTTPError) as refused:
        create(server, script(" yes"), **options)
    assert refused.value.code == 400
    body = json.loads(refused.value.read())
    assert (body["type"], body["error"]["type"]) == ("error", kind)
    assert says in body["error"]["message"]
    assert said(create(server, script(" yes"))) == [" yes"]


def test_an_unknown_model_is_answered(server: EngineServer, script: Script):
    assert said(create(server, script(" yes"), model="m4")) == [" yes"]
