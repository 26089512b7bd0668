"""From images and videos to patches: vLLM's own processors of MiniMax-M3, with the timestamps of videos kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm.models.minimax_m3.common.mm_preprocess import (
    MiniMaxM3VLDummyInputsBuilder,
    MiniMaxM3VLMultiModalProcessor,
    MiniMaxM3VLProcessingInfo,
)
from vllm.multimodal.parse import MultiModalDataParser

if TYPE_CHECKING:
    from vllm.config.multimodal import MultiModalDummyOptions

# MiniMaxM3VLMultiModalProcessor is handed on as it is.
__all__ = ["M3DummyInputs", "M3ProcessingInfo", "MiniMaxM3VLMultiModalProcessor"]


class M3ProcessingInfo(MiniMaxM3VLProcessingInfo):
    """Asks for the metadata of videos. Without, vLLM's processor cache parses bare frames, and the timestamps that
    belong before each of them are lost from every prompt."""

    def get_data_parser(self) -> MultiModalDataParser:
        return MultiModalDataParser(
            video_needs_metadata=True,
            expected_hidden_size=self._get_expected_hidden_size(),
            allow_missing_mm_embeddings=self.allow_missing_mm_embeddings,
        )


class M3DummyInputs(MiniMaxM3VLDummyInputsBuilder):
    """Videos come with metadata, here without any."""

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: MultiModalDummyOptions
    ) -> dict[str, Any]:
        data = super().get_dummy_mm_data(seq_len, mm_counts, mm_options)
        return {**data, "video": [(frames, {}) for frames in data["video"]]}
