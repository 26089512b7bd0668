from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from msa_backend.tiny.tokenizer import BOS, EOS, IMAGE, PAD, SPECIAL_TOKENS, TEXT_MARKERS, VIDEO, token_id, vocab_size
from msa_backend.tiny.words import WORDS

TEXTS = [
    "",
    " ",
    "The river runs through the old city, and nobody asked why.",
    "tabs\tnewlines\r\n\n  double  spaces  ",
    "naïve café, Straße, Ελληνικά, русский, עברית, العربية, हिन्दी",
    "漢字かな交じり文。한국어 문장",
    "emoji 👩‍👩‍👧‍👦🏳️‍🌈, combining e\u0301, zero\u200bwidth, \U0010ffff, \x00\x7f",
    "def f(x):\n    return {'a': x ** 2}  # 100%",
    "a marker ]~b] and <mm:think>thought</mm:think> and ]<]minimax[>[<tool_call> in the text",
    "".join(map(chr, range(0x20, 0x250))),
]


@pytest.fixture(scope="module")
def tokenizer(original: Path) -> Any:
    return AutoTokenizer.from_pretrained(original, local_files_only=True)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_round_trip(text: str, tokenizer: Any) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_words_are_single_tokens(tokenizer: Any) -> None:
    assert len(set(WORDS)) == len(WORDS)
    ids = tokenizer.encode("".join(" " + word for word in WORDS))
    assert len(ids) == len(WORDS)


def test_ids_are_where_the_config_says(original: Path, tokenizer: Any) -> None:
    for marker in SPECIAL_TOKENS + TEXT_MARKERS:
        assert tokenizer.convert_tokens_to_ids(marker) == token_id(marker)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (BOS, EOS, PAD)
    assert len(tokenizer) <= vocab_size() and vocab_size() % 64 == 0
    config = json.loads((original / "config.json").read_text())
    assert config["text_config"]["vocab_size"] == vocab_size()
    assert config["image_token_index"] == token_id(IMAGE) and config["video_token_index"] == token_id(VIDEO)
    assert json.loads((original / "generation_config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id


def test_markers_that_parsers_need_survive_decoding(tokenizer: Any) -> None:
    text = "]~b]<mm:think> so</mm:think>]<]minimax[>[[e~["
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == (
        "<mm:think> so</mm:think>]<]minimax[>["
    )


def test_chat_template(tokenizer: Any) -> None:
    chat = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "What is in "}, {"type": "image"}]},
        {"role": "assistant", "content": "A cat.", "reasoning_content": "whiskers"},
        {"role": "user", "content": "Sure?"},
    ]
    said = (
        "]~!b[]~b]system\nBe kind.[e~[\n]~b]user\nWhat is in ]<]image[>[[e~[\n"
        "]~b]ai\n<mm:think>whiskers</mm:think>A cat.[e~[\n]~b]user\nSure?[e~[\n"
    )
    assert tokenizer.apply_chat_template(chat, tokenize=False) == said
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == said + "]~b]ai\n"
    ids = tokenizer.apply_chat_template(chat, return_dict=False)
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.eos_token_id) == 4


def test_chat_template_refuses_an_unknown_role(tokenizer: Any) -> None:
    with pytest.raises(Exception, match="system, user, assistant or tool, not robot"):
        tokenizer.apply_chat_template([{"role": "robot", "content": "beep"}], tokenize=False)


def test_thinking_mode_leaves_the_prompt_inside_a_thought_or_behind_it(tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "Sure?"}]
    ends = {"enabled": "<mm:think>", "disabled": "</mm:think>", "adaptive": "", None: ""}
    for mode, end in ends.items():
        said = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, thinking_mode=mode)
        assert said == "]~!b[]~b]user\nSure?[e~[\n]~b]ai\n" + end
    with pytest.raises(Exception, match="thinking_mode is enabled, disabled or adaptive, not on"):
        tokenizer.apply_chat_template(chat, tokenize=False, thinking_mode="on")


def test_tools_their_calls_and_their_results(tokenizer: Any) -> None:
    arguments = {"city": "Paris", "days": [1, 2], "in": {"unit": "C", "exact": True}}
    chat = [
        {"role": "user", "content": "Warm?"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]},
        {"role": "tool", "content": "22"},
    ]
    n = "]<]minimax[>["
    call = (
        f'{n}<tool_call>\n{n}<invoke name="f">{n}<city>Paris{n}</city>{n}<days>{n}<item>1{n}</item>{n}<item>2{n}</item>'
        f"{n}</days>{n}<in>{n}<unit>C{n}</unit>{n}<exact>true{n}</exact>{n}</in>{n}</invoke>\n{n}</tool_call>"
    )
    said = f"]~b]user\nWarm?[e~[\n]~b]ai\n{call}[e~[\n]~b]tool\n22[e~[\n"
    tools = [{"type": "function", "function": {"name": "f"}}]
    offered = ']~!b[]~b]system\nTools:\n{"type": "function", "function": {"name": "f"}}\n[e~[\n'
    assert tokenizer.apply_chat_template(chat, tokenize=False, tools=tools) == offered + said
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "]~!b[" + said
