"""Our parsers as vLLM calls them, without a server: whose thought has ended, and which grammar a request gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.exceptions import VLLMValidationError
from vllm.plugins import load_general_plugins
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager

from msa_backend.names import PARSER_NAME

from ..engines.calls import ANSWER, ARGUMENTS, PARAMETERS, calls, openai_tool


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    from vllm.tokenizers import get_tokenizer

    load_general_plugins()
    return get_tokenizer(str(tiny))


def reasoning_parser(tokenizer: Any, mode: str | None = None) -> Any:
    parser = ReasoningParserManager.get_reasoning_parser(PARSER_NAME)
    return parser(tokenizer, chat_template_kwargs={"thinking_mode": mode})


def tool_parser(tokenizer: Any, mode: str | None = None) -> Any:
    return ToolParserManager.get_tool_parser(PARSER_NAME)(tokenizer, chat_template_kwargs={"thinking_mode": mode})


def request(**body: Any) -> Any:
    return ChatCompletionRequest.model_validate({"model": "m3", "messages": [{"role": "user", "content": "?"}]} | body)


def allows(tokenizer: Any, tag: Any, text: str) -> bool:
    """Whether a grammar takes the tokens of a text, and may end there."""
    import xgrammar

    known = xgrammar.TokenizerInfo.from_huggingface(tokenizer, stop_token_ids=[tokenizer.eos_token_id])
    compiled = xgrammar.GrammarCompiler(known).compile_structural_tag(tag)
    matcher = xgrammar.GrammarMatcher(compiled)
    return all(map(matcher.accept_token, [*tokenizer.encode(text), tokenizer.eos_token_id]))


BEFORE = "]~b]user\nHot?[e~[\n]~b]ai\n<mm:think>summer</mm:think>Yes.[e~[\n]~b]user\nCold?[e~[\n]~b]ai\n"
ENDED = [("", False), ("<mm:think>", False), ("</mm:think>", True), ("<mm:think> so</mm:think> no", True)]


@pytest.mark.parametrize(("written", "ended"), ENDED)
def test_a_thought_of_an_earlier_message_is_not_this_ones(tokenizer: Any, written: str, ended: bool):
    assert reasoning_parser(tokenizer).is_reasoning_end(tokenizer.encode(BEFORE + written)) == ended


def test_in_the_engine_the_thought_of_thinking_mode_enabled_ends(tokenizer: Any):
    """The engine shows the parser token ids alone, and all of them: here a grammar would wait for ever with vLLM's."""
    parser = reasoning_parser(tokenizer, "enabled")
    ids = tokenizer.encode(BEFORE + "<mm:think>")
    for text, ended in ((" so", False), ("</mm:think>", True), (" no", True)):
        delta = tokenizer.encode(text)
        ids = ids + delta
        assert parser.is_reasoning_end_streaming(ids, delta) == ended


