"""A step's rows, split into decode and prefill, each as a batch whose query tokens start at 0."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from msa_backend.vllm.metadata import MSAMetadata, MSAMetadataBuilder


def build(query_lens: list[int], seq_lens: list[int], draft_tokens: int | None = None) -> MSAMetadata:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    num_tokens = int(starts[-1])
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        num_reqs=len(query_lens),
        num_actual_tokens=num_tokens,
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
        block_table_tensor=torch.arange(len(query_lens) * 4, dtype=torch.int32).view(-1, 4),
        slot_mapping=torch.arange(num_tokens),
    )
    speculative = None
    if draft_tokens is not None:
        speculative = SimpleNamespace(num_speculative_tokens=draft_tokens, parallel_drafting=False)
    vllm_config = SimpleNamespace(
        speculative_config=speculative,
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        use_v2_model_runner=False,
    )
    return MSAMetadataBuilder(None, [], vllm_config, torch.device("cpu")).build(0, common)


def lengths(batch) -> list[tuple[int, int, int]]:
    """(new tokens, tokens before, tokens) of each row."""
    new = (batch.cu_seqlens_q[1:] - batch.cu_seqlens_q[:-1]).tolist()
    return list(zip(new, batch.context_lens.tolist(), batch.seq_lens.tolist(), strict=True))


def test_decode_then_prefill():
    step = build([1, 1, 300, 5], [40, 257, 300, 133])
    assert step.num_decode_tokens == 2
    assert lengths(step.decode) == [(1, 39, 40), (1, 256, 257)]
    assert lengths(step.prefill) == [(300, 0, 300), (5, 128, 133)]
    assert step.prefill.cu_seqlens_q.tolist() == [0, 300, 305]
    assert step.prefill.block_table.tolist() == [[8, 9, 10, 11], [12, 13, 14, 15]]
    assert (step.decode.max_query_len, step.prefill.max_query_len) == (1, 300)


@pytest.mark.parametrize(("query_lens", "empty"), [([1, 1], "prefill"), ([7, 9], "decode")])
def test_one_kind_alone(query_lens: list[int], empty: str):
    step = build(query_lens, [200, 300])
    assert getattr(step, empty) is None


def test_drafts_to_verify_are_decode_rows():
    step = build([3, 3, 60], [203, 303, 60], draft_tokens=2)
    assert step.num_decode_tokens == 6
    assert lengths(step.decode) == [(3, 200, 203), (3, 300, 303)]
    assert lengths(step.prefill) == [(60, 0, 60)]


def test_rows_of_uneven_drafts_are_not_one_decode_batch():
    """Decode rows are uniform, as a CUDA graph needs them; the rest is served as prefill, correctly."""
    step = build([3, 2, 3], [203, 302, 403], draft_tokens=2)
    assert lengths(step.decode) == [(3, 200, 203)]
    assert lengths(step.prefill) == [(2, 300, 302), (3, 400, 403)]
