"""A step's parts, and the one road through them."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch

from msa_backend import attend as road
from msa_backend.kernels import reference
from msa_backend.kernels.api import Batch, LayerCaches, Selection, Step


def cut(query_lens: list[int], seq_lens: list[int]) -> Step:
    starts = torch.tensor([0, *accumulate(query_lens)], dtype=torch.int32)
    table = torch.arange(len(query_lens) * 4, dtype=torch.int32).view(-1, 4)
    return road.cut(starts, torch.tensor(seq_lens, dtype=torch.int32), table, query_lens, seq_lens)


def lengths(batch: Batch) -> list[tuple[int, int, int]]:
    """(new tokens, tokens before, tokens) of each sequence."""
    new = (batch.cu_seqlens_q[1:] - batch.cu_seqlens_q[:-1]).tolist()
    return list(zip(new, batch.context_lens.tolist(), batch.seq_lens.tolist(), strict=True))


def test_decode_then_prompts():
    step = cut([1, 1, 600, 5, 40], [40, 257, 600, 133, 41])
    decode, prompts = step.parts
    assert step.num_tokens == 647
    assert (decode.tokens, prompts.tokens) == (slice(0, 2), slice(2, 647))
    assert lengths(decode.batch) == [(1, 39, 40), (1, 256, 257)]
    assert lengths(prompts.batch) == [(600, 0, 600), (5, 128, 133), (40, 1, 41)]
    assert prompts.batch.cu_seqlens_q.tolist() == [0, 600, 605, 645]
    assert prompts.batch.block_table.tolist() == [[8, 9, 10, 11], [12, 13, 14, 15], [16, 17, 18, 19]]
    assert (decode.batch.max_query_len, prompts.batch.max_query_len) == (1, 600)
    assert (decode.batch.max_seq_len, prompts.batch.max_seq_len) == (257, 600)


def test_prompts_then_decode():
    step = cut([600, 5, 1], [700, 133, 41])
    assert [lengths(part.batch) for part in step.parts] == [[(600, 100, 700)], [(5, 128, 133), (1, 40, 41)]]
    assert [part.tokens for part in step.parts] == [slice(0, 600), slice(600, 606)]


@pytest.mark.parametrize(("query_lens", "seq_lens"), [([1, 300, 5], [40, 300, 133]), ([16] * 100, [500] * 100)])
def test_a_step_of_few_tokens_or_of_short_sequences_is_one_part(query_lens: list[int], seq_lens: list[int]):
    step = cut(query_lens, seq_lens)
    (part,) = step.parts
    assert part.tokens == slice(0, sum(query_lens))
    assert part.batch.num_seqs == len(query_lens)


def test_a_step_of_nothing():
    assert cut([0, 0], [5, 0]) == Step(0, ())
    assert road.whole(*torch.zeros(3, 1, dtype=torch.int32), 0, 0, 0) == Step(0, ())


def test_sequences_without_tokens_bound_nothing():
    (part,) = cut([900, 0], [5000, 99_000]).parts
    assert part.batch.max_seq_len == 5000


@pytest.mark.parametrize("sparse", [True, False])
def test_each_part_in_its_place_and_zero_behind(sparse: bool):
    torch.manual_seed(0)
    heads, kv_heads, dim, padding = 4, 2, 16, 3
    step = cut([1, 520, 2], [300, 530, 9])
    num_tokens = step.num_tokens
    k_pages, v_pages = torch.randn(2, 12, kv_heads, 128, dim)
    # The table names four pages a sequence, and 530 tokens need five.
    pages = torch.randperm(15, dtype=torch.int32).view(3, 5) % 12
    parts = tuple(
        road.Part(part.tokens, road.Batch(*vars_of(part.batch, pages[first:last])))
        for part, first, last in zip(step.parts, (0, 1, 2), (1, 2, 3), strict=True)
    )
    step = Step(num_tokens, parts)
    caches = LayerCaches(k_pages, v_pages, torch.randn(12, 128, dim))
    q, index_q = torch.randn(num_tokens + padding, heads, dim), torch.randn(num_tokens + padding, kv_heads, dim)
    out = torch.full_like(q, torch.nan)
    selection = Selection(2)
    if sparse:
        road.attend(q, index_q, caches, step, selection, 0.25, out)
    else:
        road.attend(q, None, caches, step, None, 0.25, out)
    for part in parts:
        here = part.tokens
        if sparse:
            block_ids = reference.select_blocks(index_q[here], caches, part.batch, selection)
            expected = reference.sparse_attention(q[here], caches, block_ids, part.batch, 0.25)
        else:
            expected = reference.dense_attention(q[here], caches, part.batch, 0.25)
        torch.testing.assert_close(out[here].double(), expected, atol=1e-5, rtol=0)
    assert (out[num_tokens:] == 0).all()


def vars_of(batch: Batch, block_table: torch.Tensor) -> tuple:
    return (batch.cu_seqlens_q, batch.seq_lens, block_table, batch.max_query_len, batch.max_seq_len)
