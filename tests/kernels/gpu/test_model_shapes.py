"""The shapes that users run, on a GPU: too much for the reference on a CPU, so sampled tokens, exact in fp64."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from msa_backend.kernels import api, gpu
from msa_backend.kernels.batch import BLOCK_SIZE
from msa_backend.kernels.selection import Selection

from ..batches import Case, Row, make_case
from ..compare import assert_attention, assert_best, assert_well_formed, visible_tokens
from ..implementations import ON_CUDA
from . import blocked

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not ON_CUDA, reason="needs a CUDA device")]

BF16, FP16, E4M3, E5M2 = torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2
SELECTION = Selection(16)
PROMPT = [Row.of(2048)]
PROMPTS = [Row.of(2500), Row.of(1), Row.of(130), Row.of(0, 700), Row.of(2048)]
CHUNK = [Row.of(2048, 16384)]
SUFFIXES = [Row.of(171, 55339), Row.of(338, 7457), Row.of(128, 16001)]
DECODE = [Row.of(1, n) for n in (0, 127, 128, 2047, 2048, 4095, 10_000, 60_000)] + [Row(1, 0, 0), Row(1, -1, 0)]
VERIFY = [Row.of(n, 3000 * n) for n in (8, 1, 4, 16, 2)] + [Row.of(8, 5), Row(8, 0, 0)]
MIXED = [Row.of(1, 9000), Row.of(700, 4000), Row.of(5, 130_000), Row.of(0, 300), Row.of(300), Row(2, 0, 0), Row.of(1)]


@pytest.fixture
def seed() -> int:
    """Another in every run; a failure shows it, and MSA_TEST_SEED repeats it."""
    seed = int(os.environ.get("MSA_TEST_SEED", int.from_bytes(os.urandom(4))))
    print(f"MSA_TEST_SEED={seed}")
    return seed


def check(case: Case, seed: int, selection: Selection = SELECTION, *, samples: int = 200) -> None:
    block_ids = api.select_blocks(case.index_q, case.caches, case.batch, selection)
    visible = visible_tokens(case.batch, case.q.shape[0]).to(case.q.device)
    assert_well_formed(block_ids, visible, num_heads=case.index_q.shape[1], topk=selection.topk)
    tokens = blocked.sample_tokens(case, samples, seed)
    tokens = tokens[visible[tokens] > 0]
    longest_key = case.caches.index_k_pages.float().norm(dim=-1).nan_to_num(posinf=0).max()
    assert_best(
        block_ids[:, tokens], blocked.block_scores(case, tokens), visible[tokens],
        blocked.taken(case.index_q, tokens), longest_key, selection,
    )  # fmt: skip

    out, in_one = (torch.full_like(case.q, torch.nan) for _ in range(2))
    api.sparse_attention(case.q, case.caches, block_ids, case.batch, case.scale, out)
    api.attend(case.q, case.index_q, case.caches, case.batch, selection, case.scale, in_one)
    expected, weighed = blocked.attention(case, tokens, block_ids)
    for x in (out, in_one):
        assert x.isfinite().all()
        assert (x[visible == 0] == 0).all()
        assert_attention(x[tokens], expected, case, weighed)


@pytest.mark.parametrize(("num_kv_heads", "group"), [(4, 16), (2, 16), (1, 16), (1, 8)], ids=str)
@pytest.mark.parametrize("rows", [PROMPTS, CHUNK, SUFFIXES, DECODE, VERIFY, MIXED],
                         ids=["prompts", "chunk", "suffixes", "decode", "verify", "mixed"])  # fmt: skip
def test_ranks_of_the_model(seed: int, rows: list[Row], num_kv_heads: int, group: int):
    check(make_case(rows, num_kv_heads=num_kv_heads, group=group, dim=128, dtype=BF16, padding_tail=5, seed=seed,
                    device="cuda"), seed)  # fmt: skip


@pytest.mark.parametrize("rows", [CHUNK, DECODE, VERIFY, MIXED], ids=["chunk", "decode", "verify", "mixed"])
@pytest.mark.parametrize(("dtype", "cache_dtype"), [(FP16, FP16), (BF16, E4M3), (BF16, E5M2), (FP16, E4M3)], ids=str)
def test_dtypes(seed: int, rows: list[Row], dtype: torch.dtype, cache_dtype: torch.dtype):
    scaled = {"k_scale": 0.5, "v_scale": 0.3} if cache_dtype in (E4M3, E5M2) else {}
    case = make_case(rows, num_kv_heads=2, group=16, dim=128, dtype=dtype, cache_dtype=cache_dtype, seed=seed,
                     device="cuda", **scaled)  # fmt: skip
    check(case, seed)


@pytest.mark.parametrize("rows", [CHUNK, DECODE, VERIFY, MIXED], ids=["chunk", "decode", "verify", "mixed"])
def test_fp8_products(seed: int, rows: list[Row]):
    """Index queries in fp8 too, scaled as norm_rope_write scales them: the largest channel of each is 448."""
    case = make_case(rows, num_kv_heads=4, group=16, dim=128, dtype=BF16, cache_dtype=E4M3, k_scale=0.5, v_scale=0.3,
                     seed=seed, device="cuda")  # fmt: skip
    index_q = case.index_q.float() / case.index_q.float().abs().amax(-1, keepdim=True) * 448
    check(replace(case, index_q=index_q.to(E4M3)), seed)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 8, 12, 16])
def test_groups(seed: int, group: int):
    check(make_case(MIXED[:5], num_kv_heads=2, group=group, dim=128, dtype=BF16, seed=seed, device="cuda"), seed)


@pytest.mark.parametrize("topk", [1, 16])
def test_small_tiles_beside_large_ones(seed: int, topk: int):
    """Each program lists its tile's blocks in memory of its own: a decoding request's tile beside a prompt's."""
    rows = [*[Row.of(2, 3000)] * 150, Row.of(700, 3000)]
    check(make_case(rows, num_kv_heads=2, group=8, dim=128, dtype=BF16, seed=seed, device="cuda"), seed,
          Selection(topk))  # fmt: skip


