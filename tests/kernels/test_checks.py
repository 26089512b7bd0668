"""What the operations refuse, and that the message says what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from msa_backend.kernels import api
from msa_backend.kernels.caches import LayerCaches
from msa_backend.kernels.norms import HeadNorms
from msa_backend.kernels.selection import Selection

from .batches import Row, make_case

CASE = make_case([Row.of(2, 200)], num_kv_heads=2, group=2, dim=16)
CACHES = CASE.caches
BLOCK_IDS = torch.zeros(2, 2, 4, dtype=torch.int32)
NEW = torch.zeros(2, 2, 16)
SLOTS = torch.tensor([0, -1])


def bind(**changed: Any) -> LayerCaches:
    return LayerCaches(**{"k_pages": CACHES.k_pages, "v_pages": CACHES.v_pages} | changed)


def sparse_attention(**changed: Any) -> None:
    arguments = {"q": CASE.q, "caches": CACHES, "block_ids": BLOCK_IDS, "batch": CASE.batch, "scale": 1.0}
    api.sparse_attention(**arguments | changed)


def select(**changed: Any) -> None:
    arguments = {"index_q": CASE.index_q, "caches": CACHES, "batch": CASE.batch, "selection": Selection(4)}
    api.select_blocks(**arguments | changed)


def attend(**changed: Any) -> None:
    arguments = {"q": CASE.q, "index_q": CASE.index_q, "caches": CACHES, "batch": CASE.batch,
                 "selection": Selection(4), "scale": 1.0}  # fmt: skip
    api.attend(**arguments | changed)


def write(**changed: Any) -> None:
    arguments = {"k": NEW, "v": NEW, "index_k": NEW[:, 0], "caches": caches_to_write(), "slot_mapping": SLOTS}
    api.write(**arguments | changed)


def caches_to_write() -> LayerCaches:
    return LayerCaches(CACHES.k_pages.clone(), CACHES.v_pages.clone(), CACHES.index_k_pages.clone())


PROJECTED = torch.zeros(2, (4 + 2 * 2 + 3) * 16)
WEIGHT = torch.zeros(16)


def norms(**changed: Any) -> HeadNorms:
    arguments = dict.fromkeys(("q_weight", "k_weight", "index_q_weight", "index_k_weight"), WEIGHT)
    return HeadNorms(**arguments | {"cos_sin_cache": torch.zeros(5, 8), "eps": 1e-6} | changed)


def norm_rope_write(**changed: Any) -> None:
    arguments = {"projected": PROJECTED, "positions": torch.tensor([0, 1]), "norms": norms(),
                 "caches": caches_to_write(), "slot_mapping": SLOTS}  # fmt: skip
    api.norm_rope_write(**arguments | changed)


def test_the_unchanged_calls_pass():
    sparse_attention()
    attend()
    select()
    bind()
    write()
    norm_rope_write()


PAGES_OF_64 = torch.zeros(5, 2, 64, 16)


@pytest.mark.parametrize(
    ("call", "changed", "message"),
    [
        (bind, {"k_pages": PAGES_OF_64}, r"k_pages.*64.*start the engine with KV pages \(blocks\) of 128"),
        (bind, {"v_pages": PAGES_OF_64}, r"v_pages.*64.*of 128 tokens"),
        (bind, {"v_pages": CACHES.v_pages[:-1]}, "both must be the same"),
        (bind, {"v_pages": CACHES.v_pages.half()}, "both must be the same"),
        (bind, {"k_pages": torch.zeros(5, 2, 16, 128).mT}, "stride 128 on its last axis"),
        (bind, {"k_pages": CACHES.k_pages.double()}, "k_pages is torch.float64.*must be one of.*convert"),
        (bind, {"k_scale": 2.0}, "k_scale is 2.0, but k_pages is torch.float32 and only fp8 is scaled"),
        (bind, {"v_scale": 3.0}, "v_scale is 3.0.*only fp8 is scaled"),
        (bind, {"index_k_pages": PAGES_OF_64[:, 0]}, r"index_k_pages has shape \(5, 64, 16\).*of 128 tokens"),
        (bind, {"index_k_pages": CACHES.index_k_pages[:-1]}, "index_k_pages has shape.*one for each of k_pages"),
        (Selection, {"topk": 3, "init_blocks": 2, "local_blocks": 2}, r"topk is 3.*2 init \+ 2 local"),
        (Selection, {"topk": 0, "local_blocks": 0}, "topk is 0, but must be at least 1"),
        (Selection, {"topk": 4, "init_blocks": -1}, "init_blocks=-1.*negative"),
        (sparse_attention, {"scale": 0.0}, "scale is 0.0, but must be positive.*head_dim"),
        (sparse_attention, {"scale": float("nan")}, "scale is nan, but must be positive"),
        (sparse_attention, {"q": CASE.q[..., :8]}, r"q has shape \(2, 4, 8\).*16\) to match the keys"),
        (sparse_attention, {"q": CASE.q[:, :3]}, "q has 3 heads.*2 KV heads.*multiple"),
        (sparse_attention, {"q": CASE.q.to(torch.float64)}, "q is torch.float64"),
        (sparse_attention, {"block_ids": BLOCK_IDS[:1]}, "1 index heads.*2 KV heads.*as many index heads"),
        (sparse_attention, {"block_ids": BLOCK_IDS[:, :1]}, "of 1 tokens, but q has 2"),
        (sparse_attention, {"block_ids": BLOCK_IDS.long()}, "torch.int64.*must be torch.int32"),
        (sparse_attention, {"out": CASE.q[:1]}, r"out has shape \(1, 4, 16\).*\(2, 4, 16\)"),
        (sparse_attention, {"out": torch.zeros(2, 16, 4).mT}, "stride 4 on its last axis"),
        (select, {"index_q": CASE.index_q[..., :8]}, r"index_q has shape \(2, 2, 8\).*16\)"),
        (select, {"index_q": CASE.index_q.to(torch.float8_e4m3fn)}, "index_q is torch.float8_e4m3fn"),
        (select, {"index_q": CASE.index_q.int()}, "index_q is torch.int32"),
        (select, {"caches": bind()}, "the caches have no index keys"),
        (attend, {"index_q": CASE.index_q[:, :1]}, "1 index heads.*2 KV heads"),
        (attend, {"index_q": CASE.index_q[:1]}, "index_q has 1 tokens, but q has 2"),
        (attend, {"scale": -1.0}, "scale is -1.0, but must be positive"),
        (write, {"k": NEW[:, :1]}, r"k has shape \(2, 1, 16\), but must be \(2, 2, 16\)"),
        (write, {"v": NEW[:1]}, r"v has shape \(1, 2, 16\)"),
        (write, {"index_k": NEW[:, 0, :8]}, r"index_k has shape \(2, 8\), but must be \(2, 16\)"),
        (write, {"index_k": None}, "the caches has index keys but index_k is None"),
        (write, {"caches": bind()}, "index_k has index keys but the caches have none"),
        (write, {"slot_mapping": torch.zeros(2, dtype=torch.int32)}, "slot_mapping is torch.int32.*int64"),
        (norms, {"index_k_weight": WEIGHT[:8]}, r"index_k_weight has shape \(8,\), but must be \(16,\)"),
        (norms, {"cos_sin_cache": torch.zeros(5, 7)}, "even rotary_dim of at most 16"),
        (norms, {"cos_sin_cache": torch.zeros(5, 18)}, "even rotary_dim of at most 16"),
        (norm_rope_write, {"projected": PROJECTED[:, :-8]}, r"projected has shape \(2, 168\), .* multiple of 2 query"),
        (norm_rope_write, {"projected": PROJECTED[:, :-16]}, r"projected has shape \(2, 160\), .* multiple of 2 query"),
        (norm_rope_write, {"projected": PROJECTED.mT.contiguous().mT}, "projected has stride 2 on its last axis"),
        (norm_rope_write, {"projected": PROJECTED.double()}, "projected is torch.float64"),
        (norm_rope_write, {"positions": torch.tensor([0])}, r"positions has shape \(1,\), but must be \(2,\)"),
        (norm_rope_write, {"positions": torch.tensor([0, 1]).int()}, "positions is torch.int32.*int64"),
        (norm_rope_write, {"index_q_dtype": torch.float16}, "index_q_dtype is torch.float16.*leave it out"),
        (norm_rope_write, {"caches": bind()}, "norms are of 16 and 16 channels, but the caches keep heads of 16 and"),
    ],
)
def test_refusals(call: Any, changed: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message) as caught:
        call(**changed)
    assert "\n" not in str(caught.value)
