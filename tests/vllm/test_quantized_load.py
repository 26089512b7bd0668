"""Quantized checkpoints through vLLM's own layers and loaders, as far as a CPU goes: parameters, not products.

vLLM chooses the kernel of a quantized layer while it makes the layer's parameters, and has none for this machine; so
the choice is taken out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn

from msa_backend.model.quantization import fused_layer, parse_quantization
from msa_backend.model.quantized import is_linear
from msa_backend.model.weights import CheckpointError, expected_shapes
from msa_backend.tiny import TinyShape, write_tiny_checkpoint

from ..dequantize import dequantized, load_shards, spread

QKV = ("q_proj", "k_proj", "v_proj")
INDEX = ("index_q_proj", "index_k_proj")
ROOT = "language_model.model.layers"
E4M3 = {"num_bits": 8, "type": "float", "symmetric": True}
KERNELS = (
    "vllm.model_executor.layers.quantization.modelopt.select_linear_kernel",
    "vllm.model_executor.layers.quantization.fp8.init_fp8_linear_kernel",
    "vllm.model_executor.layers.quantization.compressed_tensors.schemes.compressed_tensors_w8a8_fp8"
    ".init_fp8_linear_kernel",
)

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("quantized")
    return {
        name: write_tiny_checkpoint(folder / str(name), quantization=name, dtype="bfloat16")
        for name in ("mxfp8", "fp8", None)
    }


@pytest.fixture(scope="module")
def vllm_config(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One rank of vLLM in this process, with the config of the plain checkpoint."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    arguments: dict[str, Any] = {"language_model_only": True, "skip_tokenizer_init": True, "max_model_len": 2048}
    config = EngineArgs(model=str(checkpoints[None]), **arguments).create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{tmp_path_factory.mktemp('meet') / 'here'}", 0, "gloo")
        initialize_model_parallel(1, 1)
    yield config
    destroy_model_parallel()
    destroy_distributed_environment()


def read(folder: Path) -> tuple[dict[str, Any], Weights]:
    return json.loads((folder / "config.json").read_text())["quantization_config"], load_shards(folder)


def modelopt(section: dict[str, Any]) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": "MXFP8", "ignore": section["ignored_layers"]}


def compressed(section: dict[str, Any]) -> dict[str, Any]:
    group = {
        "targets": ["Linear"],
        "weights": E4M3 | {"strategy": "block", "block_structure": [128, 128], "dynamic": False},
        "input_activations": E4M3 | {"strategy": "group", "group_size": 128, "dynamic": True},
    }
    groups = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}
    return groups | {"ignore": section["ignored_layers"]}


def same(section: dict[str, Any]) -> dict[str, Any]:
    return section


# Format in vLLM, which tiny checkpoint, its config in that format, and what the scales are called in the file.
FORMS = {
    "mxfp8": ("mxfp8", "mxfp8", same, "weight_scale_inv"),
    "modelopt": ("modelopt_mxfp8", "mxfp8", modelopt, "weight_scale"),
    "fp8": ("fp8", "fp8", same, "weight_scale_inv"),
    "fp8, the other name": ("fp8", "fp8", same, "weight_scale"),
    "compressed": ("compressed-tensors", "fp8", compressed, "weight_scale"),
}


@pytest.fixture
def make_model(vllm_config: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, dict[str, Any]], nn.Module]:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.model_executor.model_loader.utils import configure_quant_config
    from vllm.utils.torch_utils import set_default_torch_dtype

    from msa_backend.model.vllm.causal_lm import MiniMaxM3ForCausalLM
    from msa_backend.model.vllm.mlp import M3MoE

    for kernel in KERNELS:
        monkeypatch.setattr(kernel, MagicMock())

    def make(method: str, section: dict[str, Any]) -> nn.Module:
        quant_config = get_quantization_config(method).from_config(section)
        configure_quant_config(quant_config, MiniMaxM3ForCausalLM)
        vllm_config.compilation_config.static_forward_context.clear()
        monkeypatch.setattr(vllm_config, "quant_config", quant_config)
        with set_current_vllm_config(vllm_config), set_default_torch_dtype(torch.bfloat16):
            model = MiniMaxM3ForCausalLM(vllm_config=vllm_config)
        for module in model.modules():
            if isinstance(module, M3MoE):
                module.interleaved = False  # as on a GPU
        return model

    return make


@pytest.fixture
def make_image_model(
    checkpoints: dict[str, Path], vllm_config: Any, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, dict[str, Any]], nn.Module]:
    """The same behind a vision tower."""
    pytest.importorskip("torchvision", reason="the tower does not import without")
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.model_executor.model_loader.utils import configure_quant_config
    from vllm.utils.torch_utils import set_default_torch_dtype

    from msa_backend.model.vllm.multimodal import MiniMaxM3ForConditionalGeneration

    for kernel in KERNELS:
        monkeypatch.setattr(kernel, MagicMock())
    arguments: dict[str, Any] = {"skip_tokenizer_init": True, "max_model_len": 2048}
    config = EngineArgs(model=str(checkpoints[None]), **arguments).create_engine_config()

    def make(method: str, section: dict[str, Any]) -> nn.Module:
        config.quant_config = get_quantization_config(method).from_config(section)
        configure_quant_config(config.quant_config, MiniMaxM3ForConditionalGeneration)
        with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16):
            return MiniMaxM3ForConditionalGeneration(vllm_config=config)

    return make


def restored(model: nn.Module, module: str) -> torch.Tensor:
    """The weight of a layer of vLLM, from its codes and scales; a plain one as it is."""
    parameters = dict(model.named_parameters())
    names = (f"{module}{joint}weight" for joint in (".", "_"))
    name = next(name for name in names if name in parameters)
    weight = parameters[name].data
    if weight.dtype != torch.float8_e4m3fn:
        return weight.float()
    scale = next(parameters[name + suffix].data for suffix in ("_scale", "_scale_inv") if name + suffix in parameters)
    if weight.dim() == 2:
        return weight.float() * spread(scale, weight.shape)
    return torch.stack([w.float() * spread(s, w.shape) for w, s in zip(weight, scale, strict=True)])


@pytest.mark.parametrize("form", FORMS)
def test_codes_and_scales_arrive(form: str, checkpoints: dict[str, Path], make_model: Callable[..., nn.Module]):
    """Every fused layer is, from its codes and its scales, what the checkpoint's parts are from theirs."""
    method, source, config, suffix = FORMS[form]
    section, weights = read(checkpoints[source])
    plain = dequantized(weights)
    model = make_model(method, config(section))
    loaded = model.load_weights([(name.replace("weight_scale_inv", suffix), w) for name, w in weights.items()])

    missed = {name for name, _ in model.named_parameters()} - loaded
    assert all(".attn." in name for name in missed), missed  # scales of a quantized cache, which no checkpoint has here

    def parts(prefix: str, *names: str) -> torch.Tensor:
        return torch.cat([plain[f"{prefix}.{name}.weight"].float() for name in names])

    for layer in range(4):
        ours, theirs = f"model.layers.{layer}", f"{ROOT}.{layer}"
        attention = f"{theirs}.self_attn"
        names = QKV if layer == 0 else QKV + INDEX
        assert torch.equal(restored(model, f"{ours}.self_attn.qkv_proj"), parts(attention, *names))
        assert torch.equal(restored(model, f"{ours}.self_attn.o_proj"), parts(attention, "o_proj"))
        mlp = "mlp" if layer == 0 else "block_sparse_moe.shared_experts"
        gate_up = parts(f"{theirs}.{mlp}", "gate_proj", "up_proj")
        assert torch.equal(restored(model, f"{ours}.{mlp}.gate_up_proj"), gate_up)
        if layer:
            experts = f"{theirs}.block_sparse_moe.experts"
            for fused, names in (("w13", ("w1", "w3")), ("w2", ("w2",))):
                whole = torch.stack([parts(f"{experts}.{expert}", *names) for expert in range(8)])
                assert torch.equal(restored(model, f"{ours}.block_sparse_moe.experts.routed_experts.{fused}"), whole)
    assert torch.equal(restored(model, "lm_head"), plain["language_model.lm_head.weight"].float())