@pytest.mark.parametrize("num_kv_heads", [3, 8])
def test_heads(seed: int, num_kv_heads: int):
    check(make_case(MIXED[:5], num_kv_heads=num_kv_heads, group=4, dim=128, dtype=BF16, seed=seed, device="cuda"), seed)


@pytest.mark.parametrize("dim", [16, 32, 64])
def test_dims(seed: int, dim: int):
    check(make_case(MIXED[:5], num_kv_heads=2, group=8, dim=dim, dtype=BF16, seed=seed, device="cuda"), seed)


@pytest.mark.parametrize(
    "selection",
    [Selection(1), Selection(3, 1), Selection(8, 0, 0), Selection(17, 0, 4), Selection(32, 3, 3), Selection(1, 1, 0)],
    ids=str,
)  # fmt: skip
def test_selections(seed: int, selection: Selection):
    check(make_case(MIXED, num_kv_heads=2, group=8, dim=128, dtype=BF16, seed=seed, device="cuda"), seed, selection)


@pytest.mark.parametrize("rows", [[Row.of(8192, 122_880)], [Row.of(8192, 1_040_384)], [Row.of(2048, 524_288)],
                                  [Row.of(1, 1_048_575)] * 2, [Row.of(8, 1_040_000), Row.of(1, 77)]],
                         ids=["chunk-128K", "chunk-1M", "chunk-512K", "decode-1M", "verify-1M"])  # fmt: skip
@pytest.mark.parametrize("cache_dtype", [BF16, E4M3], ids=str)
def test_long_contexts(seed: int, rows: list[Row], cache_dtype: torch.dtype):
    case = make_case(rows, num_kv_heads=4, group=16, dim=128, dtype=BF16, cache_dtype=cache_dtype, seed=seed,
                     device="cuda")  # fmt: skip
    check(case, seed, samples=64)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=str)
@pytest.mark.parametrize("query_len", [300, 8])
def test_addresses_past_two_to_the_31(
    monkeypatch: pytest.MonkeyPatch, seed: int, query_len: int, capability: tuple[int, int]
):
    """Pages whose elements lie more than 2**31 from the first: a page id times a stride needs 64 bits."""
    monkeypatch.setattr(gpu.arch, "capability", lambda device: capability)
    heads, dim = 1, 128
    stride = 40 * BLOCK_SIZE * dim  # of a page, in elements: with 8000 pages, 5.2e9
    rows = [Row.of(query_len, 700_000), Row.of(1, 300_000)]
    small = make_case(rows, num_kv_heads=heads, group=4, dim=dim, dtype=BF16,
                      seed=seed, device="cuda")  # fmt: skip
    num_pages = small.caches.num_pages

    def spread(pages: torch.Tensor) -> torch.Tensor:
        room = torch.empty(num_pages * stride, dtype=BF16, device="cuda")
        return room.as_strided(pages.shape, (stride, *pages.contiguous().stride()[1:])).copy_(pages)

    names = ("k_pages", "v_pages", "index_k_pages")
    case = small.with_caches(**{name: spread(getattr(small.caches, name)) for name in names})
    assert num_pages * stride > 2**31
    check(case, seed)


