"""Random inputs of a case, on its device.

Pages are scattered over the cache by a random page table. Where a batch needs more pages than there may be, its
sequences share them, each in an order of its own and with a last page of its own. What lies past a sequence's end is
:data:`GARBAGE`, large and finite: an implementation that lets it count is far off, and one that multiplies it by a
weight of zero is right, as in engines, whose fresh caches are zeros.

Index queries of neighbouring tokens choose alike, or not, by :mod:`msa_backend.bench.locality`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from msa_backend.bench import locality
from msa_backend.bench.cases import BLOCK_SIZE, Case
from msa_backend.bench.counts import ITEM_SIZE
from msa_backend.kernels.batch import Batch
from msa_backend.kernels.caches import LayerCaches

GARBAGE = 100.0
FP8_MAX = 448.0
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# At once, while random numbers are made and converted.
PIECE = 2**28


@dataclass(frozen=True)
class Cache:
    """The KV cache of a batch, in the layouts of both engines. Shapes as in :mod:`msa_backend.kernels.api`."""

    kv_pages: Tensor
    """``[num_pages, num_kv_heads, 128, 2 * dim]``: K and V side by side, as vLLM keeps them."""
    index_k_pages: Tensor
    block_table: Tensor
    """As wide as the longest sequence that the host allows for; page 0 past a sequence's last."""

    @cached_property
    def slot_pools(self) -> list[Tensor]:
        """K and V, each ``[num_pages * 128, num_kv_heads, dim]``: a copy as SGLang keeps them."""
        return [x.transpose(1, 2).flatten(0, 1).contiguous() for x in self.kv_pages.chunk(2, dim=-1)]

    @cached_property
    def slot_table(self) -> Tensor:
        """``[num_seqs, max_pages * 128]`` int32: the slot of each token of a sequence."""
        offset = torch.arange(BLOCK_SIZE, dtype=torch.int32, device=self.block_table.device)
        return (self.block_table[..., None] * BLOCK_SIZE + offset).flatten(1)


@dataclass(frozen=True)
class Inputs:
    """Queries over a cache. ``index_q`` holds numbers of e4m3 where ``index_q_fp8``, in that dtype, is given."""

    case: Case
    cache: Cache
    q: Tensor
    index_q: Tensor
    index_q_fp8: Tensor | None
    batch: Batch
    scale: float

    @property
    def kv_pages(self) -> Tensor:
        return self.cache.kv_pages

    @cached_property  # made once, as an engine does
    def k_pages(self) -> Tensor:
        return self.kv_pages[..., : self.case.dim]

    @cached_property
    def v_pages(self) -> Tensor:
        return self.kv_pages[..., self.case.dim :]

    @property
    def index_k_pages(self) -> Tensor:
        return self.cache.index_k_pages

    @property
    def context_lens(self) -> Tensor:
        """``[num_seqs]`` int32: tokens before the new ones."""
        return self.batch.context_lens

    @cached_property
    def caches(self) -> LayerCaches:
        return LayerCaches(self.k_pages, self.v_pages, self.index_k_pages)


@dataclass(frozen=True)
class Projection:
    """What a sparse layer makes queries and cache entries of, and where the entries of the new tokens go.

    Attributes:
        projected: ``[num_tokens, (num_heads + 3 * num_kv_heads + 1) * dim]``: queries, keys, values, index queries and
            an index key of each token, side by side as one fused projection makes them.
        positions: ``[num_tokens]`` int64.
        slot_mapping: ``[num_tokens]`` int64, ``page * 128 + offset``.
        cos_sin_cache: ``[max_seq_len, rotary_dim]``: cosines, then sines.
        norm_weight: ``[dim]``, less 1, of every norm.
    """

    projected: Tensor
    positions: Tensor
    slot_mapping: Tensor
    cos_sin_cache: Tensor
    norm_weight: Tensor
    eps: float = 1e-6


def page_bytes(case: Case) -> int:
    """Of a page in both caches."""
    kv, index = (ITEM_SIZE["fp8" if fp8 else case.dtype] for fp8 in (case.fp8_kv, case.fp8_index))
    return BLOCK_SIZE * case.dim * (2 * case.num_kv_heads * kv + index)


