"""``--tool-call-parser msa_minimax_m3``: vLLM's for MiniMax-M3, which enforces ``tool_choice`` and ``strict``."""

from __future__ import annotations

from typing import Any

from vllm.tool_parsers.minimax_m3_tool_parser import MinimaxM3ToolParser
from xgrammar import StructuralTag

from .thought_grammar import behind_thought, constrain_from_the_start, thinking_mode
from .tool_grammar import TAG_NAME


class MSAToolParser(MinimaxM3ToolParser):
    """Gives vLLM the grammar of the calls, with the thought before them."""

    structural_tag_model = TAG_NAME

    def __init__(self, tokenizer: Any, tools: Any = None, **kwargs: Any) -> None:
        super().__init__(tokenizer, tools, **kwargs)
        self._thinking_mode = thinking_mode(kwargs.get("chat_template_kwargs"))

    def get_structural_tag(self, request: Any, **options: Any) -> Any:
        tag = super().get_structural_tag(request, **options)
        if tag is None or not constrain_from_the_start(request):
            return tag
        return StructuralTag(format=behind_thought(tag.format, self._thinking_mode))
