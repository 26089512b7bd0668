"""What a sparse layer's heads are normed and rotated by."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class HeadNorms:
    """The norms of queries, keys, index queries and index keys, and the rope table.

    Attributes:
        q_weight, k_weight: ``[head_dim]``, contiguous, less 1 as the checkpoint has them (Gemma style).
        index_q_weight, index_k_weight: ``[index_dim]``, likewise.
        cos_sin_cache: ``[max_positions, rotary_dim]``, any float dtype: cosines of ``rotary_dim / 2`` angles, then
            their sines.
        eps: of the norms.

    Raises:
        ValueError: shapes that do not fit together.
    """

    q_weight: Tensor
    k_weight: Tensor
    index_q_weight: Tensor
    index_k_weight: Tensor
    cos_sin_cache: Tensor
    eps: float

    def __post_init__(self) -> None:
        for name, weight, like in (
            ("k_weight", self.k_weight, self.q_weight),
            ("index_k_weight", self.index_k_weight, self.index_q_weight),
        ):
            if weight.dim() != 1 or weight.shape != like.shape:
                raise ValueError(
                    f"{name} has shape {tuple(weight.shape)}, but must be {tuple(like.shape)} like the queries' norm, "
                    "one factor a channel; pass the weights of one layer"
                )
        most = min(len(self.q_weight), len(self.index_q_weight))
        rotary_dim = self.cos_sin_cache.shape[-1]
        if self.cos_sin_cache.dim() != 2 or rotary_dim % 2 or not 0 < rotary_dim <= most:
            raise ValueError(
                f"cos_sin_cache has shape {tuple(self.cos_sin_cache.shape)}, but must be (max_positions, rotary_dim) "
                f"with an even rotary_dim of at most {most}, the channels of a head; pass cosines, then sines"
            )

    @property
    def head_dim(self) -> int:
        return self.q_weight.shape[0]

    @property
    def index_dim(self) -> int:
        return self.index_q_weight.shape[0]

    @property
    def rotary_dim(self) -> int:
        return self.cos_sin_cache.shape[1]
