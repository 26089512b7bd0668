"""Choosing by one-byte keys and rescoring what their bounds leave open: the choice is that of the bf16 keys."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

PATH = Path(__file__).parents[2] / "research" / "fp8_rescore.py"
spec = importlib.util.spec_from_file_location("fp8_rescore", PATH)
assert spec is not None and spec.loader is not None
study = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = study  # NamedTuples look their module up
spec.loader.exec_module(study)

CASES = [(rounding, bound) for rounding, bounds in study.VARIANTS.items() for bound in bounds]
KINDS = (
    "gaussian", "near ties", "norms apart", "huge channel", "identical", "subnormal", "saturated", "zero", "one way",
    "query one way",
)  # fmt: skip


def make(kind: str, blocks: int, seed: int) -> tuple[Tensor, Tensor]:
    """Queries ``[4, 128]`` and keys ``[blocks * 128, 128]``, numbers of bf16 as fp32."""
    rng = torch.Generator().manual_seed(seed)
    q, keys = torch.randn(4, study.DIM, generator=rng), torch.randn(blocks * study.BLOCK, study.DIM, generator=rng)
    if kind == "near ties":  # one vector, with a last bit changed here and there: one byte sees no difference
        keys = keys[:1].repeat(len(keys), 1) * (1 + 2.0**-8 * (torch.rand(keys.shape, generator=rng) < 0.02))
    elif kind == "norms apart":
        keys *= 2.0 ** torch.randint(-20, 20, (len(keys), 1), generator=rng)
    elif kind == "huge channel":
        keys[:, 7] *= 1e6
    elif kind == "identical":
        keys = keys[: study.BLOCK].repeat(blocks, 1)
    elif kind == "subnormal":
        keys *= 2.0**-124
    elif kind == "saturated":
        keys *= 1000
    elif kind == "zero":
        keys[: len(keys) // 2] = 0
        q[0] = 0
    elif kind == "one way":  # every channel is rounded against the query, down in some keys and up in others
        q = q.sign()
        up = torch.rand(len(keys), 1, generator=rng) < 0.5
        keys = torch.where(up, 1 + 13 / 128, 1 + 7 / 128) * q[0].repeat(len(keys), 1)
        keys += 2.0**-7 * (torch.rand(keys.shape, generator=rng) < 0.1)
    elif kind == "query one way":  # keys are exact, and all channels of the query are rounded down
        q = torch.full_like(q, 1 + 1 / 16)
        q[:, 0] = 448 / 256
        keys = torch.ones_like(keys)
        keys[:, 0] = 0
    return study.as_bf16(q), study.as_bf16(keys)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(KINDS), st.sampled_from(CASES), st.integers(1, 12), st.data())
def test_the_choice_is_that_of_bf16(kind: str, case: tuple, blocks: int, data: st.DataObject) -> None:
    topk = data.draw(st.integers(1, blocks))
    q, keys = make(kind, blocks, data.draw(st.integers(0, 2**32)))
    exact = study.block_max(q.double() @ keys.double().T)
    best = exact.topk(topk).values
    for seeded in (False, True):
        chosen, rescored = study.select(q, keys, *case, topk, seeded)
        assert all(len(set(row)) == topk for row in chosen.tolist())
        assert torch.equal(exact.gather(1, chosen).sort(descending=True).values, best)
        assert rescored.gather(1, chosen).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join((*case[0][:2], *case[1])))
def test_scores_lie_between_their_ends(kind: str, case: tuple) -> None:
    q, keys = make(kind, 3, seed=1)
    exact = study.block_max(q.double() @ keys.double().T)
    (ends,) = study.score_ends(q, keys, case[0], [case[1]])
    assert (ends.lower <= exact).all() and (exact <= ends.upper).all()


def test_bytes_alone_choose_otherwise() -> None:
    """Or the tests above would show nothing: e4m3 ranks blocks in another order, by all that the bound allows."""
    q, keys = make("one way", 8, seed=0)
    exact = study.block_max(q.double() @ keys.double().T)
    rounding = study.Rounding("e4m3", "one")
    (ends,) = study.score_ends(q, keys, rounding, [study.KEY])
    by_bytes = ends.middle[0].topk(2).indices
    assert exact[0, by_bytes].sum() < exact[0].topk(2).values.sum()


def test_far_apart_blocks_are_not_rescored() -> None:
    q, keys = make("gaussian", 12, seed=3)
    keys[: 3 * study.BLOCK] = study.as_bf16(keys[: 3 * study.BLOCK] + 3 * q[0])
    chosen, rescored = study.select(q[:1], keys, *CASES[0], 3, False)
    assert sorted(chosen[0].tolist()) == [0, 1, 2]
    assert rescored.sum() == 3


def test_bounds_are_stored_rounded_up() -> None:
    x = torch.tensor([0.0, 1.0, 1.0 + 2**-20, 3.14159, 1e-30])
    up = study.up_to_bf16(x)
    assert (up >= x).all() and torch.equal(up, up.bfloat16().float())
    assert torch.allclose(up, x, rtol=2**-7)


def test_shares_of_a_small_study() -> None:
    rows = study.shares(study.Source("clustered", 0), [2**13], tokens=2)
    assert len(rows) == len(CASES)
    for row in rows:
        assert study.TOPK / 64 <= row["seeded"] <= row["seeded_token"] <= 1
        assert row["plain"] <= row["plain_worst_row"] <= 1
