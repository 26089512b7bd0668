"""Gemma-style RMS norm in one launch, where there is a kernel for it."""

from __future__ import annotations

from functools import cache

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.layernorm import GemmaRMSNorm

logger = init_logger("vllm.msa_backend")

FUSED_DTYPES = (torch.bfloat16, torch.float16)


class M3RMSNorm(GemmaRMSNorm):
    """vLLM's norm, by FlashInfer's kernels on a GPU: vLLM's own is some ten elementwise kernels when nothing compiles
    the model, and MiniMax-M3 is not compiled."""

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """``norm(x)``, or ``norm(x + residual), x + residual``; the second works in place.

        Args:
            x, residual: ``[num_tokens, hidden_size]``.
        """
        fused = _fused_norms() if x.is_cuda and x.dtype in FUSED_DTYPES else None
        if fused is None:
            return super().forward(x) if residual is None else super().forward(x, residual)
        if residual is None:
            return fused.gemma_rmsnorm(x, self.weight, self.variance_epsilon)
        fused.gemma_fused_add_rmsnorm(x, residual, self.weight, self.variance_epsilon)
        return x, residual


@cache
def _fused_norms():  # type: ignore[no-untyped-def]  # a module, or None
    try:
        import flashinfer.norm
    except Exception as error:  # its import raises whatever its extensions raise
        logger.warning("FlashInfer does not import (%s), so norms are slower; install flashinfer-python.", error)
        return None
    return flashinfer.norm
