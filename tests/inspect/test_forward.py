"""The forward pass is ``transformers``' own: the same choices and the same hidden states, whatever the chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from msa_backend.inspect import forward
from msa_backend.inspect.forward import Seen
from msa_backend.kernels.cpu.select_blocks import best_blocks
from msa_backend.kernels.selection import Selection
from msa_backend.tiny import TinyShape
from msa_backend.transformers.attention import ascending
from tests import oracle

SELECTION = Selection(TinyShape().topk, local_blocks=TinyShape().local_blocks)
IDS = oracle.random_prompt(1100)
CPU = torch.device("cpu")


class Read:
    """What a forward pass saw, whole."""

    def __init__(self, decoder: Any) -> None:
        self.seen: list[tuple[int, Seen]] = []
        hidden: list[torch.Tensor] = []
        hook = decoder.norm.register_forward_hook(lambda _module, _inputs, out: hidden.append(out[0]))
        self.counts = list(forward.read(decoder, IDS, lambda layer, seen: self.seen.append((layer, seen))))
        hook.remove()
        self.hidden = torch.cat(hidden)

    def block_ids(self, layer: int) -> torch.Tensor:
        return torch.cat([seen.block_ids for number, seen in self.seen if number == layer], 1)


@pytest.fixture(scope="module")
def read(tiny: Path) -> Read:
    return Read(forward.load(tiny, "float32", CPU))


@pytest.fixture(scope="module")
def truth(tiny: Path) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """Hidden states and choices of ``transformers`` with its own attention, the prompt at once."""
    model = oracle.load(tiny)
    chosen = {}
    for number, layer in enumerate(oracle.text_layers(model)):
        if layer.self_attn.indexer is not None:
            layer.self_attn.indexer.register_forward_hook(
                lambda _module, _inputs, ids, number=number: chosen.update({number: ids[0]})
            )
    with torch.inference_mode():
        hidden = model.model.language_model(input_ids=torch.tensor([IDS])).last_hidden_state[0]
    return hidden, chosen


def test_hidden_states(read: Read, truth: tuple[torch.Tensor, dict[int, torch.Tensor]]):
    assert read.counts == [512, 1024, 1100]
    assert torch.allclose(read.hidden, truth[0], atol=1e-4)


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_choices(layer: int, read: Read, truth: tuple[torch.Tensor, dict[int, torch.Tensor]]):
    assert set(truth[1]) == {1, 2, 3}
    assert torch.equal(read.block_ids(layer), ascending(truth[1][layer], SELECTION.topk))


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_index_queries_and_keys_give_the_choices(layer: int, read: Read):
    *_, seen = (seen for number, seen in read.seen if number == layer)
    positions = torch.arange(1024, 1100)
    scores = torch.einsum("gnd,td->gnt", seen.index_q, seen.index_k)
    scores = scores.masked_fill(torch.arange(1100) > positions[:, None], -torch.inf)
    scores = torch.nn.functional.pad(scores, (0, -1100 % 128), value=-torch.inf).unflatten(-1, (-1, 128)).amax(-1)
    assert torch.equal(best_blocks(scores, positions // 128, SELECTION), seen.block_ids)


def test_another_form_of_the_checkpoint(native: Path, read: Read):
    assert torch.equal(Read(forward.load(native, "float32", CPU)).hidden, read.hidden)


@pytest.mark.parametrize(("num_tokens", "heads", "chunk"), [(1000, 2, 512), (131072, 2, 256), (131072, 4, 128),
                                                            (1 << 20, 4, 128)])  # fmt: skip
def test_chunks_shrink_with_the_context(num_tokens: int, heads: int, chunk: int):
    assert forward.chunk_length(num_tokens, heads) == chunk
