"""Under ``cudagraph_mode`` FULL, capture graphs for decode batches beside those for any mix of requests."""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

from . import APPLIED, NOT_NEEDED, Patch, PatchError

_MODULE = "vllm.v1.worker.gpu.cudagraph_utils"
_MARK = "_msa_original"


def _apply() -> None:
    """In a worker that builds our model, before it captures: the module is too much to import in every process."""
    from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager as manager

    original = getattr(manager, "_init_candidates", None)
    if original is None or list(inspect.signature(original).parameters) != ["self"]:
        raise PatchError(PATCH, "ModelCudaGraphManager._init_candidates(self) is gone or changed")
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def of_both_kinds(self: Any) -> None:
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

    setattr(of_both_kinds, _MARK, original)
    manager._init_candidates = of_both_kinds


def _status() -> str:
    imported = sys.modules.get(_MODULE)
    if imported is not None and hasattr(imported.ModelCudaGraphManager._init_candidates, _MARK):
        return APPLIED
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
