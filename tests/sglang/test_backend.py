"""The attention backend by itself over SGLang's own caches, against the definition, in every kind of step."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from msa_backend.config import MSAConfig, MSAError
from msa_backend.kernels import cpu, reference
from msa_backend.kernels.api import HeadNorms, LayerCaches, Selection
from msa_backend.kernels.batch import BLOCK_SIZE
from msa_backend.sglang import backend as backend_module
from msa_backend.sglang.dense import CpuDenseAttnBackend
from msa_backend.sglang.pools import caches_of, check_pool

from .batches import DIM, decode, extend, idle, pool, request_table, verify

HEADS, KV_HEADS = 4, 2
SELECTION = Selection(3, 1, 1)
CONFIG = MSAConfig(HEADS, KV_HEADS, DIM, KV_HEADS, DIM, BLOCK_SIZE, sparse_layers=(False, True), **vars(SELECTION))
REQUESTS, PAGES_EACH = 5, 7
LAYER = SimpleNamespace(
    layer_id=1, tp_q_head_num=HEADS, tp_k_head_num=KV_HEADS, head_dim=DIM, v_head_dim=DIM, scaling=DIM**-0.5,
    k_scale_float=None, v_scale_float=None,
)  # fmt: skip
PADDING = 3


class Dense:
    """A backend of SGLang's that only notes what it is asked."""

    extend_dummy_seqs_capped_by_req_pool = False

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def note(*_args: Any, **_keywords: Any) -> str:
            self.asked.append(name)
            return f"dense {name}"

        return note


@pytest.fixture
def table() -> torch.Tensor:
    return request_table(REQUESTS, PAGES_EACH)


def make(table: torch.Tensor, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.float32) -> Any:
    """A backend over poisoned caches, which writes its output over poison."""
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *a, **k: _poisoned(new_empty(x, *a, **k)))
    monkeypatch.setattr(backend_module, "_check_model", lambda runner: None)
    runner = SimpleNamespace(
        device="cpu",
        page_size=BLOCK_SIZE,
        token_to_kv_pool=pool(REQUESTS * PAGES_EACH + 1, KV_HEADS, dtype),
        req_to_token_pool=SimpleNamespace(req_to_token=table),
        model=SimpleNamespace(m3_config=SimpleNamespace(msa=CONFIG)),
        model_config=SimpleNamespace(context_len=table.shape[1]),
    )
    made = backend_module.MSAAttnBackend(runner, Dense())
    made.runner = runner
    return made


def _poisoned(x: torch.Tensor) -> torch.Tensor:
    return x.fill_(torch.nan) if x.is_floating_point() and x.element_size() > 1 else x


def remember(msa: Any, table: torch.Tensor, request: int, count: int):
    """What earlier steps have left of ``count`` tokens in the cache."""
    slots = table[request, :count].long()
    k, v = msa.token_to_kv_pool.get_kv_buffer(1)
    for buffer in (k, v, msa.token_to_kv_pool.get_index_k_buffer(1)):
        buffer[slots] = torch.randn(count, *buffer.shape[1:]).to(buffer.dtype)


