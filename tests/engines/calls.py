"""Tools, and calls of them as MiniMax-M3 writes them."""

from __future__ import annotations

from typing import Any

N = "]<]minimax[>["

# Short names, as the tiny tokenizer spells them in bytes, and a word that it knows.
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "at": {"type": "string"},
        "n": {"type": "array", "items": {"type": "integer"}},
        "o": {"type": "object", "properties": {"u": {"enum": ["C", "F"]}, "x": {"type": "boolean"}}},
    },
    "required": ["at"],
}
ARGUMENTS = {"at": " castle", "n": [1, 2], "o": {"u": "C", "x": True}}
"""Nested as :data:`PARAMETERS` say."""

FEW = {"at": " castle"}
"""What they require."""

ANSWER: dict[str, Any] = {"type": "object", "properties": {"yes": {"enum": ["y"]}}, "required": ["yes"]}
"""Leaves a model that does not want to say it no other words."""


def element(name: str, value: Any) -> str:
    if isinstance(value, dict):
        value = "".join(element(key, item) for key, item in value.items())
    elif isinstance(value, list):
        value = "".join(element("item", item) for item in value)
    elif isinstance(value, bool):
        value = str(value).lower()
    return f"{N}<{name}>{value}{N}</{name}>"


def calls(*called: tuple[str, dict[str, Any]]) -> str:
    """A block of calls."""
    each = [
        f'{N}<invoke name="{name}">' + "".join(element(key, value) for key, value in arguments.items())
        for name, arguments in called
    ]
    return f"{N}<tool_call>\n" + "".join(f"{call}{N}</invoke>\n" for call in each) + f"{N}</tool_call>"


def openai_tool(name: str, parameters: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


def anthropic_tool(name: str, parameters: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": name, "input_schema": parameters, **more}


CONVERSATION: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "Is it warm?", "cache_control": {"type": "ephemeral"}}]},
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "look", "signature": ""},
            {"type": "text", "text": "Let me look."},
            {"type": "tool_use", "id": "1", "name": "f", "input": ARGUMENTS},
        ],
    },
    {
        "role": "user",
        "content": [{"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "22"}]}],
    },
]
"""In Anthropic's blocks: text, thinking, a call and its result."""
