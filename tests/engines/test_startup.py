"""What MSA cannot serve is refused by the engine's own option parsing, in one sentence, before any process is started.

The sentences are the same for every engine, but for the names of options.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from msa_backend.tiny import write_tiny_checkpoint

from ..damage import BAD_CONFIGS, LACKS_LAYER_4, add_a_layer, remove_weights, truncate_a_shard
from ..device import DEVICE, DTYPE
from ..refusal import sentence
from .capabilities import Can, needs
from .drivers import DRIVER

Change = Callable[[dict[str, Any]], None]
TOPK = 4


def refusal(model: Path, **options: Any) -> str:
    return sentence(DRIVER.parse, model, **options)


@pytest.mark.parametrize("backend", ["msa", None])
def test_served_with_and_without_the_flag(tiny: Path, backend: str | None):
    """Installed means used: without the flag an M3 model gets the backend all the same."""
    parsed = DRIVER.parse(tiny, backend=backend)
    assert (parsed.backend, parsed.page_size, parsed.topk) == (DRIVER.left_of_msa, 128, TOPK)


def test_the_class_is_ours():
    for architecture in ("MiniMaxM3SparseForConditionalGeneration", "MiniMaxM3SparseForCausalLM"):
        assert DRIVER.model_module(architecture).startswith(f"msa_backend.model.{DRIVER.package}.")


def test_another_backend_is_left_to_the_dense_layers(tiny: Path):
    parsed = DRIVER.parse(tiny, backend=DRIVER.other_backend)
    assert (parsed.backend, parsed.page_size, parsed.topk) == (DRIVER.other_backend, 128, TOPK)


@needs(Can.WEIGHT_FORMS)
@pytest.mark.parametrize("form", ["original", "transformers"])
def test_text_only_checkpoints(form: str, text_only: Path, truth: Any, tmp_path: Path):
    """The text half alone; that of ``transformers`` has another architecture, and names and a config of its own."""
    folder = text_only
    if form == "transformers":
        from transformers import MiniMaxM3VLForCausalLM

        folder = tmp_path
        MiniMaxM3VLForCausalLM(truth.config.text_config).save_pretrained(folder)
    parsed = DRIVER.parse(folder, tokenizer=False)
    assert (parsed.page_size, parsed.topk) == (128, TOPK)


def overrides(topk: int) -> dict[str, Any]:
    return {"sparse_attention_config": {"sparse_topk_blocks": topk}}


def test_overrides_reach_the_model(tiny: Path):
    assert DRIVER.parse(tiny, overrides=overrides(3)).topk == 3


def test_overrides_that_msa_cannot_serve(tiny: Path):
    assert "top-k is 99 blocks, but MSA supports 1 to 32" in refusal(tiny, overrides=overrides(99))


def test_another_model(llama: Path):
    assert "LlamaForCausalLM, which has no MSA layers" in refusal(llama, context=4096, tokenizer=False)


@pytest.mark.parametrize("backend", [None, DRIVER.other_backend])
def test_another_model_without_the_flag_is_left_alone(llama: Path, backend: str | None):
    parsed = DRIVER.parse(llama, backend=backend, context=4096, tokenizer=False)
    assert parsed.backend != "msa"
    assert backend is None or parsed.backend == backend
    assert parsed.topk is None


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("page_size", 64, "is 64, but MSA needs 128, one KV-cache page per sparse block; omit it or pass 128"),
        ("page_size", 256, "is 256, but MSA needs 128"),
        ("ranks", 3, "is 3"),
    ],
)
def test_options_msa_cannot_serve(tiny: Path, option: str, value: int, says: str):
    assert f"{DRIVER.flag(option)} {says}" in refusal(tiny, **{option: value})


def test_ranks_that_do_not_share_the_heads(tiny: Path):
    assert "2 KV heads" in refusal(tiny, ranks=3)


REFUSED = [
    pytest.param(options, says, id=f"{capability.name}-{says.split(',')[0]}")
    for capability, lack in DRIVER.lacks(DEVICE, DTYPE).items()
    for options, says in lack.refused
]


@pytest.mark.parametrize(("options", "says"), REFUSED)
def test_what_the_engine_lacks_is_refused(tiny: Path, options: dict[str, Any], says: str):
    assert says in refusal(tiny, **options)


@pytest.mark.parametrize(("change", "says"), BAD_CONFIGS)
def test_configs_msa_cannot_serve(edited: Callable[[Change], Path], change: Change, says: str):
    assert says in refusal(edited(change))


def test_a_truncated_shard(tiny: Path, tmp_path: Path):
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    says = truncate_a_shard(tmp_path)
    assert says in refusal(tmp_path)


@pytest.mark.skipif(DEVICE != "cpu", reason="refused as untested elsewhere")
@pytest.mark.parametrize("quantization", ["mxfp8", "fp8"])
def test_a_quantized_checkpoint(quantization: str, tmp_path: Path):
    """No option says so: the engine finds it in the checkpoint's config."""
    folder = write_tiny_checkpoint(tmp_path / "quantized", quantization=quantization, dtype="bfloat16")
    says = f"quantization is {quantization}, but on a CPU MSA serves unquantized weights only"
    assert says in refusal(folder, dtype="bfloat16")


def test_a_layer_more_than_the_checkpoint_has(edited: Callable[[Change], Path]):
    assert LACKS_LAYER_4 in refusal(edited(add_a_layer))


def test_dummy_weights_need_no_files(tiny: Path, tmp_path: Path):
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    remove_weights(tmp_path)
    assert DRIVER.parse(tmp_path, dummy_weights=True).topk == TOPK
