"""Steps of few tokens in any mix, against the definition, on a GPU if there is one, else under Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from msa_backend.kernels import reference
from msa_backend.kernels.gpu import arch
from msa_backend.kernels.gpu.launch import Repeated
from msa_backend.kernels.selection import Selection

from ..batches import LAYOUTS, Case, Row, make_case
from ..compare import assert_selection
from ..implementations import GPU, ON_CUDA

pytestmark = pytest.mark.gpu
DTYPES = [torch.float16, torch.bfloat16, torch.float32] if ON_CUDA else [torch.float16, torch.float32]
VERIFY = [Row.of(4, 900), Row.of(1, 2300), Row(1, 0, 0), Row.of(3), Row.of(0, 300), Row(1, -1, 0), Row.of(7, 1020)]
DECODE = [Row.of(1, 2300), Row(1, -1, 0), Row.of(1, 127), Row.of(1), Row.of(1, 1500)]
MIXED = [Row.of(1, 2300), Row.of(37, 700), Row.of(1, 128), Row.of(0, 5), Row.of(6, 1000), Row.of(21), Row(2, 0, 0)]
SELECTION = Selection(4)


def select(case: Case, selection: Selection) -> Tensor:
    case = case.to(GPU.device)
    return GPU.select_blocks(case.index_q, case.caches, case.batch, selection).cpu()


def check_attention(case: Case, block_ids: Tensor) -> None:
    """Products of 16-bit numbers are exact in fp32, but the weights are rounded to the dtype of the values, each by
    at most half a unit of it; the values averaged are of order 1."""
    expected = reference.sparse_attention(case.q, case.caches, block_ids, case.batch, case.scale)
    on_device = case.to(GPU.device)
    out = torch.full_like(on_device.q, torch.nan)
    arguments = on_device.q, on_device.caches, block_ids.to(GPU.device), on_device.batch, case.scale
    GPU.sparse_attention(*arguments, out)
    out = out.cpu().double()
    eps = torch.finfo(case.q.dtype).eps if case.q.dtype != torch.float32 else 2e-6
    assert (out - expected).norm() <= eps * expected.norm()
    assert ((out - expected).abs() <= 2 * eps * expected.abs().max()).all()
    assert (out[case.num_live_tokens :] == 0).all()


def check(case: Case, selection: Selection) -> None:
    assert_selection(case, select(case, selection), selection)
    block_ids = reference.select_blocks(case.index_q, case.caches, case.batch, selection)
    check_attention(case, block_ids)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [DECODE, VERIFY, MIXED], ids=["decode", "verify", "mixed"])
def test_rows(rows: list[Row], dtype: torch.dtype):
    check(make_case(rows, dtype=dtype, padding_tail=3), SELECTION)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str):
    check(make_case(MIXED, dtype=torch.float16, layout=layout, share_prefix=True), SELECTION)


@pytest.mark.parametrize("group", [1, 3, 12, 16])
def test_groups(group: int):
    check(make_case([Row.of(5, 700), Row.of(1, 600)], dtype=torch.float16, group=group), SELECTION)


@pytest.mark.parametrize("num_kv_heads", [1, 3, 8])
def test_heads(num_kv_heads: int):
    check(make_case([Row.of(5, 700), Row.of(1, 600)], dtype=torch.float16, num_kv_heads=num_kv_heads), SELECTION)


@pytest.mark.parametrize(("query_len", "topk"), [(1, 1), (1, 32), (2, 13), (8, 13), (16, 1), (16, 32), (90, 5)])
def test_row_lengths(query_len: int, topk: int):
    case = make_case([Row.of(query_len, 4400), Row.of(query_len, 30)], group=16, dtype=torch.float16, padding_tail=1)
    check(case, Selection(topk))


@pytest.mark.parametrize("dim", [16, 64, 128])
def test_head_sizes(dim: int):
    check(make_case([Row.of(2, 600), Row.of(1, 600)], dim=dim, dtype=torch.float16), SELECTION)


@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("query_len", [1, 3, 20])
def test_fp8_caches(query_len: int, dtype: torch.dtype, cache_dtype: torch.dtype):
    rows = [Row.of(query_len, 700), Row.of(1, 600)]
    check(make_case(rows, dtype=dtype, cache_dtype=cache_dtype, k_scale=0.5, v_scale=2.0), SELECTION)


@pytest.mark.parametrize("query_len", [1, 3, 20])
@pytest.mark.parametrize("fp8_index", [False, True])
def test_caches_of_two_dtypes(query_len: int, fp8_index: bool):
    """K and V in fp8 beside index keys that are not, and the other way round."""
    fp8 = torch.float8_e4m3fn
    scales = {} if fp8_index else {"cache_dtype": fp8, "k_scale": 0.5, "v_scale": 2.0}
    case = make_case([Row.of(query_len, 700), Row.of(1, 600)], dtype=torch.float16, **scales)
    index_k_pages = case.caches.index_k_pages
    assert index_k_pages is not None
    check(case.with_caches(index_k_pages=index_k_pages.to(fp8 if fp8_index else torch.float16)), SELECTION)


@pytest.mark.parametrize("query_len", [1, 600])
def test_layers_with_scales_of_their_own(query_len: int):
    """The launches of a step's first layer serve the others, with theirs: all blocks are taken in both."""
    rows = [Row.of(query_len, 300), Row.of(1, 200)]
    made = [
        make_case(rows, dtype=torch.float16, cache_dtype=torch.float8_e4m3fn, k_scale=k, v_scale=v)
        for k, v in [(0.5, 2.0), (0.125, 0.75), (0.5, 0.75)]
    ]
    first = made[0].to(GPU.device)
    for case in made:
        layer, selection = case.to(GPU.device), Selection(8)
        out = GPU.attend(layer.q, layer.index_q, layer.caches, first.batch, selection, case.scale)
        expected = reference.dense_attention(case.q, case.caches, made[0].batch, case.scale)
        assert (out.cpu().double() - expected).norm() <= 2**-10 * expected.norm()
    assert sum(isinstance(kept, Repeated) for kept in first.batch.kept.values()) == 1


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("query_len", [1, 5])
def test_fp8_index_queries(query_len: int, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    """Against the reference on the same rounded queries. fp8 tensor cores add up with about 13 bits."""
    if not ON_CUDA and capability == (9, 0):
        pytest.skip("the interpreter multiplies no fp8")
    monkeypatch.setattr(arch, "capability", lambda device: capability)
    case = make_case([Row.of(query_len, 2000)], dtype=torch.float16, cache_dtype=torch.float8_e4m3fn, dim=128)
    case = replace(case, index_q=case.index_q.to(torch.float8_e4m3fn))
    block_ids = select(case, SELECTION)
    scores = reference.block_scores(case.index_q, case.caches, case.batch)
    size = case.index_q.float().norm(dim=-1).T * 128**0.5
    # The newest block is forced in; the others are the best, but for rounding.
    assert (block_ids[..., -1] == 15).all()
    best = scores[..., :15].topk(SELECTION.topk - 1, dim=-1).values.sum(-1)
    taken = scores.gather(2, block_ids[..., :-1].long()).sum(-1)
    assert (taken >= best - 3 * 2.0**-10 * size).all()


@pytest.mark.parametrize("query_len", [1, 3])
def test_tokens_without_blocks(query_len: int):
    case = make_case([Row.of(query_len, 600), Row.of(query_len, 900)], dtype=torch.float16)
    block_ids = reference.select_blocks(case.index_q, case.caches, case.batch, SELECTION)
    block_ids[:, 0] = -1
    check_attention(case, block_ids)


@pytest.mark.parametrize("query_len", [1, 2])
def test_nothing_to_split(query_len: int, monkeypatch: pytest.MonkeyPatch):
    """With more rows than programs are wanted nothing is merged, and the rows' own programs fill the padding."""
    monkeypatch.setattr(arch, "num_sms", lambda device: 1)
    rows = [Row.of(query_len, 30 + 90 * i) for i in range(7)] + [Row(query_len, 0, 0)]
    check(make_case(rows, dtype=torch.float16, padding_tail=25, dim=16), SELECTION)


@pytest.mark.parametrize("query_len", [1, 5, 20])
def test_older_gpus(query_len: int, monkeypatch: pytest.MonkeyPatch):
    """The choices and the loads of an SM80, on whatever is there."""
    monkeypatch.setattr(arch, "capability", lambda device: (8, 0))
    rows, fp8 = [Row.of(query_len, 900), Row.of(1, 1000)], torch.float8_e4m3fn
    check(make_case(rows, dtype=torch.float16, cache_dtype=fp8, k_scale=0.5, v_scale=2.0), SELECTION)


@pytest.mark.parametrize("rows", [DECODE, VERIFY], ids=["decode", "verify"])
@pytest.mark.parametrize("num_sms", [1, 3, 132])
def test_as_a_graph_for_any_mix_takes_it(rows: list[Row], num_sms: int, monkeypatch: pytest.MonkeyPatch):
    """The host knows the number of tokens alone: one sequence might have them all, and be as long as can be."""
    monkeypatch.setattr(arch, "num_sms", lambda device: num_sms)
    case = make_case(rows, dtype=torch.float16, padding_tail=9)
    bounds = {"max_query_len": case.q.shape[0], "max_seq_len": 128 * case.batch.block_table.shape[1]}
    check(replace(case, batch=replace(case.batch, **bounds)), SELECTION)


def test_many_sequences():
    """More than a vector of them, some empty, in every order of lengths."""
    rows = [Row.of(i % 3, (i * 37) % 700) for i in range(300)]
    check(make_case(rows, num_kv_heads=1, group=1, dim=16, dtype=torch.float16, padding_tail=2), Selection(2))
