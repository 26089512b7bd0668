"""What the operations refuse, and that the message says what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from msa_backend.kernels import api

from .batches import Row, make_case

CASE = make_case([Row.of(2, 200)], num_kv_heads=2, group=2, dim=16)
BLOCK_IDS = torch.zeros(2, 2, 4, dtype=torch.int32)
NEW = torch.zeros(2, 2, 16)


def attend(**changed: Any) -> None:
    arguments = {
        "q": CASE.q, "k_pages": CASE.k_pages, "v_pages": CASE.v_pages, "block_ids": BLOCK_IDS, "batch": CASE.batch,
        "scale": 1.0,
    }  # fmt: skip
    api.sparse_attention(**arguments | changed)


def select(**changed: Any) -> None:
    arguments = {"index_q": CASE.index_q, "index_k_pages": CASE.index_k_pages, "batch": CASE.batch, "topk": 4}
    api.select_blocks(**arguments | changed)


def write(**changed: Any) -> None:
    arguments = {
        "k": NEW, "v": NEW, "index_k": NEW[:, 0], "k_pages": CASE.k_pages.clone(), "v_pages": CASE.v_pages.clone(),
        "index_k_pages": CASE.index_k_pages.clone(), "slot_mapping": torch.tensor([0, -1]),
    }  # fmt: skip
    api.write_cache(**arguments | changed)


PROJECTED = torch.zeros(2, (4 + 2 * 2 + 3) * 16)
WEIGHT = torch.zeros(16)


def norm_rope_write(**changed: Any) -> None:
    arguments = {
        "projected": PROJECTED, "positions": torch.tensor([0, 1]), "cos_sin_cache": torch.zeros(5, 8),
        "q_weight": WEIGHT, "k_weight": WEIGHT, "index_q_weight": WEIGHT, "index_k_weight": WEIGHT,
        "k_pages": CASE.k_pages.clone(), "v_pages": CASE.v_pages.clone(), "index_k_pages": CASE.index_k_pages.clone(),
        "slot_mapping": torch.tensor([0, -1]), "num_heads": 4, "eps": 1e-6,
    }  # fmt: skip
    api.norm_rope_write(**arguments | changed)


def test_the_unchanged_calls_pass():
    attend()
    select()
    write()
    norm_rope_write()


PAGES_OF_64 = torch.zeros(5, 2, 64, 16)


@pytest.mark.parametrize(
    ("call", "changed", "message"),
    [
        (attend, {"k_pages": PAGES_OF_64}, r"k_pages.*64.*start the engine with KV pages \(blocks\) of 128"),
        (attend, {"v_pages": PAGES_OF_64}, r"v_pages.*64.*of 128 tokens"),
        (attend, {"v_pages": CASE.v_pages[:-1]}, "both must be the same"),
        (attend, {"k_pages": torch.zeros(5, 2, 16, 128).mT}, "stride 128 on its last axis"),
        (attend, {"k_pages": CASE.k_pages.double()}, "k_pages is torch.float64.*must be one of.*convert"),
        (attend, {"k_scale": 2.0}, "torch.float32 with scale 2.0, but only fp8 pages are scaled"),
        (attend, {"scale": 0.0}, "scale is 0.0, but must be positive.*head_dim"),
        (attend, {"scale": float("nan")}, "scale is nan, but must be positive"),
        (attend, {"q": CASE.q[..., :8]}, r"q has shape \(2, 4, 8\).*16\) to match the keys"),
        (attend, {"q": CASE.q[:, :3]}, "q has 3 heads.*2 KV heads.*multiple"),
        (attend, {"q": CASE.q.to(torch.float64)}, "q is torch.float64"),
        (attend, {"block_ids": BLOCK_IDS[:1]}, "1 index heads.*2 KV heads.*as many index heads"),
        (attend, {"block_ids": BLOCK_IDS[:, :1]}, "of 1 tokens, but q has 2"),
        (attend, {"block_ids": BLOCK_IDS.long()}, "torch.int64.*must be torch.int32"),
        (attend, {"out": CASE.q[:1]}, r"out has shape \(1, 4, 16\).*\(2, 4, 16\)"),
        (select, {"topk": 3, "init_blocks": 2, "local_blocks": 2}, r"topk is 3.*2 init \+ 2 local"),
        (select, {"topk": 0, "local_blocks": 0}, "topk is 0, but must be at least 1"),
        (select, {"init_blocks": -1}, "init_blocks=-1.*negative"),
        (select, {"index_q": CASE.index_q[..., :8]}, r"index_q has shape \(2, 2, 8\).*16\)"),
        (select, {"index_q": CASE.index_q.to(torch.float8_e4m3fn)}, "index_q is torch.float8_e4m3fn"),
        (select, {"index_q": CASE.index_q.int()}, "index_q is torch.int32"),
        (select, {"index_k_pages": PAGES_OF_64[:, 0]}, r"index_k_pages has shape \(5, 64, 16\).*of 128 tokens"),
        (write, {"k": NEW[:, :1]}, r"k has shape \(2, 1, 16\), but must be \(2, 2, 16\)"),
        (write, {"v": NEW[:1]}, r"v has shape \(1, 2, 16\)"),
        (write, {"index_k": NEW[:, 0, :8]}, r"index_k has shape \(2, 8\), but must be \(2, 16\)"),
        (write, {"index_k": None}, "index_k_pages is given but index_k is None"),
        (write, {"slot_mapping": torch.zeros(2, dtype=torch.int32)}, "slot_mapping is torch.int32.*int64"),
        (write, {"v_scale": 3.0}, "only fp8 pages are scaled"),
        (norm_rope_write, {"num_heads": 5}, r"projected has shape \(2, 176\), but must be \(2, 192\), 5 query, 2 key"),
        (norm_rope_write, {"projected": PROJECTED.mT.contiguous().mT}, "projected has stride 2 on its last axis"),
        (norm_rope_write, {"projected": PROJECTED.double()}, "projected is torch.float64"),
        (norm_rope_write, {"positions": torch.tensor([0])}, r"positions has shape \(1,\), but must be \(2,\)"),
        (norm_rope_write, {"positions": torch.tensor([0, 1]).int()}, "positions is torch.int32.*int64"),
        (norm_rope_write, {"index_k_weight": WEIGHT[:8]}, r"index_k_weight has shape \(8,\), but must be \(16,\)"),
        (norm_rope_write, {"cos_sin_cache": torch.zeros(5, 7)}, "even rotary_dim of at most 16"),
        (norm_rope_write, {"cos_sin_cache": torch.zeros(5, 18)}, "even rotary_dim of at most 16"),
        (norm_rope_write, {"index_q_dtype": torch.float16}, "index_q_dtype is torch.float16.*leave it out"),
        (norm_rope_write, {"k_scale": 2.0}, "only fp8 pages are scaled"),
    ],
)
def test_refusals(call: Any, changed: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message) as caught:
        call(**changed)
    assert "\n" not in str(caught.value)
