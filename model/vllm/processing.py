"""From images and videos to patches: vLLM's own processors of MiniMax-M3, with the timestamps of videos kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMValidationError
from vllm.models.minimax_m3.common.mm_preprocess import (
    MiniMaxM3VLDummyInputsBuilder,
    MiniMaxM3VLMultiModalProcessor,
    MiniMaxM3VLProcessingInfo,
)
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataParser, VideoProcessorItems
from vllm.transformers_utils.processors.minimax_m3 import MAX_RATIO

if TYPE_CHECKING:
    from vllm.config.multimodal import MultiModalDummyOptions
    from vllm.multimodal.parse import ImageSize, MultiModalDataItems

# MiniMaxM3VLMultiModalProcessor is handed on as it is.
__all__ = ["M3DummyInputs", "M3ProcessingInfo", "MiniMaxM3VLMultiModalProcessor"]


class M3DataParser(MultiModalDataParser):
    """Refuses, in a sentence, what the processors fail on: the user's mistake, not the server's."""

    def parse_mm_data(self, mm_data: Any) -> MultiModalDataItems:
        """
        Raises:
            VLLMValidationError: an image or a frame is too narrow, or no frame of a video could be read.
        """
        items = super().parse_mm_data(mm_data)
        for modality, found in items.items():
            for index in range(found.get_count()):
                item = found.get(index)
                if item is None:  # a cache has it
                    continue
                if isinstance(found, ImageProcessorItems):
                    _check_size(modality, index, found.get_image_size(index))
                elif isinstance(found, VideoProcessorItems):
                    frames = VideoProcessorItems([item[0]])  # without the metadata
                    if not frames.get_num_frames(0):
                        raise VLLMValidationError(
                            f"no frame of {modality} {index} could be read; send another, or its frames as images"
                        )
                    _check_size(modality, index, frames.get_frame_size(0))
        return items


def _check_size(modality: str, index: int, size: ImageSize) -> None:
    if max(size) > MAX_RATIO * min(size):
        raise VLLMValidationError(
            f"{modality} {index} is {size.width} x {size.height} pixels, but MiniMax-M3 takes no side of more than "
            f"{MAX_RATIO} times the other; crop it"
        )


class M3ProcessingInfo(MiniMaxM3VLProcessingInfo):
    """Asks for the metadata of videos. Without, vLLM's processor cache parses bare frames, and the timestamps that
    belong before each of them are lost from every prompt."""

    def get_data_parser(self) -> MultiModalDataParser:
        return M3DataParser(
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
