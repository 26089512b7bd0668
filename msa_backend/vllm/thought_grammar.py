"""A grammar for MiniMax-M3's whole answer: its thought, and behind that what a request asks to be constrained.

vLLM lets a model with a reasoning parser think first, and constrains what follows the token that ends the thought. But
whether M3 thinks at all shows only in its first token, which vLLM therefore leaves free. With the thought inside the
grammar there is nothing to wait for: the first token begins a thought, or what was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xgrammar.structural_tag import (
    AnyTextFormat,
    ConstStringFormat,
    Format,
    OptionalFormat,
    OrFormat,
    SequenceFormat,
    TagFormat,
)

from msa_backend.markers import THINK_END, THINK_START

_FROM_THE_START = "_grammar_from_parser"


def thinking_mode(chat_template_kwargs: Mapping[str, Any] | None) -> str | None:
    """What the chat template was given, and the parser is."""
    return (chat_template_kwargs or {}).get("thinking_mode")


def behind_thought(constrained: Format, mode: str | None) -> Format:
    """``constrained`` after the thought that ``mode`` leaves to the model.

    Args:
        constrained: the answer without its thought.
        mode: ``"enabled"``, the prompt ends inside a thought; ``"disabled"``, there is none; else the model chooses.
    """
    if mode == "disabled":
        return constrained
    if mode == "enabled":
        thought: Format = TagFormat(begin="", content=AnyTextFormat(), end=THINK_END)
    else:
        whole = TagFormat(begin=THINK_START, content=AnyTextFormat(), end=THINK_END)
        # M3 may say that it does not think by ending what it did not begin.
        thought = OptionalFormat(content=OrFormat(elements=[whole, ConstStringFormat(value=THINK_END)]))
    return SequenceFormat(elements=[thought, constrained])


def constrain_from_the_start(request: Any) -> bool:
    """Have the engine apply the request's grammar from the first token on, thought or not.

    vLLM keeps the switch on the request, for a parser's ``adjust_request`` to set. Its Responses API has it from 0.33
    on.

    Returns:
        False where this request has none, and its grammar has to begin behind the thought.
    """
    if not hasattr(request, _FROM_THE_START):
        return False
    setattr(request, _FROM_THE_START, True)
    return True
