"""The hidden states that EAGLE3 drafts from, in a stack whose layers each add a known number."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from msa_backend.model.vllm import decoder
from msa_backend.model.vllm.causal_lm import MiniMaxM3ForCausalLM
from msa_backend.model.vllm.decoder import M3Model

LAYERS = 7
TOKENS, HIDDEN = 3, 4


class Adds(nn.Module):
    """A layer that adds its number plus one, into the residual in place, as fused norms do."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        residual = hidden_states if residual is None else residual.add_(hidden_states)
        # Half of it in the layer's output, half in its residual: a tap is the sum.
        residual += (self.number + 1) / 2
        return torch.full_like(residual, (self.number + 1) / 2), residual


class Sum(nn.Module):
    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return hidden_states + residual, residual


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> MiniMaxM3ForCausalLM:
    pipeline = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    monkeypatch.setattr(decoder, "get_pp_group", lambda: pipeline)
    model = M3Model.__new__(M3Model)
    nn.Module.__init__(model)
    model.start_layer, model.end_layer = 0, LAYERS
    model.layers = nn.ModuleList(map(Adds, range(LAYERS)))
    model.norm = Sum()
    model.embed_tokens = nn.Embedding(TOKENS, HIDDEN, _weight=torch.zeros(TOKENS, HIDDEN))
    found = MiniMaxM3ForCausalLM.__new__(MiniMaxM3ForCausalLM)
    nn.Module.__init__(found)
    found.model = model
    return found


BEFORE_LAYER = [0, 1, 3, 6, 10, 15, 21, 28]


@torch.inference_mode()
@pytest.mark.parametrize("layers", [(2, 3, 4), (0, 1, 7), (5,), (0,)])
def test_taps(target: MiniMaxM3ForCausalLM, layers: tuple[int, ...]):
    """Before a layer; past the last one, before the final norm."""
    target.set_aux_hidden_state_layers(layers)
    hidden_states, taps = target(torch.arange(TOKENS), torch.arange(TOKENS))
    assert [tap.unique().tolist() for tap in taps] == [[BEFORE_LAYER[layer]] for layer in layers]
    assert hidden_states.unique().tolist() == [BEFORE_LAYER[LAYERS]]


@torch.inference_mode()
def test_without_taps(target: MiniMaxM3ForCausalLM):
    assert torch.is_tensor(target(torch.arange(TOKENS), torch.arange(TOKENS)))


def test_default_taps(target: MiniMaxM3ForCausalLM):
    from vllm.model_executor.models.interfaces import supports_eagle3

    assert supports_eagle3(target)
    assert target.get_eagle3_default_aux_hidden_state_layers() == (2, LAYERS // 2, LAYERS - 3)
