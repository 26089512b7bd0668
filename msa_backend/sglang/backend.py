"""MSAAttnBackend: sparse layers by MSA's kernels, dense layers by a backend of SGLang's own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend, SharedReadEnds
from torch.nn.functional import pad

from msa_backend import refusals
from msa_backend.attend import attend, index_query_dtype
from msa_backend.config import MSAError
from msa_backend.kernels import api as kernels
from msa_backend.kernels.api import HeadNorms, LayerCaches, Selection, Step
from msa_backend.kernels.dispatch import choose
from msa_backend.model.sglang.causal_lm import MiniMaxM3ForCausalLM
from msa_backend.names import M3_ARCHITECTURES

from .dense import CpuDenseAttnBackend
from .engine import get_default_attn_backend, resolving_view
from .in_place import require_in_place
from .metadata import LastingBuffers, build
from .pools import caches_of, check_pool

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger("sglang.msa_backend")

ON_EVERY_GPU = "triton"


def create(runner: ModelRunner) -> MSAAttnBackend:
    """The backend called ``msa``, with the platform's best for the dense layers.

    Raises:
        MSAError: with the one sentence for the user.
    """
    require_in_place()
    return MSAAttnBackend(runner, CpuDenseAttnBackend(runner) if runner.device == "cpu" else _dense(runner))


def _dense(runner: ModelRunner) -> AttentionBackend:
    """What SGLang finds best for a model like this on this GPU, or else what it can do on every GPU."""
    name = get_default_attn_backend(runner.server_args, use_mla_backend=False, model_config=runner.model_config)
    try:
        return ATTENTION_BACKENDS[name](runner)
    except ImportError as error:
        if name == ON_EVERY_GPU:
            raise MSAError(
                f"SGLang's attention backend {name} does not import ({error}), and MSA leaves the dense layers to it; "
                "install SGLang with its GPU requirements, or name another one by --attention-backend"
            ) from error
        logger.warning(
            "SGLang's attention backend %s does not import (%s), so %s serves the dense layers, more slowly; install "
            "sglang-kernel, or name a backend by --attention-backend.",
            name,
            error,
            ON_EVERY_GPU,
        )
    return ATTENTION_BACKENDS[ON_EVERY_GPU](runner)


def wrap(
    original: Callable[[ModelRunner, AttentionBackend], AttentionBackend],
    runner: ModelRunner,
    full_attn_backend: AttentionBackend,
) -> AttentionBackend:
    """In place of SGLang's own wrapping: another backend that was selected serves MiniMax-M3's dense layers."""
    if isinstance(full_attn_backend, MSAAttnBackend):
        return full_attn_backend
    if set(M3_ARCHITECTURES).intersection(runner.model_config.hf_config.architectures):
        return MSAAttnBackend(runner, full_attn_backend)
    return original(runner, full_attn_backend)


class MSAAttnBackend(AttentionBackend):
    """MiniMax Sparse Attention over pages of 128 tokens, one page per sparse block.

    Args:
        runner: SGLang's, whose model and caches are there already.
        dense: the backend of the dense layers.

    Raises:
        MSAError: the model or the caches are not those that MSA serves.
    """

    def __init__(self, runner: ModelRunner, dense: AttentionBackend) -> None:
        super().__init__()
        _check_model(runner)
        check_pool(runner.token_to_kv_pool, runner.page_size)
        self.dense = dense
        config = runner.model.m3_config.msa
        self.selection = Selection(config.topk, config.init_blocks, config.local_blocks)
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.req_to_token_pool = runner.req_to_token_pool
        self.req_to_token = runner.req_to_token_pool.req_to_token
        self.max_context_len = runner.model_config.context_len
        self.lasting: LastingBuffers | None = None
        self.forward_metadata: Step | None = None
        self._caches: dict[int, LayerCaches] = {}
        self.extend_dummy_seqs_capped_by_req_pool = dense.extend_dummy_seqs_capped_by_req_pool
        self.choice = choose(torch.device(runner.device))
        logger.info("%s Dense layers: %s.", self.choice.why, type(dense).__name__)
        if self.choice.is_triton:
            self._warm_up(runner)

    # SGLang prepares a step in one call when eager, and in two around the recorded part when it goes through a graph.

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        self._prepare(forward_batch, in_capture=False)
        self.dense.init_forward_metadata(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        self._prepare(forward_batch, in_capture)
        self.dense.init_forward_metadata_out_graph(forward_batch, in_capture)

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        self.dense.init_forward_metadata_in_graph(forward_batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        if not self.choice.is_triton:
            raise MSAError(
                f"CUDA graphs are on, but MSA's kernels cannot be recorded here ({self.choice.why}); pass "
                "--disable-cuda-graph"
            )
        self.lasting = LastingBuffers(max_bs, self.req_to_token)
        self.dense.init_cuda_graph_state(max_bs, max_num_tokens)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return self.dense.get_cuda_graph_seq_len_fill_value()

    def shared_read_ends(self, fm: ForwardMode) -> SharedReadEnds:
        return SharedReadEnds.max_of((super().shared_read_ends(fm), self.dense.shared_read_ends(fm)))

    def support_triton(self) -> bool:
        return self.dense.support_triton()

    def _prepare(self, forward_batch: ForwardBatch, in_capture: bool) -> None:
        self.forward_metadata = build(
            forward_batch, self.req_to_token, self.max_context_len, self.lasting, in_capture=in_capture
        )

    def norm_rope_write(
        self,
        projected: torch.Tensor,
        positions: torch.Tensor,
        norms: HeadNorms,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Make a sparse layer's queries, and write its keys and values; ``forward`` then attends.

        Args:
            projected: ``[num_tokens, (num_heads + 3 * num_kv_heads + 1) * 128]``: queries, keys, values, index queries,
                index key.
            positions: ``[num_tokens]``.

        Returns:
            ``[num_tokens, num_heads, 128]`` queries and ``[num_tokens, num_kv_heads, 128]`` index queries.
        """
        slots = forward_batch.out_cache_loc.long()
        if slots.shape[0] != projected.shape[0]:  # of a step whose padding was given no slots
            slots = pad(slots, (0, projected.shape[0] - slots.shape[0]), value=-1)
        caches = self._caches_of(layer)
        return kernels.norm_rope_write(
            projected, positions.long(), norms, caches, slots, index_q_dtype=self._index_q_dtype(caches)
        )

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        *,
        idx_q: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | tuple[None, torch.Tensor]:
        """Attend from the new tokens of a dense layer, or of a sparse one, which brings index queries.

        Args:
            q: ``[num_tokens, num_heads, 128]``; a dense layer's may be flat.
            k, v: ``[num_tokens, num_kv_heads, 128]``; None of a sparse layer, which has written them.
            idx_q: ``[num_tokens, num_kv_heads, 128]``.

        Returns:
            ``[num_tokens, num_heads * 128]``, zero for padding; with None before it from a sparse layer, as SGLang's
            contract has room there for the index branch's own output, which MiniMax-M3 has not.
        """
        if idx_q is None:
            return self.dense.forward(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        output = forward_batch._attn_output  # of a prompt's graph, which goes on from there
        if output is None:
            output = q.new_empty(q.shape[0], layer.tp_q_head_num * layer.v_head_dim)
        if forward_batch.forward_mode.is_idle():
            return None, output.zero_()
        step = self.forward_metadata
        assert step is not None, "attention before init_forward_metadata"
        q, out = (x.view(-1, layer.tp_q_head_num, layer.head_dim) for x in (q, output))
        attend(q, idx_q, self._caches_of(layer), step, self.selection, layer.scaling, out)
        return None, output

    def _warm_up(self, runner: ModelRunner) -> None:
        """Compile every kernel before the first request. All layers are alike, so one of them stands for all."""
        from msa_backend.kernels.gpu.warm_up import warm_up

        layer = runner.model.sparse_attention[0]
        caches = self._caches_of(layer.attn)
        assert caches.index_k_pages is not None
        options = resolving_view(runner.server_args)
        chunk = options.chunked_prefill_size or 0
        rope = layer.rotary_emb.cos_sin_cache
        warm_up(
            num_heads=layer.num_heads,
            num_kv_heads=layer.num_kv_heads,
            head_dim=caches.head_dim,
            index_dim=caches.index_dim,
            selection=self.selection,
            dtype=layer.q_norm.weight.dtype,
            kv_dtype=caches.k_pages.dtype,
            index_dtype=caches.index_k_pages.dtype,
            index_q_dtype=self._index_q_dtype(caches),
            device=rope.device,
            max_num_tokens=chunk if chunk > 0 else options.max_prefill_tokens,
            max_num_seqs=runner.max_running_requests,
            max_seq_len=self.max_context_len,
            rotary_dim=rope.shape[-1],
            rope_dtype=rope.dtype,
        )

    def _index_q_dtype(self, caches: LayerCaches) -> torch.dtype | None:
        assert caches.index_k_pages is not None
        return index_query_dtype(self.choice, caches.index_k_pages.dtype)

    def _caches_of(self, layer: RadixAttention) -> LayerCaches:
        if layer.layer_id not in self._caches:
            self._caches[layer.layer_id] = caches_of(self.token_to_kv_pool, layer, is_sparse=True)
        return self._caches[layer.layer_id]


def _check_model(runner: ModelRunner) -> None:
    if isinstance(runner.model, MiniMaxM3ForCausalLM):
        return
    found = runner.model_config.hf_config.architectures
    if not set(M3_ARCHITECTURES).intersection(found):
        raise refusals.no_msa_layers(runner.model_config.model_path, found, M3_ARCHITECTURES)
    taken = type(runner.model)
    raise MSAError(
        f"SGLang took {taken.__module__}.{taken.__name__} for this model and not msa-backend's class; look in its log "
        "for an import error of msa_backend.model.sglang, or set MSA_DISABLE=1 to serve without msa-backend"
    )
