"""The experts of SGLang's model on a CPU, loaded as its checkpoint loader does it, over tensor-parallel ranks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from msa_backend.model.config import M3Config
from msa_backend.model.experts import choose_experts, run_experts

from ..model import configs

CONFIG = M3Config.from_text_config(configs.original())


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_ranks_add_up(ranks: int, monkeypatch: pytest.MonkeyPatch):
    from msa_backend.model.sglang import cpu_experts

    torch.manual_seed(0)
    count, width, hidden = CONFIG.num_experts, CONFIG.moe_intermediate_size, CONFIG.hidden_size
    gate, up = torch.randn(2, count, width, hidden).unbind()
    down = torch.randn(count, hidden, width)
    x, logits, bias = torch.randn(9, hidden), torch.randn(9, count), torch.randn(count)

    total = torch.zeros(9, hidden)
    for rank in range(ranks):
        parallel = SimpleNamespace(tp_size=ranks, tp_rank=rank)
        monkeypatch.setattr(cpu_experts, "get_parallel", lambda parallel=parallel: parallel)
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