ASKED = [
    {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": ANSWER}}},
    {"response_format": {"type": "json_object"}},
    {"structured_outputs": {"json": ANSWER}},
    {"structured_outputs": {"choice": ['{"yes": "y"}', "no"]}},
    {"structured_outputs": {"grammar": 'root ::= "{\\"yes\\": \\"y\\"}"'}},
]
ANSWERS = [
    (None, '<mm:think> so</mm:think>{"yes": "y"}', True),
    (None, '{"yes": "y"}', True),
    (None, '</mm:think>{"yes": "y"}', True),
    (None, ' sugar{"yes": "y"}', False),
    (None, '<mm:think> so</mm:think> sugar{"yes": "y"}', False),
    (None, "<mm:think> so", False),
    ("disabled", '{"yes": "y"}', True),
    ("disabled", '<mm:think> so</mm:think>{"yes": "y"}', False),
    ("enabled", ' so</mm:think>{"yes": "y"}', True),
    ("enabled", '{"yes": "y"}', False),
]


@pytest.mark.parametrize("asked", ASKED, ids=range(len(ASKED)))
def test_the_grammar_holds_the_thought(tokenizer: Any, asked: dict[str, Any]):
    for mode, text, allowed in ANSWERS:
        adjusted = reasoning_parser(tokenizer, mode).adjust_request(request(**asked))
        assert adjusted.response_format is None
        assert adjusted.resolve_reasoning_ended(None, []) is True
        assert allows(tokenizer, adjusted.structured_outputs.structural_tag, text) == allowed, (mode, text)


def test_what_xgrammar_refuses_is_left_to_another_backend(tokenizer: Any):
    asked = request(structured_outputs={"regex": "(?<=a)b"})
    adjusted = reasoning_parser(tokenizer).adjust_request(asked)
    assert adjusted.structured_outputs.regex == "(?<=a)b"
    assert adjusted.resolve_reasoning_ended(None, []) is None


def test_nothing_asked_nothing_changed(tokenizer: Any):
    adjusted = reasoning_parser(tokenizer).adjust_request(request())
    assert adjusted.structured_outputs is None
    assert adjusted.resolve_reasoning_ended(None, []) is None


FREE, STRICT = openai_tool("free", PARAMETERS), openai_tool("strict", PARAMETERS, strict=True)
TWO = calls(("free", ARGUMENTS), ("strict", ARGUMENTS))
WRONG = calls(("strict", {"at": "Paris", "n": ["x"]}))
NAMED = {"type": "function", "function": {"name": "strict"}}
CALLS = [
    ("required", TWO, True),
    ("required", " text", False),
    ("required", " text" + TWO, False),
    ("required", TWO + " text", False),
    ("required", calls(("free", {"n": ["x"]})), True),
    ("required", calls(("free", {})), True),
    ("required", WRONG, False),
    ("required", calls(("strict", {"n": [1]})), False),
    ("required", calls(("other", {})), False),
    ("required", calls(), False),
    (NAMED, calls(("strict", ARGUMENTS)), True),
    (NAMED, calls(("free", ARGUMENTS)), False),
    (NAMED, calls(("strict", ARGUMENTS), ("strict", ARGUMENTS)), False),
    ("auto", " text", True),
    ("auto", " text" + TWO, True),
    ("auto", WRONG, False),
]


@pytest.mark.parametrize(
    ("mode", "thought"), [(None, ""), (None, "<mm:think> so</mm:think>"), ("enabled", " so</mm:think>")]
)
def test_the_grammar_of_calls(tokenizer: Any, mode: str | None, thought: str):
    for choice, text, allowed in CALLS:
        asked = request(tools=[FREE, STRICT], tool_choice=choice)
        tag = tool_parser(tokenizer, mode).get_structural_tag(asked)
        assert allows(tokenizer, tag, thought + text) == allowed, (choice, text)
        assert asked.resolve_reasoning_ended(None, []) is True


def test_no_tool_is_strict_and_none_is_asked_for(tokenizer: Any):
    assert tool_parser(tokenizer).get_structural_tag(request(tools=[FREE], tool_choice="auto")) is None


def test_a_strict_schema_that_cannot_be_enforced_is_refused(tokenizer: Any):
    anything = openai_tool("anything", {"type": "object", "properties": {"a": {}}}, strict=True)
    sentence = (
        "the function anything has strict set, but its parameters cannot .* unconstrained schemas.*leave strict out"
    )
    with pytest.raises(VLLMValidationError, match=sentence):
        tool_parser(tokenizer).get_structural_tag(request(tools=[anything], tool_choice="required"))


def test_a_grammar_survives_the_way_to_the_engine(tokenizer: Any):
    tag = tool_parser(tokenizer).get_structural_tag(request(tools=[STRICT], tool_choice="required"))
    assert allows(tokenizer, json.dumps(tag.model_dump()), calls(("strict", ARGUMENTS)))
