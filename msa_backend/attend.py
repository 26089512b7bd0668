"""The one road through attention, for both engines: in each part of a step select and attend; zero the padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msa_backend.kernels import api as kernels
from msa_backend.kernels.api import Batch, LayerCaches, Part, Selection, Step
from msa_backend.kernels.dispatch import Choice
from msa_backend.sharing import SharedScoring

UNCUT_TOKENS = 512
"""Steps of up to so many query tokens are one part, whatever sequences they are of."""
SHORT_QUERY_LEN = 16
"""Sequences of up to so many are decode steps, drafts to verify, or as good as those."""


def attend(
    q: Tensor,
    index_q: Tensor | None,
    caches: LayerCaches,
    step: Step,
    selection: Selection | None,
    scale: float,
    out: Tensor,
    sharing: SharedScoring | None = None,
) -> None:
    """Attend from the new tokens of a layer, whose keys and values are in its caches already.

    Args:
        q: ``[num_tokens, num_heads, head_dim]``, as many tokens as the step has, or more: padding.
        index_q: ``[num_tokens, num_kv_heads, index_dim]`` of a sparse layer; None for a dense one.
        selection: of a sparse layer; None for a dense one.
        scale: of the logits.
        out: like ``q``, to be filled; 0 for padding.
        sharing: how ranks share the scoring of blocks; None if each is for itself.
    """
    attend_sparse = kernels.attend if sharing is None else sharing.attend
    for part in step.parts:
        here = part.tokens
        if index_q is None or selection is None:
            kernels.dense_attention(q[here], caches, part.batch, scale, out[here])
        else:
            attend_sparse(q[here], index_q[here], caches, part.batch, selection, scale, out[here])
    if q.shape[0] > step.num_tokens:
        out[step.num_tokens :].zero_()


def index_query_dtype(choice: Choice, index_dtype: torch.dtype) -> torch.dtype | None:
    """Of index queries, given that of the keys; None is the model's.

    Tensor cores take both sides of a product in e4m3; on a CPU rounding the queries too would gain nothing.
    """
    return index_dtype if choice.is_triton and index_dtype == torch.float8_e4m3fn else None


def whole(
    cu_seqlens_q: Tensor, seq_lens: Tensor, block_table: Tensor, num_tokens: int, max_query_len: int, max_seq_len: int
) -> Step:
    """A step in one part, of which the host need know no more than bounds: what a CUDA graph records."""
    batch = Batch(cu_seqlens_q, seq_lens, block_table, max_query_len, max_seq_len)
    return Step(num_tokens, (Part(slice(0, num_tokens), batch),) if num_tokens else ())


def cut(
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    query_lens: Sequence[int],
    known_seq_lens: Sequence[int],
) -> Step:
    """A step cut so that short sequences at its front and back stand apart from long ones between them.

    Args:
        cu_seqlens_q, seq_lens, block_table: as in :class:`~msa_backend.kernels.batch.Batch`.
        query_lens: ``[num_seqs]`` on the host.
        known_seq_lens: ``[num_seqs]`` on the host, upper bounds of ``seq_lens``.
    """
    num_seqs, num_tokens = len(query_lens), sum(query_lens)
    if not num_tokens:
        return Step(0, ())
    bounds = [0, num_seqs]
    if num_tokens > UNCUT_TOKENS:
        long = [i for i, query_len in enumerate(query_lens) if query_len > SHORT_QUERY_LEN]
        if long:
            bounds = sorted({0, long[0], long[-1] + 1, num_seqs})
    parts, start = [], 0
    for first, last in zip(bounds, bounds[1:], strict=False):
        here = slice(first, last)
        tokens = sum(query_lens[here])
        if not tokens:
            continue
        live = [(n, m) for n, m in zip(query_lens[here], known_seq_lens[here], strict=True) if n]
        of_part = cu_seqlens_q[first : last + 1]
        batch = Batch(
            cu_seqlens_q=of_part - start if start else of_part,
            seq_lens=seq_lens[here],
            block_table=block_table[here],
            max_query_len=max(n for n, _ in live),
            max_seq_len=max(m for _, m in live),
        )
        parts.append(Part(slice(start, start + tokens), batch))
        start += tokens
    return Step(num_tokens, tuple(parts))
