"""Whatever a scheduler does, each token attends to its own sequence: random schedules, compared with fp64.

``MSA_SCHEDULES=10000 pytest tests/vllm/test_schedules.py`` runs as many; without it, a few.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from msa_backend.config import MSAConfig
from msa_backend.kernels import reference
from msa_backend.kernels.api import HeadNorms, LayerCaches, Selection
from msa_backend.kernels.batch import BLOCK_SIZE, Batch
from msa_backend.vllm import layer as layer_module
from msa_backend.vllm.layer import MSAAttention

from .schedules import Row, Scheduler
from .test_metadata import builder

HEADS, KV_HEADS, DIM, TOPK, PAGES, DRAFTS, VOCABULARY, LENGTH = 4, 2, 16, 2, 14, 3, 50, 900
WIDTH = (HEADS + 3 * KV_HEADS + 1) * DIM
SCHEDULES, STEPS = int(os.environ.get("MSA_SCHEDULES", "30")), 25
NAME = "model.layers.1.self_attn.attn"


class World(NamedTuple):
    """A layer of fixed weights and what it says of some streams.

    Attributes:
        table: ``[VOCABULARY, WIDTH]``, the fused projection of each token.
        streams: ``[num_streams, LENGTH]``.
        expected: ``[num_streams, LENGTH, HEADS * DIM]`` fp64.
    """

    norms: HeadNorms
    table: Tensor
    streams: Tensor
    expected: Tensor


@pytest.fixture(scope="module")
def world() -> World:
    torch.manual_seed(1)
    angles = torch.rand(LENGTH, DIM // 4) * 6
    norms = HeadNorms(*(0.3 * torch.randn(4, DIM)).unbind(), torch.cat((angles.cos(), angles.sin()), dim=1), 1e-6)
    table = torch.randn(VOCABULARY, WIDTH)
    streams = torch.randint(VOCABULARY, (6, LENGTH))
    streams[1, :300] = streams[0, :300]
    streams[2, :520] = streams[0, :520]
    streams[4, :128] = streams[3, :128]
    expected = torch.stack([truth(table[stream], norms) for stream in streams])
    return World(norms, table, streams, expected)


def truth(projected: Tensor, norms: HeadNorms) -> Tensor:
    """What the layer says at each place of one sequence, alone in caches in order."""
    heads = projected.view(LENGTH, -1, DIM)
    q, k, v, index_q, index_k = heads.split((HEADS, KV_HEADS, KV_HEADS, KV_HEADS, 1), dim=1)
    positions = torch.arange(LENGTH)
    weights = norms.q_weight, norms.k_weight, norms.index_q_weight, norms.index_k_weight
    q, k, index_q, index_k = (
        reference.norm_rope(x, weight, positions, norms.cos_sin_cache, eps=norms.eps)
        for x, weight in zip((q, k, index_q, index_k), weights, strict=True)
    )
    pages = -(-LENGTH // BLOCK_SIZE)
    stored = torch.zeros(pages * BLOCK_SIZE, 2 * KV_HEADS + 1, DIM)
    stored[:LENGTH] = torch.cat((k, v, index_k), dim=1)
    k_pages, v_pages, index_k_pages = (
        stored.view(pages, BLOCK_SIZE, -1, DIM).transpose(1, 2).split((KV_HEADS, KV_HEADS, 1), dim=1)
    )
    caches = LayerCaches(k_pages, v_pages, index_k_pages.squeeze(1))
    batch = Batch(
        torch.tensor([0, LENGTH]), torch.tensor([LENGTH]), torch.arange(pages)[None].int(), LENGTH, LENGTH
    )  # fmt: skip
    block_ids = reference.select_blocks(index_q, caches, batch, Selection(TOPK))
    return reference.sparse_attention(q, caches, block_ids, batch, DIM**-0.5).flatten(1)


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> MSAAttention:
    state = SimpleNamespace(attn_metadata={}, slot_mapping={})
    config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={}))
    monkeypatch.setattr(layer_module, "get_current_vllm_config", lambda: config)
    monkeypatch.setattr(layer_module, "get_forward_context", lambda: state)
    msa = MSAConfig(HEADS, KV_HEADS, DIM, KV_HEADS, DIM, BLOCK_SIZE, TOPK, 0, 1, (True,))
    layer = MSAAttention(HEADS, KV_HEADS, DIM**-0.5, msa, NAME, torch.float32, torch.float32)
    layer.state = state
    return layer


def run(layer: MSAAttention, world: World, rows: list[Row], scheduler: Scheduler) -> Tensor:
    """One step through the metadata builder and the layer, as the model runner drives them."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    counts = [len(row.tokens) for row in rows]
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    seq_lens = torch.tensor([row.request.done + count for row, count in zip(rows, counts, strict=True)]).int()
    # Past a sequence's pages a table holds whatever an earlier request left there.
    table = torch.tensor([[scheduler.random.randrange(PAGES) for _ in range(8)] for _ in rows]).int()
    for i, row in enumerate(rows):
        table[i, : len(row.request.pages)] = torch.tensor(row.request.pages)
    positions = torch.cat([row.request.done + torch.arange(len(row.tokens)) for row in rows])
    owner = torch.arange(len(rows)).repeat_interleave(torch.tensor(counts))
    slots = table[owner, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=seq_lens,
        seq_lens_cpu_upper_bound=seq_lens,
        num_reqs=len(rows),
        num_actual_tokens=len(slots),
        max_query_len=max(counts),
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=table,
        slot_mapping=slots,
    )
    layer.state.attn_metadata = {NAME: builder(DRAFTS).build(0, common)}
    layer.state.slot_mapping = {NAME: slots}
    padding = scheduler.random.choice([0, 0, 5])
    projected = torch.cat((world.table[torch.cat([row.tokens for row in rows])], torch.randn(padding, WIDTH)))
    output = layer(projected, torch.cat((positions, torch.zeros(padding, dtype=torch.int64))), world.norms)
    assert (output[len(slots) :] == 0).all()
    return output


