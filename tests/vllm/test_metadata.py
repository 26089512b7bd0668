"""A step's rows, split into decode and prefill, each as a batch whose query tokens start at 0."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from msa_backend.vllm.metadata import MSAMetadata, MSAMetadataBuilder


def common_metadata(query_lens: list[int], seq_lens: list[int], max_seq_len: int | None = None) -> Any:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    num_tokens = int(starts[-1])
    lengths_of_rows = torch.tensor(seq_lens, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths_of_rows,
        seq_lens_cpu_upper_bound=lengths_of_rows,
        num_reqs=len(query_lens),
        num_actual_tokens=num_tokens,
        max_query_len=max(query_lens),
        max_seq_len=max_seq_len or max(seq_lens),
        block_table_tensor=torch.arange(len(query_lens) * 4, dtype=torch.int32).view(-1, 4),
        slot_mapping=torch.arange(num_tokens),
    )


def builder(draft_tokens: int | None = None) -> MSAMetadataBuilder:
    speculative = None
    if draft_tokens is not None:
        speculative = SimpleNamespace(num_speculative_tokens=draft_tokens, parallel_drafting=False)
    vllm_config = SimpleNamespace(
        speculative_config=speculative,
        scheduler_config=SimpleNamespace(max_num_batched_tokens=512),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        use_v2_model_runner=False,
    )
    return MSAMetadataBuilder(None, [], vllm_config, torch.device("cpu"))


def build(query_lens: list[int], seq_lens: list[int], draft_tokens: int | None = None) -> MSAMetadata:
    return builder(draft_tokens).build(0, common_metadata(query_lens, seq_lens))


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
    assert (step.decode.max_seq_len, step.prefill.max_seq_len) == (257, 300)
    assert 0 <= step.prefill.min_context_len <= int(step.prefill.context_lens.min())


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


def test_a_graph_finds_a_step_where_it_recorded_one():
    """Bounds as vLLM gives them for the recording, larger than any row; what changes between steps, at one address."""
    steps = builder()
    recorded = steps.build_for_cudagraph_capture(common_metadata([1, 1, 1], [1, 1, 1], max_seq_len=4096)).decode
    address = recorded.context_lens.data_ptr()
    assert recorded.max_seq_len == 4096
    replayed = steps.build(0, common_metadata([1, 1, 0], [40, 257, 0])).decode
    assert replayed.context_lens.data_ptr() == address
    assert recorded.context_lens.tolist() == [39, 256, 0]
    assert replayed.num_seqs == 3


def test_the_torch_path_is_kept_out_of_graphs():
    from vllm.v1.attention.backend import AttentionCGSupport

    vllm_config = SimpleNamespace(device_config=SimpleNamespace(device_type="cpu"))
    assert MSAMetadataBuilder.get_cudagraph_support(vllm_config, None) == AttentionCGSupport.NEVER


def test_the_bound_of_contexts_allows_for_drafts_that_were_not_accepted():
    """vLLM's lengths on the host take every draft for accepted; the kernels must not believe a context to be longer
    than it is."""
    steps = builder(draft_tokens=3)
    common = common_metadata([9, 7], [5000, 6000])
    common.seq_lens_cpu_upper_bound = common.seq_lens_cpu_upper_bound + 3
    batch = steps.build(0, common).prefill
    assert batch is not None
    contexts = batch.context_lens.tolist()
    assert min(contexts) - 16 < batch.min_context_len <= min(contexts)
