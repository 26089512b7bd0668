"""Into which of an engine's fused parameters a canonical weight goes, and as which part of it. Free of both engines."""

from __future__ import annotations

import re

EXPERT = re.compile(r"experts\.\d+\.w[123]\.")
_FUSED = (
    (".q_proj.", ".qkv_proj.", "q"),
    (".k_proj.", ".qkv_proj.", "k"),
    (".v_proj.", ".qkv_proj.", "v"),
    (".index_q_proj.", ".qkv_proj.", "index_q"),
    (".index_k_proj.", ".qkv_proj.", "index_k"),
    (".gate_proj.", ".gate_up_proj.", 0),
    (".up_proj.", ".gate_up_proj.", 1),
)


def fused_part(name: str) -> tuple[str, tuple[str | int, ...]]:
    """The parameter that holds the weight ``name``, which is of no routed expert, and which part of it the weight is.

    Returns:
        The parameter's name, and what its loader takes behind the tensor: nothing where it is the weight alone.
    """
    for projection, fused, part in _FUSED:
        if projection in name:
            return name.replace(projection, fused), (part,)
    return name, ()