def norms() -> HeadNorms:
    rng = torch.Generator().manual_seed(3)
    angles = torch.rand(2000, DIM // 4, generator=rng) * 6
    weights = torch.randn(4, DIM, generator=rng).unbind()
    return HeadNorms(*weights, torch.cat((angles.cos(), angles.sin()), dim=1), 1e-6)


def run(msa: Any, step: Any, padding: int = 0, **scales: float) -> tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A sparse layer's attention as the model runs it: what it returns, the projection and both kinds of queries."""
    num_tokens = len(step.out_cache_loc) + padding
    layer = SimpleNamespace(**(vars(LAYER) | scales))
    projected = torch.randn(num_tokens, (HEADS + 3 * KV_HEADS + 1) * DIM)
    positions = torch.arange(num_tokens)
    query, index_query = msa.norm_rope_write(projected, positions, norms(), layer, step)
    returned = msa.forward(query, None, None, layer, step, False, idx_q=index_query)
    return returned, projected, query, index_query


def assert_right(msa: Any, step: Any, ran: tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor]):
    """The output is the definition's, over a cache that holds the new keys and values; zero for padding."""
    (nothing, output), projected, query, index_query = ran
    assert nothing is None
    caches = caches_of(msa.token_to_kv_pool, LAYER, is_sparse=True)
    metadata = msa.forward_metadata
    slots = step.out_cache_loc[: metadata.num_tokens]
    written = LayerCaches(*(torch.full_like(x, torch.nan) for x in (caches.k_pages, caches.v_pages)),
                          torch.full_like(caches.index_k_pages, torch.nan))  # fmt: skip
    positions = torch.arange(len(slots))
    cpu.norm_rope_write(projected[: len(slots)], positions, norms(), written, slots)
    page, offset = slots // BLOCK_SIZE, slots % BLOCK_SIZE
    for name in ("k_pages", "v_pages"):
        found, expected = (getattr(x, name).transpose(1, 2)[page, offset] for x in (caches, written))
        assert torch.equal(found, expected)
    assert torch.equal(caches.index_k_pages[page, offset], written.index_k_pages[page, offset])

    for part in metadata.parts:
        here = part.tokens
        block_ids = reference.select_blocks(index_query[here], caches, part.batch, SELECTION)
        expected = reference.sparse_attention(query[here], caches, block_ids, part.batch, LAYER.scaling)
        # Outputs are means of values of order 1, and fp32 carries seven digits of sums of a few hundred.
        torch.testing.assert_close(output[here].view_as(expected).double(), expected, atol=1e-5, rtol=0)
    assert (output[metadata.num_tokens :] == 0).all()


