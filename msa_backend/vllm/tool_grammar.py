"""Calls of the offered tools in MiniMax-M3's syntax, as a structural tag that vLLM knows by name."""

from __future__ import annotations

from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.tool_parsers.structural_tag_registry import register_vllm_structural_tag
from xgrammar import Grammar, StructuralTag
from xgrammar.structural_tag import (
    AnyTextFormat,
    Format,
    JSONSchemaFormat,
    TagFormat,
    TagsWithSeparatorFormat,
    TriggeredTagsFormat,
)

from msa_backend.markers import NAMESPACE, THINK_END, THINK_START

TAG_NAME = "msa_minimax_m3"

_CALLS = f"{NAMESPACE}<tool_call>"
_CALLS_END = f"{NAMESPACE}</tool_call>"
_INVOKE = f"{NAMESPACE}<invoke"
_INVOKE_END = f"{NAMESPACE}</invoke>"


@register_vllm_structural_tag(TAG_NAME)
def tool_calls(
    tools: list[Any], builtin_tools: list[Any], tool_choice: str, reasoning: bool, token_suffix: str = ""
) -> StructuralTag:
    """What follows the thought: with ``"auto"`` any text and calls, else one block of calls and nothing but that.

    Args:
        tools: what may be called; of ``tool_choice`` ``"forced"``, the one.
        builtin_tools: none, M3 has no such.
        tool_choice: ``"auto"``, ``"required"`` or ``"forced"``.
        reasoning: whether the thought is to be part, which is not done here.
        token_suffix: none, M3's markers are fixed.
    """
    del builtin_tools, reasoning, token_suffix
    block = TagFormat(
        begin=f"{_CALLS}\n",
        content=TagsWithSeparatorFormat(
            tags=[_call(tool.function) for tool in tools],
            separator="\n",
            at_least_one=True,
            stop_after_first=tool_choice == "forced",
        ),
        end=f"\n{_CALLS_END}",
    )
    if tool_choice != "auto":
        return StructuralTag(format=block)
    # A thought among the text would hide what begins a call in it.
    text_excludes = [THINK_START, THINK_END]
    return StructuralTag(format=TriggeredTagsFormat(triggers=[_CALLS], tags=[block], excludes=text_excludes))


def _call(function: Any) -> TagFormat:
    if function.strict:
        arguments = _arguments(function)
    else:
        arguments = AnyTextFormat(excludes=[_CALLS, _CALLS_END, _INVOKE])
    return TagFormat(begin=f'{_INVOKE} name="{function.name}">', content=arguments, end=_INVOKE_END)


def _arguments(function: Any) -> Format:
    """Arguments after the function's schema.

    Raises:
        VLLMValidationError: M3's syntax has no grammar for this schema.
    """
    schema = {"type": "object", "properties": {}} if function.parameters is None else function.parameters
    arguments = JSONSchemaFormat(json_schema=schema, style="minimax_m3_xml")
    try:
        Grammar.from_structural_tag(StructuralTag(format=arguments))
    except RuntimeError as error:
        # xgrammar puts the line of its source in front.
        reason = str(error).strip().rpartition("] ")[2].partition(": ")[2] or str(error)
        raise VLLMValidationError(
            f"the function {function.name} has strict set, but its parameters cannot be enforced in MiniMax-M3's "
            f"tool syntax ({reason.strip()}); change them, or leave strict out"
        ) from error
    return arguments