@pytest.mark.parametrize("form", ["mxfp8", "modelopt", "fp8", "compressed"])
@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.", "model."])
def test_a_dense_layer_is_excluded(
    form: str, prefix: str, checkpoints: dict[str, Path], make_model: Callable[..., nn.Module]
):
    """By the names of its q, k and v, whichever prefix the list has; the sparse layers' are quantized still."""
    method, source, config, _ = FORMS[form]
    section, _ = read(checkpoints[source])
    names = (*(f"self_attn.{name}" for name in QKV), "mlp.gate_proj", "mlp.up_proj")
    section = section | {"ignored_layers": ["lm_head", *(f"{prefix}layers.0.{name}" for name in names)]}
    parameters = dict(make_model(method, config(section)).named_parameters())
    dtypes = [parameters[f"model.layers.{layer}.self_attn.qkv_proj.weight"].dtype for layer in range(4)]
    assert dtypes == [torch.bfloat16] + [torch.float8_e4m3fn] * 3
    assert parameters["model.layers.0.mlp.gate_up_proj.weight"].dtype == torch.bfloat16
    assert parameters["lm_head.weight"].dtype == torch.bfloat16


ATTENTION = [f"{ROOT}.1.self_attn.{name}" for name in QKV + INDEX]


@pytest.mark.parametrize(
    ("form", "ignored"),
    [
        ("mxfp8", []),
        ("mxfp8", ["language_model.lm_head*", *ATTENTION]),
        ("mxfp8", ["lm_head", f"{ROOT}.1.self_attn", "o_proj*"]),
        ("mxfp8", ["*lm_head", "*shared_experts*", "*.2.*down_proj"]),
        ("modelopt", ["lm_head", f"{ROOT}.2.block_sparse_moe.experts.0.w1", f"{ROOT}.0.mlp*"]),
        ("fp8", []),
        ("fp8", [*ATTENTION, f"{ROOT}.3", "o_proj", f"{ROOT}.0.mlp.down_proj"]),
        ("fp8", [f"{ROOT}.0.self_attn.qkv_proj", f"{ROOT}.2.block_sparse_moe.experts.5.w2"]),
        ("compressed", []),
        ("compressed", [*ATTENTION, r"re:.*layers\.0\.self_attn\.[qkv]_proj", "re:.*shared_experts", "o_proj"]),
        ("compressed", [r"re:.*layers\.2\..*experts\.\d", "re:language_model.*", "lm_head"]),
    ],
)
def test_lists_are_read_as_vllm_reads_them(
    form: str, ignored: list[str], checkpoints: dict[str, Path], make_model: Callable[..., nn.Module]
):
    """What the check before start-up takes for quantized is what vLLM makes quantized."""
    method, source, config, _ = FORMS[form]
    section = config(read(checkpoints[source])[0] | {"ignored_layers": ignored})
    rule = parse_quantization(section)
    model = make_model(method, section)
    parameters = dict(model.named_parameters())
    seen = set()
    for name, shape in expected_shapes(model.m3_config).items():
        module = name.removesuffix(".weight")
        layer = fused_layer(module)
        weight = f"{layer}.routed_experts.w2_weight" if layer.endswith(".experts") else f"{layer}.weight"
        if not is_linear(module, shape, rule) or weight not in parameters:
            continue
        seen.add(layer)
        quantized = parameters[weight].dtype == torch.float8_e4m3fn
        assert quantized == (rule.excluding(module) is None), module
    assert len(seen) == 4 * 2 + 2 + 3 * 3 + rule.quantizes_head
    others = [parameters["model.layers.1.block_sparse_moe.gate.weight"], parameters["model.embed_tokens.weight"]]
    others += [] if rule.quantizes_head else [parameters["lm_head.weight"]]
    assert all(other.dtype != torch.float8_e4m3fn for other in others)


