"""The least work a case can be: floating-point operations, and bytes when each input is read and output written once.

Work over the measured rate of the card is the floor under any implementation's time. A stage's floor is the larger
of its two, and its share of the ceiling is floor over time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from msa_backend.bench.cases import BLOCK_SIZE, Case

ITEM_SIZE = {"bf16": 2, "fp16": 2, "fp32": 4, "fp8": 1}


@dataclass(frozen=True)
class Work:
    flop: int
    bytes: int
    fp8: bool = False
    """The products are of fp8 numbers on both sides, which a card multiplies faster."""

    def floor(self, rates: Rates) -> float:
        """Seconds."""
        flops = rates.fp8_flops if self.fp8 else rates.flops
        return max(self.flop / flops, self.bytes / rates.bandwidth)


@dataclass(frozen=True)
class Rates:
    """What a card was seen to do."""

    bandwidth: float
    """Bytes a second, read."""
    copy: float
    """Bytes a second, read and written."""
    flops: float
    """Of a matrix product in the case's dtype."""
    fp8_flops: float


def _visible(case: Case) -> Iterator[int]:
    """Tokens that each query token sees, its own counted."""
    for length in case.lengths:
        yield from range(length - case.new_tokens + 1, length + 1)


def selection(case: Case) -> Work:
    """Every visible index key against every index head of its query; the keys are read once a sequence."""
    visible = sum(_visible(case))
    size = ITEM_SIZE["fp8" if case.fp8_index else case.dtype]
    queries = case.num_tokens * case.num_kv_heads
    return Work(
        flop=2 * case.dim * case.num_kv_heads * visible,
        bytes=sum(case.lengths) * case.dim * size + queries * (case.dim * size + case.topk * 4),
        fp8=case.fp8_index,
    )


def _attention(case: Case, pairs: int, kv_vectors: int) -> Work:
    """``pairs`` of query and key tokens for each query head; ``kv_vectors`` keys, and as many values, read once."""
    kv_size = ITEM_SIZE["fp8" if case.fp8_kv else case.dtype]
    queries = 2 * case.num_tokens * case.num_heads * case.dim * ITEM_SIZE[case.dtype]  # and outputs
    return Work(flop=4 * case.dim * case.num_heads * pairs, bytes=queries + 2 * kv_vectors * case.dim * kv_size)


def sparse_attention(case: Case, distinct_blocks: int) -> Work:
    """``distinct_blocks``: (KV head, page) pairs that some query token chose; each is read once."""
    pairs = 0
    for visible in _visible(case):
        of_last = (visible - 1) % BLOCK_SIZE + 1  # the query's own block is always chosen
        pairs += min(visible, (case.topk - 1) * BLOCK_SIZE + of_last)
    return _attention(case, pairs, distinct_blocks * BLOCK_SIZE)


def dense_attention(case: Case) -> Work:
    return _attention(case, sum(_visible(case)), sum(case.lengths) * case.num_kv_heads)
