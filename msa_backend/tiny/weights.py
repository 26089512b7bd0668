"""Random weights, under the names of the original checkpoint, scaled so that a wrong answer shows.

A random model is a poor fixture by default: its attention averages over everything, so that no choice of
blocks changes a logit, and it answers one token for ever. Four choices here make it a good one:

* q/k norms give attention logits a spread of 1.5, so that each selected block holds a few keys that decide,
  and none is negligible;
* what attention adds to the residual stream is a good part of it, so that it reaches the logits;
* the SwiGLU inputs reach the clamp at 7 now and then, and the routing bias changes the chosen experts;
* the output head leans towards a successor for each word, on one cycle through all words, so that an answer
  wanders instead of looping; what attention found pushes it off that path every few words. Markers and most
  bytes are quiet in the head.

The gains are no larger than that takes. Blocks and experts are chosen by comparing, so a rounding error now
and then turns a choice, in bf16 often; larger gains would carry each turned choice into every later token,
and a bf16 run could not be compared with anything.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from msa_backend.config import HEAD_DIM
from msa_backend.tiny.config import PATCH_SIZE, SPATIAL_MERGE_SIZE, TEMPORAL_PATCH_SIZE
from msa_backend.tiny.shape import TinyShape
from msa_backend.tiny.tokenizer import byte_alphabet, vocab_size, word_token_ids

if TYPE_CHECKING:
    import torch

    Draw = Callable[..., Future[torch.Tensor]]

ATTENTION_LOGIT_SPREAD = 1.5
ATTENTION_GAIN = 0.8
SWIGLU_INPUT_SPREAD = 2.5
MLP_GAIN = 0.04
MTP_MIX = 0.1
ROUTER_SPREAD = 1.5
ROUTING_BIAS = 0.2
LOGIT_SPREAD = 3.0
SUCCESSOR = 0.06
SUCCESSOR_STRIDE = 389
QUIET_BYTE = 0.3
SPOKEN_BYTES = ".,?!"


def random_weights(shape: TinyShape, seed: int) -> dict[str, torch.Tensor]:
    """All tensors of the checkpoint in fp32, each drawn from its own stream of ``(seed, name)``, on all cores."""
    drawn: dict[str, Future[torch.Tensor]] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def draw(name: str, *size: int, spread: float, mean: float = 0.0) -> Future[torch.Tensor]:
            drawn[name] = pool.submit(_uniform, f"{seed}:{name}", size, spread, mean)
            return drawn[name]

        _text(draw, shape)
        _vision(draw, shape)
    return {name: tensor.result() for name, tensor in drawn.items()}


def _uniform(stream: str, size: tuple[int, ...], spread: float, mean: float) -> torch.Tensor:
    # Uniform numbers are integers scaled by a power of two, hence the same on every CPU; normal ones go through
    # vectorised log and cos, which differ in the last bit between instruction sets.
    import torch

    digest = hashlib.sha256(stream.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    return (torch.rand(size, generator=generator) - 0.5) * (spread * 12**0.5) + mean


def _text(draw: Draw, shape: TinyShape) -> None:
    root = "language_model.model"
    embedding = draw(f"{root}.embed_tokens.weight", vocab_size(shape.words), shape.hidden, spread=1.0).result()
    for layer in range(shape.layers):
        prefix = f"{root}.layers.{layer}"
        draw(f"{prefix}.input_layernorm.weight", shape.hidden, spread=0.1)
        _attention(draw, f"{prefix}.self_attn", shape, shape.sparse_attention[layer])
        draw(f"{prefix}.post_attention_layernorm.weight", shape.hidden, spread=0.1)
        if shape.moe[layer]:
            _experts(draw, f"{prefix}.block_sparse_moe", shape)
        else:
            _swiglu(draw, f"{prefix}.mlp", ("gate_proj", "down_proj", "up_proj"), shape.hidden, shape.dense_size)
    norm = draw(f"{root}.norm.weight", shape.hidden, spread=0.1).result()
    for module in range(shape.mtp_modules):
        _mtp(draw, f"{root}.mtp.layers.{module}", shape, norm)

    spread = LOGIT_SPREAD * shape.hidden**-0.5
    head = draw("language_model.lm_head.weight", vocab_size(shape.words), shape.hidden, spread=spread).result()
    for number, character in enumerate(byte_alphabet()):
        if character not in SPOKEN_BYTES:
            head[number] *= QUIET_BYTE
    words = word_token_ids(shape.words)
    # The words are listed by the alphabet; a stride coprime to their number visits all of them out of that order.
    for number in range(len(words)):
        successor = words[(number + SUCCESSOR_STRIDE) % len(words)]
        head[successor] += embedding[words[number]] * (SUCCESSOR * TinyShape.hidden / shape.hidden)
    head[words.stop :] = 0.0


def _mtp(draw: Draw, prefix: str, shape: TinyShape, norm: torch.Tensor) -> None:
    """A module that drafts the successor of a word, which the answer is whenever attention does not change it."""
    for name in ("enorm", "hnorm"):
        draw(f"{prefix}.{name}.weight", shape.hidden, spread=0.1)
    projection = draw(f"{prefix}.eh_proj.weight", shape.hidden, 2 * shape.hidden, spread=MTP_MIX * shape.hidden**-0.5)
    projection.result()[:, : shape.hidden].diagonal().add_(1.0)
    draw(f"{prefix}.final_layernorm.weight", shape.hidden, spread=0.0).result().copy_(norm)
    _attention(draw, f"{prefix}.transformer_layer.self_attn", shape, sparse=True)
    for name in ("input_layernorm", "post_attention_layernorm"):
        draw(f"{prefix}.transformer_layer.{name}.weight", shape.hidden, spread=0.1)
    _experts(draw, f"{prefix}.transformer_layer.block_sparse_moe", shape)


def _attention(draw: Draw, prefix: str, shape: TinyShape, sparse: bool) -> None:
    width = shape.heads * HEAD_DIM
    narrow = shape.hidden**-0.5
    draw(f"{prefix}.q_proj.weight", width, shape.hidden, spread=narrow)
    draw(f"{prefix}.k_proj.weight", shape.kv_heads * HEAD_DIM, shape.hidden, spread=narrow)
    draw(f"{prefix}.v_proj.weight", shape.kv_heads * HEAD_DIM, shape.hidden, spread=narrow)
    draw(f"{prefix}.o_proj.weight", shape.hidden, width, spread=ATTENTION_GAIN * width**-0.5)
    # The norms scale by weight + 1, and the attention logit is the product of a query and a key.
    for name in ("q_norm", "k_norm"):
        draw(f"{prefix}.{name}.weight", HEAD_DIM, spread=0.1, mean=ATTENTION_LOGIT_SPREAD**0.5 - 1)
    if sparse:
        draw(f"{prefix}.index_q_proj.weight", shape.kv_heads * HEAD_DIM, shape.hidden, spread=narrow)
        draw(f"{prefix}.index_k_proj.weight", HEAD_DIM, shape.hidden, spread=narrow)
        for name in ("index_q_norm", "index_k_norm"):
            draw(f"{prefix}.{name}.weight", HEAD_DIM, spread=0.3, mean=0.2)


def _experts(draw: Draw, prefix: str, shape: TinyShape) -> None:
    draw(f"{prefix}.gate.weight", shape.experts, shape.hidden, spread=ROUTER_SPREAD * shape.hidden**-0.5)
    draw(f"{prefix}.e_score_correction_bias", shape.experts, spread=ROUTING_BIAS)
    for expert in range(shape.experts):
        _swiglu(draw, f"{prefix}.experts.{expert}", ("w1", "w2", "w3"), shape.hidden, shape.expert_size)
    names = ("gate_proj", "down_proj", "up_proj")
    _swiglu(draw, f"{prefix}.shared_experts", names, shape.hidden, shape.expert_size)


def _swiglu(draw: Draw, prefix: str, names: tuple[str, str, str], hidden: int, inner: int) -> None:
    gate, down, up = names
    for name in (gate, up):
        draw(f"{prefix}.{name}.weight", inner, hidden, spread=SWIGLU_INPUT_SPREAD * hidden**-0.5)
    draw(f"{prefix}.{down}.weight", hidden, inner, spread=MLP_GAIN * inner**-0.5)


def _vision(draw: Draw, shape: TinyShape) -> None:
    hidden, inner = shape.vision_hidden, shape.vision_mlp_size
    root = "vision_tower.vision_model"
    patch = (3, TEMPORAL_PATCH_SIZE, PATCH_SIZE, PATCH_SIZE)
    draw(f"{root}.embeddings.patch_embedding.weight", hidden, *patch, spread=0.05)
    _layer_norm(draw, f"{root}.pre_layrnorm", hidden)
    for layer in range(shape.vision_layers):
        prefix = f"{root}.encoder.layers.{layer}"
        _layer_norm(draw, f"{prefix}.layer_norm1", hidden)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            _linear(draw, f"{prefix}.self_attn.{name}", hidden, hidden)
        _layer_norm(draw, f"{prefix}.layer_norm2", hidden)
        _linear(draw, f"{prefix}.mlp.fc1", inner, hidden)
        _linear(draw, f"{prefix}.mlp.fc2", hidden, inner)
    merged = shape.hidden * SPATIAL_MERGE_SIZE**2
    for prefix, width in (("multi_modal_projector", hidden), ("patch_merge_mlp", merged)):
        _linear(draw, f"{prefix}.linear_1", shape.projector_size, width)
        _linear(draw, f"{prefix}.linear_2", shape.hidden, shape.projector_size)


def _linear(draw: Draw, prefix: str, rows: int, columns: int) -> None:
    draw(f"{prefix}.weight", rows, columns, spread=1.5 * columns**-0.5)
    draw(f"{prefix}.bias", rows, spread=0.1)


def _layer_norm(draw: Draw, prefix: str, size: int) -> None:
    draw(f"{prefix}.weight", size, spread=0.1, mean=1.0)
    draw(f"{prefix}.bias", size, spread=0.1)