def test_many_tokens_times_heads(seed: int):
    """Outputs and selections past 2**31 bytes: 300,000 query tokens at once."""
    check(make_case([Row.of(300_000)], num_kv_heads=1, group=16, dim=128, dtype=BF16, seed=seed, device="cuda"), seed)


def test_many_rows(seed: int):
    """More rows than a block of threads."""
    rows = [Row.of(i % 3, (i * 37) % 5000) for i in range(700)]
    check(make_case(rows, num_kv_heads=1, group=8, dim=128, dtype=BF16, seed=seed, device="cuda"), seed, samples=2000)


def test_an_adversarial_order_of_scores(seed: int):
    """The best blocks side by side, all at the front, or all at the end: where a top-k by groups has its corners."""
    case = make_case([Row.of(5, 400_000)], num_kv_heads=2, group=2, dim=128, dtype=BF16, seed=seed, device="cuda")
    num_blocks = 400_005 // BLOCK_SIZE
    table = case.batch.block_table[0, :num_blocks].long()
    case.index_q[..., 0] = 1.0
    case.index_q[..., 1:] *= 0.01
    block = torch.arange(num_blocks, device="cuda").float()
    for score in (block, -block, (block - 1000).abs(), -(block - 1000).abs(), block % 512, block * 0):
        case.caches.index_k_pages[table, :, 0] = (score / 8).to(BF16)[:, None]
        check(case, seed, Selection(32), samples=5)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9)], ids=str)
@pytest.mark.parametrize("rows", [CHUNK, DECODE, VERIFY, MIXED], ids=["chunk", "decode", "verify", "mixed"])
@pytest.mark.parametrize("cache_dtype", [BF16, E4M3], ids=str)
def test_as_on_an_older_gpu(
    monkeypatch: pytest.MonkeyPatch, seed: int, rows: list[Row], cache_dtype: torch.dtype, capability: tuple[int, int]
):
    """The paths that an SM80 or SM89 takes, on this one."""
    monkeypatch.setattr(gpu.arch, "capability", lambda device: capability)
    scaled = {"k_scale": 0.5, "v_scale": 0.3} if cache_dtype == E4M3 else {}
    case = make_case(rows, num_kv_heads=2, group=16, dim=128, dtype=BF16, cache_dtype=cache_dtype, seed=seed,
                     device="cuda", **scaled)  # fmt: skip
    check(case, seed)


@pytest.mark.parametrize("rows", [DECODE, VERIFY, SUFFIXES[:1] + DECODE[:9]], ids=["decode", "verify", "mixed"])
@pytest.mark.parametrize("cache_dtype", [BF16, E4M3], ids=str)
def test_as_a_graph_for_any_mix_takes_it(seed: int, rows: list[Row], cache_dtype: torch.dtype):
    """The host knows the number of tokens alone: one sequence might have them all, and be as long as can be."""
    case = make_case(rows, num_kv_heads=4, group=16, dim=128, dtype=BF16, cache_dtype=cache_dtype, padding_tail=5,
                     seed=seed, device="cuda")  # fmt: skip
    table = torch.nn.functional.pad(case.batch.block_table, (0, 8192 - case.batch.block_table.shape[1]), value=10**6)
    batch = replace(case.batch, block_table=table, max_query_len=case.q.shape[0], max_seq_len=1 << 20)
    check(replace(case, batch=batch), seed)


@pytest.mark.parametrize("query_lens", [(40, 1, 300, 1), (1, 1, 1, 1), (4, 1, 8, 1)], ids=str)
def test_no_fault_beyond_the_live_part_of_the_block_table(seed: int, query_lens: tuple[int, ...]):
    """Rows whose length goes past their pages, and past the table: other rows are right, and nothing faults."""
    rows = [Row.of(n, context_len) for n, context_len in zip(query_lens, (3000, 5000, 900, 777), strict=True)]
    good = make_case(rows, num_kv_heads=2, group=8, dim=128, dtype=BF16, seed=seed, device="cuda")
    longer = torch.tensor([0, 7000, 7000, 0], dtype=torch.int32, device="cuda")
    beyond = replace(good.batch, seq_lens=good.batch.seq_lens + longer, max_seq_len=13_000)
    selected, attended = [], []
    for batch in (good.batch, beyond):
        block_ids = api.select_blocks(good.index_q, good.caches, batch, Selection(4))
        selected.append(block_ids)
        attended.append(api.sparse_attention(good.q, good.caches, block_ids, batch, good.scale).float())
    torch.cuda.synchronize()
    sound = torch.arange(query_lens[0] + 1, device="cuda") - 1  # the last token is the last row's
    assert torch.equal(selected[0][:, sound], selected[1][:, sound])
    assert (attended[0][sound] - attended[1][sound]).abs().max() < 0.02
