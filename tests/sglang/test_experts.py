"""The experts of SGLang's model on a CPU, loaded as its checkpoint loader does it, over tensor-parallel ranks."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from msa_backend.model.config import M3Config
from msa_backend.model.experts import choose_experts, run_experts

from ..model import configs


@contextmanager
def parallel_state(ranks: int, rank: int = 0) -> Iterator[None]:
    """SGLang's, as far as the experts ask."""
    from msa_backend.model.sglang import cpu_experts, mlp

    parallel = SimpleNamespace(tp_size=ranks, tp_rank=rank)
    with pytest.MonkeyPatch.context() as patch:
        for module in (cpu_experts, mlp):
            patch.setattr(module, "get_parallel", lambda: parallel)
        yield


CONFIG = M3Config.from_text_config(configs.original())


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_ranks_add_up(ranks: int):
    from msa_backend.model.sglang import cpu_experts

    torch.manual_seed(0)
    count, width, hidden = CONFIG.num_experts, CONFIG.moe_intermediate_size, CONFIG.hidden_size
    gate, up = torch.randn(2, count, width, hidden).unbind()
    down = torch.randn(count, hidden, width)
    x, logits, bias = torch.randn(9, hidden), torch.randn(9, count), torch.randn(count)

    total = torch.zeros(9, hidden)
    for rank in range(ranks):
        with parallel_state(ranks, rank):
            experts = cpu_experts.CpuExperts(CONFIG)
            for expert in range(count):
                for weight, tensor, shard in (
                    (experts.w13_weight, gate, "w1"),
                    (experts.w13_weight, up, "w3"),
                    (experts.w2_weight, down, "w2"),
                ):
                    weight.weight_loader(weight, tensor[expert], "name", shard_id=shard, expert_id=expert)
            total += experts(x, logits, bias)

    weights, chosen = choose_experts(logits, bias, CONFIG.num_experts_per_tok, CONFIG.routed_scaling_factor)
    expected = run_experts(x, weights, chosen, torch.cat((gate, up), 1), down, CONFIG.swiglu_alpha, CONFIG.swiglu_limit)
    torch.testing.assert_close(total, expected, atol=1e-4, rtol=1e-5)


class Recording(torch.nn.Module):
    """In place of a model: takes any weight, and notes where each went."""

    def __init__(self, weights: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.given: list[tuple[str, dict[str, Any]]] = []
        self.names = set(weights)
        for name in weights:
            self.names.add(re.sub(r"(gate|up)_proj\.", "gate_up_proj.", name))
            self.names.add(re.sub(r"\.(?:index_)?[qkv]_proj\.", ".qkv_proj.", name))
            for part in ("w13", "w2"):
                self.names.add(re.sub(r"experts\.\d+\.w\d\.weight", f"experts.{part}_weight", name))

    def named_parameters(self, *_: Any, **__: Any) -> Any:
        for name in self.names:
            yield name, SimpleNamespace(weight_loader=lambda *given, name=name, **shard: self.note(name, given, shard))

    def note(self, name: str, given: tuple[Any, ...], shard: dict[str, Any]) -> None:
        self.given.append((name, shard | {"tensor": given[1]}))


@pytest.mark.parametrize("shared", [0, 1])
def test_a_shared_expert_loads_as_one_behind_the_routed_ones(shared: int):
    from msa_backend.model.sglang.load import load_weights
    from msa_backend.model.weights import expected_shapes

    shapes = expected_shapes(CONFIG)
    model = Recording(shapes)
    kinds = {"gate": 1.0, "down": 2.0, "up": 3.0}  # as w1, w2 and w3
    weights = {
        name: torch.full(shape, next((number for kind, number in kinds.items() if f".{kind}_proj." in name), 0.0))
        for name, shape in shapes.items()
    }
    loaded = load_weights(model, weights.items(), CONFIG, shared)
    behind = [(name, shard) for name, shard in model.given if shard.get("expert_id") == CONFIG.num_experts]
    assert len(behind) == 3 * sum(CONFIG.moe_layers) * shared
    for name, shard in behind:
        down = shard["shard_id"] == "w2"
        assert name.endswith("experts.w2_weight" if down else "experts.w13_weight")
        assert len(shard["tensor"]) == (CONFIG.hidden_size if down else CONFIG.shared_intermediate_size)
        assert f"w{shard['tensor'][0, 0]:.0f}" == shard["shard_id"]
    assert any("shared_experts" in name for name in loaded) != bool(shared)


def test_when_a_shared_expert_runs_as_a_routed_one(monkeypatch: pytest.MonkeyPatch):
    from msa_backend.model.sglang import causal_lm

    def reason(shared: int, quant_config: Any = None) -> str | None:
        config = dataclasses.replace(CONFIG, shared_intermediate_size=shared)
        monkeypatch.setattr(causal_lm, "recorded", lambda hf_config: config)
        return causal_lm.MiniMaxM3ForCausalLM.shared_experts_fusion_disable_reason(None, quant_config)

    width = CONFIG.moe_intermediate_size
    assert reason(width) == "Only GPU kernels take the shared expert for a routed one."
    monkeypatch.setattr(causal_lm, "is_cuda", lambda: True)
    assert reason(width) is None
    for other in (0, 2 * width):
        assert "another size" in reason(other)
    assert "quantized differently" in reason(width, object())


def test_experts_may_overwrite_their_input():
    """SGLang's fused experts do, on a GPU; the shared expert must have read it before."""
    from msa_backend.model.sglang.mlp import M3MoE

    class InPlace(torch.nn.Module):
        def forward(self, x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
            return x.fill_(7.0)

    moe = M3MoE.__new__(M3MoE)
    torch.nn.Module.__init__(moe)
    moe.gate, moe.experts, moe.shared_experts = torch.nn.Identity(), InPlace(), torch.nn.Identity()
    moe.on_cpu, moe.e_score_correction_bias = True, None
    x = torch.randn(3, 4)
    # The identity hands its input on, so a copy stands for what a real expert computes from it.
    moe.shared_experts.register_forward_hook(lambda module, given, output: output.clone())
    expected = x + 7.0
    with parallel_state(1):
        torch.testing.assert_close(moe(x), expected)
