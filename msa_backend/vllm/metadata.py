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

    # The torch path reads lengths on the host, which no CUDA graph can record.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER

    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> MSAMetadata:
        common = common_attn_metadata
        num_decodes, num_prefills, num_decode_tokens, _ = split_decodes_and_prefills(
            common, decode_threshold=self.reorder_batch_threshold, require_uniform=True
        )
        return MSAMetadata(
            slot_mapping=common.slot_mapping,
            num_tokens=common.num_actual_tokens,
            num_decode_tokens=num_decode_tokens,
            decode=_rows(common, 0, num_decodes),
            prefill=_rows(common, num_decodes, num_decodes + num_prefills),
        )


def _rows(common: CommonAttentionMetadata, first: int, last: int) -> Batch | None:
    """The rows ``first`` to ``last`` of a step as a batch whose query tokens start at 0."""
    if first == last:
        return None
    starts_on_host = common.query_start_loc_cpu[first : last + 1]
    cu_seqlens_q = common.query_start_loc[first : last + 1]
    if first:
        cu_seqlens_q = cu_seqlens_q - cu_seqlens_q[0]
    return Batch(
        cu_seqlens_q=cu_seqlens_q,
        seq_lens=common.seq_lens[first:last],
        context_lens=common.compute_num_computed_tokens()[first:last],
        block_table=common.block_table_tensor[first:last],
        max_query_len=int((starts_on_host[1:] - starts_on_host[:-1]).max()),
        max_seq_len=common.max_seq_len,
    )