def dense_inputs(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(num_tokens, HEADS * DIM), *torch.randn(2, num_tokens, KV_HEADS, DIM).unbind()


CASES = {
    "decode": lambda table: (decode([4, 0, 2], [257, 640, 31], table), [(4, 256), (0, 639), (2, 30)]),
    "extend": lambda table: (extend([1, 3], [130, 300], [256, 0], table), [(1, 256)]),
    "mixed": lambda table: (extend([1, 3, 0], [130, 300, 1], [256, 0, 640], table, "MIXED"), [(1, 256), (0, 640)]),
    "verify": lambda table: (verify([3, 0], [400, 255], 4, table), [(3, 400), (0, 255)]),
}


@pytest.mark.parametrize("padding", [0, PADDING])
@pytest.mark.parametrize("kind", CASES)
def test_against_the_definition(kind: str, padding: int, table: torch.Tensor, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    msa = make(table, monkeypatch)
    step, before = CASES[kind](table)
    for request, count in before:
        remember(msa, table, request, count)
    msa.init_forward_metadata(step)
    assert_right(msa, step, run(msa, step, padding))


def test_an_idle_step(table: torch.Tensor, monkeypatch: pytest.MonkeyPatch):
    msa = make(table, monkeypatch)
    step = idle(table)
    msa.init_forward_metadata(step)
    (index_output, output), *_ = run(msa, step, padding=2)
    assert index_output is None
    assert torch.equal(output, torch.zeros(2, HEADS * DIM))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_an_fp8_cache(dtype: torch.dtype, table: torch.Tensor, monkeypatch: pytest.MonkeyPatch):
    """Scaled by what the checkpoint gives the layer; the definition reads what was written."""
    torch.manual_seed(0)
    msa = make(table, monkeypatch, dtype)
    step = extend([1], [300], [0], table)
    msa.init_forward_metadata(step)
    scales = {"k_scale_float": 0.5, "v_scale_float": 0.25}
    (_, output), projected, query, index_query = run(msa, step, **scales)
    caches = caches_of(msa.token_to_kv_pool, SimpleNamespace(**(vars(LAYER) | scales)), is_sparse=True)
    assert (caches.k_scale, caches.v_scale) == (0.5, 0.25)
    v = msa.token_to_kv_pool.get_value_buffer(1)[step.out_cache_loc].float()
    # Two or three bits behind the point, and nothing of an fp8 number below the smallest normal one.
    given = projected[:, (HEADS + KV_HEADS) * DIM : (HEADS + 2 * KV_HEADS) * DIM].view_as(v)
    torch.testing.assert_close(v * 0.25, given, atol=0.02, rtol=0.15)

    (part,) = msa.forward_metadata.parts
    block_ids = reference.select_blocks(index_query, caches, part.batch, SELECTION)
    expected = reference.sparse_attention(query, caches, block_ids, part.batch, LAYER.scaling)
    torch.testing.assert_close(output.view_as(expected).double(), expected, atol=1e-5, rtol=0)


def test_a_dense_layer_is_the_other_backends(table: torch.Tensor, monkeypatch: pytest.MonkeyPatch):
    msa = make(table, monkeypatch)
    step = decode([4], [257], table)
    msa.init_forward_metadata(step)
    msa.init_forward_metadata_out_graph(step)
    msa.init_forward_metadata_in_graph(step)
    q, k, v = dense_inputs(1)
    assert msa.forward(q, k, v, LAYER, step) == "dense forward"
    assert msa.get_cuda_graph_seq_len_fill_value() == "dense get_cuda_graph_seq_len_fill_value"
    assert msa.dense.asked == [
        "init_forward_metadata",
        "init_forward_metadata_out_graph",
        "init_forward_metadata_in_graph",
        "forward",
        "get_cuda_graph_seq_len_fill_value",
    ]


@pytest.mark.parametrize("kind", CASES)
def test_a_dense_layer_on_a_cpu(kind: str, table: torch.Tensor, monkeypatch: pytest.MonkeyPatch):
    """Against torch's own attention over each sequence; the cache of the layer is poisoned like the others."""
    torch.manual_seed(0)
    msa = make(table, monkeypatch)
    dense = CpuDenseAttnBackend(msa.runner)
    step, before = CASES[kind](table)
    k_cache, v_cache = msa.token_to_kv_pool.get_kv_buffer(0)
    for request, count in before:
        slots = table[request, :count].long()
        k_cache[slots], v_cache[slots] = torch.randn(2, count, KV_HEADS, DIM).unbind()
    dense.init_forward_metadata(step)
    q, k, v = dense_inputs(len(step.out_cache_loc) + PADDING)
    layer = SimpleNamespace(**(vars(LAYER) | {"layer_id": 0}))
    output = dense.forward(q, k, v, layer, step)

    at, requests = 0, iter(step.req_pool_indices.tolist())
    for part in dense.forward_metadata.parts:
        batch = part.batch
        for row in range(batch.num_seqs):
            request = next(requests)
            new, length = int(batch.cu_seqlens_q[row + 1] - batch.cu_seqlens_q[row]), int(batch.seq_lens[row])
            slots = table[request, :length].long()
            mask = torch.arange(length) <= torch.arange(length - new, length)[:, None]
            tokens = slice(at, at + new)
            expected = torch.nn.functional.scaled_dot_product_attention(
                q[tokens].view(new, HEADS, DIM).transpose(0, 1),
                k_cache[slots].transpose(0, 1),
                v_cache[slots].transpose(0, 1),
                attn_mask=mask,
                enable_gqa=True,
            )
            found = output[tokens].view(new, HEADS, DIM).transpose(0, 1)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
            at += new
    assert at == len(step.out_cache_loc)
    assert (output[at:] == 0).all()


def test_a_step_as_a_graph_takes_it(table: torch.Tensor, monkeypatch: pytest.MonkeyPatch):
    """Prepared outside of the graph for the longest context, recorded, then refreshed: the rows of the recording."""
    torch.manual_seed(0)
    msa = make(table, monkeypatch)
    msa.choice = msa.choice._replace(module=None)  # as if Triton's kernels ran here
    msa.init_cuda_graph_state(max_bs=4, max_num_tokens=4)
    recorded_step = decode([0, 0, 0], [1, 1, 1], table)
    msa.init_forward_metadata_out_graph(recorded_step, in_capture=True)
    recorded = msa.forward_metadata

    step, before = CASES["decode"](table)
    for request, count in before:
        remember(msa, table, request, count)
    msa.init_forward_metadata_out_graph(step)
    msa.forward_metadata = recorded
    assert_right(msa, step, run(msa, step))


def test_the_output_is_written_where_a_prompt_s_graph_reads_it(table: torch.Tensor, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    msa = make(table, monkeypatch)
    step, before = CASES["extend"](table)
    for request, count in before:
        remember(msa, table, request, count)
    msa.init_forward_metadata(step)
    step._attn_output = torch.full((len(step.out_cache_loc) + PADDING, HEADS * DIM), torch.nan)
    ran = run(msa, step, PADDING)
    assert ran[0][1].data_ptr() == step._attn_output.data_ptr()
    assert_right(msa, step, ran)


def test_without_flash_attention_triton_serves_the_dense_layers(monkeypatch: pytest.MonkeyPatch, caplog: Any):
    def missing(runner: Any) -> Any:
        raise ImportError("no FlashAttention-3 here")

    made = {"fa3": missing, "triton": lambda runner: "Triton's"}
    monkeypatch.setattr(backend_module, "get_default_attn_backend", lambda *_, **__: "fa3")
    monkeypatch.setattr(backend_module, "ATTENTION_BACKENDS", made)
    runner = SimpleNamespace(server_args=None, model_config=None)
    assert backend_module._dense(runner) == "Triton's"
    assert "fa3 does not import (no FlashAttention-3 here), so triton serves the dense layers" in caplog.text
    made["triton"] = missing
    monkeypatch.setattr(backend_module, "get_default_attn_backend", lambda *_, **__: "triton")
    with pytest.raises(MSAError, match="triton does not import .* or name another one by --attention-backend"):
        backend_module._dense(runner)


def test_all_that_a_step_may_be_is_compiled_at_the_start(table: torch.Tensor, monkeypatch: pytest.MonkeyPatch):
    """On a GPU alone, and there by the kernels' own function, which is asked for what this server's steps can be."""
    from msa_backend.kernels.gpu import warm_up

    asked: list[dict[str, Any]] = []
    signature = inspect.signature(warm_up.warm_up)
    monkeypatch.setattr(warm_up, "warm_up", lambda **given: asked.append(signature.bind(**given).arguments))
    msa = make(table, monkeypatch)
    assert not asked
    rope = torch.zeros(4, 64)
    weight = torch.zeros(DIM, dtype=torch.bfloat16)
    layer = SimpleNamespace(
        attn=LAYER, num_heads=HEADS, num_kv_heads=KV_HEADS, rotary_emb=SimpleNamespace(cos_sin_cache=rope),
        q_norm=SimpleNamespace(weight=weight),
    )  # fmt: skip
    msa.runner.model.sparse_attention = [layer]
    msa.runner.max_running_requests = 7
    monkeypatch.setattr(backend_module, "resolving_view", lambda given: given)
    for chunk, most in ((2048, 2048), (-1, 9999), (None, 9999)):
        msa.runner.server_args = SimpleNamespace(chunked_prefill_size=chunk, max_prefill_tokens=9999)
        msa._warm_up(msa.runner)
        assert asked[-1]["max_num_tokens"] == most
    expected = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "rotary_dim": 64}
    expected |= {"max_num_seqs": 7, "max_seq_len": table.shape[1]}
    assert {name: asked[-1][name] for name in expected} == expected
    assert (asked[-1]["dtype"], asked[-1]["rope_dtype"]) == (torch.bfloat16, torch.float32)


def test_graphs_are_refused_where_they_cannot_be(table: torch.Tensor, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(MSAError, match="CUDA graphs are on, but .* pass --disable-cuda-graph"):
        make(table, monkeypatch).init_cuda_graph_state(4, 4)


def test_pages_are_the_pool_itself():
    cache = pool(3, KV_HEADS)
    caches = caches_of(cache, LAYER, is_sparse=True)
    assert caches.k_pages.shape == caches.v_pages.shape == (3, KV_HEADS, BLOCK_SIZE, DIM)
    assert caches.index_k_pages.shape == (3, BLOCK_SIZE, DIM)
    for view, buffer in (
        (caches.k_pages, cache.get_key_buffer(1)),
        (caches.v_pages, cache.get_value_buffer(1)),
        (caches.index_k_pages, cache.get_index_k_buffer(1)),
    ):
        assert view.data_ptr() == buffer.data_ptr()
    slot = 2 * BLOCK_SIZE + 5
    caches.k_pages[2, 1, 5] = 7.0
    caches.index_k_pages[2, 5] = 8.0
    assert (cache.get_key_buffer(1)[slot, 1] == 7).all()
    assert (cache.get_index_k_buffer(1)[slot] == 8).all()


def test_another_cache():
    with pytest.raises(
        MSAError, match="the KV cache is a object, but MSA keeps its index keys in .*MiniMaxSparseKVPool"
    ):
        check_pool(object(), BLOCK_SIZE)


def test_pages_of_another_size():
    with pytest.raises(MSAError, match="pages of 64 tokens, but MSA needs 128.*pass --page-size 128"):
        check_pool(pool(2, KV_HEADS), 64)
