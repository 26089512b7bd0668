"""Checkpoints whose drafts are known to be right, so that what is accepted tells what the draft layers computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from msa_backend.config import HEAD_DIM
from msa_backend.tiny import TinyShape, write_tiny_checkpoint

ROOT = "language_model.model"
MODULE = f"{ROOT}.mtp.layers.0"
OUTPUTS = ("o_proj.weight", "w2.weight", "down_proj.weight")
LOUDER, LOUDER_EXPERTS = 10, 40
"""How much more attention and experts say in a layer that is copied than in the tiny checkpoint."""

Weights = dict[str, torch.Tensor]


def rewrite(folder: Path, change: Callable[[Weights], None]) -> Path:
    """Change the tensors of a checkpoint of one file."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})
    return folder


def tensor(folder: Path, name: str) -> torch.Tensor:
    """One tensor of a checkpoint of any number of files."""
    (found,) = (part[name] for part in map(load_file, folder.glob("*.safetensors")) if name in part)
    return found


def silence(weights: Weights, layer: int) -> None:
    """Let a decoder layer add nothing."""
    for name in weights:
        if name.startswith(f"{ROOT}.layers.{layer}.") and name.endswith(OUTPUTS):
            weights[name].zero_()


def write_rejected(folder: Path) -> Path:
    """The tiny checkpoint with an MTP module that drafts the least probable token of all."""
    write_tiny_checkpoint(folder, shape=TinyShape(mtp_modules=1))
    # The norm scales by weight + 1, whose sign this turns.
    return rewrite(folder, lambda weights: weights[f"{MODULE}.final_layernorm.weight"].neg_().sub_(2))


def write_clone(folder: Path) -> Path:
    """A target that is one layer, and an MTP module that is that layer: the draft is right where its caches are.

    Two things differ all the same: the module never sees the first token, and its blocks begin one token later. The
    attention and the experts are much louder than in the tiny checkpoint: there they change so few tokens that every
    draft is accepted whatever they say.
    """

    def louder(weights: Weights, layer: str) -> None:
        for name in weights:
            if name.startswith(f"{layer}.") and name.endswith(OUTPUTS):
                weights[name] *= LOUDER if "o_proj" in name else LOUDER_EXPERTS

    return _write_copied(folder, louder)


def write_own(folder: Path) -> Path:
    """The same, with a layer in which each token attends to itself and says its successor: all drafts are right.

    A draft that does not see its own key takes the token before for itself, and drafts itself again.
    """
    return _write_copied(folder, _attend_to_itself)


def _write_copied(folder: Path, shape_layer: Callable[[Weights, str], object]) -> Path:
    write_tiny_checkpoint(folder, shape=TinyShape(mtp_modules=1))
    layer = f"{ROOT}.layers.3"

    def change(weights: Weights) -> None:
        embedding = weights[f"{ROOT}.embed_tokens.weight"]
        embedding[:, 0] = 4.0
        # The module norms the embedding, the target does not.
        embedding /= embedding.pow(2).mean(-1, keepdim=True).sqrt()
        for other in range(3):
            silence(weights, other)
        shape_layer(weights, layer)
        for name in [name for name in weights if name.startswith(f"{layer}.")]:
            weights[name.replace(layer, f"{MODULE}.transformer_layer")] = weights[name].clone()
        hidden = embedding.shape[1]
        weights[f"{MODULE}.eh_proj.weight"] = torch.cat((torch.eye(hidden), torch.zeros(hidden, hidden)), dim=1)
        for norm in ("enorm", "hnorm"):
            weights[f"{MODULE}.{norm}.weight"].zero_()

    return rewrite(folder, change)


def _attend_to_itself(weights: Weights, layer: str) -> None:
    silence(weights, 3)
    attention = f"{layer}.self_attn"
    for name in ("q", "k"):
        # The one channel that is the same in every embedding: one query and one key for all, which rope turns away
        # from each other with their distance. Seven times their norm leaves a neighbour e^-6 of a token's own weight.
        weights[f"{attention}.{name}_proj.weight"].zero_()[:, 0] = 1.0
        weights[f"{attention}.{name}_norm.weight"].fill_(7.0 - 1)
    hidden, width = weights[f"{attention}.o_proj.weight"].shape
    weights[f"{attention}.v_proj.weight"] = torch.eye(hidden)
    # Each KV head carries half of the channels, and as many query heads bring them back.
    output = torch.eye(hidden).view(hidden, 2, 1, HEAD_DIM).expand(hidden, 2, width // hidden, HEAD_DIM)
    weights[f"{attention}.o_proj.weight"] = LOUDER * hidden / width * output.reshape(hidden, width)


EAGLE3_LAYERS = 7
EQUAL_TAPS = 4
"""Before layers 0 to 4 of the EAGLE3 target there is one hidden state, before 5 and later others."""


def write_eagle3_target(folder: Path) -> Path:
    """Seven layers, of which the first four add nothing."""
    others = (True,) * (EAGLE3_LAYERS - 1)
    write_tiny_checkpoint(folder, shape=TinyShape(sparse_attention=(False, *others), moe=(False, *others)))

    def silence_four(weights: Weights) -> None:
        for layer in range(EQUAL_TAPS):
            silence(weights, layer)

    return rewrite(folder, silence_four)


def write_eagle3_draft(folder: Path, target: Path, taps: list[int] | None) -> Path:
    """A Llama that drafts the successor of a word as long as the first of three taps equals the last.

    Its ``fc`` is a thousand times the difference of the two; 0 is added to the embedding, anything else buries it.
    Queries and keys are one constant, so that rotated each token attends to itself, and the values are its embedding
    less what the draft token before left in the hidden state.

    Args:
        taps: before which layers; None leaves it to the target's default.
    """
    shape = TinyShape()
    heads = shape.hidden // 64
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": 64,
        "vocab_size": json.loads((target / "config.json").read_text())["text_config"]["vocab_size"],
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": 1e-6,
        "attention_bias": True,
        "torch_dtype": "float32",
    }
    if taps is not None:
        config["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": taps}
    one, none = torch.eye(shape.hidden), torch.zeros(shape.hidden, shape.hidden)
    layer, ones, wide = "midlayer", torch.ones(shape.hidden), torch.zeros(128, shape.hidden)
    weights = {
        "fc.weight": torch.cat((1000 * one, none, -1000 * one), dim=1),
        # Llama's norm scales by its weight, MiniMax-M3's by weight + 1.
        "norm.weight": tensor(target, f"{ROOT}.norm.weight") + 1,
        f"{layer}.self_attn.v_proj.weight": torch.cat((one, -one), dim=1),
        f"{layer}.self_attn.v_proj.bias": torch.zeros(shape.hidden),
        f"{layer}.self_attn.o_proj.weight": one.clone(),
        f"{layer}.self_attn.o_proj.bias": torch.zeros(shape.hidden),
        f"{layer}.mlp.gate_proj.weight": wide.clone(),
        f"{layer}.mlp.up_proj.weight": wide.clone(),
        f"{layer}.mlp.down_proj.weight": wide.T.contiguous(),
    }
    for name in ("q_proj", "k_proj"):
        weights[f"{layer}.self_attn.{name}.weight"] = torch.zeros(shape.hidden, 2 * shape.hidden)
        weights[f"{layer}.self_attn.{name}.bias"] = torch.full((shape.hidden,), 4.0)
    for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm"):
        weights[f"{layer}.{name}.weight"] = ones.clone()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder
