"""Steps as SGLang describes them, and its caches, without an engine around them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

PAGE = 128
DIM = 128
MAX_TOKENS = 8 * PAGE


def request_table(num_requests: int, pages_each: int, seed: int = 0) -> torch.Tensor:
    """``[num_requests, MAX_TOKENS]`` slots of requests whose pages lie about; page 0 is SGLang's for padding."""
    generator = torch.Generator().manual_seed(seed)
    pages = 1 + torch.randperm(num_requests * pages_each, generator=generator).view(num_requests, pages_each)
    table = torch.zeros(num_requests, MAX_TOKENS, dtype=torch.int32)
    table[:, : pages_each * PAGE] = (pages[:, :, None] * PAGE + torch.arange(PAGE)).flatten(1).int()
    return table


def step(mode: str, requests: list[int], table: torch.Tensor, **fields: Any) -> Any:
    """As much of a ``ForwardBatch`` as the backend reads."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    empty = {"seq_lens": None, "seq_lens_cpu": None, "extend_seq_lens": None, "extend_seq_lens_cpu": None}
    empty |= {"extend_prefix_lens": None, "extend_prefix_lens_cpu": None, "spec_info": None}
    empty |= {"_attn_output": None}
    batch = SimpleNamespace(forward_mode=ForwardMode[mode], req_pool_indices=torch.tensor(requests), **(empty | fields))
    if batch.seq_lens_cpu is None and batch.seq_lens is not None:
        batch.seq_lens_cpu = batch.seq_lens
    return batch


def decode(requests: list[int], lengths: list[int], table: torch.Tensor) -> Any:
    """One new token each, the last of ``lengths``."""
    slots = [int(table[request, length - 1]) for request, length in zip(requests, lengths, strict=True)]
    return step("DECODE", requests, table, seq_lens=torch.tensor(lengths), out_cache_loc=torch.tensor(slots))


def extend(requests: list[int], new: list[int], before: list[int], table: torch.Tensor, mode: str = "EXTEND") -> Any:
    """``new`` tokens behind ``before`` others."""
    slots = torch.cat([table[request, b : b + n] for request, n, b in zip(requests, new, before, strict=True)])
    return step(
        mode,
        requests,
        table,
        seq_lens=torch.tensor(new) + torch.tensor(before),
        extend_seq_lens=torch.tensor(new, dtype=torch.int32),
        extend_seq_lens_cpu=new,
        extend_prefix_lens=torch.tensor(before, dtype=torch.int32),
        extend_prefix_lens_cpu=before,
        out_cache_loc=slots.long(),
    )


def verify(requests: list[int], accepted: list[int], drafts: int, table: torch.Tensor) -> Any:
    """``drafts`` tokens to verify behind ``accepted`` ones, which alone are in the lengths."""
    slots = torch.cat([table[request, a : a + drafts] for request, a in zip(requests, accepted, strict=True)])
    return step(
        "TARGET_VERIFY",
        requests,
        table,
        seq_lens=torch.tensor(accepted),
        spec_info=SimpleNamespace(draft_token_num=drafts),
        out_cache_loc=slots.long(),
    )


def idle(table: torch.Tensor) -> Any:
    empty = torch.empty(0, dtype=torch.int64)
    return step("IDLE", [], table, seq_lens=empty, out_cache_loc=empty)


def pool(num_pages: int, kv_heads: int, dtype: torch.dtype = torch.float32) -> Any:
    """SGLang's cache for a dense layer 0 and a sparse layer 1, with garbage in every slot."""
    from sglang.srt.mem_cache.memory_pool import MiniMaxSparseKVPool

    made = MiniMaxSparseKVPool(
        size=(num_pages - 1) * PAGE,
        page_size=PAGE,
        dtype=dtype,
        index_dtype=torch.float32,
        head_num=kv_heads,
        head_dim=DIM,
        idx_head_dim=DIM,
        dense_layer_ids=[0],
        sparse_layer_ids=[1],
        disable_value_sparse_layer_ids=[1],
        device="cpu",
        start_layer=0,
        end_layer=2,
    )
    for buffer in (*made.get_kv_buffer(0), *made.get_kv_buffer(1), made.get_index_k_buffer(1)):
        if buffer.element_size() == 1:
            buffer.view(torch.uint8).fill_(0x7F)  # NaN
        else:
            buffer.fill_(torch.nan)
    return made
