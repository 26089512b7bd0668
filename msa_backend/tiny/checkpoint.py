"""Write a tiny checkpoint directory: config, weights, tokenizer, and a card that says what it is."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msa_backend.tiny import config as configs
from msa_backend.tiny.errors import TinyCheckpointError
from msa_backend.tiny.forms import model_class, saved_by_transformers
from msa_backend.tiny.quantize import QUANTIZATIONS, quantization_config, quantize
from msa_backend.tiny.shape import TinyShape
from msa_backend.tiny.tokenizer import save_tokenizer

if TYPE_CHECKING:
    import torch

FORMS = ("original", "transformers", "transformers-default")
DTYPES = ("float32", "bfloat16")

CARD = """\
# A tiny MiniMax-M3 with random weights

Written by `msa-backend tiny`. It has the architecture of MiniMax-M3 and none of its knowledge: the weights are
random numbers, and every answer is gibberish. Use it to test that a server loads, schedules and computes.
"""


def write_tiny_checkpoint(
    directory: str | Path,
    *,
    form: str = "original",
    dtype: str = "float32",
    shards: int = 1,
    seed: int = 0,
    overwrite: bool = False,
    shape: TinyShape | None = None,
    quantization: str | None = None,
) -> Path:
    """Write a small random MiniMax-M3 checkpoint, the same bytes for the same arguments.

    Args:
        directory: where to; created if absent.
        form: ``"original"`` as MiniMax publishes, ``"transformers"`` with its native names, or
            ``"transformers-default"`` as its ``save_pretrained`` writes unasked. The weights are the same in all.
        dtype: ``"float32"`` or ``"bfloat16"``. The original form keeps router weights in fp32 either way.
        shards: number of weight files; more than one come with an index.
        seed: another seed, other weights.
        overwrite: allow a directory that is not empty, and replace the checkpoint in it.
        shape: other sizes than the default ones.
        quantization: ``"mxfp8"`` or ``"fp8"`` (blocks of 128 x 128) for the text layers' projections and experts, in
            the original form alone; all else stays in ``dtype``.

    Returns:
        The directory.

    Raises:
        TinyCheckpointError: an argument or the directory does not allow it, or a package is missing.
    """
    directory = Path(directory)
    shape = shape or TinyShape()
    _check(directory, form, dtype, shards, seed, overwrite, shape)
    _check_quantization(quantization, form)
    from msa_backend.tiny.weights import random_weights

    weights = in_dtype(random_weights(shape, seed), dtype)
    config = configs.original_config(shape, dtype)
    if form != "original":
        with tempfile.TemporaryDirectory() as name:
            _save_model(Path(name), config, weights, 1)
            flat = configs.transformers_config(shape, dtype)
            config, weights = saved_by_transformers(Path(name), flat, dtype, native=form == "transformers")
    if quantization is not None:
        config |= {"quantization_config": quantization_config(weights, quantization)}
        weights = quantize(weights, quantization)
    write_checkpoint(directory, shape, config, weights, shards=shards, card=CARD)
    return directory


def write_checkpoint(
    directory: Path,
    shape: TinyShape,
    config: dict[str, Any],
    weights: dict[str, torch.Tensor],
    *,
    shards: int = 1,
    card: str,
) -> None:
    """Write a whole checkpoint, in the place of one that may be there.

    Args:
        config: of the model, in the form that the names of ``weights`` have.
        card: the model card.
    """
    if shards > len(weights):
        raise TinyCheckpointError(f"{shards} shards are more than the {len(weights)} tensors to put in them; ask fewer")
    directory.mkdir(parents=True, exist_ok=True)
    for stale in (*directory.glob("model*.safetensors"), directory / "model.safetensors.index.json"):
        stale.unlink(missing_ok=True)
    _save_model(directory, config, weights, shards)
    save_tokenizer(directory, shape.words, shape.max_positions)
    _write_json(directory / "generation_config.json", configs.generation_config(shape.words))
    _write_json(directory / "preprocessor_config.json", configs.image_processor_config())
    _write_json(directory / "video_preprocessor_config.json", configs.video_processor_config())
    (directory / "README.md").write_text(card)


def _check(directory: Path, form: str, dtype: str, shards: int, seed: int, overwrite: bool, shape: TinyShape) -> None:
    if form not in FORMS:
        raise TinyCheckpointError(f"the form is {form!r}, but must be one of {', '.join(FORMS)}")
    if dtype not in DTYPES:
        raise TinyCheckpointError(f"the dtype is {dtype!r}, but must be one of {', '.join(DTYPES)}")
    if shards < 1 or seed < 0:
        raise TinyCheckpointError(f"shards={shards} and seed={seed}, but shards start at 1 and seeds at 0")
    if shape.mtp_modules < 0 or (shape.mtp_modules and form != "original"):
        raise TinyCheckpointError(
            f"mtp_modules={shape.mtp_modules} and form={form!r}, but modules start at 0, and transformers saves none; "
            "choose the original form"
        )
    if directory.exists() and not directory.is_dir():
        raise TinyCheckpointError(f"{directory} is a file; name a directory to write the checkpoint to")
    if directory.is_dir() and any(directory.iterdir()) and not overwrite:
        raise TinyCheckpointError(f"{directory} is not empty; choose another directory or pass --overwrite")
    for package in ("torch", "safetensors", "tokenizers"):
        if importlib.util.find_spec(package) is None:
            raise TinyCheckpointError(f"writing a tiny checkpoint needs {package}, which is not installed; install it")
    if form != "original":
        model_class()


def _check_quantization(quantization: str | None, form: str) -> None:
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise TinyCheckpointError(
            f"the quantization is {quantization!r}, but must be one of {', '.join(QUANTIZATIONS)}"
        )
    if quantization is not None and form != "original":
        raise TinyCheckpointError(
            f"the quantization is {quantization!r} and the form {form!r}, but quantized checkpoints of MiniMax-M3 have "
            "the original form; choose that"
        )


def in_dtype(weights: dict[str, torch.Tensor], dtype: str) -> dict[str, torch.Tensor]:
    """Round to ``dtype``, but store the router in fp32 as the released checkpoint does.

    Router values are rounded all the same, so that a reader that casts them to bf16 has the same model.
    """
    import torch

    rounded = {name: weight.to(getattr(torch, dtype)) for name, weight in weights.items()}
    for name in rounded:
        if name.endswith((".gate.weight", ".e_score_correction_bias")):
            rounded[name] = rounded[name].float()
    return rounded


def _save_model(directory: Path, config: dict[str, Any], weights: dict[str, torch.Tensor], shards: int) -> None:
    from safetensors.torch import save_file

    _write_json(directory / "config.json", config)
    files = _split(weights, shards)
    for file, part in files.items():
        save_file(part, directory / file, metadata={"format": "pt"})
        # safetensors leaves its files readable by their owner only; a server may run as somebody else.
        (directory / file).chmod((directory / "config.json").stat().st_mode)
    if shards > 1:
        index = {
            "metadata": {"total_size": sum(weight.nbytes for weight in weights.values())},
            "weight_map": {name: file for file, part in files.items() for name in part},
        }
        _write_json(directory / "model.safetensors.index.json", index)


def _split(weights: dict[str, torch.Tensor], shards: int) -> dict[str, dict[str, torch.Tensor]]:
    """Deal the tensors out in the order of their names, so that one layer's parts end up in different files."""
    if shards == 1:
        return {"model.safetensors": weights}
    names = sorted(weights)
    return {
        f"model-{shard + 1:05d}-of-{shards:05d}.safetensors": {name: weights[name] for name in names[shard::shards]}
        for shard in range(shards)
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
