"""From vLLM's description of a step to the kernels'."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

from msa_backend.attend import SHORT_QUERY_LEN, UNCUT_TOKENS, cut, whole
from msa_backend.kernels.batch import Step
from msa_backend.kernels.dispatch import choose

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheSpec


@dataclass
class MSAMetadata(AttentionMetadata):
    """One step.

    Attributes:
        slot_mapping: ``[num_tokens]`` int64, the cache slot of each new token; -1 for padding.
        step: whose tokens these are.
    """

    slot_mapping: torch.Tensor
    step: Step


class MSAMetadataBuilder(AttentionMetadataBuilder[MSAMetadata]):
    """Describes a step by vLLM's own buffers, which last: a CUDA graph reads from where it was recorded, and what it
    reads but for them it works out itself."""

    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # Short sequences come first, so that a step cuts in two.
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        # Then the steps of a draft are one CUDA graph. The torch path waits for lengths, so it can be in none.
        self.supports_draft_decode_metadata_update = choose(device).is_triton

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec) -> AttentionCGSupport:
        # The torch path reads lengths on the host, which no CUDA graph can record; the Triton kernels never do.
        on_gpu = choose(torch.device(vllm_config.device_config.device_type)).is_triton
        return AttentionCGSupport.ALWAYS if on_gpu else AttentionCGSupport.NEVER

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> MSAMetadata:
        common = common_attn_metadata
        known = common.seq_lens_cpu_upper_bound
        short = common.num_actual_tokens <= UNCUT_TOKENS or common.max_query_len <= SHORT_QUERY_LEN
        if short or known is None:
            return self._whole(common)
        starts = common.query_start_loc_cpu
        step = cut(
            common.query_start_loc,
            common.seq_lens,
            common.block_table_tensor,
            (starts[1:] - starts[:-1]).tolist(),
            known[: common.num_reqs].tolist(),
        )
        return MSAMetadata(common.slot_mapping, step)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> MSAMetadata:
        # What vLLM records is a stand-in; the graph has to serve any step within its bounds.
        return self._whole(common_attn_metadata)

    def update_draft_decode_metadata(self, metadata: MSAMetadata) -> None:
        """The lengths that ``metadata`` refers to have changed in place: the next layer plans the step anew."""
        for part in metadata.step.parts:
            part.batch.forget_lengths()

    @staticmethod
    def _whole(common: CommonAttentionMetadata) -> MSAMetadata:
        step = whole(
            common.query_start_loc,
            common.seq_lens,
            common.block_table_tensor,
            common.num_actual_tokens,
            common.max_query_len,
            common.max_seq_len,
        )
        return MSAMetadata(common.slot_mapping, step)


class IndexKeyMetadataBuilder(AttentionMetadataBuilder[AttentionMetadata]):
    """Builds nothing: the layer that owns the index keys takes everything from the metadata of its K/V cache."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS
    supports_draft_decode_metadata_update = True

    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> AttentionMetadata:
        return AttentionMetadata()

    def update_draft_decode_metadata(self, metadata: AttentionMetadata) -> None:
        pass
