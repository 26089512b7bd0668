"""``--reasoning-parser msa_minimax_m3``: vLLM's for MiniMax-M3, which looks at the message being written alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.parser.abstract_parser import structured_outputs_to_format
from vllm.reasoning.minimax_m3_reasoning_parser import MiniMaxM3ReasoningParser
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.structured_output.backend_xgrammar import validate_xgrammar_grammar
from xgrammar import StructuralTag

from msa_backend.markers import ROLE

from .thought_grammar import behind_thought, constrain_from_the_start, thinking_mode

logger = init_logger("vllm.msa_backend")


class MSAReasoningParser(MiniMaxM3ReasoningParser):
    """Where vLLM's goes by any thought in the prompt, this one goes by the last message's.

    And it puts the thought into the grammar of a structured output, see :mod:`thought_grammar`.
    """

    def __init__(self, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(tokenizer, *args, **kwargs)
        self._thinking_mode = thinking_mode(kwargs.get("chat_template_kwargs"))
        self._role_id = self.vocab.get(ROLE)
        # In the engine's process, only token ids are seen.
        self._sees_text = False

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        return super().is_reasoning_end(self._last_message(input_ids))

    def is_reasoning_end_streaming(self, input_ids: Sequence[int], delta_ids: Iterable[int]) -> bool:
        written = self._last_message(input_ids)
        if self._initial_in_reasoning and not self._sees_text:
            # vLLM's waits for the text, which the engine never has: the thought would last to the end.
            return super().is_reasoning_end(written)
        return super().is_reasoning_end_streaming(written, delta_ids)

    def extract_reasoning_streaming(self, *args: Any, **kwargs: Any) -> Any:
        self._sees_text = True
        return super().extract_reasoning_streaming(*args, **kwargs)

    def adjust_request(self, request: Any) -> Any:
        request = super().adjust_request(request)
        asked = request.extract_structured_outputs()
        whole = None if asked is None else self._with_thought(asked)
        if whole is None or not constrain_from_the_start(request):
            return request
        request.structured_outputs = whole
        # Where the same was asked for in the words of each protocol.
        for field in ("response_format", "text"):
            if hasattr(request, field):
                setattr(request, field, None)
        return request

    def _last_message(self, ids: Sequence[int]) -> Sequence[int]:
        """What follows the last role marker: of a prompt, the answer's beginning; of an answer, all of it."""
        if self._role_id is None:
            return ids
        for end in range(len(ids), 0, -1):
            if ids[end - 1] == self._role_id:
                return ids[end:]
        return ids

    def _with_thought(self, asked: StructuredOutputsParams) -> StructuredOutputsParams | None:
        """None for what xgrammar cannot express; then vLLM takes another backend, behind the thought."""
        try:
            constrained = structured_outputs_to_format(asked)
            if constrained is None:
                return None
            tag = StructuralTag(format=behind_thought(constrained, self._thinking_mode))
            whole = StructuredOutputsParams(structural_tag=json.dumps(tag.model_dump()))
            # The check changes what it is given.
            validate_xgrammar_grammar(SamplingParams(structured_outputs=replace(whole)))
        except (TypeError, ValueError, VLLMValidationError) as error:
            logger.warning_once("A structured output begins behind the thought, as xgrammar refuses it: %s", error)
            return None
        return whole
