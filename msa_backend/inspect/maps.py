"""Choices of all query tokens of a layer, as a map over the context: queries down, blocks across."""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 64
"""At most so many of either; longer contexts have several blocks in one."""


class Map:
    """
    Attributes:
        bin_blocks: neighbouring blocks in a bin; one of queries holds as many tokens.
        counts: ``[num_kv_heads, bins, bins]`` int64, choices.
        queries: ``[bins]`` int64, query tokens.
    """

    def __init__(self, num_tokens: int, block_size: int, num_kv_heads: int) -> None:
        self.num_blocks, self.block_size = -(-num_tokens // block_size), block_size
        self.bin_blocks = -(-self.num_blocks // BINS)
        bins = -(-self.num_blocks // self.bin_blocks)
        self.counts = torch.zeros(num_kv_heads, bins, bins, dtype=torch.int64)
        self.queries = torch.zeros(bins, dtype=torch.int64)

    def add(self, positions: Tensor, block_ids: Tensor) -> None:
        """
        Args:
            positions: ``[n]`` of query tokens.
            block_ids: ``[num_kv_heads, n, topk]``, -1 for none.
        """
        heads, bins, _ = self.counts.shape
        row = positions // (self.block_size * self.bin_blocks)
        self.queries += row.bincount(minlength=bins).cpu()
        head = torch.arange(heads, device=row.device)[:, None, None]
        cell = (head * bins + row[:, None]) * bins + block_ids.long() // self.bin_blocks
        self.counts += cell[block_ids >= 0].bincount(minlength=heads * bins * bins).view(heads, bins, bins).cpu()

    def shares(self) -> Tensor:
        """``[num_kv_heads, bins, bins]`` fp32: of the blocks of a bin, how many an average query of a bin chose."""
        bins = len(self.queries)
        blocks = (self.num_blocks - torch.arange(bins) * self.bin_blocks).clamp(max=self.bin_blocks)
        return self.counts / (self.queries[:, None] * blocks).clamp(min=1)
