"""The work of a case, counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from msa_backend.bench import counts
from msa_backend.bench.cases import Case
from msa_backend.bench.counts import Rates, Work

DECODE = Case("decode", context=1000, batch=2, num_heads=8, num_kv_heads=2, dim=32, topk=4)


def test_selection_reads_each_index_key_once() -> None:
    work = counts.selection(DECODE)
    assert work.flop == 2 * 32 * 2 * (1000 + 1000)
    keys, queries, block_ids = 2 * 1000 * 32 * 2, 2 * 2 * 32 * 2, 2 * 2 * 4 * 4
    assert work.bytes == keys + queries + block_ids
    assert not work.fp8


def test_fp8_index_keys_and_queries_are_half_the_bytes_and_multiply_faster() -> None:
    fp8 = counts.selection(replace(DECODE, fp8_index=True))
    assert counts.selection(DECODE).bytes - fp8.bytes == 2 * 1000 * 32 + 2 * 2 * 32
    assert fp8.fp8


def test_a_query_sees_its_own_token_and_those_before() -> None:
    work = counts.selection(replace(DECODE, mode="prefill", context=5, batch=1, new_tokens=3))
    assert work.flop == 2 * 32 * 2 * (3 + 4 + 5)


def test_attention_over_the_chosen_blocks_of_which_the_last_is_not_full() -> None:
    work = counts.sparse_attention(DECODE, distinct_blocks=16)
    pairs = 2 * (3 * 128 + 1000 - 7 * 128)
    assert work.flop == 4 * 32 * 8 * pairs
    assert work.bytes == 2 * 2 * 8 * 32 * 2 + 2 * 16 * 128 * 32 * 2
    fp8 = counts.sparse_attention(replace(DECODE, fp8_kv=True), distinct_blocks=16)
    assert work.bytes - fp8.bytes == 2 * 16 * 128 * 32


def test_a_short_context_is_attended_to_whole() -> None:
    short = replace(DECODE, context=300)
    assert counts.sparse_attention(short, distinct_blocks=1).flop == counts.dense_attention(short).flop


def test_dense_attention_reads_all_keys_and_values() -> None:
    work = counts.dense_attention(DECODE)
    assert work.flop == 4 * 32 * 8 * 2000
    assert work.bytes == 2 * 2 * 8 * 32 * 2 + 2 * 2 * 2000 * 32 * 2


def test_the_floor_is_the_slower_of_reading_and_multiplying() -> None:
    rates = Rates(bandwidth=10.0, copy=10.0, flops=100.0, fp8_flops=200.0)
    assert Work(flop=1000, bytes=20).floor(rates) == 10.0
    assert Work(flop=1000, bytes=20, fp8=True).floor(rates) == 5.0
    assert Work(flop=1000, bytes=200).floor(rates) == 20.0


def test_the_release_at_a_million_tokens_is_what_the_report_of_the_floors_says() -> None:
    work = counts.selection(Case("prefill", 2**20, new_tokens=8192))
    assert work.flop == pytest.approx(8.8e12, rel=0.01)
    assert counts.sparse_attention(Case("prefill", 2**20, new_tokens=8192), 0).flop == pytest.approx(5.5e11, rel=0.05)
