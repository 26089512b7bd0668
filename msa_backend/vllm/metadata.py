"""From vLLM's batch description to the kernels': one ``Batch`` of decode rows and one of prefill rows."""

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
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from msa_backend.kernels.batch import Batch
from msa_backend.kernels.dispatch import choose

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheSpec


@dataclass
class MSAMetadata(AttentionMetadata):
    """One step's rows, decode rows first.

    Attributes:
        slot_mapping: ``[num_tokens]`` int64, the cache slot of each new token; -1 for padding.
        num_tokens: new tokens in the step, padding not counted.
        num_decode_tokens: how many of them, at the front, belong to ``decode``.
        decode: rows of one query length each: single tokens, or drafts to verify. None when there are none.
        prefill: the other rows. None when there are none.
    """

    slot_mapping: torch.Tensor
    num_tokens: int
    num_decode_tokens: int
    decode: Batch | None
    prefill: Batch | None


class MSAMetadataBuilder(AttentionMetadataBuilder[MSAMetadata]):
    """Splits a step into decode and prefill rows. Draft tokens to verify count as decode."""

    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        # A CUDA graph reads from where it was recorded. All else it reads lies in vLLM's own lasting buffers.
        self._context_lens = torch.zeros(
            vllm_config.scheduler_config.max_num_batched_tokens, dtype=torch.int32, device=device
        )

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec) -> AttentionCGSupport:
        # The torch path reads lengths on the host, which no CUDA graph can record; the Triton kernels never do.
        # Prefill rows stay outside: their grids follow from the step's longest row.
        on_gpu = choose(torch.device(vllm_config.device_config.device_type)).is_triton
        return AttentionCGSupport.UNIFORM_BATCH if on_gpu else AttentionCGSupport.NEVER

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> MSAMetadata:
        common = common_attn_metadata
        num_decodes, num_prefills, num_decode_tokens, _ = split_decodes_and_prefills(
            common, decode_threshold=self.reorder_batch_threshold, require_uniform=True
        )
        context_lens = self._context_lens[: common.num_reqs]
        context_lens.copy_(common.compute_num_computed_tokens(), non_blocking=True)
        # With drafts, vLLM's lengths on the host take every draft of the step before for accepted.
        slack = self.reorder_batch_threshold or 1
        return MSAMetadata(
            slot_mapping=common.slot_mapping,
            num_tokens=common.num_actual_tokens,
            num_decode_tokens=num_decode_tokens,
            decode=_rows(common, context_lens, 0, num_decodes, slack),
            prefill=_rows(common, context_lens, num_decodes, num_decodes + num_prefills, slack),
        )


class IndexKeyMetadataBuilder(AttentionMetadataBuilder[AttentionMetadata]):
    """Builds nothing: the layer that owns the index keys takes everything from the metadata of its K/V cache."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS

    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> AttentionMetadata:
        return AttentionMetadata()


def _rows(
    common: CommonAttentionMetadata, context_lens: torch.Tensor, first: int, last: int, slack: int
) -> Batch | None:
    """The rows ``first`` to ``last`` of a step as a batch whose query tokens start at 0.

    ``slack``: by how many tokens a length known on the host may be too great.
    """
    if first == last:
        return None
    cu_seqlens_q = common.query_start_loc[first : last + 1]
    max_query_len, max_seq_len, min_context_len = common.max_query_len, common.max_seq_len, 0
    starts = common.query_start_loc_cpu[first : last + 1]
    query_lens = starts[1:] - starts[:-1]
    if (seq_lens := common.seq_lens_cpu_upper_bound) is not None:
        min_context_len = max(0, int((seq_lens[first:last] - query_lens).min()) - slack)
    if (first, last) != (0, common.num_reqs):
        # Decode and prefill rows differ most in just these bounds, from which the kernels take their grids.
        max_query_len = int(query_lens.max())
        if seq_lens is not None:
            max_seq_len = int(seq_lens[first:last].max())
    if first:
        cu_seqlens_q = cu_seqlens_q - cu_seqlens_q[0]
    return Batch(
        cu_seqlens_q=cu_seqlens_q,
        seq_lens=common.seq_lens[first:last],
        context_lens=context_lens[first:last],
        block_table=common.block_table_tensor[first:last],
        max_query_len=max_query_len,
        max_seq_len=max_seq_len,
        min_context_len=min_context_len,
    )
