"""How many floating-point operations one token takes, with MSA and with dense attention, the index counted.

A product and the sum it goes into are two. Norms, rope, softmax and top-k are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from msa_backend.config import MSAConfig
from msa_backend.model.config import M3Config
from msa_backend.model.sizing import used_weights


class LayerFlops(NamedTuple):
    """Of one token in one sparse layer.

    Attributes:
        dense: attention to every token, as without MSA.
        selected: attention to the tokens of the selected blocks.
        scoring: of the index, which scores every token that is visible.
    """

    dense: int
    selected: int
    scoring: int

    @property
    def msa(self) -> int:
        return self.selected + self.scoring


class ModelFlops(NamedTuple):
    """Of one token in the whole text model: what MSA is in it, and what dense attention would be."""

    msa: int
    dense: int


def sparse_layer(msa: MSAConfig, tokens: int) -> LayerFlops:
    """Of a token that sees ``tokens``, its own counted."""
    of_a_token = 4 * msa.num_heads * msa.head_dim
    return LayerFlops(
        dense=of_a_token * tokens,
        selected=of_a_token * min(tokens, msa.topk * msa.block_size),
        scoring=2 * msa.num_index_heads * msa.index_dim * tokens,
    )


def attention(config: M3Config, tokens: int) -> ModelFlops:
    """Of the attention of all layers, dense ones included."""
    layer = sparse_layer(config.msa, tokens)
    sparse = sum(config.msa.sparse_layers)
    kept = (config.num_layers - sparse) * layer.dense
    return ModelFlops(kept + sparse * layer.msa, config.num_layers * layer.dense)


def weights(config: M3Config) -> int:
    """Of the products with weights, of which a token uses the experts that it is sent to."""
    return round(2 * used_weights(config, 1))


def table(config: M3Config, lengths: list[int]) -> Iterator[str]:
    """Lines of text, one for each length."""
    msa = config.msa
    yield "  tokens      blocks      dense   selected +   index   a sparse layer   all attention   with weights"
    of_weights = weights(config)
    for tokens in lengths:
        layer, all_layers = sparse_layer(msa, tokens), attention(config, tokens)
        blocks = -(-tokens // msa.block_size)
        times = (
            layer.dense / layer.msa,
            all_layers.dense / all_layers.msa,
            (all_layers.dense + of_weights) / (all_layers.msa + of_weights),
        )
        read = f"{min(msa.topk, blocks)} of {blocks:,}"
        work = f"{layer.dense / 1e9:>10.3f} {layer.selected / 1e9:>10.3f} + {layer.scoring / 1e9:>7.3f}"
        yield f"{tokens:>9,} {read:>12}{work}" + "".join(f"{less:>15.1f}x" for less in times)
