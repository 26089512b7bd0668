"""Which class serves the model, with images and without, and what the user is told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from msa_backend.config import MSAError
from msa_backend.vllm import images

from ..engines.drivers import DRIVER
from ..engines.drivers.options import Options

ARCHITECTURE = "MiniMaxM3SparseForConditionalGeneration"
with_torchvision = pytest.mark.skipif(images.find_spec("torchvision") is None, reason="torchvision is not installed")
served_by = f"""
import sys
if "hide" in sys.argv:
    sys.modules["torchvision"] = None
from vllm.plugins import load_general_plugins
from vllm.model_executor.models import ModelRegistry
load_general_plugins()
print(ModelRegistry.models["{ARCHITECTURE}"].module_name, "vllm.models.minimax_m3" in sys.modules)
"""


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    DRIVER.prepare()


def start(model: Path, **own: Any) -> Any:
    """vLLM's config of a start with these options."""
    from vllm.engine.arg_utils import EngineArgs

    arguments = DRIVER.arguments(model, Options()) | {"language_model_only": False} | own
    return EngineArgs(model=str(model), **arguments).create_engine_config().model_config


def model_class(model_config: Any) -> str:
    """What vLLM will load."""
    from vllm.model_executor.model_loader.utils import get_model_architecture

    return get_model_architecture(model_config)[0].__name__


@with_torchvision
def test_with_images(tiny: Path):
    found = start(tiny)
    assert model_class(found) == "MiniMaxM3ForConditionalGeneration"
    assert found.supports_multimodal_inputs


@with_torchvision
@pytest.mark.parametrize(
    "wanted", [{"language_model_only": True}, {"limit_mm_per_prompt": {"image": 0, "video": 0}}], ids=str
)
def test_text_only(tiny: Path, wanted: dict[str, Any]):
    found = start(tiny, **wanted)
    assert model_class(found) == "MiniMaxM3ForCausalLM"
    assert not found.is_multimodal_model


@with_torchvision
@pytest.mark.parametrize("option", images.UNSERVED)
def test_what_is_not_served(tiny: Path, option: str):
    with pytest.raises(MSAError, match=f"--{option.replace('_', '-')} is set, .* leave it out"):
        start(tiny, **{option: True})


@with_torchvision
def test_drafts_are_tested_with_text_alone(tiny: Path):
    ngram = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    with pytest.raises(MSAError, match="--speculative-config is given and .* --language-model-only"):
        start(tiny, speculative_config=ngram)
    start(tiny, speculative_config=ngram, language_model_only=True)


@with_torchvision
def test_a_vision_weight_is_missed_only_where_images_are_wanted(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    from msa_backend.tiny import write_tiny_checkpoint

    folder = write_tiny_checkpoint(tmp_path / "tiny", dtype="float32")
    weights = load_file(folder / "model.safetensors")
    del weights["patch_merge_mlp.linear_2.bias"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    start(folder, language_model_only=True)
    with pytest.raises(MSAError, match=r"lacks .*: patch_merge_mlp\.linear_2\.bias"):
        start(folder)


@pytest.mark.parametrize(
    ("argument", "module"),
    [pytest.param("see", "multimodal", marks=with_torchvision), ("hide", "causal_lm")],
)
def test_the_class_goes_with_torchvision(argument: str, module: str):
    """And is not imported to find out."""
    code = f"import sys; sys.argv.append({argument!r})\n{served_by}"
    *_, said = DRIVER.run(code).strip().splitlines()
    assert said == f"msa_backend.model.vllm.{module} False"


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    yield


def test_no_torchvision_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(images, "find_spec", lambda name: None)
    reason = images.no_images()
    assert reason is not None
    assert "torchvision, which is not installed" in reason


@pytest.mark.usefixtures("on_a_gpu")
def test_images_on_a_gpu_are_untested(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(images, "find_spec", lambda name: name)
    reason = images.no_images()
    assert reason is not None
    assert "MSA_ALLOW_UNTESTED=1" in reason
    monkeypatch.setenv("MSA_ALLOW_UNTESTED", "1")
    assert images.no_images() is None


def test_text_only_is_said(monkeypatch: pytest.MonkeyPatch):
    said = []
    monkeypatch.setattr(images, "find_spec", lambda name: None)
    monkeypatch.setattr(images.logger, "info", lambda *message: said.append(message[0] % message[1:]))
    config = SimpleNamespace(model_config=SimpleNamespace(multimodal_config=None, architectures=[ARCHITECTURE]))
    assert images.settle(config) is False
    assert said == [
        "Text only, an image is answered with 400: images need torchvision, which is not installed; "
        "install the build that goes with your torch."
    ]
