"""MSAAttention: the vLLM layer that owns the K/V cache and the index-key cache of one sparse layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, MLAAttentionSpec, SparseCacheRole

from msa_backend.config import MSAConfig
from msa_backend.kernels import api as kernels

from .backend import MSABackend
from .metadata import MSAMetadata

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import AttentionBackend


class _CacheLayer(nn.Module, AttentionLayerBase):
    """A cache that vLLM allocates: it is found by its name, and bound once the memory is there."""

    def __init__(self, prefix: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer_name = prefix
        self.dtype = dtype
        self.kv_cache = torch.tensor([])
        layers = get_current_vllm_config().compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"two attention layers are called {prefix}")
        layers[prefix] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        return MSABackend


class IndexKeyCache(_CacheLayer):
    """One shared index key of ``index_dim`` channels for every token: ``[num_pages, 128, index_dim]``."""

    def __init__(self, prefix: str, dtype: torch.dtype, index_dim: int) -> None:
        super().__init__(prefix, dtype)
        self.index_dim = index_dim

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        self.kv_cache = kv_cache.squeeze(1)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        # The one spec that budgets a single vector a token. Being a kind of full attention, it shares the K/V
        # cache's group, so one page id names a page of each: prefix hits and evictions cannot part them.
        return MLAAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=self.index_dim,
            dtype=self.dtype,
            cache_role=SparseCacheRole.INDEXER,
        )


class MSAAttention(_CacheLayer):
    """Sparse attention over paged K/V, one rank's heads.

    Args:
        num_heads: query heads on this rank.
        num_kv_heads: KV heads on this rank, and index heads: one selection each.
        scale: factor of the attention logits.
        config: the model's MSA config.
        prefix: the layer's name; holds its layer number.
        dtype: of the K/V cache.
        index_dtype: of the index-key cache.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        scale: float,
        config: MSAConfig,
        prefix: str,
        dtype: torch.dtype,
        index_dtype: torch.dtype,
    ) -> None:
        super().__init__(prefix, dtype)
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.scale = scale
        self.config = config
        self.index_cache = IndexKeyCache(f"{prefix}.index_cache", index_dtype, config.index_dim)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return FullAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=self.num_kv_heads,
            head_size=self.config.head_dim,
            head_size_v=self.config.head_dim,
            dtype=self.dtype,
        )

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        index_query: torch.Tensor,
        index_key: torch.Tensor,
    ) -> torch.Tensor:
        """Cache the new tokens and attend from them. All inputs are normed and rotated.

        Args:
            query: ``[num_tokens, num_heads * 128]``.
            key, value: ``[num_tokens, num_kv_heads * 128]``.
            index_query: ``[num_tokens, num_kv_heads * 128]``.
            index_key: ``[num_tokens, 128]``.

        Returns:
            ``[num_tokens, num_heads * 128]``, zero for padding tokens.
        """
        dim = self.config.head_dim
        output = torch.empty_like(query)
        self._attend(
            query.view(-1, self.num_heads, dim),
            key.view(-1, self.num_kv_heads, dim),
            value.view(-1, self.num_kv_heads, dim),
            index_query.view(-1, self.num_kv_heads, self.config.index_dim),
            index_key,
            output.view(-1, self.num_heads, dim),
        )
        return output

    @eager_break_during_capture
    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        index_query: torch.Tensor,
        index_key: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        step = get_forward_context().attn_metadata
        if not isinstance(step, dict):
            output.zero_()  # the memory-profiling run, before there are caches
            return
        metadata: MSAMetadata = step[self.layer_name]
        k_pages, v_pages = self.kv_cache.split(self.config.head_dim, dim=-1)
        index_k_pages = self.index_cache.kv_cache

        new = slice(0, metadata.num_tokens)
        kernels.write_cache(
            key[new], value[new], index_key[new], k_pages, v_pages, index_k_pages, metadata.slot_mapping[new]
        )
        parts = (
            (metadata.decode, slice(0, metadata.num_decode_tokens)),
            (metadata.prefill, slice(metadata.num_decode_tokens, metadata.num_tokens)),
        )
        for batch, tokens in parts:
            if batch is None:
                continue
            block_ids = kernels.select_blocks(
                index_query[tokens],
                index_k_pages,
                batch,
                topk=self.config.topk,
                init_blocks=self.config.init_blocks,
                local_blocks=self.config.local_blocks,
            )
            kernels.sparse_attention(
                query[tokens], k_pages, v_pages, block_ids, batch, scale=self.scale, out=output[tokens]
            )
        output[metadata.num_tokens :].zero_()
