"""MSAConfig: what a checkpoint's config says of MiniMax Sparse Attention.

Read from either form in which MiniMax-M3 configs exist: the original one, a nested
``sparse_attention_config``, and the flat one that ``transformers`` saves. No engine and no torch here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from msa_backend.kernels.batch import BLOCK_SIZE

HEAD_DIM = 128
MAX_TOPK = 32

_FLAT_KEYS = {
    "index_dim": "index_head_dim",
    "num_index_heads": "index_n_heads",
    "topk": "index_topk_blocks",
    "block_size": "index_block_size",
    "local_blocks": "index_local_blocks",
}
_NESTED_KEYS = {
    "index_dim": "sparse_index_dim",
    "num_index_heads": "sparse_num_index_heads",
    "topk": "sparse_topk_blocks",
    "block_size": "sparse_block_size",
    "local_blocks": "sparse_local_block",
}


class MSAError(Exception):
    """Something a user asked for that MSA cannot serve. The message is one sentence to act on.

    Not a ``ValueError``: engines validate their configs with pydantic, which wraps those into a dump
    of the whole config and buries the sentence.
    """


class MSAConfigError(MSAError):
    """A model config that MSA cannot serve."""


@dataclass(frozen=True)
class MSAConfig:
    """The attention half of a MiniMax-M3 text config, checked.

    Attributes:
        num_heads: query heads of the whole model.
        num_kv_heads: key/value heads, and GQA groups, of the whole model.
        head_dim: channels of a query, key or value head.
        num_index_heads: index query heads; equal to ``num_kv_heads``.
        index_dim: channels of an index query and of the one shared index key.
        block_size: tokens in a sparse block; equal to the KV-cache page.
        topk: blocks that a (query token, KV head) attends to, the forced ones counted.
        init_blocks: blocks forced in from the front of the sequence.
        local_blocks: blocks forced in from the back, the query's own counted.
        sparse_layers: for every layer, whether its attention is sparse.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_index_heads: int
    index_dim: int
    block_size: int
    topk: int
    init_blocks: int
    local_blocks: int
    sparse_layers: tuple[bool, ...]

    @classmethod
    def from_text_config(cls, config: Mapping[str, Any]) -> MSAConfig:
        """Read the text section of a ``config.json``, in the original or in the ``transformers`` form.

        Raises:
            MSAConfigError: a key is missing, a value is one MSA cannot serve, or two keys disagree.
        """
        num_layers = require(config, "num_hidden_layers")
        nested = config.get("sparse_attention_config")
        flat = "layer_types" in config or any(key in config for key in _FLAT_KEYS.values())
        if not nested and not flat:
            raise MSAConfigError(
                "the model config has no sparse section: MSA needs sparse_attention_config (original form) or "
                "layer_types with index_topk_blocks (transformers form); set MSA_DISABLE=1 to serve it without "
                "msa-backend"
            )
        if nested and not nested.get("use_sparse_attention", True):
            raise MSAConfigError(
                "sparse_attention_config.use_sparse_attention is false, so the model has no MSA layers; "
                "set MSA_DISABLE=1 to serve it without msa-backend"
            )

        values: dict[str, int] = {}
        for field, flat_key in _FLAT_KEYS.items():
            found = {}
            if nested and _NESTED_KEYS[field] in nested:
                found[_NESTED_KEYS[field]] = nested[_NESTED_KEYS[field]]
            if flat_key in config:
                found[flat_key] = config[flat_key]
            if not found:
                raise MSAConfigError(
                    f"the sparse section of the model config lacks {_NESTED_KEYS[field] if nested else flat_key}; "
                    "add it with the value the weights were trained with"
                )
            if len(set(found.values())) > 1:
                raise MSAConfigError(
                    "the model config contradicts itself: "
                    + ", ".join(f"{key}={value}" for key, value in found.items())
                    + "; keep one of them"
                )
            values[field] = _whole_number(*next(iter(found.items())))

        nested = nested or {}
        if (score := nested.get("sparse_score_type", "max")) != "max":
            raise MSAConfigError(f"sparse_score_type is {score!r}, but MSA scores a block by 'max' only")
        init_blocks = _whole_number("sparse_init_block", nested.get("sparse_init_block", 0))

        result = cls(
            num_heads=_whole_number("num_attention_heads", require(config, "num_attention_heads")),
            num_kv_heads=_whole_number("num_key_value_heads", require(config, "num_key_value_heads")),
            head_dim=_whole_number("head_dim", require(config, "head_dim")),
            init_blocks=init_blocks,
            sparse_layers=layer_flags(
                "are sparse",
                num_layers,
                ("sparse_attention_freq", nested.get("sparse_attention_freq")),
                ("layer_types", config.get("layer_types")),
                {"full_attention": False, "minimax_m3_sparse": True},
            ),
            **values,
        )
        result._check(nested)
        return result

    def to_original_form(self) -> dict[str, Any]:
        """The ``sparse_attention_config`` that says the same, for an engine that reads no other form."""
        flags = [int(flag) for flag in self.sparse_layers]
        return {nested: getattr(self, field) for field, nested in _NESTED_KEYS.items()} | {
            "use_sparse_attention": True,
            "sparse_init_block": self.init_blocks,
            "sparse_score_type": "max",
            "sparse_attention_freq": flags,
            "sparse_disable_index_value": flags,
        }

    def _check(self, nested: Mapping[str, Any]) -> None:
        for name, value, allowed in (
            ("head_dim", self.head_dim, HEAD_DIM),
            ("the index head dim", self.index_dim, HEAD_DIM),
            ("the sparse block size", self.block_size, BLOCK_SIZE),
        ):
            if value != allowed:
                raise MSAConfigError(f"{name} is {value}, but MSA kernels support {allowed} only")
        if self.num_heads % self.num_kv_heads:
            raise MSAConfigError(
                f"num_attention_heads={self.num_heads} is not a multiple of num_key_value_heads={self.num_kv_heads}"
            )
        if self.num_index_heads != self.num_kv_heads:
            raise MSAConfigError(
                f"the model has {self.num_index_heads} index heads for {self.num_kv_heads} KV heads, but MSA selects "
                "blocks once per KV head, so the two must be equal"
            )
        if not 1 <= self.topk <= MAX_TOPK:
            raise MSAConfigError(f"top-k is {self.topk} blocks, but MSA supports 1 to {MAX_TOPK}")
        if self.local_blocks < 1 or self.init_blocks < 0:
            raise MSAConfigError(
                f"local_blocks={self.local_blocks} and init_blocks={self.init_blocks}, but a query must at least see "
                "its own block, so local_blocks starts at 1 and init_blocks at 0"
            )
        if self.topk < self.init_blocks + self.local_blocks:
            raise MSAConfigError(
                f"top-k is {self.topk} blocks, fewer than the {self.init_blocks} init + {self.local_blocks} local "
                "blocks that are forced in; raise top-k or force fewer"
            )
        if not any(self.sparse_layers):
            raise MSAConfigError(
                "every layer of the model config is dense, so it has no MSA layers; set MSA_DISABLE=1 to serve it "
                "without msa-backend"
            )
        disabled = nested.get("sparse_disable_index_value")
        if disabled is not None:
            flags = disabled if isinstance(disabled, list) else [disabled] * len(self.sparse_layers)
            if len(flags) != len(self.sparse_layers):
                raise MSAConfigError(
                    f"sparse_disable_index_value has {len(flags)} entries for {len(self.sparse_layers)} layers"
                )
            if any(sparse and not flag for sparse, flag in zip(self.sparse_layers, flags, strict=True)):
                raise MSAConfigError(
                    "sparse_disable_index_value is 0 for a sparse layer, but MSA has no index-value branch; "
                    "only checkpoints that disable it on every sparse layer can be served"
                )