def test_plain_index_weights_beside_quantized_ones(checkpoints: dict[str, Path], make_model: Callable[..., nn.Module]):
    """As from a model hub, where nothing is checked before the download."""
    section, weights = read(checkpoints["mxfp8"])
    name = f"{ROOT}.1.self_attn.index_q_proj.weight"
    del weights[f"{name}_scale_inv"]
    weights[name] = weights[name].bfloat16()
    model = make_model("mxfp8", section)
    with pytest.raises(
        CheckpointError, match=r"index_q_proj\.weight is torch\.bfloat16, but quantization_config makes"
    ):
        model.load_weights(weights.items())


@pytest.mark.parametrize(
    ("first", "says"), [("weight", "is torch.float8_e4m3fn, but"), ("weight_scale_inv", "has no place in the layer")]
)
def test_quantized_weights_that_the_list_excludes(
    first: str, says: str, checkpoints: dict[str, Path], make_model: Callable[..., nn.Module]
):
    module = f"{ROOT}.1.self_attn.o_proj"
    section, weights = read(checkpoints["mxfp8"])
    model = make_model("mxfp8", section | {"ignored_layers": ["lm_head", module]})
    with pytest.raises(CheckpointError, match=rf"o_proj\.{first} {says}"):
        model.load_weights({f"{module}.{first}": weights[f"{module}.{first}"], **weights}.items())


