"""MSAAttention: the vLLM layer that owns the K/V cache and the index-key cache of one sparse layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, MLAAttentionSpec, SparseCacheRole

from msa_backend.config import MSAConfig
from msa_backend.kernels import api as kernels
from msa_backend.kernels.dispatch import choose

from .backend import IndexKeyBackend, MSABackend
from .metadata import MSAMetadata

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import AttentionBackend


logger = init_logger("vllm.msa_backend")


class NormRope(NamedTuple):
    """What :func:`msa_backend.kernels.api.norm_rope_write` norms and rotates by."""

    cos_sin_cache: torch.Tensor
    q_weight: torch.Tensor
    k_weight: torch.Tensor
    index_q_weight: torch.Tensor
    index_k_weight: torch.Tensor
    eps: float


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

    def get_attn_backend(self) -> type[AttentionBackend]:
        return IndexKeyBackend

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
        choice = choose(torch.device(current_platform.device_type))
        self.is_triton = choice.is_triton
        self.largest = _largest_step(get_current_vllm_config()) if self.is_triton else {}
        if choice.is_triton or current_platform.is_cpu():
            logger.info_once("%s", choice.why)
        else:
            logger.warning_once("%s MSA_DISABLE=1 gives vLLM's own M3 class back.", choice.why)

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

    def forward_projected(self, projected: torch.Tensor, positions: torch.Tensor, norm_rope: NormRope) -> torch.Tensor:
        """Norm, rotate, cache the new tokens and attend from them.

        Args:
            projected: ``[num_tokens, (num_heads + 3 * num_kv_heads + 1) * 128]``: queries, keys, values, index
                queries, index key.
            positions: ``[num_tokens]`` int64.
            norm_rope: of this layer.

        Returns:
            ``[num_tokens, num_heads * 128]``, zero for padding tokens.
        """
        output = projected.new_empty(projected.shape[0], self.num_heads * self.config.head_dim)
        self._attend_projected(projected, positions, norm_rope, output.view(-1, self.num_heads, self.config.head_dim))
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
        metadata = self._metadata()
        if metadata is None:
            self._profile(output)
            return
        new = slice(0, metadata.num_tokens)
        kernels.write_cache(key[new], value[new], index_key[new], *self._caches(), metadata.slot_mapping[new])
        self._attend_rows(query, index_query, metadata, output)

    @eager_break_during_capture
    def _attend_projected(
        self, projected: torch.Tensor, positions: torch.Tensor, norm_rope: NormRope, output: torch.Tensor
    ) -> None:
        metadata = self._metadata()
        if metadata is None:
            self._profile(output)
            return
        new = slice(0, metadata.num_tokens)
        query, index_query = kernels.norm_rope_write(
            projected[new],
            positions[new],
            norm_rope.cos_sin_cache,
            norm_rope.q_weight,
            norm_rope.k_weight,
            norm_rope.index_q_weight,
            norm_rope.index_k_weight,
            *self._caches(),
            metadata.slot_mapping[new],
            num_heads=self.num_heads,
            eps=norm_rope.eps,
        )
        self._attend_rows(query, index_query, metadata, output)

    def _metadata(self) -> MSAMetadata | None:
        """This step's; None in the memory-profiling run, before there are caches."""
        step = get_forward_context().attn_metadata
        return step[self.layer_name] if isinstance(step, dict) else None

    def _caches(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """K, V and index-key pages."""
        k_pages, v_pages = self.kv_cache.split(self.config.head_dim, dim=-1)
        return k_pages, v_pages, self.index_cache.kv_cache

    def _attend_rows(
        self, query: torch.Tensor, index_query: torch.Tensor, metadata: MSAMetadata, output: torch.Tensor
    ) -> None:
        k_pages, v_pages, index_k_pages = self._caches()
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

    def _profile(self, output: torch.Tensor) -> None:
        """Compile every kernel and allocate the largest workspace while vLLM measures what is left for its caches."""
        output.zero_()
        if not self.is_triton:
            return
        from msa_backend.kernels.gpu.warm_up import warm_up

        warm_up(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.config.head_dim,
            index_dim=self.config.index_dim,
            topk=self.config.topk,
            init_blocks=self.config.init_blocks,
            local_blocks=self.config.local_blocks,
            dtype=output.dtype,
            kv_dtype=self.dtype,
            index_dtype=self.index_cache.dtype,
            device=output.device,
            **self.largest,
        )


def _largest_step(vllm_config: VllmConfig) -> dict[str, int]:
    speculative = vllm_config.speculative_config
    return {
        "max_num_tokens": vllm_config.scheduler_config.max_num_batched_tokens,
        "max_num_seqs": vllm_config.scheduler_config.max_num_seqs,
        "max_draft_tokens": (speculative.num_speculative_tokens or 0) if speculative is not None else 0,
        "max_seq_len": vllm_config.model_config.max_model_len,
    }
