"""MSAAttention: the vLLM layer that owns the K/V cache and the index-key cache of one sparse layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import pad
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.config import get_current_vllm_config
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheSpec,
    KVQuantMode,
    MLAAttentionSpec,
    SparseCacheRole,
)

from msa_backend.attend import attend, index_query_dtype
from msa_backend.config import MSAConfig
from msa_backend.kernels import api as kernels
from msa_backend.kernels.api import HeadNorms, LayerCaches, Selection
from msa_backend.kernels.caches import FP8_DTYPES
from msa_backend.kernels.dispatch import choose

from .backend import IndexKeyBackend, MSABackend
from .sharing import shared_scoring

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorBase_V1
    from vllm.v1.attention.backend import AttentionBackend


logger = init_logger("vllm.msa_backend")


class _CacheLayer(nn.Module, AttentionLayerBase):
    """A cache that vLLM allocates: it is found by its name, and bound once the memory is there.

    Attributes:
        dtype: of its numbers.
        stored: as vLLM allocates them: fp8 as bytes, which is how it keeps those of dense layers.
        quant_mode: what vLLM calls that. Were it another for index keys than for K and V, vLLM would take the memory
            for shared by two formats, and clear every page before use.
    """

    def __init__(self, prefix: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer_name = prefix
        self.dtype = dtype
        is_fp8 = dtype in FP8_DTYPES
        self.stored = torch.uint8 if is_fp8 else dtype
        self.quant_mode = KVQuantMode.FP8_PER_TENSOR if is_fp8 else KVQuantMode.NONE
        self.caches: LayerCaches | None = None
        self.kv_cache = torch.tensor([])
        layers = get_current_vllm_config().compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"two attention layers are called {prefix}")
        layers[prefix] = self

    @property
    def kv_cache(self) -> torch.Tensor:
        """What vLLM has bound; an empty tensor before, and again when it takes its memory back."""
        return self._kv_cache

    @kv_cache.setter
    def kv_cache(self, kv_cache: torch.Tensor) -> None:
        self._kv_cache = kv_cache
        self.caches = None

    @property
    def pages(self) -> torch.Tensor:
        """What vLLM has bound, as the numbers that it holds."""
        return self.kv_cache.view(self.dtype)

    def get_attn_backend(self) -> type[AttentionBackend]:
        return MSABackend


class IndexKeyCache(_CacheLayer):
    """One shared index key of ``index_dim`` channels for every token: ``[num_pages, 1, 128, index_dim]``."""

    def __init__(self, prefix: str, dtype: torch.dtype, index_dim: int) -> None:
        super().__init__(prefix, dtype)
        self.index_dim = index_dim

    def get_attn_backend(self) -> type[AttentionBackend]:
        return IndexKeyBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        # The one spec that budgets a single vector a token. Being a kind of full attention, it shares the K/V
        # cache's group, so one page id names a page of each: prefix hits and evictions cannot part them.
        return MLAAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=self.index_dim,
            dtype=self.stored,
            kv_quant_mode=self.quant_mode,
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
        dtype: of keys and values in their cache.
        index_dtype: of index keys in theirs.

    Attributes:
        k_scale, v_scale: what fp8 keys and values are multiplied by when read; on the host, settled when weights are
            loaded, so no step waits for them and a CUDA graph may keep them.
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
        self.head_dim = config.head_dim
        self.k_scale = self.v_scale = 1.0
        self.selection = Selection(config.topk, config.init_blocks, config.local_blocks)
        self.index_cache = IndexKeyCache(f"{prefix}.index_cache", index_dtype, config.index_dim)
        choice = choose(torch.device(current_platform.device_type))
        self.index_q_dtype = index_query_dtype(choice, index_dtype)
        self.largest = _largest_step(get_current_vllm_config()) if choice.is_triton else None
        self.sharing = shared_scoring(config.num_index_heads)
        if choice.is_triton or current_platform.is_cpu():
            logger.info_once("%s", choice.why)
        else:
            logger.warning_once("%s MSA_DISABLE=1 gives vLLM's own M3 class back.", choice.why)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return FullAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_dim,
            head_size_v=self.head_dim,
            dtype=self.stored,
            kv_quant_mode=self.quant_mode,
        )

    def take_scales(self, scales: Mapping[str, float]) -> None:
        """Keep the checkpoint's scales of fp8 keys and values; queries stay in the model's dtype."""
        if self.dtype in FP8_DTYPES:
            self.k_scale, self.v_scale = scales.get("k", 1.0), scales.get("v", 1.0)

    def bound_caches(self) -> LayerCaches:
        """Both caches, checked when first used after vLLM has bound them."""
        if self.caches is None or self.caches is not self.index_cache.caches:
            k_pages, v_pages = self.pages.split(self.head_dim, dim=-1)
            index_k_pages = self.index_cache.pages.squeeze(1)
            self.caches = LayerCaches(k_pages, v_pages, index_k_pages, self.k_scale, self.v_scale)
            self.index_cache.caches = self.caches
        return self.caches

    def forward(self, projected: torch.Tensor, positions: torch.Tensor, norms: HeadNorms) -> torch.Tensor:
        """Norm, rotate, cache the new tokens and attend from them.

        Args:
            projected: ``[num_tokens, (num_heads + 3 * num_kv_heads + 1) * 128]``: queries, keys, values, index
                queries, index key.
            positions: ``[num_tokens]`` int64.
            norms: of this layer.

        Returns:
            ``[num_tokens, num_heads * 128]``, zero for padding tokens.
        """
        output = projected.new_empty(projected.shape[0], self.num_heads * self.head_dim)
        slots = get_forward_context().slot_mapping
        if not isinstance(slots, dict) or self.layer_name not in slots:
            self._profile(output, norms)
            return output.zero_()
        slot_mapping = slots[self.layer_name]
        if slot_mapping.shape[0] != projected.shape[0]:  # of a step that is not padded as its tokens are
            slot_mapping = pad(slot_mapping, (0, projected.shape[0] - slot_mapping.shape[0]), value=-1)
        query, index_query = kernels.norm_rope_write(
            projected, positions, norms, self.bound_caches(), slot_mapping, index_q_dtype=self.index_q_dtype
        )
        self._attend(query, index_query, output.view_as(query))
        return output

    @eager_break_during_capture
    def _attend(self, query: torch.Tensor, index_query: torch.Tensor, output: torch.Tensor) -> None:
        metadata = get_forward_context().attn_metadata
        if not isinstance(metadata, dict):  # a step that only warms up, over caches of nothing
            output.zero_()
            return
        step = metadata[self.layer_name].step
        connector = _connector_of_step()
        if connector is not None:
            for cache in (self, self.index_cache):
                connector.wait_for_layer_load(cache.layer_name)
        attend(query, index_query, self.bound_caches(), step, self.selection, self.scale, output, self.sharing)
        if connector is not None:
            for cache in (self, self.index_cache):
                connector.save_kv_layer(cache.layer_name, cache.kv_cache, metadata[cache.layer_name])

    def _profile(self, output: torch.Tensor, norms: HeadNorms) -> None:
        """Compile every kernel and allocate the largest workspace while vLLM measures what is left for its caches."""
        if self.largest is None:
            return
        from msa_backend.kernels.gpu.warm_up import warm_up

        warm_up(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            index_dim=self.index_cache.index_dim,
            selection=self.selection,
            dtype=output.dtype,
            kv_dtype=self.dtype,
            index_dtype=self.index_cache.dtype,
            index_q_dtype=self.index_q_dtype,
            device=output.device,
            rotary_dim=norms.rotary_dim,
            rope_dtype=norms.cos_sin_cache.dtype,
            attend=kernels.attend if self.sharing is None else self.sharing.attend,
            **self.largest,
        )


def _connector_of_step() -> KVConnectorBase_V1 | None:
    """The KV connector, in a step for which it was told what to move."""
    if not has_kv_transfer_group():
        return None
    connector = get_kv_transfer_group()
    return connector if connector.has_connector_metadata() else None


def _largest_step(vllm_config: VllmConfig) -> dict[str, int]:
    return {
        "max_num_tokens": vllm_config.scheduler_config.max_num_batched_tokens,
        "max_num_seqs": vllm_config.scheduler_config.max_num_seqs,
        "max_seq_len": vllm_config.model_config.max_model_len,
    }
