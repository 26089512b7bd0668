"""One matrix product for all that a sparse layer's attention reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from sglang.srt.layers.linear import MergedColumnParallelLinear
from sglang.srt.runtime_context import get_parallel
from torch import nn

from ..config import M3Config

if TYPE_CHECKING:
    from sglang.srt.layers.quantization.base_config import QuantizationConfig


class QKVIndexProjection(MergedColumnParallelLinear):
    """Queries, keys, values, index queries and the index key, split over ranks by their heads.

    SGLang's own fused projections have no room for the last two. Where there are more ranks than heads, each head is on
    several: so is the one index key on all.
    """

    def __init__(self, config: M3Config, quant_config: QuantizationConfig | None, prefix: str) -> None:
        msa, ranks = config.msa, get_parallel().tp_size
        parts = (
            ("q", msa.num_heads, msa.head_dim),
            ("k", msa.num_kv_heads, msa.head_dim),
            ("v", msa.num_kv_heads, msa.head_dim),
            ("index_q", msa.num_index_heads, msa.index_dim),
            ("index_k", 1, msa.index_dim),
        )
        self.parts = [name for name, _, _ in parts]
        self.heads = {name: heads for name, heads, _ in parts}
        self.copies = {name: max(1, ranks // heads) for name, heads in self.heads.items()}
        super().__init__(
            config.hidden_size,
            [heads * self.copies[name] * dim for name, heads, dim in parts],
            bias=False,
            quant_config=quant_config,
            prefix=prefix,
        )

    # Which of the two SGLang calls hangs on how the weights are quantized.

    def weight_loader(self, param: nn.Parameter, loaded_weight: torch.Tensor, part: str) -> None:
        """Load the whole weight of a part: one of ``parts``."""
        super().weight_loader(param, self._for_every_rank(loaded_weight, part), self.parts.index(part))

    def weight_loader_v2(self, param: nn.Parameter, loaded_weight: torch.Tensor, part: str) -> None:
        """As ``weight_loader``."""
        super().weight_loader_v2(param, self._for_every_rank(loaded_weight, part), self.parts.index(part))

    def _for_every_rank(self, weight: torch.Tensor, part: str) -> torch.Tensor:
        """``weight`` with each head as often as ranks hold it; rows are those of the heads, one after the other."""
        if self.copies[part] == 1 or weight.numel() == 1:
            return weight
        return weight.unflatten(0, (self.heads[part], -1)).repeat_interleave(self.copies[part], 0).flatten(0, 1)
