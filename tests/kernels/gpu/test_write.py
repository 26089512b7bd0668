"""Writing the cache, alone and with norm and rope before it: the Triton kernels beside the torch path.

On a GPU, or in Triton's interpreter, whose bf16 is unreliable.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from msa_backend.kernels import cpu, gpu
from msa_backend.kernels.batch import BLOCK_SIZE
from msa_backend.kernels.caches import LayerCaches
from msa_backend.kernels.norms import HeadNorms

from ..batches import LAYOUTS, lay_out
from ..implementations import GPU, ON_CUDA

pytestmark = pytest.mark.gpu
DEVICE = GPU.device
DTYPES = [torch.bfloat16, torch.float16, torch.float32] if ON_CUDA else [torch.float16, torch.float32]
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]
# Of K and V, and of index keys; None is the dtype of what is written.
BOTH_CACHES = [(None, None), *((dtype, dtype) for dtype in FP8), (FP8[0], None), (None, FP8[0]), (FP8[1], FP8[0])]
SLOTS = [130, 5, -1, 127, 128, 510, -100]
PAGES = 4


def empty_caches(
    kv_heads: int,
    dim: int,
    index_dim: int,
    dtype: torch.dtype,
    layout: str = "halves",
    index_dtype: torch.dtype | None = None,
    **scales: float,
) -> LayerCaches:
    nothing = torch.full((PAGES, BLOCK_SIZE, kv_heads, 2 * dim), torch.nan, device=DEVICE).to(dtype)
    index = torch.full((PAGES, BLOCK_SIZE, index_dim), torch.nan, device=DEVICE).to(index_dtype or dtype)
    return LayerCaches(*lay_out(nothing, layout), index, **scales)


def pages_of(caches: LayerCaches) -> tuple[torch.Tensor, ...]:
    return caches.k_pages, caches.v_pages, caches.index_k_pages


def assert_same(new: torch.Tensor, expected: torch.Tensor, **tolerance: float) -> None:
    torch.testing.assert_close(new.float(), expected.float(), equal_nan=True, **tolerance)


@pytest.mark.parametrize(("cache_dtype", "index_dtype"), BOTH_CACHES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_write(dtype: torch.dtype, layout: str, cache_dtype: torch.dtype | None, index_dtype: torch.dtype | None):
    torch.manual_seed(0)
    kv_heads, dim = 3, 16
    fused = torch.randn(len(SLOTS), 2 * kv_heads + 1, dim, device=DEVICE).to(dtype)
    fused[0, :, :2] = torch.tensor([6e4, -6e4]).to(fused)  # more than fp8 holds
    fused[1, 0, 0] = torch.nan
    new = fused[:, :kv_heads], fused[:, kv_heads : 2 * kv_heads], fused[:, -1]
    slots = torch.tensor(SLOTS, device=DEVICE)
    scales = {"k_scale": 0.3, "v_scale": 0.7} if cache_dtype else {}
    written = empty_caches(kv_heads, dim, dim, cache_dtype or dtype, layout, index_dtype or dtype, **scales)
    # On a GPU, torch multiplies by 1 / scale.
    expected = LayerCaches(*(pages.cpu().clone() for pages in pages_of(written)), **scales)
    gpu.write(*new, written, slots)
    cpu.write(*(x.cpu() for x in new), expected, slots.cpu())
    for pages, truth in zip(pages_of(written), pages_of(expected), strict=True):
        assert_same(pages.cpu(), truth, atol=0, rtol=0)


def test_dense_layer_has_no_index_keys():
    k, v = torch.randn(2, len(SLOTS), 2, 16, device=DEVICE)
    caches = replace(empty_caches(2, 16, 16, torch.float32), index_k_pages=None)
    gpu.write(k, v, None, caches, torch.tensor(SLOTS, device=DEVICE))
    assert torch.equal(caches.k_pages[1, :, 2], k[0])
    assert torch.equal(caches.v_pages[1, :, 2], v[0])
    assert caches.k_pages.isnan().sum() == (PAGES * BLOCK_SIZE - 5) * 2 * 16


def test_nothing_to_write():
    none = torch.empty(0, 2, 16, device=DEVICE)
    gpu.write(none, none, None, empty_caches(2, 16, 16, none.dtype), none[:, 0, 0].long())


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "index_dim", "rotary_dim"),
    [(6, 2, 32, 32, 16), (3, 3, 16, 32, 16), (20, 1, 64, 16, 12), (12, 1, 128, 128, 64), (40, 20, 16, 16, 8)],
    ids=str,
)
@pytest.mark.parametrize(("cache_dtype", "index_dtype"), BOTH_CACHES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_rope_write(
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None,
    index_dtype: torch.dtype | None,
    heads: int,
    kv_heads: int,
    dim: int,
    index_dim: int,
    rotary_dim: int,
):
    torch.manual_seed(0)
    num_tokens, eps = len(SLOTS), 1e-6
    width = (heads + 2 * kv_heads) * dim + (kv_heads + 1) * index_dim
    projected = torch.randn(num_tokens, width + 16, device=DEVICE).to(dtype)[:, :width]
    projected[1, :dim] = 0  # a head of zeros stays one
    projected[1, (heads + 2 * kv_heads) * dim :] = 0
    weights = [torch.randn(size, device=DEVICE).to(dtype) for size in (dim, dim, index_dim, index_dim)]
    angles = torch.rand(1000, rotary_dim // 2, device=DEVICE) * 6.28
    cos_sin_cache = torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype)
    positions = torch.tensor([0, 1, -(2**40), 3, 999, 999, 2**40], device=DEVICE)  # padding's may be anything
    slots = torch.tensor(SLOTS, device=DEVICE)
    scales = {"k_scale": 0.01, "v_scale": 0.02} if cache_dtype else {}
    index_q_dtype = torch.float8_e4m3fn if index_dtype else None
    written, expected = (
        empty_caches(kv_heads, dim, index_dim, cache_dtype or dtype, index_dtype=index_dtype or dtype, **scales)
        for _ in range(2)
    )
    norms = HeadNorms(*weights, cos_sin_cache, eps)
    q, index_q = gpu.norm_rope_write(projected, positions, norms, written, slots, index_q_dtype=index_q_dtype)
    true_q, true_index_q = cpu.norm_rope_write(
        projected, positions, norms, expected, slots, index_q_dtype=index_q_dtype
    )

    # Both compute in fp32 and round once; sums are in another order, so a value may fall to the neighbouring number.
    def assert_rounded(x: torch.Tensor, truth: torch.Tensor) -> None:
        assert x.dtype == truth.dtype and x.shape == truth.shape
        tiny = torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps
        assert_same(x, truth, atol=max(tiny, 1e-6), rtol=max(torch.finfo(x.dtype).eps, 1e-5))
        if x.dtype != torch.float32:
            assert (x.float() != truth.float()).logical_and(truth.float().isfinite()).float().mean() < 0.02

    assert_rounded(q, true_q)
    assert_rounded(index_q, true_index_q)
    for pages, truth in zip(pages_of(written), pages_of(expected), strict=True):
        assert_rounded(pages, truth)
    if index_dtype:
        assert (index_q.float()[0].abs().amax(-1) == 448).all()
        assert (index_q.float()[1] == 0).all()
