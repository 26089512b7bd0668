"""Under ``cudagraph_mode`` FULL, capture graphs for decode batches beside those for any mix of requests."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from . import NOT_NEEDED, Patch, status_of_method, wrap_method

_MODULE = "vllm.v1.worker.gpu.cudagraph_utils"
_METHOD = "_init_candidates"


def _apply() -> None:
    """In a worker that builds our model, before it captures: the module is too much to import in every process."""
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

    # Of the target and of its drafts alike: the first step of a draft replays over the attention metadata that the
    # target made for its own step, so both must take graphs of the same shape.
    wrap_method(PATCH, CudaGraphManager, _METHOD, ["self"], _of_both_kinds)


def _of_both_kinds(original: Callable[[Any], None], self: Any) -> None:
    from vllm.config.compilation import CUDAGraphMode

    original(self)
    if self.cudagraph_mode != CUDAGraphMode.FULL:
        return
    mixed = self._candidates, self._capture_descs
    self._candidates, self._capture_descs = {}, {}
    self.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
    try:
        original(self)
    finally:
        self.cudagraph_mode = CUDAGraphMode.FULL
    # The first that fits is taken: decode batches their own, every other batch one for any mix.
    for key, fits_any in mixed[0].items():
        self._candidates[key] = [*self._candidates.get(key, []), *fits_any]
    for mode, descs in mixed[1].items():
        both = [*self._capture_descs.get(mode, []), *descs]
        self._capture_descs[mode] = sorted(both, key=lambda desc: desc.num_tokens, reverse=True)


def _status() -> str:
    imported = sys.modules.get(_MODULE)
    if imported is not None and sys.modules["vllm.platforms"].current_platform.is_cuda():
        return status_of_method(imported.CudaGraphManager, _METHOD)
    return f"{NOT_NEEDED}: no MiniMax-M3 was built on a GPU in this process"


PATCH = Patch(
    name="vllm_graphs_of_both_kinds",
    why=(
        "vLLM captures full graphs for decode batches or for any mix of requests, not both: a short suffix then runs "
        "in pieces, bound by the host, or decode runs as a mixed batch, up to a fifth slower"
    ),
    checked_on=("vLLM 0.32", "vLLM 0.33"),
    retired_by="a cudagraph_mode of vLLM that captures full graphs of both kinds",
    apply=_apply,
    status=_status,
)
