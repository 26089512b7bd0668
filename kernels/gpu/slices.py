"""A step cut into pieces, so that what the kernels hold between two launches stays small."""

from __future__ import annotations

from collections.abc import Iterator

from ..batch import Batch


def token_slices(batch: Batch, num_tokens: int, at_a_time: int) -> Iterator[tuple[slice, Batch]]:
    """The query tokens, ``at_a_time`` of them, with the batch each piece is; the whole batch if one piece does."""
    if num_tokens <= at_a_time:
        yield slice(0, num_tokens), batch
        return
    bounds = batch.cu_seqlens_q
    for start in range(0, num_tokens, at_a_time):
        stop = min(start + at_a_time, num_tokens)
        inside = bounds.clamp(start, stop)
        yield (
            slice(start, stop),
            Batch(
                cu_seqlens_q=inside - start,
                seq_lens=batch.seq_lens,
                context_lens=batch.context_lens + (inside - bounds)[:-1].clamp(min=0),
                block_table=batch.block_table,
                max_query_len=min(batch.max_query_len, stop - start),
                max_seq_len=batch.max_seq_len,
                min_context_len=batch.min_context_len,
            ),
        )
