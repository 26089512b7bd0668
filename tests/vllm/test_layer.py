"""The attention layer by itself: what vLLM binds to it and steps it with, in shapes a CPU engine never produces."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.kv_cache_interface import KVQuantMode, UniformTypeKVCacheSpecs

from msa_backend import attend as road
from msa_backend.config import MSAConfig
from msa_backend.kernels import cpu, reference
from msa_backend.kernels.api import HeadNorms, LayerCaches, Selection
from msa_backend.kernels.batch import BLOCK_SIZE
from msa_backend.vllm import layer as layer_module
from msa_backend.vllm.layer import MSAAttention
from msa_backend.vllm.metadata import MSAMetadata

HEADS, KV_HEADS, DIM, TOPK, PAGES = 4, 2, 128, 2, 24
CONFIG = MSAConfig(HEADS, KV_HEADS, DIM, KV_HEADS, DIM, BLOCK_SIZE, TOPK, 0, 1, (True,))
WIDTH = (HEADS + 3 * KV_HEADS + 1) * DIM
PADDING = 3


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """As much of vLLM as the layer asks: a place to register, and the step it is in."""
    state = SimpleNamespace(layers={}, attn_metadata=None, slot_mapping={})
    compilation = SimpleNamespace(static_forward_context=state.layers)
    config = SimpleNamespace(compilation_config=compilation)
    monkeypatch.setattr(layer_module, "get_current_vllm_config", lambda: config)
    monkeypatch.setattr(layer_module, "get_forward_context", lambda: state)
    return state


def make_layer(
    name: str = "model.layers.3.self_attn.attn",
    dtype: torch.dtype = torch.float32,
    index_dtype: torch.dtype = torch.float32,
) -> MSAAttention:
    return MSAAttention(HEADS, KV_HEADS, DIM**-0.5, CONFIG, name, dtype, index_dtype)


def make_norms() -> HeadNorms:
    angles = torch.rand(900, DIM // 4) * 6
    return HeadNorms(*torch.randn(4, DIM).unbind(), torch.cat((angles.cos(), angles.sin()), dim=1), 1e-6)


FP32, E4M3, E5M2 = torch.float32, torch.float8_e4m3fn, torch.float8_e5m2
K_SCALE, V_SCALE = 0.006, 0.5  # keys beyond 2.7 are clipped in e4m3


# vLLM keeps one logical view whatever the memory order: page, head, token is its default on a CPU, page, token, head
# on Hopper.
@pytest.mark.parametrize("memory_order", [(0, 1, 2, 3), (0, 2, 1, 3)], ids=["head-major", "token-major"])
@pytest.mark.parametrize("padding", [0, PADDING])
@pytest.mark.parametrize(
    ("dtype", "index_dtype"),
    [(FP32, FP32), (E4M3, FP32), (FP32, E4M3), (E4M3, E4M3), (E5M2, E4M3)],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def test_a_mixed_padded_step(
    engine: SimpleNamespace,
    memory_order: tuple[int, ...],
    padding: int,
    dtype: torch.dtype,
    index_dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
):
    """Two drafts to verify and a chunk, then padding, over a cache whose unused parts are NaN, into NaN."""
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *a, **k: poisoned(new_empty(x, *a, **k)))
    torch.manual_seed(0)
    layer, norms = make_layer(dtype=dtype, index_dtype=index_dtype), make_norms()
    layer.take_scales({"q": 9.0, "k": K_SCALE, "v": V_SCALE})
    scales = (1.0, 1.0) if dtype == FP32 else (K_SCALE, V_SCALE)
    shape = (PAGES, KV_HEADS, BLOCK_SIZE, 2 * DIM)
    stored = of_nan([shape[axis] for axis in memory_order], dtype)
    layer.bind_kv_cache(stored.permute(memory_order))
    layer.index_cache.bind_kv_cache(of_nan((PAGES, 1, BLOCK_SIZE, DIM), index_dtype))

    block_table = torch.randperm(PAGES).int().view(3, 8)
    new, before = [3, 3, 600], [400, 700, 100]
    for row, length in enumerate(before):  # what earlier steps have left in the cache
        page, offset = block_table[row, torch.arange(length) // BLOCK_SIZE], torch.arange(length) % BLOCK_SIZE
        layer.kv_cache[page, :, offset] = as_stored(torch.randn(length, KV_HEADS, 2 * DIM), dtype)
        layer.index_cache.kv_cache[page, 0, offset] = as_stored(torch.randn(length, DIM), index_dtype)
    positions = torch.cat([length + torch.arange(count) for count, length in zip(new, before, strict=True)])
    row = torch.arange(3).repeat_interleave(torch.tensor(new))
    slots = block_table[row, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
    slots = torch.cat((slots, torch.full((padding,), -1)))
    seq_lens = [a + b for a, b in zip(new, before, strict=True)]
    starts = torch.tensor([0, *accumulate(new)], dtype=torch.int32)
    step = road.cut(starts, torch.tensor(seq_lens, dtype=torch.int32), block_table, new, seq_lens)
    assert len(step.parts) == 2
    engine.slot_mapping = {layer.layer_name: slots}
    engine.attn_metadata = {layer.layer_name: MSAMetadata(slots, step)}

    projected = torch.randn(step.num_tokens + padding, WIDTH)
    positions = torch.cat((positions, torch.zeros(padding, dtype=torch.int64)))
    output = layer(projected, positions, norms)

    halves = layer.kv_cache.view(dtype).split(DIM, dim=-1)
    caches = LayerCaches(*halves, layer.index_cache.kv_cache.view(index_dtype)[:, 0], *scales)
    written = LayerCaches(*(pages.clone() for pages in (*halves, caches.index_k_pages)), *scales)
    q, index_q = cpu.norm_rope_write(projected, positions, norms, written, slots)
    for name in ("k_pages", "v_pages", "index_k_pages"):
        torch.testing.assert_close(getattr(written, name).float(), getattr(caches, name).float(), equal_nan=True)
    for part in step.parts:
        here = part.tokens
        block_ids = reference.select_blocks(index_q[here], caches, part.batch, Selection(TOPK))
        expected = reference.sparse_attention(q[here], caches, block_ids, part.batch, layer.scale)
        # Outputs are means of values of order 1, or of what e5m2 keeps at most, and fp32 carries seven digits of sums.
        atol = 1e-5 * max(1.0, expected.abs().max().item() / 4)
        torch.testing.assert_close(output[here].view_as(expected).double(), expected, atol=atol, rtol=0)
    assert (output[step.num_tokens :] == 0).all()


def of_nan(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """As vLLM allocates it: fp8 in bytes."""
    nan = torch.full(shape, torch.nan).to(dtype)
    return nan.view(torch.uint8) if dtype.itemsize == 1 else nan


def as_stored(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype).view(torch.uint8) if dtype.itemsize == 1 else x.to(dtype)


def poisoned(x: torch.Tensor) -> torch.Tensor:
    return x.fill_(torch.nan) if x.is_floating_point() else x


def test_the_profiling_run_has_no_caches(engine: SimpleNamespace):
    assert (make_layer()(torch.randn(5, WIDTH), torch.arange(5), make_norms()) == 0).all()


def test_a_step_that_only_warms_up(engine: SimpleNamespace):
    """vLLM runs some with slots of padding and no description."""
    layer = bound_layer()
    engine.slot_mapping = {layer.layer_name: torch.full((5,), -1)}
    assert (layer(torch.randn(5, WIDTH), torch.arange(5), make_norms()) == 0).all()
    assert (layer.kv_cache == 0).all()


def bound_layer() -> MSAAttention:
    layer = make_layer()
    layer.bind_kv_cache(torch.zeros(PAGES, KV_HEADS, BLOCK_SIZE, 2 * DIM))
    layer.index_cache.bind_kv_cache(torch.zeros(PAGES, 1, BLOCK_SIZE, DIM))
    return layer


@pytest.mark.parametrize("told", [True, False])
def test_a_kv_connector_is_handed_both_caches(engine: SimpleNamespace, told: bool, monkeypatch: pytest.MonkeyPatch):
    """In the order in which vLLM's own layers do, and as four axes each: a connector indexes the third by tokens."""
    layer, calls = bound_layer(), []
    names = [layer.layer_name, layer.index_cache.layer_name]
    connector = SimpleNamespace(
        has_connector_metadata=lambda: told,
        wait_for_layer_load=lambda name: calls.append(("wait", name)),
        save_kv_layer=lambda name, cache, metadata: calls.append(("save", name, cache.shape, metadata)),
    )
    monkeypatch.setattr(layer_module, "has_kv_transfer_group", lambda: True)
    monkeypatch.setattr(layer_module, "get_kv_transfer_group", lambda: connector)
    monkeypatch.setattr(layer_module, "attend", lambda *_: calls.append(("attend",)))
    slots = torch.arange(5)
    described = MSAMetadata(slots, SimpleNamespace()), object()
    engine.slot_mapping = {layer.layer_name: slots}
    engine.attn_metadata = dict(zip(names, described, strict=True))
    layer(torch.randn(5, WIDTH), torch.arange(5), make_norms())
    shapes = (PAGES, KV_HEADS, BLOCK_SIZE, 2 * DIM), (PAGES, 1, BLOCK_SIZE, DIM)
    waited = [("wait", name) for name in names]
    saved = [("save", *of_cache) for of_cache in zip(names, shapes, described, strict=True)]
    assert calls == ([*waited, ("attend",), *saved] if told else [("attend",)])