def test_each_token_attends_to_its_own_sequence(layer: MSAAttention, world: World) -> None:
    hits = preempted = rejected = checked = 0
    for seed in range(SCHEDULES):
        scheduler = Scheduler(seed, world.streams, PAGES, DRAFTS, VOCABULARY)
        layer.bind_kv_cache(torch.full((PAGES, KV_HEADS, BLOCK_SIZE, 2 * DIM), torch.nan))
        layer.index_cache.bind_kv_cache(torch.full((PAGES, 1, BLOCK_SIZE, DIM), torch.nan))
        for step in range(STEPS):
            while len(scheduler.running) < 5 and scheduler.random.random() < 0.6:
                scheduler.admit()
            rows = scheduler.step()
            if not rows:
                scheduler.finish(rows)
                continue
            output = run(layer, world, rows, scheduler)
            first = 0
            for row in rows:
                done, right = row.request.done, row.right
                expected = world.expected[row.request.stream, done : done + right]
                # Means of values of order 1 over a few hundred keys in fp32, against fp64.
                torch.testing.assert_close(
                    output[first : first + right].double(), expected, atol=2e-5, rtol=0,
                    msg=lambda text, seed=seed, step=step: f"schedule {seed}, step {step}: {text}",
                )  # fmt: skip
                first += len(row.tokens)
                checked += right
            scheduler.finish(rows)
        hits, preempted, rejected = (
            hits + scheduler.hits,
            preempted + scheduler.preempted,
            rejected + scheduler.rejected,
        )
    print(f"{SCHEDULES} schedules: {checked} tokens checked, {hits} pages hit, {preempted} preemptions,", end=" ")
    print(f"{rejected} drafts rejected")
    assert min(hits, preempted, rejected) >= SCHEDULES // 3
