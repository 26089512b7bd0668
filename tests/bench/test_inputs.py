"""Inputs: where sequences lie, and what is counted of a selection."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from msa_backend.bench import check, inputs
from msa_backend.bench.baselines import ours
from msa_backend.bench.cases import PRESETS, Case, capture_for, grid
from msa_backend.bench.inputs import GARBAGE, Inputs

CASE = Case("prefill", 4000, new_tokens=256, num_heads=4, num_kv_heads=2, dim=32, topk=4, dtype="fp32")


PRESET = {case.mode: case for case in PRESETS["small"]()}


def make(case: Case) -> Inputs:
    return inputs.make_inputs(case, inputs.make_cache(case, torch.device("cpu"), seed=0), seed=0)


@pytest.mark.parametrize("case", PRESET.values(), ids=lambda case: case.mode)
def test_rows_lie_in_pages_of_their_own_with_garbage_past_their_end(case: Case) -> None:
    made = make(case)
    assert made.batch.seq_lens.tolist() == case.lengths
    assert (made.batch.seq_lens - made.context_lens).tolist() == [case.new_tokens] * case.batch
    pages = [row[: -(-length // 128)] for row, length in zip(made.batch.block_table, case.lengths, strict=True)]
    assert torch.cat(pages).sort().values.tolist() == list(range(len(made.kv_pages)))
    for row, length in zip(pages, case.lengths, strict=True):
        past_end = made.kv_pages[row[-1], :, (length - 1) % 128 + 1 :]
        assert (past_end == GARBAGE).all()
    assert (made.kv_pages == GARBAGE).sum() == sum(-length % 128 for length in case.lengths) * case.num_kv_heads * 64


@pytest.mark.parametrize("most_pages", [21, 14])
def test_sequences_that_share_pages_hold_none_twice_and_their_last_alone(most_pages: int) -> None:
    case = replace(PRESET["verify"], context=1010)  # of 4 + 7 + 10 + 12 pages
    cache = inputs.make_cache(case, torch.device("cpu"), 0, most_pages)
    made = inputs.make_inputs(case, cache, seed=0)
    rows = [row[:count].tolist() for row, count in zip(cache.block_table, inputs.pages_needed(case), strict=True)]
    assert [len(set(row)) for row in rows] == [4, 7, 10, 12]
    held = [page for row in rows for page in row]
    assert set(held) <= set(range(len(cache.kv_pages)))
    assert len(cache.kv_pages) == max(most_pages, 11 + 4) < len(held)
    assert all(held.count(row[-1]) == 1 for row in rows)
    assert rows[2][:9] != sorted(rows[2][:9])
    block_ids = ours.select(made)
    assert check.selection_error(block_ids, made) <= check.SELECTION_TOLERANCE["fp32"]
    assert check.attention_error(ours.attend(made, block_ids), block_ids, made) < 1e-5


def test_lengths_to_verify_are_spread_about_their_mean() -> None:
    lengths = Case("verify", 1000, batch=5, new_tokens=8).lengths
    assert lengths == [500, 750, 1000, 1250, 1500]


def test_a_bound_is_all_that_the_host_knows_of_the_lengths() -> None:
    case = replace(PRESET["verify"], bound=32768)
    own, made = make(replace(case, bound=0)), make(case)
    assert made.batch.max_seq_len == 32768 and made.batch.block_table.shape == (4, 256)
    assert own.batch.max_seq_len == 1500 and own.batch.block_table.shape == (4, 12)
    assert torch.equal(made.batch.block_table[:, :12], own.batch.block_table)
    assert torch.equal(made.batch.seq_lens, own.batch.seq_lens)
    assert torch.equal(ours.select(made), ours.select(own))


def test_decode_and_verify_are_captured_for_each_bound_that_holds_them() -> None:
    cases = [
        Case("prefill", 4096, new_tokens=9),
        Case("decode", 4096, bound=7),
        Case("verify", 4000, batch=3, new_tokens=4),
        Case("decode", 8193),
    ]
    captured = list(capture_for(cases, [8192, 4096]))
    assert [(case.mode, case.bound) for case in captured] == [
        ("prefill", 0), ("decode", 8192), ("decode", 4096), ("verify", 8192), ("decode", 0)
    ]  # fmt: skip
    assert [case.bound for case in capture_for(cases[1:2], [0, 8192])] == [0, 8192]
    assert captured[1].title.endswith("captured for 8K")


def test_distinct_blocks_of_a_selection_by_hand() -> None:
    made = make(replace(CASE, batch=2, new_tokens=2, context=1000))
    one_head = torch.tensor([[0, 3, 7, -1], [0, 4, 7, -1], [1, 2, -1, -1], [1, 2, -1, -1]])
    assert inputs.distinct_blocks(one_head.expand(2, 4, 4).int(), made) == 2 * (4 + 2)


def test_fp8_index_queries_are_the_same_numbers_in_both_dtypes() -> None:
    made = make(replace(CASE, fp8_index=True, dtype="bf16"))
    assert made.index_q_fp8 is not None and made.index_k_pages.dtype == torch.float8_e4m3fn
    assert torch.equal(made.index_q_fp8.float(), made.index_q.float())
    assert make(replace(CASE, fp8_index=False)).index_q_fp8 is None


def test_the_slot_pools_hold_what_the_pages_hold() -> None:
    made = make(CASE)
    k, v = made.cache.slot_pools
    slot = made.cache.slot_table[0, 1234]
    page = made.batch.block_table[0, 1234 // 128]
    assert torch.equal(k[slot], made.k_pages[page, :, 1234 % 128])
    assert torch.equal(v[slot], made.v_pages[page, :, 1234 % 128])


def test_a_grid_has_every_combination_and_no_more_new_tokens_than_context() -> None:
    cases = list(grid(["prefill", "decode"], [4096, 16384], [1, 2], [(64, 4), (8, 1)], None, CASE))
    assert len({case.title for case in cases}) == len(cases) == 16
    assert {case.new_tokens for case in cases if case.mode == "prefill"} == {4096, 8192}
    assert {case.new_tokens for case in cases if case.mode == "decode"} == {1}
