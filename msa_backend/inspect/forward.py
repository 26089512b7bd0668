"""The forward pass of ``transformers``' MiniMax-M3, chunk by chunk, and what its sparse layers choose on the way.

The attention is that of :mod:`msa_backend.transformers`, which a notebook may use as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from msa_backend.kernels.batch import BLOCK_SIZE
from msa_backend.transformers import MINIMUM_VERSION, attention
from msa_backend.transformers.attention import ascending

from .errors import InspectError

ATTENTION = "msa_inspect"
MAX_SCORES = 1 << 26
"""Index scores of a chunk: 256 MB of fp32, of which the indexer holds a few copies."""
LONGEST_CHUNK = 512


class Seen(NamedTuple):
    """What the new tokens of a chunk have before them in a sparse layer.

    Attributes:
        q: ``[num_heads, n, head_dim]``.
        k: ``[num_kv_heads, seq_len, head_dim]``, the new tokens' at its end.
        index_q: ``[num_kv_heads, n, index_dim]``.
        index_k: ``[seq_len, index_dim]``.
        block_ids: ``[num_kv_heads, n, topk]`` int32, ascending, -1 after the last.
        scale: of the logits.
    """

    q: Tensor
    k: Tensor
    index_q: Tensor
    index_k: Tensor
    block_ids: Tensor
    scale: float


Observe = Callable[[int, Seen], None]
"""Called with the number of the layer, from the first layer to the last in each chunk."""


def load(model: Path, dtype: str, device: torch.device) -> Any:
    """The text model of a whole checkpoint, in any form that ``transformers`` loads.

    Raises:
        InspectError: ``transformers`` has no MiniMax-M3, or the checkpoint does not fit it.
    """
    try:
        from transformers import MiniMaxM3SparseForConditionalGeneration
    except ImportError as error:
        raise InspectError(
            f"inspecting needs transformers {MINIMUM_VERSION} or newer, with MiniMax-M3 ({error}); install it"
        ) from None
    attention.register(ATTENTION, _attention)
    try:
        loaded, info = MiniMaxM3SparseForConditionalGeneration.from_pretrained(
            model, dtype=dtype, attn_implementation=ATTENTION, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InspectError(f"transformers cannot load {model} ({reason}); inspect a checkpoint that it loads") from None
    for problem in ("missing_keys", "mismatched_keys"):
        if found := sorted(map(str, info.get(problem) or ())):
            raise InspectError(
                f"{model} has {len(found)} {problem.replace('_', ' ')}, such as {found[0]}; fetch it anew"
            )
    decoder = loaded.get_decoder()
    for layer in decoder.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.float()  # as the released checkpoint stores the router
    return decoder.eval().to(device)


def chunk_length(num_tokens: int, num_index_heads: int) -> int:
    """Whole blocks, so that only the last chunk ends within one."""
    fits = MAX_SCORES // (num_index_heads * num_tokens) // BLOCK_SIZE * BLOCK_SIZE
    return min(LONGEST_CHUNK, max(BLOCK_SIZE, fits))


@torch.inference_mode()
def read(decoder: Any, ids: list[int], observe: Observe) -> Iterator[int]:
    """Read the tokens ``ids``; yield how many are read after each chunk."""
    from transformers import DynamicCache

    device = decoder.embed_tokens.weight.device
    cache = DynamicCache(config=decoder.config)
    chunk = chunk_length(len(ids), decoder.config.num_key_value_heads)
    with _indices(decoder) as indices:
        for start in range(0, len(ids), chunk):
            part = torch.tensor([ids[start : start + chunk]], device=device)
            decoder(input_ids=part, past_key_values=cache, use_cache=True, observe=observe, indices=indices)
            yield start + part.shape[1]


@contextmanager
def _indices(decoder: Any) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Within this context, index queries and index keys of each layer's last call."""
    from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import apply_rotary_pos_emb

    found: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(indexer: Any, inputs: Any, _: Any) -> None:
        hidden, (cos, sin), cache, _ = inputs
        index_q = indexer.q_norm(indexer.q_proj(hidden).unflatten(-1, (-1, indexer.head_dim))).transpose(1, 2)
        index_q, _ = apply_rotary_pos_emb(index_q, index_q, cos, sin)
        found[indexer.layer_idx] = index_q[0], cache.layers[indexer.layer_idx].idx_keys[0, 0]

    with ExitStack() as hooks:
        for layer in decoder.layers:
            if layer.self_attn.indexer is not None:
                hooks.enter_context(layer.self_attn.indexer.register_forward_hook(keep))
        yield found


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float,
    block_indices: Tensor | None = None,
    observe: Observe | None = None,
    indices: dict[int, tuple[Tensor, Tensor]] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """:func:`~msa_backend.transformers.attention.attention` of one sequence, shown to ``observe`` first."""
    if block_indices is not None and observe is not None and indices is not None:
        index_q, index_k = indices[module.layer_idx]
        block_ids = ascending(block_indices[0], module.indexer.topk_blocks)
        observe(module.layer_idx, Seen(query[0], key[0], index_q, index_k, block_ids, scaling))
    return attention.attention(module, query, key, value, attention_mask, scaling, block_indices, **kwargs)