def test_caches_are_those_that_were_bound_last(engine: SimpleNamespace):
    """vLLM binds small ones first, to see what its graphs take, then takes their memory back and binds its own."""
    layer = bound_layer()
    first = layer.bound_caches()
    assert layer.bound_caches() is first
    layer.index_cache.bind_kv_cache(torch.zeros(PAGES, 1, BLOCK_SIZE, DIM))
    second = layer.bound_caches()
    assert second.index_k_pages.data_ptr() == layer.index_cache.kv_cache.data_ptr()
    layer.kv_cache = torch.tensor([])
    assert layer.caches is None
    layer.bind_kv_cache(torch.zeros(PAGES, KV_HEADS, BLOCK_SIZE, 2 * DIM))
    assert layer.bound_caches().k_pages.data_ptr() == layer.kv_cache.data_ptr()


@pytest.mark.parametrize(("dtype", "index_dtype"), [(torch.bfloat16, E4M3), (E4M3, torch.bfloat16), (E4M3, E4M3)])
def test_what_vllm_allocates(engine: SimpleNamespace, dtype: torch.dtype, index_dtype: torch.dtype):
    """One group, whose pages are of the bytes that each cache takes; as one format if both are fp8."""
    layer = make_layer(dtype=dtype, index_dtype=index_dtype)
    config = SimpleNamespace(cache_config=SimpleNamespace(block_size=BLOCK_SIZE))
    specs = {name: cache.get_kv_cache_spec(config) for name, cache in engine.layers.items()}
    kv, index = specs.values()
    assert kv.page_size_bytes == BLOCK_SIZE * KV_HEADS * 2 * DIM * dtype.itemsize
    assert index.page_size_bytes == BLOCK_SIZE * DIM * index_dtype.itemsize
    formats = [(spec.dtype, spec.kv_quant_mode) for spec in (kv, index)]
    fp8 = (torch.uint8, KVQuantMode.FP8_PER_TENSOR)
    assert formats == [fp8 if of == E4M3 else (of, KVQuantMode.NONE) for of in (dtype, index_dtype)]
    assert UniformTypeKVCacheSpecs.is_uniform_type(specs)
    layer.bind_kv_cache(torch.zeros(PAGES, KV_HEADS, BLOCK_SIZE, 2 * DIM, dtype=kv.dtype))
    layer.index_cache.bind_kv_cache(torch.zeros(PAGES, 1, BLOCK_SIZE, DIM, dtype=index.dtype))
    caches = layer.bound_caches()
    assert (caches.k_pages.dtype, caches.v_pages.dtype, caches.index_k_pages.dtype) == (dtype, dtype, index_dtype)


def test_both_caches_are_registered_under_names_of_their_own(engine: SimpleNamespace):
    layer = make_layer()
    assert engine.layers == {layer.layer_name: layer, f"{layer.layer_name}.index_cache": layer.index_cache}
    with pytest.raises(ValueError, match="two attention layers are called"):
        make_layer()
