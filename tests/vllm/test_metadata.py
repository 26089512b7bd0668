"""A step as the kernels get it from vLLM."""

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
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        use_v2_model_runner=False,
    )
    return MSAMetadataBuilder(None, [], vllm_config, torch.device("cpu"))


def build(query_lens: list[int], seq_lens: list[int], draft_tokens: int | None = None) -> MSAMetadata:
    return builder(draft_tokens).build(0, common_metadata(query_lens, seq_lens))


def test_a_long_step_is_cut():
    """Decode rows and drafts come first, as vLLM orders them."""
    decode, prompts = build([3, 3, 600, 50], [203, 303, 600, 178], draft_tokens=2).step.parts
    assert (decode.tokens, prompts.tokens) == (slice(0, 6), slice(6, 656))
    assert decode.batch.seq_lens.tolist() == [203, 303]
    assert prompts.batch.context_lens.tolist() == [0, 128]


@pytest.mark.parametrize(("query_lens", "seq_lens"), [([1, 300, 5], [40, 300, 133]), ([4] * 200, [500] * 200)])
def test_a_short_step_is_taken_as_it_is(query_lens: list[int], seq_lens: list[int]):
    """The host works nothing out for it: vLLM's own tensors, its own bounds."""
    common = common_metadata(query_lens, seq_lens, max_seq_len=4096)
    metadata = builder().build(0, common)
    (part,) = metadata.step.parts
    assert part.batch.seq_lens is common.seq_lens
    assert part.batch.cu_seqlens_q is common.query_start_loc
    assert part.batch.block_table is common.block_table_tensor
    assert (part.batch.max_query_len, part.batch.max_seq_len) == (max(query_lens), 4096)
    assert metadata.slot_mapping is common.slot_mapping


def test_a_draft_goes_on_by_the_same_description():
    """vLLM draws all steps of a draft into one graph: between them lengths change in place, and it says so."""
    common = common_metadata([1, 1], [48, 30])
    metadata = builder().build(0, common)
    (part,) = metadata.step.parts
    part.batch.kept["plan"] = "of the first step"
    assert part.batch.context_lens.tolist() == [47, 29]
    common.seq_lens += 1
    builder().update_draft_decode_metadata(metadata)
    assert not part.batch.kept
    assert part.batch.context_lens.tolist() == [48, 30]


def test_a_draft_is_one_graph_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch):
    from msa_backend.vllm import metadata

    assert not builder().supports_draft_decode_metadata_update
    monkeypatch.setattr(metadata, "choose", lambda device: SimpleNamespace(is_triton=True))
    assert builder().supports_draft_decode_metadata_update
    assert metadata.IndexKeyMetadataBuilder.supports_draft_decode_metadata_update


def test_drafts_change_lengths_in_place():
    """vLLM's drafting proposer does, between two steps that one description serves; what was worked out before must
    not stay."""
    common = common_metadata([2, 1], [48, 30])
    first = builder().build(0, common).step.parts[0].batch
    assert first.context_lens.tolist() == [46, 29]
    common.seq_lens += 1
    second = builder().build(0, common).step.parts[0].batch
    assert second.context_lens.tolist() == [47, 30]


def test_what_is_recorded_serves_any_step_within_its_bounds():
    """vLLM records with rows of one token, of a step that may be one prompt as well."""
    common = common_metadata([1] * 600, [1] * 600, max_seq_len=4096)
    common.max_query_len = 600
    (part,) = builder().build_for_cudagraph_capture(common).step.parts
    assert part.batch.seq_lens is common.seq_lens
    assert (part.batch.max_query_len, part.batch.max_seq_len) == (600, 4096)


def test_the_torch_path_is_kept_out_of_graphs():
    from vllm.v1.attention.backend import AttentionCGSupport

    vllm_config = SimpleNamespace(device_config=SimpleNamespace(device_type="cpu"))
    assert MSAMetadataBuilder.get_cudagraph_support(vllm_config, None) == AttentionCGSupport.NEVER
