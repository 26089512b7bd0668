"""The attention backend by itself over SGLang's own caches, against the definition, in every kind of step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from msa_backend.config import MSAConfig, MSAError
from msa_backend.kernels import reference
from msa_backend.kernels.batch import BLOCK_SIZE
from msa_backend.sglang import backend as backend_module
from msa_backend.sglang.pools import check_pool, pages_of

from .batches import DIM, decode, extend, idle, pool, request_table, verify

HEADS, KV_HEADS = 4, 2
CHOICE = {"topk": 3, "init_blocks": 1, "local_blocks": 1}
CONFIG = MSAConfig(HEADS, KV_HEADS, DIM, KV_HEADS, DIM, BLOCK_SIZE, sparse_layers=(False, True), **CHOICE)
REQUESTS, PAGES_EACH = 5, 7
LAYER = SimpleNamespace(
    layer_id=1, tp_q_head_num=HEADS, head_dim=DIM, v_head_dim=DIM, scaling=DIM**-0.5, k_scale_float=None,
    v_scale_float=None,
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
    return backend_module.MSAAttnBackend(runner, Dense())


def _poisoned(x: torch.Tensor) -> torch.Tensor:
    return x.fill_(torch.nan) if x.is_floating_point() and x.element_size() > 1 else x


def remember(msa: Any, table: torch.Tensor, request: int, count: int):
    """What earlier steps have left of ``count`` tokens in the cache."""
    slots = table[request, :count].long()
    k, v = msa.token_to_kv_pool.get_kv_buffer(1)
    for buffer in (k, v, msa.token_to_kv_pool.get_index_k_buffer(1)):
        buffer[slots] = torch.randn(count, *buffer.shape[1:]).to(buffer.dtype)


def inputs(num_tokens: int) -> dict[str, torch.Tensor]:
    return {
        "q": torch.randn(num_tokens, HEADS * DIM),
        "k": torch.randn(num_tokens, KV_HEADS, DIM),
        "v": torch.randn(num_tokens, KV_HEADS, DIM),
        "idx_q": torch.randn(num_tokens, KV_HEADS, DIM),
        "idx_k": torch.randn(num_tokens, 1, DIM),
    }


def assert_right(msa: Any, step: Any, given: dict[str, torch.Tensor], output: torch.Tensor):
    """The output is the definition's, over a cache that holds the new keys and values; zero for padding."""
    caches = pages_of(msa.token_to_kv_pool, 1)
    slots = step.out_cache_loc[: msa.forward_metadata.num_tokens]
    page, offset = slots // BLOCK_SIZE, slots % BLOCK_SIZE
    new = slice(0, len(slots))
    for cache, name in ((caches.k.transpose(1, 2), "k"), (caches.v.transpose(1, 2), "v")):
        assert torch.equal(cache[page, offset], given[name][new].to(cache.dtype))
    assert torch.equal(caches.index_k[page, offset], given["idx_k"][new, 0])

    for rows in msa.forward_metadata.rows:
        block_ids = reference.select_blocks(given["idx_q"][rows.tokens], caches.index_k, rows.batch, **CHOICE)
        expected = reference.sparse_attention(
            given["q"][rows.tokens].view(-1, HEADS, DIM), caches.k, caches.v, block_ids, rows.batch, scale=LAYER.scaling
        )
        # Outputs are means of values of order 1, and fp32 carries seven digits of sums of a few hundred.
        found = output[rows.tokens].view_as(expected).double()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (output[msa.forward_metadata.num_tokens :] == 0).all()


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
    given = inputs(len(step.out_cache_loc) + padding)
    index_output, output = msa.forward(**given, layer=LAYER, forward_batch=step)
    assert index_output is None
    assert_right(msa, step, given, output)


def test_an_idle_step(table: torch.Tensor, monkeypatch: pytest.MonkeyPatch):
    msa = make(table, monkeypatch)
    step = idle(table)
    msa.init_forward_metadata(step)
    index_output, output = msa.forward(**inputs(2), layer=LAYER, forward_batch=step)
    assert index_output is None
    assert torch.equal(output, torch.zeros(2, HEADS * DIM))