def test_a_scale_that_never_came(checkpoints: dict[str, Path], make_model: Callable[..., nn.Module]):
    section, weights = read(checkpoints["fp8"])
    del weights[f"{ROOT}.2.block_sparse_moe.experts.3.w1.weight_scale_inv"]
    with pytest.raises(
        CheckpointError, match=r"experts\.3\.w1\.weight is quantized, but the checkpoint lacks its scale"
    ):
        make_model("fp8", section).load_weights(weights.items())


@pytest.mark.parametrize("quantization", ["fp8", None])
def test_scales_of_a_cache_arrive(
    quantization: str | None,
    checkpoints: dict[str, Path],
    vllm_config: Any,
    make_model: Callable[..., nn.Module],
    monkeypatch: pytest.MonkeyPatch,
):
    """In dense layers where vLLM's attention reads them, from plain checkpoints too, and in sparse layers in ours."""
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    monkeypatch.setattr(vllm_config.cache_config, "cache_dtype", "fp8")
    weights = load_shards(checkpoints[quantization])
    names = {f"{layer}.self_attn.{kind}_proj.{kind}_scale": (layer, kind) for layer in range(4) for kind in "qkv"}
    expected = {name: 0.25 + number for number, name in enumerate(names)}
    model = make_model(quantization, read(checkpoints[quantization])[0]) if quantization else make_plain(vllm_config)
    scales = ((f"{ROOT}.{name}", torch.tensor([value])) for name, value in expected.items())
    loaded = model.load_weights([*scales, *weights.items()])
    assert {name for name, _ in model.named_parameters()} - loaded <= {
        f"model.layers.0.self_attn.attn.{kind}_scale" for kind in ("q", "k", "v", "prob")
    }
    attention = [layer.self_attn.attn for layer in model.model.layers]
    holder = nn.ModuleList(attention)
    process_weights_after_loading(holder, vllm_config.model_config, torch.device("cpu"))
    for name, (layer, kind) in names.items():
        if layer == 0:
            found = [getattr(attention[0], f"_{kind}_scale{where}") for where in ("", "_float")]
            assert [float(scale) for scale in found] == [expected[name]] * 2
        elif kind != "q":
            assert getattr(attention[layer], f"{kind}_scale") == expected[name]


def make_plain(vllm_config: Any, mtp: bool = False) -> nn.Module:
    from vllm.config import set_current_vllm_config
    from vllm.utils.torch_utils import set_default_torch_dtype

    from msa_backend.model.vllm.causal_lm import MiniMaxM3ForCausalLM
    from msa_backend.model.vllm.mtp import MiniMaxM3MTP

    vllm_config.compilation_config.static_forward_context.clear()
    with set_current_vllm_config(vllm_config), set_default_torch_dtype(torch.bfloat16):
        return (MiniMaxM3MTP if mtp else MiniMaxM3ForCausalLM)(vllm_config=vllm_config)


