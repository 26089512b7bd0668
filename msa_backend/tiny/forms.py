"""Rename the weights the way ``transformers`` saves them, by letting ``transformers`` save them."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msa_backend.tiny.errors import TinyCheckpointError
from msa_backend.transformers import MINIMUM_VERSION

if TYPE_CHECKING:
    import torch


def model_class() -> Any:
    """The MiniMax-M3 model class of ``transformers``.

    Raises:
        TinyCheckpointError: ``transformers`` is absent or has no MiniMax-M3.
    """
    try:
        import transformers
    except ImportError:
        raise TinyCheckpointError(
            f"this form needs transformers {MINIMUM_VERSION} or newer, which is not installed; "
            "install it or choose --form original"
        ) from None
    try:
        return transformers.MiniMaxM3SparseForConditionalGeneration
    except (AttributeError, ImportError):
        raise TinyCheckpointError(
            f"this form needs transformers {MINIMUM_VERSION} or newer, but {transformers.__version__} is "
            "installed and has no MiniMax-M3; upgrade it or choose --form original"
        ) from None


def saved_by_transformers(
    original: Path, config: dict[str, Any], dtype: str, native: bool
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Load the checkpoint at ``original`` and return the config and tensors that ``transformers`` saves for it.

    Args:
        config: the same model's config in the flat form, so that no original key leaks into the result.
        native: whether to ask for ``transformers``' own names, or for what it writes by default.
    """
    model_type = model_class()
    from safetensors.torch import load_file

    model = model_type.from_pretrained(original, config=model_type.config_class.from_dict(config), dtype=dtype)
    options = {"save_original_format": False} if native else {}
    with tempfile.TemporaryDirectory() as name:
        model.save_pretrained(name, **options)
        saved = json.loads((Path(name) / "config.json").read_text())
        return saved, load_file(Path(name) / "model.safetensors")
