"""Writing the cache."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from msa_backend.kernels.batch import BLOCK_SIZE
from msa_backend.kernels.caches import LayerCaches

from .batches import HALF, LAYOUTS, lay_out
from .implementations import Implementation, every_implementation

SLOTS = [130, 5, -1, 127, 128, 510, -100]


def new_tokens(dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    n = len(SLOTS)
    fused = torch.randn(n, 5, 16, generator=rng).to(dtype).to(device)  # k and v as views of one projection
    return fused[:, 0:2], fused[:, 2:4], fused[:, 4]


def empty_caches(dtype: torch.dtype, device: str, layout: str = "halves", **scales: float) -> LayerCaches:
    nothing = torch.full((4, BLOCK_SIZE, 2, 32), torch.nan, device=device).to(dtype)
    index = torch.full((4, BLOCK_SIZE, 16), torch.nan, device=device).to(dtype)
    return LayerCaches(*lay_out(nothing, layout), index, **scales)


@every_implementation
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, HALF, torch.float32])
def test_each_token_in_its_slot_and_nothing_else(ops: Implementation, layout: str, dtype: torch.dtype):
    new, caches = new_tokens(dtype, ops.device), empty_caches(dtype, ops.device, layout)
    ops.write(*new, caches, torch.tensor(SLOTS, device=ops.device))
    for x, pages in zip(new, (caches.k_pages, caches.v_pages, caches.index_k_pages), strict=True):
        by_slot = pages.transpose(1, 2) if pages.dim() == 4 else pages
        by_slot = by_slot.flatten(0, 1).clone()
        for token, slot in enumerate(SLOTS):
            if slot >= 0:
                assert torch.equal(by_slot[slot], x[token])
                by_slot[slot] = torch.nan
        assert by_slot.isnan().all()


@every_implementation
def test_dense_layer_has_no_index_keys(ops: Implementation):
    k, v, _ = new_tokens(torch.float32, ops.device)
    caches = replace(empty_caches(torch.float32, ops.device), index_k_pages=None)
    ops.write(k, v, None, caches, torch.tensor(SLOTS, device=ops.device))
    assert torch.equal(caches.k_pages[1, :, 2], k[0])
    assert torch.equal(caches.v_pages[1, :, 2], v[0])


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("new_dtype", [HALF, torch.float32])
def test_fp8_is_scaled_and_saturates(ops: Implementation, dtype: torch.dtype, new_dtype: torch.dtype):
    k, v, index_k = (x.clone() for x in new_tokens(new_dtype, ops.device))
    k[0, 0, 0], v[0, 0, 0], index_k[0, 0] = 6e4, -6e4, 6e4
    caches = empty_caches(dtype, ops.device, k_scale=0.5, v_scale=0.25)
    ops.write(k, v, index_k, caches, torch.tensor(SLOTS, device=ops.device))

    limit = torch.finfo(dtype).max
    written_k, written_v = caches.k_pages[1, :, 2].float(), caches.v_pages[1, :, 2].float()
    written_index_k = caches.index_k_pages[1, 2]
    assert (written_k[0, 0], written_v[0, 0], written_index_k[0].float()) == (limit, -limit, limit)
    assert torch.equal(written_k[1], (k[0, 1].float() / 0.5).to(dtype).float())
    assert torch.equal(written_v[1], (v[0, 1].float() / 0.25).to(dtype).float())
    assert torch.equal(written_index_k[1:].float(), index_k[0, 1:].to(dtype).float())
    assert caches.k_pages.float().isnan()[:, 0, :, 0].sum() == 4 * BLOCK_SIZE - sum(slot >= 0 for slot in SLOTS)
