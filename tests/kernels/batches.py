"""Batches for the kernel tests: ragged rows over a paged cache in which everything not alive is poisoned."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from msa_backend.kernels.batch import BLOCK_SIZE, Batch
from msa_backend.kernels.caches import LayerCaches
from msa_backend.kernels.selection import Selection

from .implementations import INTERPRETED

GARBAGE_PAGES = (-1, -(2**31), 2**31 - 1, 10**6, 0)
LAYOUTS = ("separate", "halves", "token_major_halves", "slot_pool")


class Row(NamedTuple):
    """A sequence of a batch; a length of 0 makes it padding, whatever its query length."""

    query_len: int
    context_len: int
    seq_len: int

    @classmethod
    def of(cls, query_len: int, context_len: int = 0) -> Row:
        return cls(query_len, context_len, query_len + context_len)


@dataclass(frozen=True)
class Case:
    q: Tensor
    index_q: Tensor
    caches: LayerCaches
    batch: Batch

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    @property
    def num_live_tokens(self) -> int:
        return int(self.batch.cu_seqlens_q[-1])

    def to(self, device: str) -> Case:
        """The same on another device, or afresh: nothing that a step or a cache has kept comes along."""
        tensors = (getattr(self.batch, name).to(device) for name in ("cu_seqlens_q", "seq_lens", "block_table"))
        bounds = {name: getattr(self.batch, name) for name in ("max_query_len", "max_seq_len")}
        q, index_q = moved(self.q, device), moved(self.index_q, device)
        return Case(q, index_q, caches_to(self.caches, device), Batch(*tensors, **bounds))

    def with_caches(self, **changed: Any) -> Case:
        return replace(self, caches=replace(self.caches, **changed))


def caches_to(caches: LayerCaches, device: str) -> LayerCaches:
    index_k_pages = caches.index_k_pages
    return LayerCaches(
        moved(caches.k_pages, device),
        moved(caches.v_pages, device),
        None if index_k_pages is None else moved(index_k_pages, device),
        caches.k_scale,
        caches.v_scale,
    )


def moved(x: Tensor, device: str) -> Tensor:
    """``x`` on ``device`` with its strides and what lies between them; ``Tensor.to`` would make a view contiguous."""
    if x.device.type == device:
        return x
    whole = x.as_strided((x.untyped_storage().nbytes() // x.itemsize,), (1,), 0)
    return whole.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


def make_case(
    rows: list[Row],
    *,
    num_kv_heads: int = 2,
    group: int = 2,
    dim: int = 32,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    layout: str = "halves",
    share_prefix: bool = False,
    padding_tail: int = 0,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    seed: int = 0,
    device: str = "cpu",
) -> Case:
    """A batch of ``rows``. With the values made on a GPU, a million tokens take a second."""
    rng = torch.Generator().manual_seed(seed)
    of_values = torch.Generator(device).manual_seed(seed)
    cache_dtype = cache_dtype or dtype
    seq_lens = [row.seq_len for row in rows]
    num_blocks = [-(-n // BLOCK_SIZE) for n in seq_lens]
    num_pages = sum(num_blocks) + 3
    order = torch.randperm(num_pages, generator=rng).tolist()

    # Wider than any row needs, and garbage past each row's last page.
    garbage = torch.tensor(GARBAGE_PAGES, dtype=torch.int32)
    width = max(num_blocks, default=0) + 2
    block_table = garbage[torch.randint(len(garbage), (len(rows), width), generator=rng)]
    live = torch.zeros(num_pages, BLOCK_SIZE, dtype=torch.bool)
    for i, (row, blocks) in enumerate(zip(rows, num_blocks, strict=True)):
        pages = [order.pop() for _ in range(blocks)]
        if share_prefix and i > 0:  # with row 0, as far as both have whole pages of old context
            shared = max(0, min(row.context_len, rows[0].context_len)) // BLOCK_SIZE
            pages[:shared] = block_table[0, :shared].tolist()
        block_table[i, :blocks] = torch.tensor(pages, dtype=torch.int32)
        for j, page in enumerate(pages):
            live[page, : min(BLOCK_SIZE, row.seq_len - j * BLOCK_SIZE)] = True

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=of_values, device=device)

    live = live.to(device)
    nan = torch.rand(num_pages, BLOCK_SIZE, 1, generator=of_values, device=device) < 0.5
    poison = torch.where(nan, torch.nan, torch.inf)
    keys_and_values = normal(num_pages, BLOCK_SIZE, num_kv_heads, 2 * dim)
    keys_and_values = keys_and_values.where(live[..., None, None], poison[..., None]).to(cache_dtype)
    index_keys = normal(num_pages, BLOCK_SIZE, dim).where(live[..., None], poison).to(cache_dtype)

    bounds = torch.tensor([0] + [row.query_len for row in rows]).cumsum(0)
    num_tokens = int(bounds[-1]) + padding_tail
    k_pages, v_pages = lay_out(keys_and_values, layout)
    return Case(
        q=normal(num_tokens, num_kv_heads * group, dim).to(dtype),
        index_q=normal(num_tokens, num_kv_heads, dim).to(dtype),
        caches=LayerCaches(k_pages, v_pages, index_keys, k_scale, v_scale),
        batch=Batch(
            cu_seqlens_q=bounds.int().to(device),
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
            block_table=block_table.to(device),
            max_query_len=max((row.query_len for row in rows), default=0),
            max_seq_len=max(seq_lens, default=0),
        ),
    )


def lay_out(keys_and_values: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """``[num_pages, 128, num_kv_heads, 2 * dim]`` as K and V pages, in memory as some engine keeps them."""
    by_head = keys_and_values.permute(0, 2, 1, 3)
    if layout == "token_major_halves":
        return by_head.chunk(2, dim=-1)
    if layout == "halves":
        return by_head.contiguous().chunk(2, dim=-1)
    k, v = (x.contiguous() for x in by_head.chunk(2, dim=-1))
    if layout == "separate":
        return k, v
    assert layout == "slot_pool"
    _, num_kv_heads, _, dim = k.shape
    k, v = (x.transpose(1, 2).reshape(-1, num_kv_heads, dim) for x in (k, v))  # [slots, heads, dim], as SGLang has it
    return tuple(x.view(-1, BLOCK_SIZE, num_kv_heads, dim).permute(0, 2, 1, 3) for x in (k, v))


# Under the interpreter, a tenth of the work: what it lacks in length, the GPU's tests at the model's shapes have.
lengths = st.sampled_from([1, 127, 128, 129, 2047, 2048, 2049]) | st.integers(1, 1500)
short_lengths = st.sampled_from([1, 127, 128, 129, 257]) | st.integers(1, 300)
if INTERPRETED:
    lengths = st.sampled_from([1, 127, 128, 129, 640]) | st.integers(1, 700)
    short_lengths = st.sampled_from([1, 127, 128, 129]) | st.integers(1, 60)
# Numpy, on which the interpreter computes, has no bf16, and what Triton 3.9 puts in its place gives wrong products.
HALF = torch.float16 if INTERPRETED else torch.bfloat16
TOPK = 2 if INTERPRETED else 16
"""The released model's 16 blocks are 2,048 tokens."""
one_row = st.one_of(
    st.builds(Row.of, short_lengths),  # prompt
    st.builds(Row.of, short_lengths, lengths),  # chunk of one
    st.builds(Row.of, st.just(1), lengths),  # decode
    st.builds(Row.of, st.integers(2, 8), lengths),  # verify
    st.builds(Row.of, st.just(0), lengths | st.just(0)),  # nothing new
    st.sampled_from([Row(1, 0, 0), Row(1, -1, 0), Row(3, 0, 0)]),  # padding to a fixed number of rows
)


# Built by name, so that a failing example prints as the call that makes it, not as its tensors.
cases = st.builds(
    make_case,
    rows=st.lists(one_row, min_size=1, max_size=3 if INTERPRETED else 5),
    num_kv_heads=st.integers(1, 4),
    group=st.sampled_from([1, 2, 3, 8, 12, 16]),
    dim=st.sampled_from([16, 32]),
    dtype=st.sampled_from([torch.float16, HALF, torch.float32]),
    layout=st.sampled_from(LAYOUTS),
    share_prefix=st.booleans(),
    padding_tail=st.sampled_from([0, 0, 1, 7]),
    seed=st.integers(0, 2**16),
)


@st.composite
def selections(draw: st.DrawFn) -> Selection:
    init_blocks, local_blocks = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    least = max(1, init_blocks + local_blocks)
    topk = draw(st.integers(least, 8) | st.integers(least, 32))  # small ones more often: they leave blocks out
    return Selection(topk, init_blocks, local_blocks)
