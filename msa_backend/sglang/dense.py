"""The dense layers on a CPU: MSA's kernel, told to attend to every block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from msa_backend.attend import attend
from msa_backend.kernels import api as kernels
from msa_backend.kernels.api import LayerCaches, Step

from .metadata import build
from .pools import caches_of

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
        self.forward_metadata: Step | None = None
        self._caches: dict[int, LayerCaches] = {}

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
        if layer.layer_id not in self._caches:
            self._caches[layer.layer_id] = caches_of(self.token_to_kv_pool, layer, is_sparse=False)
        caches = self._caches[layer.layer_id]
        new = slice(0, step.num_tokens)
        if save_kv_cache:
            kernels.write(k[new], v[new], None, caches, forward_batch.out_cache_loc[new].long())
        q, out = (x.view(-1, layer.tp_q_head_num, layer.head_dim) for x in (q, output))
        attend(q, None, caches, step, None, layer.scaling, out)
        return output
