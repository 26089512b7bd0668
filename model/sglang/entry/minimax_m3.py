"""MiniMax-M3 under the names by which SGLang looks a class up: those of the architectures."""

from __future__ import annotations

from msa_backend.model.sglang.causal_lm import MiniMaxM3ForCausalLM


class MiniMaxM3SparseForCausalLM(MiniMaxM3ForCausalLM):
    """The text model alone."""


class MiniMaxM3SparseForConditionalGeneration(MiniMaxM3ForCausalLM):
    """The text half of the model with a vision tower."""


EntryClass = [MiniMaxM3SparseForCausalLM, MiniMaxM3SparseForConditionalGeneration]
