"""In bf16 an engine is as far from the truth as ``transformers`` is."""

from __future__ import annotations

from pathlib import Path

from ..compare import assert_as_close_in_bf16
from ..oracle import random_prompt
from .capabilities import Can, needs
from .drivers import DRIVER


@needs(Can.EQUAL_TRANSFORMERS)
def test_bf16(tmp_path: Path):
    from msa_backend.tiny import write_tiny_checkpoint

    model = write_tiny_checkpoint(tmp_path / "bf16", dtype="bfloat16")
    prompts = [random_prompt(length, seed=2) for length in (100, 900, 1500, 2500)]
    with DRIVER.engine(model, dtype="bfloat16", chunk=512) as engine:
        answers = engine.ask(prompts, 1, prompt_logprobs=True)
    assert_as_close_in_bf16(answers, prompts, model)