def layer_flags(
    what: str,
    num_layers: int,
    freq: tuple[str, Sequence[int] | None],
    types: tuple[str, Sequence[str] | None],
    names: Mapping[str, bool],
) -> tuple[bool, ...]:
    """For every layer, whether it is of one of two kinds, from the list of either form or from both.

    Args:
        what: what is asked of a layer, for the message when no list says it.
        num_layers: how long a list must be.
        freq: key and value of the original form's list, of 0 and 1.
        types: key and value of the transformers form's list, of names.
        names: which names the latter may hold, and what each means.

    Raises:
        MSAConfigError: there is no list, one is of another length, names something else, or both disagree.
    """
    found: dict[str, tuple[bool, ...]] = {}
    freq_key, flags = freq
    if flags is not None:
        found[freq_key] = tuple(bool(flag) for flag in flags)
    types_key, kinds = types
    if kinds is not None:
        for kind in kinds:
            if kind not in names:
                raise MSAConfigError(f"{types_key} contains {kind!r}, but allowed are {' and '.join(map(repr, names))}")
        found[types_key] = tuple(names[kind] for kind in kinds)
    if not found:
        raise MSAConfigError(
            f"the model config does not say which layers {what}: add {freq_key} (original form) "
            f"or {types_key} (transformers form)"
        )
    for key, per_layer in found.items():
        if len(per_layer) != num_layers:
            raise MSAConfigError(
                f"{key} has {len(per_layer)} entries, but num_hidden_layers is {num_layers}; "
                "one entry per layer is needed"
            )
    if len(set(found.values())) > 1:
        raise MSAConfigError(f"the model config contradicts itself: {' and '.join(found)} name different layers")
    return next(iter(found.values()))


def require(config: Mapping[str, Any], key: str) -> Any:
    """The value of ``key``, or an error that names it."""
    value = config.get(key)
    if value is None:
        raise MSAConfigError(f"the model config lacks {key}")
    return value


def _whole_number(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise MSAConfigError(f"{key} is {value!r}, but must be a whole number of 0 or more")
    return value