@pytest.mark.parametrize(("kv", "index"), [("fp8", "auto"), ("fp8_e5m2", "fp8"), ("auto", "fp8"), ("auto", "bf16")])
def test_layers_keep_what_was_asked_for(kv: str, index: str, vllm_config: Any, monkeypatch: pytest.MonkeyPatch):
    """K and V of dense and of sparse layers alike, and index keys apart from them."""
    monkeypatch.setattr(vllm_config.cache_config, "cache_dtype", kv)
    monkeypatch.setattr(vllm_config.attention_config, "indexer_kv_dtype", index)
    dtypes = {"auto": torch.bfloat16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
    dense, *sparse = (layer.self_attn.attn for layer in make_plain(vllm_config).model.layers)
    assert dense.kv_cache_dtype == kv
    assert all((attn.dtype, attn.index_cache.dtype) == (dtypes[kv], dtypes[index]) for attn in sparse)
    specs = [attn.get_kv_cache_spec(vllm_config) for attn in (dense, *sparse)]
    assert specs == [specs[0]] * 4


def test_an_mtp_module_takes_its_own_scales(vllm_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And not those of the target's first layer."""
    monkeypatch.setattr(vllm_config.cache_config, "cache_dtype", "fp8")
    shape = TinyShape(mtp_modules=2)
    weights = load_shards(write_tiny_checkpoint(tmp_path / "m3", dtype="bfloat16", shape=shape))
    attention = "transformer_layer.self_attn"
    scales = {
        f"language_model.model.{layer}.{kind}_proj.{kind}_scale": torch.tensor([value])
        for layer, values in (
            (f"mtp.layers.1.{attention}", (5.0, 6.0)),
            (f"mtp.layers.0.{attention}", (0.25, 0.75)),
            ("layers.0.self_attn", (3.0, 4.0)),
        )
        for kind, value in zip("kv", values, strict=True)
    }
    model = make_plain(vllm_config, mtp=True)
    model.load_weights((scales | weights).items())
    layer = model.model.layers[0].transformer_layer.self_attn.attn
    assert (layer.k_scale, layer.v_scale) == (0.25, 0.75)


def test_scales_of_a_cache_are_passed_over(checkpoints: dict[str, Path], make_model: Callable[..., nn.Module]):
    section, weights = read(checkpoints["fp8"])
    weights[f"{ROOT}.0.self_attn.k_proj.k_scale"] = torch.tensor(2.0)
    loaded = make_model("fp8", section).load_weights(weights.items())
    assert not any(name.endswith("k_scale") for name in loaded)


@pytest.mark.parametrize("form", ["mxfp8", "modelopt", "fp8", "compressed"])
def test_a_vision_half_stays_as_it_is(
    form: str, checkpoints: dict[str, Path], make_image_model: Callable[..., nn.Module]
):
    """Whether the list names it or not, and the list excludes the text model's layers as it does without."""
    method, source, config, suffix = FORMS[form]
    section, weights = read(checkpoints[source])
    excluded = [f"{ROOT}.0.self_attn.{name}" for name in QKV]
    for name in excluded:
        weights[f"{name}.weight"] = weights[f"{name}.weight"].float().bfloat16()
        del weights[f"{name}.weight_scale_inv"]
    model = make_image_model(method, config(section | {"ignored_layers": ["language_model.lm_head", *excluded]}))
    model.load_weights([(name.replace("weight_scale_inv", suffix), w) for name, w in weights.items()])
    parameters = dict(model.named_parameters())
    tower = "vision_model.encoder.layers.1"
    assert torch.equal(parameters[f"vision_tower.{tower}.fc1.weight"], weights[f"vision_tower.{tower}.mlp.fc1.weight"])
    assert torch.equal(
        parameters["vision_tower.patch_merge_mlp.linear_1.weight"], weights["patch_merge_mlp.linear_1.weight"]
    )
    layers = [parameters[f"language_model.model.layers.{layer}.self_attn.qkv_proj.weight"] for layer in range(4)]
    assert [layer.dtype for layer in layers] == [torch.bfloat16] + [torch.float8_e4m3fn] * 3
    assert torch.equal(layers[0], torch.cat([weights[f"{name}.weight"] for name in excluded]))
    assert parameters["language_model.lm_head.weight"].dtype == torch.bfloat16
