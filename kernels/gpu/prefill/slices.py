"""A step cut into pieces, so that what the kernels hold between two launches stays small."""

from __future__ import annotations

from ...batch import Batch, Part
from ..workspace import kept_of, share_workspace


def slices(batch: Batch, num_tokens: int, at_a_time: int) -> list[Part]:
    """The query tokens, ``at_a_time`` of them, with the batch each piece is; the whole batch if one piece does."""
    if num_tokens <= at_a_time:
        return [Part(slice(0, num_tokens), batch)]
    key = "slices", num_tokens, at_a_time
    kept = kept_of(batch)
    if key not in kept:
        kept[key] = [
            _slice(batch, start, min(start + at_a_time, num_tokens)) for start in range(0, num_tokens, at_a_time)
        ]
    return kept[key]


def _slice(batch: Batch, start: int, stop: int) -> Part:
    bounds = batch.cu_seqlens_q
    inside = bounds.clamp(start, stop)
    piece = Batch(
        cu_seqlens_q=inside - start,
        # A sequence ends where the piece does; one of which the piece has nothing needs no more to be right.
        seq_lens=batch.seq_lens - (bounds - inside)[1:].clamp(min=0),
        block_table=batch.block_table,
        max_query_len=min(batch.max_query_len, stop - start),
        max_seq_len=batch.max_seq_len,
    )
    share_workspace(batch, piece)
    return Part(slice(start, stop), piece)
