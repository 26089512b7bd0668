"""MSABackend: what vLLM asks about the attention of a sparse layer before it builds anything."""

from __future__ import annotations

from typing import ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend, AttentionImplBase

from msa_backend.config import HEAD_DIM
from msa_backend.kernels.batch import BLOCK_SIZE
from msa_backend.names import BACKEND_NAME

from .metadata import IndexKeyMetadataBuilder, MSAMetadataBuilder


class MSABackend(AttentionBackend):
    """MiniMax Sparse Attention over pages of 128 tokens, one page per sparse block.

    The index keys' cache names a backend of the same kind, so vLLM gives both caches of a sparse layer the same
    block table and slot mapping.
    """

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[AttentionImplBase]:
        return MSAImpl

    @staticmethod
    def get_builder_cls() -> type[MSAMetadataBuilder]:
        return MSAMetadataBuilder

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return [HEAD_DIM]

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: object = None) -> list[int]:
        return [BLOCK_SIZE]

    @classmethod
    def is_sparse(cls) -> bool:
        return True


class IndexKeyBackend(MSABackend):
    """Of the cache of index keys, which ``MSAAttention`` reads and writes by the metadata of its K/V cache."""

    @staticmethod
    def get_builder_cls() -> type[IndexKeyMetadataBuilder]:
        return IndexKeyMetadataBuilder


class MSAImpl(AttentionImplBase):
    """Tells vLLM that nothing beyond plain decoder attention is offered; ``MSAAttention`` does the work itself."""