def pages_needed(case: Case) -> list[int]:
    """By each sequence."""
    return [-(-length // BLOCK_SIZE) for length in case.lengths]


def make_cache(case: Case, device: torch.device, seed: int, most_pages: int | None = None) -> Cache:
    """``most_pages``: so many at most, but as many as the longest sequence needs, and a last page for each."""
    rng = torch.Generator(device).manual_seed(seed)
    dtype = DTYPES[case.dtype]
    num_pages, dealt = _deal(pages_needed(case), most_pages, rng, device)

    kv_dtype = torch.float8_e4m3fn if case.fp8_kv else dtype
    index_dtype = torch.float8_e4m3fn if case.fp8_index else dtype
    kv_pages = torch.empty(num_pages, case.num_kv_heads, BLOCK_SIZE, 2 * case.dim, dtype=kv_dtype, device=device)
    index_k_pages = torch.empty(num_pages, BLOCK_SIZE, case.dim, dtype=index_dtype, device=device)
    for cache in (kv_pages, index_k_pages):
        _fill_normal(cache, dtype, rng)
    block_table = torch.zeros(case.batch, -(-case.max_seq_len // BLOCK_SIZE), dtype=torch.int32, device=device)
    for row, pages, length in zip(block_table, dealt, case.lengths, strict=True):
        row[: len(pages)] = pages
        if end := length % BLOCK_SIZE:
            kv_pages[pages[-1], :, end:] = GARBAGE
            index_k_pages[pages[-1], end:] = GARBAGE
    return Cache(kv_pages, index_k_pages, block_table)


def _deal(needed: list[int], most: int | None, rng: torch.Generator, device: torch.device) -> tuple[int, list[Tensor]]:
    """How many pages there are, and those of each sequence.

    A last page is not full, so nobody shares it. The others are dealt from a deck, which is shuffled anew when it runs
    out, so that no sequence holds a page twice.
    """
    full = sum(needed) - len(needed)
    if most is not None:
        full = min(full, max(most - len(needed), max(needed) - 1))
    last, deck = torch.randperm(full + len(needed), generator=rng, device=device).split([len(needed), full])
    dealt, at = [], 0
    for own, count in zip(last.split(1), needed, strict=True):
        if at + count - 1 > full:
            deck, at = deck[torch.randperm(full, generator=rng, device=device)], 0
        dealt.append(torch.cat([deck[at : at + count - 1], own]))
        at += count - 1
    return full + len(needed), dealt


def make_inputs(case: Case, cache: Cache, seed: int) -> Inputs:
    """New queries over a cache."""
    device = cache.block_table.device
    rng = torch.Generator(device).manual_seed(seed)
    dtype = DTYPES[case.dtype]
    index_q = locality.index_queries(case, rng, device)
    index_q_fp8 = None
    if case.fp8_index:  # a scale per (token, head) changes no order of blocks, so it need not be kept
        index_q_fp8 = (index_q * (FP8_MAX / index_q.abs().amax(-1, keepdim=True))).to(torch.float8_e4m3fn)
        index_q = index_q_fp8.float()

    lengths = torch.tensor(case.lengths, dtype=torch.int32)
    return Inputs(
        case=case,
        cache=cache,
        q=torch.empty(case.num_tokens, case.num_heads, case.dim, dtype=dtype, device=device).normal_(generator=rng),
        index_q=index_q.to(dtype),
        index_q_fp8=index_q_fp8,
        batch=Batch(
            cu_seqlens_q=(torch.arange(case.batch + 1, dtype=torch.int32) * case.new_tokens).to(device),
            seq_lens=lengths.to(device),
            block_table=cache.block_table,
            max_query_len=case.new_tokens,
            max_seq_len=case.max_seq_len,
        ),
        scale=case.dim**-0.5,
    )


def make_projection(inputs: Inputs, seed: int) -> Projection:
    case, table = inputs.case, inputs.batch.block_table
    device, dtype = table.device, DTYPES[case.dtype]
    rng = torch.Generator(device).manual_seed(seed)
    offset = torch.arange(case.new_tokens, device=device)
    positions = inputs.context_lens[:, None].long() + offset
    pages = table.long().gather(1, positions // BLOCK_SIZE)
    width = (case.num_heads + 3 * case.num_kv_heads + 1) * case.dim
    rotary_dim = case.dim // 2
    angle = torch.arange(case.max_seq_len, device=device)[:, None] * torch.rand(
        rotary_dim // 2, generator=rng, device=device
    )
    return Projection(
        projected=torch.empty(case.num_tokens, width, dtype=dtype, device=device).normal_(generator=rng),
        positions=positions.flatten(),
        slot_mapping=(pages * BLOCK_SIZE + positions % BLOCK_SIZE).flatten(),
        cos_sin_cache=torch.cat([angle.cos(), angle.sin()], 1).to(dtype),
        norm_weight=torch.zeros(case.dim, dtype=dtype, device=device),
    )


def _fill_normal(cache: Tensor, dtype: torch.dtype, rng: torch.Generator) -> None:
    for piece in cache.split(max(1, PIECE // cache[0].numel())):
        if cache.dtype == dtype:
            piece.normal_(generator=rng)
        else:
            piece.copy_(torch.empty(piece.shape, dtype=dtype, device=cache.device).normal_(generator=rng))


def distinct_blocks(block_ids: Tensor, inputs: Inputs) -> int:
    """(KV head, page) pairs among the chosen blocks."""
    case = inputs.case
    ids = block_ids.unflatten(1, (case.batch, case.new_tokens)).flatten(2)
    num_blocks = -(-inputs.batch.max_seq_len // BLOCK_SIZE)
    chosen = torch.zeros(*ids.shape[:2], num_blocks + 1, dtype=torch.bool, device=ids.device)
    chosen.scatter_(2, ids.long().where(ids >= 0, num_blocks), True)
    return int(chosen[..., :-1].sum())
