"""The dense layers on a CPU: MSA's kernel, told to attend to every block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from msa_backend.kernels import api as kernels
from msa_backend.kernels.batch import BLOCK_SIZE, Batch
from msa_backend.kernels.cpu.paging import locate_tokens

from .metadata import MSAMetadata, build
from .pools import heads_first

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


class CpuDenseAttnBackend(AttentionBackend):
    """Full causal attention.

    SGLang has two of its own on a CPU. One needs AMX and SGLang's compiled kernels. The other attends for as many
    queries as the sequence has tokens, however few are new: 256 behind 5,744 took it 1.2 s of a core, and this 0.11 s
    (8 heads; a whole prompt of 6,000 took 0.8 and 1.2 s). It has no rows of drafts to verify either.
    """

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__()
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.req_to_token = runner.req_to_token_pool.req_to_token
        self.max_context_len = runner.model_config.context_len
        self.forward_metadata: MSAMetadata | None = None

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        self.forward_metadata = build(forward_batch, self.req_to_token, self.max_context_len, in_capture=in_capture)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def support_triton(self) -> bool:
        return False

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Shapes as in ``MSAAttnBackend.forward``."""
        output = q.new_empty(q.shape[0], layer.tp_q_head_num * layer.v_head_dim)
        if forward_batch.forward_mode.is_idle():
            return output.zero_()
        step = self.forward_metadata
        assert step is not None, "attention before init_forward_metadata"
        k_pages, v_pages = (heads_first(slots) for slots in self.token_to_kv_pool.get_kv_buffer(layer.layer_id))
        scales = {"k_scale": layer.k_scale_float or 1.0, "v_scale": layer.v_scale_float or 1.0}
        new = slice(0, step.num_tokens)
        if save_kv_cache:
            slots = forward_batch.out_cache_loc[new].long()
            kernels.write_cache(k[new], v[new], None, k_pages, v_pages, None, slots, **scales)
        query, out = (x.view(-1, layer.tp_q_head_num, layer.head_dim) for x in (q, output))
        for rows in step.rows:
            block_ids = every_block(rows.batch, rows.tokens.stop - rows.tokens.start, layer.tp_k_head_num)
            kernels.sparse_attention(
                query[rows.tokens],
                k_pages,
                v_pages,
                block_ids,
                rows.batch,
                scale=layer.scaling,
                out=out[rows.tokens],
                **scales,
            )
        output[step.num_tokens :].zero_()
        return output


def every_block(batch: Batch, num_tokens: int, num_kv_heads: int) -> torch.Tensor:
    """``[num_kv_heads, num_tokens, blocks]`` int32: all blocks that a token sees, then -1."""
    _, position = locate_tokens(batch, num_tokens)
    block = torch.arange(-(-batch.max_seq_len // BLOCK_SIZE), dtype=torch.int32, device=position.device)
    # A token that is padding stands at -1, in no block.
    seen = block <= torch.div(position, BLOCK_SIZE, rounding_mode="floor")[:, None]
    return torch.where(seen, block, -1).expand(num_kv_heads, -1, -1)
