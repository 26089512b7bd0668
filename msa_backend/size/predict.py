"""What the whole model would take on a GPU, from times of single layers that ``msa-backend bench --json`` measured.

A prediction and a floor: the measured attention of every layer, and products with weights at the rates that the card
was seen to reach. Communication between ranks, routing, norms, sampling and the server are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from msa_backend.config import MSAError
from msa_backend.model import sizing
from msa_backend.model.config import M3Config

from . import compute

STEP = 8192
"""Prompt tokens of a step."""
OURS, IN_TREE = "ours", "vllm"
DENSE = ("fa3", "flashinfer")
"""Baselines that time dense attention, the first one found."""


class Layer(NamedTuple):
    """Milliseconds of one layer's attention at a context.

    Attributes:
        dense: of a dense layer.
        sparse: of a sparse layer, by implementation.
    """

    context: int
    dense: float
    sparse: dict[str, float]


class Measured:
    """The results of a run on one GPU that hold for one rank of a model.

    Args:
        path: what ``msa-backend bench --json`` wrote.

    Raises:
        MSAError: it is not such a file, or lacks the dense attention that M3's first layers have.
    """

    def __init__(self, path: Path, config: M3Config, ranks: int) -> None:
        try:
            found = json.loads(path.read_text())
            self.device: str = found["device"]
            self.flops = found["ceilings"]["matmul_TFLOP_per_s"] * 1e12
            self.bandwidth = found["ceilings"]["read_TB_per_s"] * 1e12
            cases = found["cases"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MSAError(
                f"{path} is no result of a GPU ({error!r}); pass what msa-backend bench --json wrote on one"
            ) from None
        self.heads = config.msa.num_heads // ranks, sizing.kv_heads_per_rank(config, ranks)
        self._cases = [case for case in cases if self._holds(case)]

    def _holds(self, case: dict[str, Any]) -> bool:
        return (
            (case["num_heads"], case["num_kv_heads"]) == self.heads
            and case["dtype"] == "bf16"
            and not case["fp8_index"]
            and not case["fp8_kv"]
            and case["locality"] == "calibrated"
            and case["sharing"] == 1
        )

    def layers(self, mode: str, batch: int, new_tokens: int) -> list[Layer]:
        """By context, ascending; of several captures the one for the longest context."""
        kept: dict[int, tuple[int, Layer]] = {}
        for case in self._cases:
            if (case["mode"], case["batch"], case["new_tokens"]) != (mode, batch, new_tokens):
                continue
            times = {name: result["ms"]["total"] for name, result in case["results"].items() if "ms" in result}
            dense = next((times[name] for name in DENSE if name in times), None)
            if dense is None or OURS not in times:
                continue
            layer = Layer(case["context"], dense, {name: times[name] for name in (OURS, IN_TREE) if name in times})
            if case["context"] not in kept or kept[case["context"]][0] < case["bound"]:
                kept[case["context"]] = case["bound"], layer
        return [layer for _, (_, layer) in sorted(kept.items())]

    def batches(self) -> list[int]:
        """That decoding was measured with."""
        return sorted({case["batch"] for case in self._cases if case["mode"] == "decode"})


def between(layers: list[Layer], context: int) -> Layer:
    """Linear in the context between two that were measured, as the work is."""
    low = max((layer for layer in layers if layer.context <= context), key=lambda layer: layer.context)
    high = min((layer for layer in layers if layer.context >= context), key=lambda layer: layer.context)
    share = (context - low.context) / max(1, high.context - low.context)
    sparse = {name: ms + share * (high.sparse[name] - ms) for name, ms in low.sparse.items() if name in high.sparse}
    return Layer(context, low.dense + share * (high.dense - low.dense), sparse)


def first_token(config: M3Config, ranks: int, measured: Measured, tokens: int) -> dict[str, float]:
    """Seconds until the first token of a prompt of ``tokens``, by implementation, in steps of :data:`STEP`.

    Raises:
        MSAError: a context that is needed was not measured, nor one on either side of it.
    """
    layers = measured.layers("prefill", 1, STEP)
    steps = range(STEP, -(-tokens // STEP) * STEP + 1, STEP)
    if not layers or layers[0].context > steps[0] or layers[-1].context < steps[-1]:
        heads = "/".join(map(str, measured.heads))
        raise MSAError(
            f"with {heads} heads no steps of {STEP:,} tokens were measured at contexts from {STEP:,} to {steps[-1]:,}; "
            f"run msa-backend bench --heads {heads} --modes prefill --contexts 8K,32K,128K,1M --json FILE"
        )
    sparse = sum(config.msa.sparse_layers)
    of_weights = compute.weights(config) * tokens / ranks / measured.flops
    at = [between(layers, context) for context in steps]
    names = [name for name in (OURS, IN_TREE) if all(name in layer.sparse for layer in at)]
    return {
        name: sum(sparse * x.sparse[name] + (config.num_layers - sparse) * x.dense for x in at) / 1e3 + of_weights
        for name in names
    }


def decode_steps(
    config: M3Config, ranks: int, measured: Measured, batch: int, form: str
) -> Iterator[tuple[int, dict[str, float]]]:
    """Each measured context, and milliseconds of a decode step of ``batch`` sequences by implementation.

    Args:
        form: of the weights, as of :func:`msa_backend.model.sizing.weight_bytes`.
    """
    sparse = sum(config.msa.sparse_layers)
    of_weights = sizing.used_weights(config, batch, ranks, form) / measured.bandwidth * 1e3
    for layer in measured.layers("decode", batch, 1):
        rest = (config.num_layers - sparse) * layer.dense + of_weights
        yield layer.context, {name: sparse * ms + rest for name, ms in layer.sparse.items()}
