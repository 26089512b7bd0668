"""TinyShape: every size of the small model, in one place."""

from __future__ import annotations

from dataclasses import dataclass

from msa_backend.tiny.words import WORDS


@dataclass(frozen=True)
class TinyShape:
    """Sizes of a tiny MiniMax-M3; what MSA fixes (128 channels, 128-token blocks) is not here.

    The defaults keep the released proportions where a kernel or a loader could care: partial rotation, more
    query than KV heads, one index head a KV head, dense layers first, three different MLP widths. ``topk`` is
    small so that a prompt leaves the dense regime after ``topk * 128`` tokens already.

    Attributes:
        sparse_attention: for every layer, whether its attention is sparse.
        moe: for every layer, whether its MLP is a mixture of experts; independent of ``sparse_attention``.
        experts_per_token: routed experts a token is sent to.
        expert_size: width of a routed expert, and of the shared one.
        dense_size: width of the MLP in layers without experts.
        mtp_modules: modules that draft tokens, in the original form alone.
        words: those that are one token each.
    """

    hidden: int = 256
    heads: int = 8
    kv_heads: int = 2
    rotary_dim: int = 64
    rope_theta: float = 5e6
    topk: int = 4
    local_blocks: int = 1
    max_positions: int = 131072
    sparse_attention: tuple[bool, ...] = (False, True, True, True)
    moe: tuple[bool, ...] = (False, True, True, True)
    experts: int = 8
    experts_per_token: int = 2
    expert_size: int = 128
    dense_size: int = 384
    routed_scaling: float = 2.0
    mtp_modules: int = 0
    words: tuple[str, ...] = WORDS
    vision_hidden: int = 160
    vision_heads: int = 2
    vision_layers: int = 2
    vision_mlp_size: int = 320
    projector_size: int = 192

    @property
    def layers(self) -> int:
        return len(self.sparse_attention)
