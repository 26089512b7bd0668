"""The model that is measured: MiniMax-M3's attention in layers small enough for one GPU."""

from __future__ import annotations

import json
from pathlib import Path

LAYERS = 20
HEAD_DIM = 128  # of the EAGLE3 draft
DENSE = 1  # the released model has 3 of 60


def write(model: Path, layers: int = LAYERS, quantization: str | None = None) -> None:
    """A random checkpoint in bf16, `layers` layers of which the first is dense.

    `quantization` is one of `msa-backend tiny --quantization`. Without, 20 layers take 8.3 GB of disk, three times
    that of memory while they are written.
    """
    from msa_backend.tiny import TinyShape, write_tiny_checkpoint

    sparse = (False,) * DENSE + (True,) * (layers - DENSE)
    shape = TinyShape(
        hidden=3072, heads=64, kv_heads=4, topk=16, experts=16, experts_per_token=4, expert_size=1024, dense_size=6144,
        sparse_attention=sparse, moe=sparse, max_positions=1_048_576,
    )  # fmt: skip
    write_tiny_checkpoint(model, dtype="bfloat16", shards=4, shape=shape, overwrite=True, quantization=quantization)
    make_sglang_load(model)


def make_sglang_load(model: Path) -> None:
    """Give `config.json` a key that SGLang's own class asks for, and which means nothing to a text model."""
    config = json.loads((model / "config.json").read_text())
    config["vision_config"].setdefault("vision_segment_max_frames", None)
    (model / "config.json").write_text(json.dumps(config, indent=2))


def add_cache_scales(model: Path, layers: int) -> None:
    """Scales of K and of V for every layer, none like another, as tools that calibrate fp8 caches write them.

    Small enough for no number to be clipped: right results are as near to those of plain caches as without scales.
    """
    import torch
    from safetensors.torch import save_file

    scales = {
        f"language_model.model.layers.{layer}.self_attn.{kind}_proj.{kind}_scale": torch.tensor(first + step * layer)
        for layer in range(layers)
        for kind, first, step in (("k", 0.03, 0.0011), ("v", 0.05, 0.0017))
    }
    file = model / "cache-scales.safetensors"
    save_file(scales, file, {"format": "pt"})
    index = model / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] |= dict.fromkeys(scales, file.name)
    index.write_text(json.dumps(content))


def write_draft(draft: Path, model: Path) -> None:
    """A random EAGLE3 draft for `model`: one Llama layer with grouped queries, in bf16.

    Its drafts are right by chance alone, so a benchmark gives the share that vLLM is to accept:
    `"rejection_sample_method": "synthetic", "synthetic_acceptance_length": 2.78`.
    """
    import torch
    from safetensors.torch import save_file

    target = json.loads((model / "config.json").read_text())
    target = target.get("text_config", target)
    hidden, inner, layers = target["hidden_size"], 2 * target["hidden_size"], target["num_hidden_layers"]
    heads = max(4, hidden // HEAD_DIM)
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 4,
        "head_dim": HEAD_DIM,
        "vocab_size": target["vocab_size"],
        "max_position_embeddings": target["max_position_embeddings"],
        "rms_norm_eps": 1e-6,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, layers // 2, layers - 1]},
        "torch_dtype": "bfloat16",
    }
    torch.manual_seed(0)
    layer, width = "midlayer", heads * HEAD_DIM
    shapes = {
        "fc": (hidden, 3 * hidden),
        f"{layer}.self_attn.q_proj": (width, 2 * hidden),
        f"{layer}.self_attn.k_proj": (width // 4, 2 * hidden),
        f"{layer}.self_attn.v_proj": (width // 4, 2 * hidden),
        f"{layer}.self_attn.o_proj": (hidden, width),
        f"{layer}.mlp.gate_proj": (inner, hidden),
        f"{layer}.mlp.up_proj": (inner, hidden),
        f"{layer}.mlp.down_proj": (hidden, inner),
    }
    weights = {f"{name}.weight": 0.02 * torch.randn(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    for norm in ("hidden_norm", "input_layernorm", "post_attention_layernorm"):
        weights[f"{layer}.{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    weights["norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    draft.mkdir(parents=True, exist_ok=True)
    (draft / "config.json").write_text(json.dumps(config))
    save_file(weights, draft / "model.safetensors", {"format": "pt"})
