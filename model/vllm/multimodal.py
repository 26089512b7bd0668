"""The class vLLM instantiates for MiniMax-M3 with images and videos. Imported only for such a model.

Importing it takes torchvision, which vLLM's processors of MiniMax-M3 need.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from vllm.model_executor.models.interfaces import SupportsMultiModal, SupportsPP
from vllm.model_executor.models.utils import maybe_prefix
from vllm.models.minimax_m3.common.vision_tower import MiniMaxVLVisionModel
from vllm.multimodal import MULTIMODAL_REGISTRY

from msa_backend.patches import vllm_vision_rope
from msa_backend.vllm.model_config import recorded_vision

from ..vision import canonical_vision_weights
from ..weights import is_vision_weight
from .causal_lm import MiniMaxM3ForCausalLM
from .processing import M3DummyInputs, M3ProcessingInfo, MiniMaxM3VLMultiModalProcessor

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sequence import IntermediateTensors

_PLACEHOLDERS = {"image": M3ProcessingInfo.IMAGE_TOKEN, "video": M3ProcessingInfo.VIDEO_TOKEN}
_PIXELS = (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw"))


@MULTIMODAL_REGISTRY.register_processor(
    MiniMaxM3VLMultiModalProcessor, info=M3ProcessingInfo, dummy_inputs=M3DummyInputs
)
class MiniMaxM3ForConditionalGeneration(nn.Module, SupportsMultiModal, SupportsPP):
    """vLLM's vision tower in front of our text model.

    No format quantizes the tower, whatever its ignore list says; the text model's layers are called as they are
    without a tower, so that lists are read as they were checked.
    """

    packed_modules_mapping = MiniMaxM3ForCausalLM.packed_modules_mapping
    hf_to_vllm_mapper = MiniMaxM3ForCausalLM.hf_to_vllm_mapper

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        vllm_vision_rope.PATCH.apply()
        self.vision_config = config = recorded_vision(vllm_config)
        with self._mark_tower_model(vllm_config, {"image", "video"}):
            self.vision_tower = MiniMaxVLVisionModel(
                PreTrainedConfig.from_dict(config.original_section()),
                text_hidden_size=config.text_hidden_size,
                projector_hidden_size=config.projector_size,
                quant_config=None,
                prefix=maybe_prefix(prefix, "vision_tower"),
            )
        with self._mark_language_model(vllm_config):
            self.language_model = MiniMaxM3ForCausalLM(vllm_config=vllm_config, prefix=prefix)
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str:
        """What stands for an image or a video in a prompt without a chat template.

        Raises:
            ValueError: for another modality.
        """
        if modality not in _PLACEHOLDERS:
            raise ValueError(f"{modality} inputs are not MiniMax-M3's; send text, images or videos")
        return _PLACEHOLDERS[modality]

    def embed_multimodal(self, **inputs: Any) -> tuple[torch.Tensor, ...]:
        """Tokens of all images, then of all videos.

        Args:
            inputs: ``pixel_values`` or ``pixel_values_videos``, ``[patches, pixels of a patch]``, with their
                ``image_grid_thw`` or ``video_grid_thw``, int ``[items, 3]`` on the CPU.

        Returns:
            ``[tokens, hidden_size]`` for each item.
        """
        found: list[torch.Tensor] = []
        for pixels, grid in _PIXELS:
            if inputs.get(pixels) is not None:
                found += self._embed(inputs[pixels], inputs[grid])
        return tuple(found)

    def _embed(self, pixels: torch.Tensor, grid_thw: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tokens = self.vision_tower(pixels.to(self.vision_tower.dtype), grid_thw.tolist())
        return tokens.split((grid_thw.prod(-1) // self.vision_config.merge_size**2).tolist())

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor | IntermediateTensors:
        return self.language_model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint in any of its three forms, in one pass.

        Vision weights may lie anywhere between those of the text model, which takes its own in one stream.

        Returns:
            The names of the parameters that were filled.

        Raises:
            CheckpointError: a weight is unknown, missing or there twice.
        """
        vision: list[tuple[str, torch.Tensor]] = []

        def text() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                if is_vision_weight(name):
                    vision.append((name, tensor))
                else:
                    yield name, tensor

        loaded = {f"language_model.{name}" for name in self.language_model.load_weights(text())}
        renamed = (
            # vLLM's tower has no module around the two matrices of a layer's MLP.
            (name.replace(".mlp.fc", ".fc"), tensor)
            for name, tensor in canonical_vision_weights(vision, self.vision_config)
        )
        return loaded | {f"vision_tower.{name}" for name in self.vision_tower.load_weights(renamed)}
