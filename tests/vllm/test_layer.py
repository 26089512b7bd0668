"""The attention layer by itself: what vLLM binds to it and steps it with, in shapes a CPU engine never produces."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from msa_backend.config import MSAConfig
from msa_backend.kernels import reference
from msa_backend.kernels.batch import BLOCK_SIZE, Batch
from msa_backend.vllm import layer as layer_module
from msa_backend.vllm.layer import MSAAttention, NormRope
from msa_backend.vllm.metadata import MSAMetadata

HEADS, KV_HEADS, DIM, TOPK, PAGES = 4, 2, 128, 2, 24
CONFIG = MSAConfig(HEADS, KV_HEADS, DIM, KV_HEADS, DIM, BLOCK_SIZE, TOPK, 0, 1, (True,))
PADDING = 3


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """As much of vLLM as the layer asks: a place to register, and the step it is in."""
    state = SimpleNamespace(layers={}, step=None)
    compilation = SimpleNamespace(static_forward_context=state.layers)
    config = SimpleNamespace(compilation_config=compilation)
    monkeypatch.setattr(layer_module, "get_current_vllm_config", lambda: config)
    monkeypatch.setattr(layer_module, "get_forward_context", lambda: SimpleNamespace(attn_metadata=state.step))
    return state


def make_layer(name: str = "model.layers.3.self_attn.attn") -> MSAAttention:
    return MSAAttention(HEADS, KV_HEADS, DIM**-0.5, CONFIG, name, torch.float32, torch.float32)


def rows(new: list[int], before: list[int], block_table: torch.Tensor) -> Batch:
    lengths = torch.tensor(new, dtype=torch.int32)
    context = torch.tensor(before, dtype=torch.int32)
    starts = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()])
    return Batch(starts, context + lengths, context, block_table, max(new), int((context + lengths).max()))


# vLLM keeps one logical view whatever the memory order: page, head, token is its default on a CPU, page, token, head
# on Hopper.
@pytest.mark.parametrize("memory_order", [(0, 1, 2, 3), (0, 2, 1, 3)], ids=["head-major", "token-major"])
def test_a_mixed_padded_step(engine: SimpleNamespace, memory_order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    """Two drafts to verify and a chunk, then padding, over a cache whose unused parts are NaN, into NaN."""
    monkeypatch.setattr(layer_module.torch, "empty_like", lambda x: torch.full_like(x, torch.nan))
    torch.manual_seed(0)
    layer = make_layer()
    shape = (PAGES, KV_HEADS, BLOCK_SIZE, 2 * DIM)
    stored = torch.full([shape[axis] for axis in memory_order], torch.nan)
    layer.bind_kv_cache(stored.permute(memory_order))
    layer.index_cache.bind_kv_cache(torch.full((PAGES, 1, BLOCK_SIZE, DIM), torch.nan))

    block_table = torch.randperm(PAGES).int().view(3, 8)
    decode = rows([3, 3], [400, 700], block_table[:2])
    prefill = rows([130], [300], block_table[2:])
    for batch in (decode, prefill):  # what earlier steps have left in the cache
        for row in range(batch.num_seqs):
            for position in range(int(batch.context_lens[row])):
                page, offset = batch.block_table[row, position // BLOCK_SIZE], position % BLOCK_SIZE
                layer.kv_cache[page, :, offset] = torch.randn(KV_HEADS, 2 * DIM)
                layer.index_cache.kv_cache[page, offset] = torch.randn(DIM)

    positions = [(0, 400 + i) for i in range(3)] + [(1, 700 + i) for i in range(3)] + [(2, 300 + i) for i in range(130)]
    slots = [int(block_table[row, p // BLOCK_SIZE]) * BLOCK_SIZE + p % BLOCK_SIZE for row, p in positions]
    num_tokens = len(slots)
    metadata = MSAMetadata(torch.tensor(slots + [-1] * PADDING), num_tokens, 6, decode, prefill)
    engine.step = {layer.layer_name: metadata}

    total = num_tokens + PADDING
    query, index_query = torch.randn(total, HEADS * DIM), torch.randn(total, KV_HEADS * DIM)
    key, value = torch.randn(2, total, KV_HEADS * DIM).unbind()
    index_key = torch.randn(total, DIM)
    output = layer(query, key, value, index_query, index_key)

    k_pages, v_pages = layer.kv_cache.split(DIM, dim=-1)
    for batch, tokens in ((decode, slice(0, 6)), (prefill, slice(6, num_tokens))):
        block_ids = reference.select_blocks(
            index_query[tokens].view(-1, KV_HEADS, DIM), layer.index_cache.kv_cache, batch, topk=TOPK
        )
        expected = reference.sparse_attention(
            query[tokens].view(-1, HEADS, DIM), k_pages, v_pages, block_ids, batch, scale=layer.scale
        )
        # Outputs are means of values of order 1, and fp32 carries seven digits of sums of a few hundred.
        torch.testing.assert_close(output[tokens].view_as(expected).double(), expected, atol=1e-5, rtol=0)
    assert (output[num_tokens:] == 0).all()


def test_from_the_projection(engine: SimpleNamespace):
    """What the GPU path is given: norm, rope and cache write left to the layer, padding behind."""
    torch.manual_seed(0)
    plain, fused = make_layer(), make_layer("model.layers.4.self_attn.attn")
    for layer in (plain, fused):
        layer.bind_kv_cache(torch.zeros(PAGES, KV_HEADS, BLOCK_SIZE, 2 * DIM))
        layer.index_cache.bind_kv_cache(torch.zeros(PAGES, 1, BLOCK_SIZE, DIM))
    block_table = torch.randperm(PAGES).int().view(3, 8)
    num_tokens = 300
    slots = [int(block_table[0, p // BLOCK_SIZE]) * BLOCK_SIZE + p % BLOCK_SIZE for p in range(num_tokens)]
    metadata = MSAMetadata(
        torch.tensor(slots + [-1] * PADDING), num_tokens, 0, None, rows([num_tokens], [0], block_table[:1])
    )
    engine.step = {plain.layer_name: metadata, fused.layer_name: metadata}

    sizes = [heads * DIM for heads in (HEADS, KV_HEADS, KV_HEADS, KV_HEADS, 1)]
    projected = torch.randn(num_tokens + PADDING, sum(sizes))
    angles = torch.rand(num_tokens, 32)
    norm_rope = NormRope(torch.cat((angles.cos(), angles.sin()), dim=1), *torch.randn(4, DIM).unbind(), 1e-6)
    positions = torch.arange(num_tokens + PADDING)

    def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return reference.norm_rope(
            x.unflatten(-1, (-1, DIM)), weight, positions, norm_rope.cos_sin_cache, eps=1e-6, dtype=torch.float32
        ).flatten(1)

    query, key, value, index_query, index_key = projected.split(sizes, dim=-1)
    expected = plain(
        normed(query, norm_rope.q_weight),
        normed(key, norm_rope.k_weight),
        value,
        normed(index_query, norm_rope.index_q_weight),
        normed(index_key, norm_rope.index_k_weight),
    )
    torch.testing.assert_close(fused.forward_projected(projected, positions, norm_rope), expected)
    torch.testing.assert_close(fused.kv_cache, plain.kv_cache)
    torch.testing.assert_close(fused.index_cache.kv_cache, plain.index_cache.kv_cache)


def test_the_profiling_run_has_no_caches(engine: SimpleNamespace):
    layer = make_layer()
    inputs = [torch.randn(5, heads * DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, KV_HEADS, 1)]
    assert (layer(*inputs) == 0).all()


def test_both_caches_are_registered_under_names_of_their_own(engine: SimpleNamespace):
    layer = make_layer()
    assert engine.layers == {layer.layer_name: layer, f"{layer.layer_name}.index_cache": layer.index_cache}
    with pytest.raises(ValueError, match="two attention layers are called"):
        make_layer()
