"""fp8 caches in the engine, against ``transformers`` whose caches are rounded alike.

Scales are chosen so that a wrong one shows: keys are clipped, values lose most of their digits, and no two are alike.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from .. import oracle
from ..compare import Answer
from ..engines.capabilities import Can, needs
from ..engines.drivers import DRIVER
from .draft_models import ROOT

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SCALES = ((0.004, 0.7), (0.005, 0.005), (0.006, 1.9), (0.0031, 1.1))
UNIT = ((1.0, 1.0),) * 4
# What tools have called them, a layer each.
NAMES = (
    ("k_proj.k_scale", "v_proj.v_scale"),
    ("kv_scale",),
    ("k_scale", "v_scale"),
    ("k_proj.output_scale", "v_proj.output_scale"),
)
# A number between two of fp8 falls to either side by the last bit of fp32: a few in a million, each off by 6 %.
CLOSE = 5e-3
PROMPTS = [oracle.random_prompt(length, seed=4) for length in (130, 700, 1500)]


def scales(layer: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    named = zip(NAMES[layer], SCALES[layer], strict=False)
    return {f"{ROOT}.layers.{layer}.self_attn.{name}": torch.tensor([value], dtype=dtype) for name, value in named}


@pytest.fixture(scope="module")
def calibrated(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with a scale of K and of V for each layer."""
    folder = tmp_path_factory.mktemp("fp8") / "calibrated"
    shutil.copytree(tiny, folder)
    save_file({name: tensor for layer in range(4) for name, tensor in scales(layer).items()}, folder / "x.safetensors")
    for index in folder.glob("*.index.json"):
        index.unlink()
    return folder


@needs(Can.FP8_CACHES)
@pytest.mark.parametrize(
    ("kv", "index", "dtype", "index_dtype"),
    [("fp8", "auto", E4M3, None), ("fp8_e4m3", "fp8", E4M3, E4M3), ("fp8_e5m2", "fp8", E5M2, E4M3)],
)
def test_equal_to_rounded_caches(
    kv: str, index: str, dtype: torch.dtype, index_dtype: torch.dtype | None, calibrated: Path, truth: Any
):
    """K/V and index keys in the same dtype and in different ones."""
    own = {"kv_cache_dtype": kv, "attention_config": {"indexer_kv_dtype": index}}
    with DRIVER.engine(calibrated, backend=None, chunk=512, own=own) as engine:
        answers = engine.ask(PROMPTS, 1, prompt_logprobs=True)
    # The dense layer is vLLM's, which cuts digits off on a CPU.
    truncating, swapped = [0], tuple((v, k) for k, v in SCALES)
    right, *wrong = (
        _distance(answers, truth, dtype, by_layer, index_dtype, truncating) for by_layer in (SCALES, UNIT, swapped)
    )
    print(f"{kv}, index keys {index}: {right:.1e}; by other scales {wrong}")
    assert right < CLOSE and min(wrong) > 10 * CLOSE


def _distance(answers: list[Answer], truth: Any, *rounding: Any) -> float:
    """The median over all prompt tokens of how far log-probabilities lie from those of rounded caches."""
    gaps = []
    with oracle.rounded_caches(*rounding):
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            gaps.append((torch.tensor(answer.prompt_logprobs) - oracle.prompt_logprobs(truth, prompt)).abs())
    return torch.cat(gaps).median().item()
