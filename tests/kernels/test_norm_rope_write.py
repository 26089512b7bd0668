"""Norm, rope and cache write in one operation: each half against what is known to be right."""

from __future__ import annotations

import torch

from msa_backend.kernels import reference
from msa_backend.kernels.batch import BLOCK_SIZE
from msa_backend.kernels.caches import LayerCaches
from msa_backend.kernels.norms import HeadNorms

from .implementations import Implementation, every_implementation

HEADS, KV_HEADS, DIM, ROTARY_DIM, EPS = 4, 2, 16, 8, 1e-6


def test_norm_and_rope_are_torchs():
    """Torch's own RMS norm, and a rotation of the plane of each channel pair by complex multiplication."""
    torch.manual_seed(0)
    x, weight = torch.randn(3, HEADS, DIM, dtype=torch.float64), torch.randn(DIM, dtype=torch.float64)
    angles = torch.rand(10, ROTARY_DIM // 2, dtype=torch.float64)
    positions = torch.tensor([7, 0, 9])
    out = reference.norm_rope(x, weight, positions, torch.cat((angles.cos(), angles.sin()), dim=1), eps=EPS)

    normed = torch.nn.functional.rms_norm(x, (DIM,), weight + 1, EPS)
    first, second = normed[..., :ROTARY_DIM].chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)[positions][:, None]
    torch.testing.assert_close(out, torch.cat((turned.real, turned.imag, normed[..., ROTARY_DIM:]), dim=-1))


@every_implementation
def test_it_is_norm_rope_and_write(ops: Implementation):
    torch.manual_seed(0)
    num_tokens = 5
    sizes = [HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM, DIM]
    projected = torch.randn(num_tokens, sum(sizes))
    weights = torch.randn(4, DIM).unbind()
    angles = torch.rand(10, ROTARY_DIM // 2)
    cos_sin_cache = torch.cat((angles.cos(), angles.sin()), dim=1)
    positions = torch.tensor([4, 5, 6, 0, 10**9])  # padding's may be anything
    slots = torch.tensor([132, 133, 5, 0, -1])
    written, expected = (empty_caches(ops.device) for _ in range(2))
    norms = HeadNorms(*(w.to(ops.device) for w in weights), cos_sin_cache.to(ops.device), EPS)
    q, index_q = ops.norm_rope_write(
        projected.to(ops.device), positions.to(ops.device), norms, written, slots.to(ops.device)
    )

    parts = [x.unflatten(-1, (-1, DIM)) for x in projected.split(sizes, dim=-1)]
    true_q, k, true_index_q, index_k = (
        reference.norm_rope(x, weight, positions, cos_sin_cache, eps=EPS).float().to(ops.device)
        for x, weight in zip([parts[0], parts[1], parts[3], parts[4]], weights, strict=True)
    )
    ops.write(k, parts[2].to(ops.device), index_k[:, 0], expected, slots.to(ops.device))
    torch.testing.assert_close(q, true_q)
    torch.testing.assert_close(index_q, true_index_q)
    for pages in ("k_pages", "v_pages", "index_k_pages"):
        torch.testing.assert_close(getattr(written, pages), getattr(expected, pages))


def empty_caches(device: str) -> LayerCaches:
    k_pages, v_pages = torch.zeros(2, 2, KV_HEADS, BLOCK_SIZE, DIM, device=device)
    return LayerCaches(k_pages, v_pages, torch.zeros(2, BLOCK_SIZE, DIM, device=device))
