"""Online softmax in base 2, as FlashAttention keeps it (arXiv:2205.14135): one place for all attention kernels.

A row holds ``m_i``, the largest logit so far, ``l_i``, the sum of the weights relative to it, and ``acc``, the weighted
sum of values. Logits come as base-2 exponents.
"""

from __future__ import annotations

import triton.language as tl
from triton import jit

LOWEST = tl.constexpr(-1e30)
"""Where ``m_i`` begins. Finite, so that a row that has seen nothing yet never subtracts infinities."""


@jit
def start_softmax(BLOCK_M: tl.constexpr, DIM: tl.constexpr):
    """``m_i``, ``l_i``, ``acc`` of rows that have seen nothing."""
    m_i = tl.full([BLOCK_M], LOWEST, tl.float32)
    return m_i, tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, DIM], tl.float32)


@jit
def masked_weights(logits, m_i):
    """Of logits that are -inf where a row must not see: the weights, the new ``m_i`` and what to scale the old by."""
    m_new = tl.maximum(m_i, tl.max(logits, axis=1))
    return tl.exp2(logits - m_new[:, None]), m_new, tl.exp2(m_i - m_new)


@jit
def row_weights(products, scale, rows, m_i):
    """As :func:`masked_weights`, where a row sees all of the keys or, by ``rows``, none; the scale comes last."""
    m_new = tl.where(rows, tl.maximum(m_i, tl.max(products, axis=1) * scale), m_i)
    # Nothing is left of a row's weights when infinity is subtracted.
    weights = tl.exp2(products * scale - tl.where(rows, m_new, float("inf"))[:, None])
    return weights, m_new, tl.exp2(m_i - m_new)


@jit
def accumulate(weights, v, alpha, l_i, acc):
    """``l_i`` and ``acc`` with a block's weights and values added; the old are scaled by ``alpha``."""
    l_i = l_i * alpha + tl.sum(weights, axis=1)
    return l_i, tl.dot(weights.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")


@jit
def finish(l_i, acc, v_scale):
    """The output; 0 for a row that saw nothing."""
    return acc * tl.where(l_i > 0, v_scale / tl.where(l_i > 0, l_i, 1.0), 0.0)[:, None]


@jit
def log_sum_exp(m_i, l_i):
    """Base 2; -inf for a row that saw nothing."""
    return tl.where(l_i > 0, m_i + tl.log2(tl.where(l_i > 0, l_i, 1.0)), float("-inf"))
