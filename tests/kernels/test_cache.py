"""Writing the cache."""

from __future__ import annotations

import pytest
import torch

from msa_backend.kernels.batch import BLOCK_SIZE

from .batches import HALF, LAYOUTS, lay_out
from .implementations import Implementation, every_implementation

SLOTS = [130, 5, -1, 127, 128, 510, -100]


def new_tokens(dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    n = len(SLOTS)
    fused = torch.randn(n, 5, 16, generator=rng).to(dtype).to(device)  # k and v as views of one projection
    return fused[:, 0:2], fused[:, 2:4], fused[:, 4]


def empty_cache(
    dtype: torch.dtype, device: str, layout: str = "halves"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    nothing = torch.full((4, BLOCK_SIZE, 2, 32), torch.nan, device=device).to(dtype)
    return *lay_out(nothing, layout), torch.full((4, BLOCK_SIZE, 16), torch.nan, device=device).to(dtype)


@every_implementation
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, HALF, torch.float32])
def test_each_token_in_its_slot_and_nothing_else(ops: Implementation, layout: str, dtype: torch.dtype):
    new, cache = new_tokens(dtype, ops.device), empty_cache(dtype, ops.device, layout)
    ops.write_cache(*new, *cache, torch.tensor(SLOTS, device=ops.device))
    for x, pages in zip(new, cache, strict=True):
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
    k_pages, v_pages, _ = empty_cache(torch.float32, ops.device)
    ops.write_cache(k, v, None, k_pages, v_pages, None, torch.tensor(SLOTS, device=ops.device))
    assert torch.equal(k_pages[1, :, 2], k[0])
    assert torch.equal(v_pages[1, :, 2], v[0])


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("new_dtype", [HALF, torch.float32])
def test_fp8_is_scaled_and_saturates(ops: Implementation, dtype: torch.dtype, new_dtype: torch.dtype):
    k, v, index_k = (x.clone() for x in new_tokens(new_dtype, ops.device))
    k[0, 0, 0], v[0, 0, 0], index_k[0, 0] = 6e4, -6e4, 6e4
    k_pages, v_pages, index_k_pages = empty_cache(dtype, ops.device)
    slots = torch.tensor(SLOTS, device=ops.device)
    ops.write_cache(k, v, index_k, k_pages, v_pages, index_k_pages, slots, k_scale=0.5, v_scale=0.25)

    limit = torch.finfo(dtype).max
    written_k, written_v, written_index_k = k_pages[1, :, 2].float(), v_pages[1, :, 2].float(), index_k_pages[1, 2]
    assert (written_k[0, 0], written_v[0, 0], written_index_k[0].float()) == (limit, -limit, limit)
    assert torch.equal(written_k[1], (k[0, 1].float() / 0.5).to(dtype).float())
    assert torch.equal(written_v[1], (v[0, 1].float() / 0.25).to(dtype).float())
    assert torch.equal(written_index_k[1:].float(), index_k[0, 1:].to(dtype).float())
    assert k_pages.float().isnan()[:, 0, :, 0].sum() == 4 * BLOCK_SIZE - sum(slot >= 0 for slot in SLOTS)
