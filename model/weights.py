"""From the names in a checkpoint to one canonical name each, whichever of the three forms it is in.

Canonical is the original MiniMax form without its ``language_model.`` prefix. The other two come from
``transformers``: its native names (one fused tensor for all experts, an ``indexer`` module), and those that its
``save_pretrained`` writes by default, where every ``.mlp.`` has become ``.block_sparse_moe.``, in dense layers too.
Free of every engine.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from msa_backend.config import MSAError

from .config import M3Config

if TYPE_CHECKING:
    from torch import Tensor

# Not part of the text model.
_VISION = re.compile(r"^(model\.)?(vision_tower|multi_modal_projector|patch_merge_mlp)\.")
_DRAFT = re.compile(r"^(language_model\.)?(model\.)?mtp\.")
_PREFIXES = (
    (re.compile(r"^language_model\.(?=(?:model|lm_head)\b)"), ""),
    (re.compile(r"^model\.language_model\."), "model."),
)
# Of an fp8 cache: query, key, value and softmax scales under all the names that tools have given them.
CACHE_SCALE = re.compile(
    r"^(?P<attention>.*\.self_attn)\."
    r"(?:(?:\w+\.)?(?P<kind>[qkv]|kv|prob)_(?:output_)?scale|(?P<projection>[qkv])_proj\.output_scale)$"
)
_INDEXER = re.compile(r"\.self_attn\.indexer\.([qk])_(proj|norm)\.")
_LAYER_MLP = re.compile(r"^(model\.layers\.(\d+))\.(?:mlp|block_sparse_moe)\.(?:gate\.(?=e_score_correction_bias$))?")
_FUSED_EXPERTS = re.compile(r"\.experts\.(gate_up_proj|down_proj)$")
_FUSED_GATE_UP = re.compile(r"\.gate_up_proj\.weight$")


WEIGHT_SCALES = ("weight_scale", "weight_scale_inv")
"""What formats call the scales of a weight. Whichever it is called, a weight is multiplied by it."""


class CheckpointError(MSAError):
    """A checkpoint whose weights are not those of its config."""


class Part(NamedTuple):
    """One canonical weight, and where it lies in the tensor that the checkpoint holds."""

    name: str
    expert: int | None = None
    half: int | None = None

    def cut(self, tensor: Tensor) -> Tensor:
        """The view of ``tensor`` that this weight is: one expert's slice, and the gate (0) or up (1) half of it."""
        if self.expert is not None:
            tensor = tensor[self.expert]
        return tensor if self.half is None else tensor.chunk(2, dim=0)[self.half]

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of ``cut(tensor)`` for a tensor of ``shape``."""
        if self.expert is not None:
            shape = shape[1:]
        return shape if self.half is None else (math.ceil(shape[0] / 2), *shape[1:])


def is_vision_weight(name: str) -> bool:
    """Whether the checkpoint tensor ``name`` is of the vision tower, its projector or its merger."""
    return _VISION.match(name) is not None


def canonical_parts(name: str, config: M3Config) -> list[Part]:
    """The canonical weights inside the checkpoint tensor ``name``; none for vision, draft and cache-scale tensors."""
    if is_other_part(name) or is_cache_scale(name):
        return []
    name = _INDEXER.sub(r".self_attn.index_\1_\2.", without_wrapper(name))
    if layer := _LAYER_MLP.match(name):
        index = int(layer[2])
        is_moe = index < config.num_layers and config.moe_layers[index]
        name = f"{layer[1]}.{'block_sparse_moe' if is_moe else 'mlp'}.{name[layer.end() :]}"
    if fused := _FUSED_EXPERTS.search(name):
        stem = name[: fused.start()] + ".experts"
        if fused[1] == "down_proj":
            return [Part(f"{stem}.{expert}.w2.weight", expert) for expert in range(config.num_experts)]
        return [
            Part(f"{stem}.{expert}.{matrix}.weight", expert, half)
            for expert in range(config.num_experts)
            for half, matrix in enumerate(("w1", "w3"))
        ]
    if fused := _FUSED_GATE_UP.search(name):
        stem = name[: fused.start()]
        return [Part(f"{stem}.gate_proj.weight", half=0), Part(f"{stem}.up_proj.weight", half=1)]
    return [Part(name)]


def is_other_part(name: str) -> bool:
    """Whether ``name``, of a weight or a module, belongs to the vision tower or to the draft layers."""
    return is_vision_weight(f"{name}.") or bool(_DRAFT.match(f"{name}."))


def is_cache_scale(name: str) -> bool:
    """Whether ``name`` is a scale of an fp8 KV cache; :mod:`.cache_scales` reads them."""
    return bool(CACHE_SCALE.search(name))


def without_wrapper(name: str) -> str:
    """``name``, of a weight or a module, without the prefix that it has inside the whole model with vision."""
    for pattern, replacement in _PREFIXES:
        name = pattern.sub(replacement, name)
    return name


def canonical_weights(weights: Iterable[tuple[str, Tensor]], config: M3Config) -> Iterator[tuple[str, Tensor]]:
    """Rename, split and check a stream of checkpoint tensors.

    Yields:
        Each weight of the text model once, under its canonical name. Split weights are views.

    Raises:
        CheckpointError: a weight the config has no place for (named at once), or weights, or scales of quantized
            weights, that never came (named when the stream ends).
    """
    expected = expected_shapes(config)
    missing = set(expected)
    quantized, scaled = set(), set()
    for name, tensor in weights:
        parts = canonical_parts(name, config)
        check_expert_count(name, parts, tuple(tensor.shape), config)
        for part in parts:
            if part.name in missing:
                missing.remove(part.name)
            elif part.name in expected:
                raise CheckpointError(f"the checkpoint holds {part.name} twice, the second time as {name}")
            elif not is_quantization_scale(part.name, expected):
                raise unknown_weights([name])
            else:
                scaled.add(module_name(part.name))
            if tensor.element_size() == 1 and part.name in expected:
                quantized.add(module_name(part.name))
            yield part.name, part.cut(tensor)
    if missing:
        raise missing_weights(missing)
    if unscaled := quantized - scaled:
        raise missing_scale(f"{min(unscaled)}.weight", WEIGHT_SCALES)


def check_expert_count(name: str, parts: list[Part], shape: tuple[int, ...], config: M3Config) -> None:
    """Refuse a tensor fused of more or fewer experts than the config has; cut apart, the rest would be lost."""
    if any(part.expert is not None for part in parts) and shape[0] != config.num_experts:
        raise CheckpointError(
            f"{name} holds {shape[0]} experts, but num_local_experts in config.json is {config.num_experts}; "
            "they belong to different models"
        )


def unknown_weights(names: Iterable[str]) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint holds weights that its config has no place for: {_some(names)}; "
        "is config.json of another model or layer count?"
    )


def other_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> CheckpointError:
    return CheckpointError(
        f"{name} has the shape {list(found)}, but config.json makes it {list(expected)}; "
        "they belong to different models"
    )


def missing_weights(names: Iterable[str]) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint lacks weights that its config asks for: {_some(names)}; download it again, "
        "or correct the layer count and lists in config.json"
    )


def missing_scale(name: str, allowed: Iterable[str]) -> CheckpointError:
    return CheckpointError(
        f"{name} is quantized, but the checkpoint lacks its scale ({' or '.join(allowed)}), without which it means "
        "nothing; download the checkpoint again"
    )


def expected_shapes(config: M3Config) -> dict[str, tuple[int, ...]]:
    """Canonical name and shape of every weight of the text model."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, config.hidden_size),
        "model.norm.weight": (config.hidden_size,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    for index, (is_sparse, is_moe) in enumerate(zip(config.msa.sparse_layers, config.moe_layers, strict=True)):
        shapes |= layer_shapes(f"model.layers.{index}", config, is_sparse=is_sparse, is_moe=is_moe)
    return shapes


def layer_shapes(layer: str, config: M3Config, *, is_sparse: bool, is_moe: bool) -> dict[str, tuple[int, ...]]:
    """Canonical name and shape of every weight of one decoder layer, whose own name is ``layer``."""
    msa, hidden = config.msa, config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {}

    def mlp(prefix: str, names: tuple[str, str, str], width: int) -> None:
        gate, up, down = names
        shapes[f"{prefix}.{gate}.weight"] = shapes[f"{prefix}.{up}.weight"] = (width, hidden)
        shapes[f"{prefix}.{down}.weight"] = (hidden, width)

    shapes[f"{layer}.input_layernorm.weight"] = shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    attention = f"{layer}.self_attn"
    shapes[f"{attention}.q_proj.weight"] = (msa.num_heads * msa.head_dim, hidden)
    shapes[f"{attention}.o_proj.weight"] = (hidden, msa.num_heads * msa.head_dim)
    for matrix in ("k_proj", "v_proj"):
        shapes[f"{attention}.{matrix}.weight"] = (msa.num_kv_heads * msa.head_dim, hidden)
    for norm in ("q_norm", "k_norm"):
        shapes[f"{attention}.{norm}.weight"] = (msa.head_dim,)
    if is_sparse:
        shapes[f"{attention}.index_q_proj.weight"] = (msa.num_index_heads * msa.index_dim, hidden)
        shapes[f"{attention}.index_k_proj.weight"] = (msa.index_dim, hidden)
        for norm in ("index_q_norm", "index_k_norm"):
            shapes[f"{attention}.{norm}.weight"] = (msa.index_dim,)
    if not is_moe:
        mlp(f"{layer}.mlp", ("gate_proj", "up_proj", "down_proj"), config.dense_intermediate_size)
        return shapes
    moe = f"{layer}.block_sparse_moe"
    shapes[f"{moe}.gate.weight"] = (config.num_experts, hidden)
    if config.use_routing_bias:
        shapes[f"{moe}.e_score_correction_bias"] = (config.num_experts,)
    for expert in range(config.num_experts):
        mlp(f"{moe}.experts.{expert}", ("w1", "w3", "w2"), config.moe_intermediate_size)
    if config.shared_intermediate_size:
        mlp(f"{moe}.shared_experts", ("gate_proj", "up_proj", "down_proj"), config.shared_intermediate_size)
    return shapes


def is_quantization_scale(name: str, expected: Iterable[str]) -> bool:
    """Whether ``name`` is a scale that belongs to a known weight, as quantized checkpoints carry beside it."""
    suffix = name.rpartition(".")[2]
    return suffix in (*WEIGHT_SCALES, "input_scale") and f"{module_name(name)}.weight" in expected


def module_name(name: str) -> str:
    """The module that a weight or scale called ``name`` is a tensor of."""
    return name.rpartition(".")[0]


def _some(names: Iterable[str], at_most: int = 5) -> str:
    ordered = sorted(names)
    rest = len(ordered) - at_most
    return ", ".join(ordered[:at_most]) + (f" and {rest} more" if rest > 0 else "")
