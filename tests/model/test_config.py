"""Both forms of a config read alike, and what MSA cannot serve is refused in one sentence that names it."""

from __future__ import annotations

from typing import Any

import pytest

from msa_backend.config import MSAConfigError
from msa_backend.model.config import M3Config, text_section

from . import configs


def test_both_forms_read_alike():
    assert M3Config.from_text_config(configs.original()) == M3Config.from_text_config(configs.transformers())


def test_what_is_read():
    config = M3Config.from_text_config(configs.original())
    assert config.msa.sparse_layers == config.moe_layers == (False, True, True, True)
    assert (config.msa.topk, config.msa.init_blocks, config.msa.local_blocks) == (4, 0, 1)
    assert (config.rotary_dim, config.rope_theta) == (64, 5_000_000)
    assert (config.moe_intermediate_size, config.shared_intermediate_size) == (32, 32)
    assert config.dense_intermediate_size == 96


def test_released_model_reads():
    """The sizes of the released 428B model, from facts published with it."""
    sparse = [0] * 3 + [1] * 57
    text = configs.original() | {"num_hidden_layers": 60, "num_attention_heads": 64, "num_key_value_heads": 4}
    text |= {"hidden_size": 6144, "num_local_experts": 128, "num_experts_per_tok": 4, "moe_layer_freq": sparse}
    text["sparse_attention_config"] |= {"sparse_num_index_heads": 4, "sparse_topk_blocks": 16}
    text["sparse_attention_config"] |= {"sparse_attention_freq": sparse, "sparse_disable_index_value": sparse}
    config = M3Config.from_text_config(text)
    assert config.msa.sparse_layers.count(True) == 57
    assert config.msa.topk == 16


def test_text_section_of_both_kinds_of_checkpoint():
    text = configs.original()
    assert text_section({"text_config": text, "vision_config": {}}) is text
    assert text_section(text) is text


def nested(**changes: Any) -> dict[str, Any]:
    config = configs.original()
    config["sparse_attention_config"] |= changes
    return config


def without(form: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in form.items() if key not in keys}


REFUSED = {
    "block size": (nested(sparse_block_size=64), "block size is 64", "128"),
    "block size, flat": (configs.transformers() | {"index_block_size": 256}, "block size is 256", "128"),
    "head size": (configs.original() | {"head_dim": 64}, "head_dim is 64", "128"),
    "index head size": (nested(sparse_index_dim=64), "index head dim is 64", "128"),
    "index heads": (nested(sparse_num_index_heads=4), "4 index heads", "2 KV heads"),
    "no sparse section": (without(configs.original(), "sparse_attention_config"), "no sparse section"),
    "no sparse section, flat": (
        without(configs.transformers(), "layer_types", "index_topk_blocks", "index_n_heads", "index_head_dim",
                "index_block_size", "index_local_blocks"),
        "no sparse section",
    ),
    "sparse attention switched off": (nested(use_sparse_attention=False), "use_sparse_attention is false"),
    "incomplete sparse section": (without(configs.transformers(), "index_topk_blocks"), "lacks index_topk_blocks"),
    "too few layers listed": (nested(sparse_attention_freq=[0, 1, 1]), "sparse_attention_freq has 3", "is 4"),
    "too many MLP kinds listed": (
        configs.transformers() | {"mlp_layer_types": ["sparse"] * 5}, "mlp_layer_types has 5", "is 4",
    ),
    "lists that disagree": (
        configs.original() | {"layer_types": ["full_attention"] * 4}, "sparse_attention_freq and layer_types",
    ),
    "values that disagree": (
        configs.original() | {"index_topk_blocks": 8}, "sparse_topk_blocks=4", "index_topk_blocks=8",
    ),
    "unknown layer type": (
        configs.transformers() | {"layer_types": ["sliding_attention"] * 4}, "'sliding_attention'",
        "'full_attention' and 'minimax_m3_sparse'",
    ),
    "no sparse layer": (nested(sparse_attention_freq=[0] * 4), "no MSA layers"),
    "top-k below the forced blocks": (
        nested(sparse_topk_blocks=2, sparse_init_block=1, sparse_local_block=2), "top-k is 2", "1 init + 2 local",
    ),
    "top-k too large": (nested(sparse_topk_blocks=64), "top-k is 64", "1 to 32"),
    "no local block": (nested(sparse_local_block=0), "local_blocks=0"),
    "index values": (nested(sparse_disable_index_value=[0, 0, 1, 1]), "sparse_disable_index_value is 0"),
    "another score": (nested(sparse_score_type="lse"), "'lse'", "'max'"),
    "not a number": (nested(sparse_topk_blocks="16"), "sparse_topk_blocks is '16'"),
    "heads that do not group": (configs.original() | {"num_attention_heads": 7}, "num_attention_heads=7"),
    "rope that disagrees": (configs.original() | {"rotary_dim": 32}, "rotary_dim is 32", "64"),
    "scaled rope": (configs.original() | {"rope_scaling": {"type": "yarn"}}, "yarn"),
    "shared experts that disagree": (configs.original() | {"n_shared_experts": 2, "shared_intermediate_size": 16},
                                     "n_shared_experts x intermediate_size is 64"),
    "another norm": (configs.original() | {"use_gemma_norm": False}, "use_gemma_norm is False"),
    "another activation": (configs.original() | {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "a missing size": (without(configs.original(), "hidden_size"), "lacks hidden_size"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_sentence(case: str):
    config, *says = REFUSED[case]
    with pytest.raises(MSAConfigError) as refusal:
        M3Config.from_text_config(config)
    message = str(refusal.value)
    assert "\n" not in message
    for words in says:
        assert words in message