def test_a_cache_that_is_not_to_be_written(table: torch.Tensor, monkeypatch: pytest.MonkeyPatch):
    msa = make(table, monkeypatch)
    step = decode([4], [257], table)
    remember(msa, table, 4, 257)
    before = msa.token_to_kv_pool.get_key_buffer(1).clone()
    msa.init_forward_metadata(step)
    _, output = msa.forward(**inputs(1), layer=LAYER, forward_batch=step, save_kv_cache=False)
    assert output.isfinite().all()
    torch.testing.assert_close(msa.token_to_kv_pool.get_key_buffer(1), before, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_an_fp8_cache(dtype: torch.dtype, table: torch.Tensor, monkeypatch: pytest.MonkeyPatch):
    """Scaled by what the checkpoint gives the layer; the definition reads what was written."""
    torch.manual_seed(0)
    msa = make(table, monkeypatch, dtype)
    step = extend([1], [300], [0], table)
    msa.init_forward_metadata(step)
    given = inputs(300)
    scales = {"k_scale_float": 0.5, "v_scale_float": 0.25}
    _, output = msa.forward(**given, layer=SimpleNamespace(**(vars(LAYER) | scales)), forward_batch=step)
    caches = pages_of(msa.token_to_kv_pool, 1)
    k, v = (buffer[step.out_cache_loc].float() for buffer in msa.token_to_kv_pool.get_kv_buffer(1))
    # Two or three bits behind the point, and nothing of an fp8 number below the smallest normal one.
    torch.testing.assert_close(k * 0.5, given["k"], atol=0.02, rtol=0.15)
    torch.testing.assert_close(v * 0.25, given["v"], atol=0.02, rtol=0.15)

    (rows,) = msa.forward_metadata.rows
    block_ids = reference.select_blocks(given["idx_q"], caches.index_k, rows.batch, **CHOICE)
    expected = reference.sparse_attention(
        given["q"].view(-1, HEADS, DIM), caches.k, caches.v, block_ids, rows.batch, scale=LAYER.scaling, k_scale=0.5,
        v_scale=0.25,
    )  # fmt: skip
    torch.testing.assert_close(output.view_as(expected).double(), expected, atol=1e-5, rtol=0)


def test_a_dense_layer_is_the_other_backends(table: torch.Tensor, monkeypatch: pytest.MonkeyPatch):
    msa = make(table, monkeypatch)
    step = decode([4], [257], table)
    msa.init_forward_metadata(step)
    msa.init_forward_metadata_out_graph(step)
    msa.init_forward_metadata_in_graph(step)
    given = inputs(1)
    assert msa.forward(given["q"], given["k"], given["v"], LAYER, step) == "dense forward"
    assert msa.get_cuda_graph_seq_len_fill_value() == "dense get_cuda_graph_seq_len_fill_value"
    assert msa.dense.asked == [
        "init_forward_metadata",
        "init_forward_metadata_out_graph",
        "init_forward_metadata_in_graph",
        "forward",
        "get_cuda_graph_seq_len_fill_value",
    ]


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
    given = inputs(3)
    _, output = msa.forward(**given, layer=LAYER, forward_batch=step)
    assert_right(msa, step, given, output)


def test_graphs_are_refused_where_they_cannot_be(table: torch.Tensor, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(MSAError, match="CUDA graphs are on, but .* pass --disable-cuda-graph"):
        make(table, monkeypatch).init_cuda_graph_state(4, 4)


def test_pages_are_the_pool_itself():
    cache = pool(3, KV_HEADS)
    pages = pages_of(cache, 1)
    assert pages.k.shape == pages.v.shape == (3, KV_HEADS, BLOCK_SIZE, DIM)
    assert pages.index_k.shape == (3, BLOCK_SIZE, DIM)
    for view, buffer in (
        (pages.k, cache.get_key_buffer(1)),
        (pages.v, cache.get_value_buffer(1)),
        (pages.index_k, cache.get_index_k_buffer(1)),
    ):
        assert view.data_ptr() == buffer.data_ptr()
    slot = 2 * BLOCK_SIZE + 5
    pages.k[2, 1, 5] = 7.0
    pages.index_k[2, 5] = 8.0
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
