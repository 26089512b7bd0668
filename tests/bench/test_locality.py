"""Locality: neighbours choose alike as far as they are made to, and by default as far as the real model's do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from msa_backend.bench import inputs, locality
from msa_backend.bench.baselines import ours
from msa_backend.bench.cases import Case
from msa_backend.bench.locality import Neighbours

CPU = torch.device("cpu")
CASE = Case("suffix", 8192, batch=2, new_tokens=64, num_heads=2, num_kv_heads=2)


def chosen(case: Case) -> Neighbours | None:
    made = inputs.make_inputs(case, inputs.make_cache(case, CPU, seed=0), seed=0)
    return locality.neighbours(ours.select(made), case)


@pytest.mark.parametrize(
    "case",
    [
        CASE,
        replace(CASE, mode="verify", batch=16, new_tokens=4, num_heads=4, num_kv_heads=4),
        replace(CASE, context=32768, new_tokens=128, batch=1),
        replace(CASE, context=131072, new_tokens=256, batch=1, num_heads=1, num_kv_heads=1, fp8_index=True),
    ],
    ids=lambda case: case.title,
)
def test_four_tokens_choose_22_distinct_blocks_of_64(case: Case) -> None:
    found = chosen(case)
    assert found is not None
    assert found.tokens == 4 and found.chosen == 64
    assert found.distinct == pytest.approx(22, abs=1)


def test_the_nearer_the_queries_the_fewer_blocks_and_random_is_the_worst() -> None:
    distinct = []
    for cosine in (0.0, 0.9, 0.99, 0.9999):
        found = chosen(replace(CASE, locality=cosine))
        assert found is not None
        distinct.append(found.distinct)
    assert distinct == sorted(distinct, reverse=True)
    assert distinct[0] > 40 and distinct[-1] < 18


def test_no_cosine_where_all_blocks_are_chosen() -> None:
    cosine = locality.calibrated_cosine(torch.tensor([1, 16, 17, 24, 8192]), topk=16)
    assert cosine[:2].tolist() == [0, 0]
    assert (cosine[2:].diff() > 0).all() and cosine[2] > 0 and cosine[-1] < 1


def test_a_chain_is_what_a_loop_makes() -> None:
    noise, cosine = torch.randn(3, 37, 2, 5, dtype=torch.float64), torch.rand(3, 37, dtype=torch.float64)
    cosine[1, 7] = 0
    x = [noise[:, 0]]
    for t in range(1, 37):
        c = cosine[:, t, None, None]
        x.append(c * x[-1] + (1 - c.square()).sqrt() * noise[:, t])
    assert torch.allclose(locality.chain(noise, cosine), torch.stack(x, 1), atol=1e-12)


def test_queries_are_as_long_as_random_ones() -> None:
    case = replace(CASE, new_tokens=2048, batch=4)
    for cosine in (0.0, 0.9):
        queries = locality.index_queries(replace(case, locality=cosine), torch.Generator().manual_seed(0), CPU)
        assert float(queries.square().mean()) == pytest.approx(1, abs=0.05)


def test_distinct_blocks_by_hand() -> None:
    case = replace(CASE, batch=2, new_tokens=5)
    row = torch.tensor([[0, 3, -1], [0, 4, 7], [0, 3, 7], [0, 3, 7], [8, 9, 10]])  # the fifth has no group of its own
    other = torch.tensor([[1, 2, 3]] * 5)
    assert locality.neighbours(torch.cat([row, other]).int().expand(4, -1, -1), case) == (4, (4 + 3) / 2, (11 + 12) / 2)
    assert locality.neighbours(other[:2].int()[None], replace(case, batch=1, new_tokens=2)) == (2, 3, 6)
    assert locality.neighbours(other[:1].int()[None], replace(case, batch=1, new_tokens=1)) is None
