"""A step of every kind that SGLang has, as the kernels' rows."""

from __future__ import annotations

import pytest
import torch

from msa_backend.sglang.metadata import LastingBuffers, MSAMetadata, build

from .batches import MAX_TOKENS, PAGE, decode, extend, idle, request_table, verify

LIMIT = 900


@pytest.fixture(scope="module")
def table() -> torch.Tensor:
    return request_table(num_requests=6, pages_each=7)


def lengths(batch) -> list[tuple[int, int, int]]:
    """(new tokens, tokens before, tokens) of each row."""
    new = (batch.cu_seqlens_q[1:] - batch.cu_seqlens_q[:-1]).tolist()
    return list(zip(new, batch.context_lens.tolist(), batch.seq_lens.tolist(), strict=True))


def assert_pages(metadata: MSAMetadata, requests: list[int], table: torch.Tensor):
    """Each page that a row's tokens are on is the one their slots are in."""
    rows = [(rows.batch, row) for rows in metadata.rows for row in range(rows.batch.num_seqs)]
    for (batch, row), request in zip(rows, requests, strict=True):
        assert batch.block_table.dtype == torch.int32
        for block in range(-(-int(batch.seq_lens[row]) // PAGE)):
            assert batch.block_table[row, block] == table[request, block * PAGE] // PAGE


def test_decode(table: torch.Tensor):
    step = build(decode([4, 0, 2], [257, 1, 128], table), table, LIMIT)
    (rows,) = step.rows
    assert lengths(rows.batch) == [(1, 256, 257), (1, 0, 1), (1, 127, 128)]
    assert (step.num_tokens, rows.tokens) == (3, slice(0, 3))
    assert (rows.batch.max_query_len, rows.batch.max_seq_len, rows.batch.min_context_len) == (1, 257, 0)
    assert_pages(step, [4, 0, 2], table)


def test_extend(table: torch.Tensor):
    step = build(extend([1, 5], [300, 5], [0, 256], table), table, LIMIT)
    (rows,) = step.rows
    assert lengths(rows.batch) == [(300, 0, 300), (5, 256, 261)]
    assert (step.num_tokens, rows.tokens) == (305, slice(0, 305))
    assert (rows.batch.max_query_len, rows.batch.max_seq_len, rows.batch.min_context_len) == (300, 300, 0)
    assert_pages(step, [1, 5], table)


def test_mixed(table: torch.Tensor):
    """SGLang puts the running requests behind the prompts, as rows of one token."""
    step = build(extend([1, 5, 3, 2], [300, 5, 1, 1], [0, 256, 400, 700], table, "MIXED"), table, LIMIT)
    prefill, running = step.rows
    assert lengths(prefill.batch) == [(300, 0, 300), (5, 256, 261)]
    assert lengths(running.batch) == [(1, 400, 401), (1, 700, 701)]
    assert (prefill.tokens, running.tokens) == (slice(0, 305), slice(305, 307))
    assert (running.batch.max_query_len, running.batch.max_seq_len, running.batch.min_context_len) == (1, 701, 400)
    assert_pages(step, [1, 5, 3, 2], table)


def test_prompts_of_one_token(table: torch.Tensor):
    step = build(extend([1, 2], [1, 1], [0, 128], table), table, LIMIT)
    (rows,) = step.rows
    assert lengths(rows.batch) == [(1, 0, 1), (1, 128, 129)]


def test_drafts_to_verify(table: torch.Tensor):
    """SGLang gives no lengths of the new tokens, and leaves them out of the sequences' lengths."""
    step = build(verify([3, 0], [200, 383], 4, table), table, LIMIT)
    (rows,) = step.rows
    assert lengths(rows.batch) == [(4, 200, 204), (4, 383, 387)]
    assert (step.num_tokens, rows.batch.max_query_len) == (8, 4)
    assert (rows.batch.max_seq_len, rows.batch.min_context_len) == (387, 200)
    assert_pages(step, [3, 0], table)


def test_idle(table: torch.Tensor):
    assert build(idle(table), table, LIMIT) == MSAMetadata(0, ())


def test_lengths_unknown_on_the_host(table: torch.Tensor):
    batch = decode([4, 0], [257, 30], table)
    batch.seq_lens_cpu = None
    (rows,) = build(batch, table, LIMIT).rows
    assert (rows.batch.max_seq_len, rows.batch.min_context_len) == (LIMIT, 0)


@pytest.mark.parametrize("kind", [decode, lambda *args: verify(*args[:2], 3, args[2])], ids=["decode", "verify"])
def test_a_graph_finds_a_step_where_it_recorded_one(kind, table: torch.Tensor):
    """Bounds of the recording hold for every later step; what changes between steps is at one address."""
    lasting = LastingBuffers(max_rows=4, req_to_token=table)
    (recorded,) = build(kind([0, 0, 0], [1, 1, 1], table), table, LIMIT, lasting, in_capture=True).rows
    addresses = [x.data_ptr() for x in (recorded.batch.seq_lens, recorded.batch.context_lens)]
    addresses += [recorded.batch.block_table.data_ptr(), recorded.batch.cu_seqlens_q.data_ptr()]
    assert (recorded.batch.max_seq_len, recorded.batch.min_context_len) == (LIMIT, 0)
    assert recorded.batch.block_table.shape == (3, MAX_TOKENS // PAGE)

    (replayed,) = build(kind([4, 1, 0], [257, 640, 1], table), table, LIMIT, lasting).rows
    assert [x.data_ptr() for x in (replayed.batch.seq_lens, replayed.batch.context_lens)] == addresses[:2]
    assert [x.data_ptr() for x in (replayed.batch.block_table, replayed.batch.cu_seqlens_q)] == addresses[2:]
    (eager,) = build(kind([4, 1, 0], [257, 640, 1], table), table, LIMIT).rows
    assert lengths(recorded.batch) == lengths(eager.batch)
    pages = eager.batch.block_table.shape[1]
    assert torch.equal(recorded.batch.block_table[:, :pages], eager.batch.block_table)


def test_a_step_larger_than_any_graph(table: torch.Tensor):
    lasting = LastingBuffers(max_rows=2, req_to_token=table)
    (rows,) = build(decode([4, 1, 0], [257, 640, 1], table), table, LIMIT, lasting).rows
    assert lengths(rows.batch) == [(1, 256, 257), (1, 639, 640), (1, 0, 1)]
