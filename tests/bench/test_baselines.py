"""What baselines are called with: those that need a GPU by stand-ins that take calls and note them."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from msa_backend.bench import inputs
from msa_backend.bench.baselines import fa3, ours, vllm
from msa_backend.bench.cases import Case
from msa_backend.bench.inputs import Inputs

DECODE = Case("decode", 1000, batch=2, num_heads=4, num_kv_heads=2, dim=32, topk=4, bound=4096)


def make(case: Case) -> Inputs:
    return inputs.make_inputs(case, inputs.make_cache(case, torch.device("cpu"), seed=0), seed=0)


class Noted:
    """Functions by any name: each call's arguments are kept, and what is returned is the function's name."""

    def __init__(self) -> None:
        self.calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def __getattr__(self, name: str) -> Any:
        def noted(*args: Any, **kwargs: Any) -> str:
            self.calls[name] = (args, kwargs)
            return name

        return noted


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> None:
    module = ModuleType(name)
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Noted:
    noted = Noted()
    names = ("flash_attn_varlen_func", "get_scheduler_metadata")
    stand_in(monkeypatch, "vllm.vllm_flash_attn", **{name: getattr(noted, name) for name in names})
    return noted


def test_fa3_is_captured_for_the_bound_and_scheduled_for_the_real_lengths(flash: Noted) -> None:
    made = make(DECODE)
    fa3.bind(made, None).attend()
    _, called = flash.calls["flash_attn_varlen_func"]
    assert called["max_seqlen_k"] == 4096 and called["block_table"].shape == (2, 32)
    assert called["num_splits"] == 32 and called["scheduler_metadata"] == "get_scheduler_metadata"
    _, scheduled = flash.calls["get_scheduler_metadata"]
    assert scheduled["max_seqlen_k"] == 1000 and scheduled["num_splits"] == 32
    assert scheduled["cache_seqlens"] is made.batch.seq_lens


def test_fa3_chooses_its_own_splits_without_a_bound(flash: Noted) -> None:
    fa3.bind(make(Case("decode", 1000, batch=2, num_heads=4, num_kv_heads=2, dim=32)), None).attend()
    assert not {"num_splits", "scheduler_metadata"} & flash.calls["flash_attn_varlen_func"][1].keys()


@pytest.fixture
def in_tree(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    kernels = SimpleNamespace(index_topk=Noted(), sparse_attn=Noted())
    stand_in(monkeypatch, "vllm.models.minimax_m3.common.ops", **vars(kernels))
    return kernels


def test_in_tree_decode_is_given_the_bound(in_tree: SimpleNamespace) -> None:
    bound = vllm.bind(make(DECODE), torch.zeros(2, 2, 4))
    assert bound.select is not None and bound.select() == "minimax_m3_index_decode"
    bound.attend()
    args, _ = in_tree.index_topk.calls["minimax_m3_index_decode"]
    assert args[2].shape == (2, 32) and args[4] == 4096
    assert "minimax_m3_sparse_attn_decode" in in_tree.sparse_attn.calls


def test_in_tree_layer_writes_in_one_operation_then_selects_and_attends(
    in_tree: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    ops = Noted()
    stand_in(monkeypatch, "vllm", _custom_ops=ops)
    made = make(replace(DECODE, mode="suffix", new_tokens=3, fp8_index=True))
    projection = inputs.make_projection(made, seed=0)
    layer = vllm.layer(made, projection)
    assert not ops.calls
    layer.write()
    args, _ = ops.calls["fused_minimax_m3_qknorm_rope_kv_insert"]
    assert args[0].shape == (6, (4 + 3 * 2 + 1) * 32)
    assert args[5:9] == (4, 2, 16, 1e-6) and args[11] == 2
    assert args[14] is made.kv_pages and args[15] is made.index_k_pages and args[16] == 128
    q, index_q = args[17:19]
    assert q.shape == (6, 4 * 32) and index_q.shape == (6, 2 * 32) and index_q.dtype == torch.float8_e4m3fn
    in_tree.sparse_attn.calls.clear()
    layer.attend()
    assert in_tree.sparse_attn.calls["minimax_m3_sparse_attn"][0][2] == "minimax_m3_index_topk"


def test_our_layer_writes_the_new_tokens_and_no_other() -> None:
    made = make(replace(DECODE, mode="suffix", new_tokens=130, bound=0, dtype="fp32"))
    projection = inputs.make_projection(made, seed=0)
    before = made.kv_pages.clone()
    layer = ours.layer(made, projection)
    q, index_q = layer.write()
    assert q.shape == made.q.shape and index_q.shape == made.index_q.shape
    changed = (made.kv_pages != before).any(-1).any(1)
    expected = torch.zeros_like(changed)
    for row in made.batch.block_table:
        for position in range(870, 1000):
            expected[row[position // 128], position % 128] = True
    assert torch.equal(changed, expected)
    assert projection.positions.tolist() == [*range(870, 1000)] * 2
    assert layer.attend().shape == made.q.shape
