"""The definition itself, against examples worked by hand and against torch's own attention."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from msa_backend.kernels import reference
from msa_backend.kernels.batch import BLOCK_SIZE, Batch
from msa_backend.kernels.caches import LayerCaches
from msa_backend.kernels.selection import Selection

from .batches import Row, make_case


def by_hand() -> tuple[torch.Tensor, LayerCaches, Batch]:
    """Two new tokens, at 300 and 301, whose blocks hold the index keys 3, 1 and 0; 301's own key is 2."""
    index_k_pages = torch.full((4, BLOCK_SIZE, 1), torch.nan)
    index_k_pages[2], index_k_pages[0], index_k_pages[3, :45], index_k_pages[3, 45] = -5.0, 1.0, 0.0, 2.0
    index_k_pages[2, 77] = 3.0
    batch = Batch(
        cu_seqlens_q=torch.tensor([0, 2], dtype=torch.int32),
        seq_lens=torch.tensor([302], dtype=torch.int32),
        block_table=torch.tensor([[2, 0, 3, -7]], dtype=torch.int32),
        max_query_len=2,
        max_seq_len=302,
    )
    nothing = torch.empty(4, 1, BLOCK_SIZE, 1)
    return torch.tensor([[[1.0], [-1.0]], [[1.0], [-1.0]]]), LayerCaches(nothing, nothing, index_k_pages), batch


def test_scores_by_hand():
    scores = reference.block_scores(*by_hand())
    assert scores.tolist() == [[[3, 1, 0], [3, 1, 2]], [[5, -1, 0], [5, -1, 0]]]


def test_selection_by_hand():
    def selected(**selection: int) -> list:
        return reference.select_blocks(*by_hand(), Selection(**selection)).tolist()

    assert selected(topk=2, local_blocks=0) == [[[0, 1], [0, 2]], [[0, 2], [0, 2]]]
    assert selected(topk=1, local_blocks=1) == [[[2], [2]], [[2], [2]]]
    assert selected(topk=2, local_blocks=2) == [[[1, 2], [1, 2]], [[1, 2], [1, 2]]]
    assert selected(topk=1, init_blocks=1, local_blocks=0) == [[[0], [0]], [[0], [0]]]
    assert selected(topk=4) == [[[0, 1, 2, -1]] * 2] * 2


def test_dense_is_torch_attention():
    case = make_case([Row.of(200), Row.of(30, 300)], num_kv_heads=2, group=3)
    out = reference.dense_attention(case.q, case.caches, case.batch, case.scale)
    for seq in reference.sequences(case.batch):
        q = case.q[seq.tokens].transpose(0, 1).double()
        pages = case.caches.k_pages, case.caches.v_pages
        k, v = (x[seq.pages, :, seq.offsets].transpose(0, 1).double() for x in pages)
        expected = scaled_dot_product_attention(q, k, v, attn_mask=seq.visible, enable_gqa=True)
        torch.testing.assert_close(out[seq.tokens], expected.transpose(0, 1))
