"""The experts in plain torch compute what MiniMax-M3's do in ``transformers``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from msa_backend.model.experts import choose_experts, run_experts, swiglu_oai

from .. import oracle

ALPHA, LIMIT = 1.702, 7.0


def test_activation_clamps_gate_from_above_and_up_from_both_sides():
    gate = torch.tensor([-100.0, -1.0, 3.0, 100.0])
    up = torch.tensor([100.0, -100.0, 2.0, 0.0])
    clamped_gate, clamped_up = torch.tensor([-100.0, -1.0, 3.0, 7.0]), torch.tensor([7.0, -7.0, 2.0, 0.0])
    expected = (clamped_up + 1) * clamped_gate * torch.sigmoid(ALPHA * clamped_gate)
    torch.testing.assert_close(swiglu_oai(torch.cat((gate, up)), ALPHA, LIMIT), expected)


def test_the_bias_chooses_but_does_not_weigh():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    weights, experts = choose_experts(logits, torch.tensor([-9.0, 0.0, 0.0, 9.0]), 2, 3.0)
    chosen = dict(zip(experts[0].tolist(), weights[0].tolist(), strict=True))
    scores = logits.sigmoid()[0, [1, 3]]
    assert chosen == pytest.approx(dict(zip((1, 3), (3 * scores / scores.sum()).tolist(), strict=True)))


@pytest.mark.parametrize("num_tokens", [0, 1, 37])
def test_a_layer_of_the_oracle(num_tokens: int, tiny: Path, truth: Any):
    """Without the shared expert, which is a plain MLP."""
    torch.manual_seed(0)
    layer = oracle.text_layers(truth)[1].mlp
    x = torch.randn(num_tokens, truth.config.text_config.hidden_size)
    logits = torch.nn.functional.linear(x, layer.gate.weight)
    bias = dict(layer.named_parameters()) | dict(layer.named_buffers())
    (bias_name,) = (name for name in bias if name.endswith("e_score_correction_bias"))
    text = truth.config.text_config
    weights, experts = choose_experts(logits, bias[bias_name], text.num_experts_per_tok, text.routed_scaling_factor)
    with torch.no_grad():
        found = run_experts(x, weights, experts, layer.experts.gate_up_proj, layer.experts.down_proj, ALPHA, LIMIT)
        expected = layer(x[None])[0] - layer.shared_experts(x) if num_tokens else x
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
