"""SGLang's in-tree Triton kernels for MiniMax-M3, on its own slot pools.

Its decode top-k is compiled with nvcc at first use; where that fails or is slow to start,
``SGLANG_OPT_USE_MINIMAX_DECODE_TOPK_RADIX=0`` takes its Triton one. Drafts are verified by its prefill kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from msa_backend.bench.baselines import Bound, UnsupportedCaseError
from msa_backend.bench.cases import BLOCK_SIZE
from msa_backend.bench.inputs import Inputs


def unavailable(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "SGLang's kernels for MiniMax-M3 need a GPU"
    try:
        from sglang.kernels.ops.attention.minimax_sparse.decode import flash_with_topk_idx  # noqa: F401
    except Exception as error:  # an engine's import raises whatever its extensions raise
        return f"SGLang's kernels do not import: {type(error).__name__}: {error}"
    return None


def bind(inputs: Inputs, block_ids: Tensor | None) -> Bound:
    from sglang.kernels.ops.attention.minimax_sparse.decode.flash_with_topk_idx import flash_decode_with_topk_idx
    from sglang.kernels.ops.attention.minimax_sparse.decode.topk_sparse import flash_decode_with_gqa_share_sparse
    from sglang.kernels.ops.attention.minimax_sparse.prefill.flash_with_topk_idx import flash_prefill_with_topk_index
    from sglang.kernels.ops.attention.minimax_sparse.prefill.topk_sparse import flash_prefill_with_gqa_share_sparse

    case, batch, topk = inputs.case, inputs.batch, inputs.case.topk
    if case.dtype == "fp32":
        raise UnsupportedCaseError("SGLang's kernels take 16-bit queries only")
    index_q = inputs.index_q if inputs.index_q_fp8 is None else inputs.index_q_fp8
    index_k = inputs.index_k_pages.view(-1, 1, case.dim)
    k, v = inputs.cache.slot_pools
    slots = inputs.cache.slot_table
    rows = torch.arange(case.batch, device=k.device)

    if case.mode == "decode":

        def select() -> Tensor:
            return flash_decode_with_topk_idx(
                index_q,
                None,
                index_k,
                None,
                slots,
                batch.seq_lens,
                batch.max_seq_len,
                rows,
                BLOCK_SIZE,
                topk,
                0,
                1,
                disable_index_value=True,
                page_size=BLOCK_SIZE,
            )[1]

        def attend() -> Tensor:
            return flash_decode_with_gqa_share_sparse(
                inputs.q, None, k, v, slots, batch.seq_lens, rows, BLOCK_SIZE, block_ids, page_size=BLOCK_SIZE
            )

        return Bound(attend, select)

    # With query blocks of one token these are the tokens' own numbers; given, they are not worked out on the host.
    query_blocks = {"cu_seqblocks_q": batch.cu_seqlens_q, "max_seqblock_q": batch.max_query_len}

    def select_chunk() -> Tensor:
        return flash_prefill_with_topk_index(
            index_q,
            index_k,
            None,
            None,
            slots,
            rows,
            batch.cu_seqlens_q,
            batch.seq_lens,
            inputs.context_lens,
            batch.max_query_len,
            batch.max_seq_len,
            1,
            BLOCK_SIZE,
            topk,
            0,
            1,
            score_type="max",
            disable_index_value=True,
            all_seqblock_q=case.num_tokens,
            page_size=BLOCK_SIZE,
            **query_blocks,
        )[1]

    def attend_chunk() -> Tensor:
        return flash_prefill_with_gqa_share_sparse(
            inputs.q,
            k,
            v,
            None,
            slots,
            rows,
            block_ids,
            1,
            BLOCK_SIZE,
            batch.cu_seqlens_q,
            batch.seq_lens,
            inputs.context_lens,
            batch.max_query_len,
            **query_blocks,
        )

    return Bound(attend_chunk, select_chunk)
