"""A step of every kind that SGLang has, as the kernels' parts."""

from __future__ import annotations

import pytest
import torch

from msa_backend.kernels.batch import Step
from msa_backend.sglang.metadata import LastingBuffers, build

from .batches import MAX_TOKENS, PAGE, decode, extend, idle, request_table, verify

LIMIT = 900


@pytest.fixture(scope="module")
def table() -> torch.Tensor:
    return request_table(num_requests=6, pages_each=7)


def lengths(batch) -> list[tuple[int, int, int]]:
    """(new tokens, tokens before, tokens) of each row."""
    new = (batch.cu_seqlens_q[1:] - batch.cu_seqlens_q[:-1]).tolist()
    return list(zip(new, batch.context_lens.tolist(), batch.seq_lens.tolist(), strict=True))


def assert_pages(step: Step, requests: list[int], table: torch.Tensor):
    """Each page that a row's tokens are on is the one their slots are in."""
    rows = [(part.batch, row) for part in step.parts for row in range(part.batch.num_seqs)]
    for (batch, row), request in zip(rows, requests, strict=True):
        assert batch.block_table.dtype == torch.int32
        for block in range(-(-int(batch.seq_lens[row]) // PAGE)):
            assert batch.block_table[row, block] == table[request, block * PAGE] // PAGE


def test_decode(table: torch.Tensor):
    step = build(decode([4, 0, 2], [257, 1, 128], table), table, LIMIT)
    (part,) = step.parts
    assert lengths(part.batch) == [(1, 256, 257), (1, 0, 1), (1, 127, 128)]
    assert (step.num_tokens, part.tokens) == (3, slice(0, 3))
    assert (part.batch.max_query_len, part.batch.max_seq_len) == (1, 257)
    assert_pages(step, [4, 0, 2], table)


def test_extend(table: torch.Tensor):
    step = build(extend([1, 5], [300, 5], [0, 256], table), table, LIMIT)
    (part,) = step.parts
    assert lengths(part.batch) == [(300, 0, 300), (5, 256, 261)]
    assert (step.num_tokens, part.tokens) == (305, slice(0, 305))
    assert (part.batch.max_query_len, part.batch.max_seq_len) == (300, 300)
    assert_pages(step, [1, 5], table)


def test_mixed(table: torch.Tensor):
    """SGLang puts the running requests behind the prompts, as rows of one token."""
    step = build(extend([1, 5, 3, 2], [600, 70, 1, 1], [0, 256, 400, 700], table, "MIXED"), table, LIMIT)
    prefill, running = step.parts
    assert lengths(prefill.batch) == [(600, 0, 600), (70, 256, 326)]
    assert lengths(running.batch) == [(1, 400, 401), (1, 700, 701)]
    assert (prefill.tokens, running.tokens) == (slice(0, 670), slice(670, 672))
    assert (running.batch.max_query_len, running.batch.max_seq_len) == (1, 701)
    assert_pages(step, [1, 5, 3, 2], table)


def test_prompts_of_one_token(table: torch.Tensor):
    step = build(extend([1, 2], [1, 1], [0, 128], table), table, LIMIT)
    (part,) = step.parts
    assert lengths(part.batch) == [(1, 0, 1), (1, 128, 129)]


def test_drafts_to_verify(table: torch.Tensor):
    """SGLang gives no lengths of the new tokens, and leaves them out of the sequences' lengths."""
    step = build(verify([3, 0], [200, 383], 4, table), table, LIMIT)
    (part,) = step.parts
    assert lengths(part.batch) == [(4, 200, 204), (4, 383, 387)]
    assert (step.num_tokens, part.batch.max_query_len) == (8, 4)
    assert part.batch.max_seq_len == 387
    assert_pages(step, [3, 0], table)


def test_idle(table: torch.Tensor):
    assert build(idle(table), table, LIMIT) == Step(0, ())


def test_lengths_unknown_on_the_host(table: torch.Tensor):
    batch = decode([4, 0], [257, 30], table)
    batch.seq_lens_cpu = None
    (part,) = build(batch, table, LIMIT).parts
    assert part.batch.max_seq_len == LIMIT


@pytest.mark.parametrize("kind", [decode, lambda *args: verify(*args[:2], 3, args[2])], ids=["decode", "verify"])
def test_a_graph_finds_a_step_where_it_recorded_one(kind, table: torch.Tensor):
    """Bounds of the recording hold for every later step; what changes between steps is at one address."""
    lasting = LastingBuffers(max_rows=4, req_to_token=table)
    (recorded,) = build(kind([0, 0, 0], [1, 1, 1], table), table, LIMIT, lasting, in_capture=True).parts
    names = ("seq_lens", "block_table", "cu_seqlens_q")
    addresses = [getattr(recorded.batch, name).data_ptr() for name in names]
    assert recorded.batch.max_seq_len == LIMIT
    assert recorded.batch.block_table.shape == (3, MAX_TOKENS // PAGE)

    (replayed,) = build(kind([4, 1, 0], [257, 640, 1], table), table, LIMIT, lasting).parts
    assert [getattr(replayed.batch, name).data_ptr() for name in names] == addresses
    (eager,) = build(kind([4, 1, 0], [257, 640, 1], table), table, LIMIT).parts
    assert lengths(recorded.batch) == lengths(eager.batch)
    pages = eager.batch.block_table.shape[1]
    assert torch.equal(recorded.batch.block_table[:, :pages], eager.batch.block_table)


def test_a_step_larger_than_any_graph(table: torch.Tensor):
    lasting = LastingBuffers(max_rows=2, req_to_token=table)
    (part,) = build(decode([4, 1, 0], [257, 640, 1], table), table, LIMIT, lasting).parts
    assert lengths(part.batch) == [(1, 256, 257), (1, 639, 640), (1, 0, 1)]
