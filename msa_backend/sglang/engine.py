"""The names of SGLang that live elsewhere in other versions of it. Branch on a version here and nowhere else.

SGLang 0.5.17, for one, has ``add_attention_backend_choices`` in ``sglang.srt.server_args`` and
``register_model_override`` in ``sglang.srt.arg_groups.overrides``.
"""

from sglang.srt.arg_groups.choices import add_attention_backend_choices
from sglang.srt.arg_groups.model_override_base import (
    get_default_attn_backend,
    register_model_override,
    register_model_override_predicate,
    resolving_view,
)
from sglang.srt.arg_groups.overrides import declare_resolution

__all__ = [
    "add_attention_backend_choices",
    "declare_resolution",
    "get_default_attn_backend",
    "register_model_override",
    "register_model_override_predicate",
    "resolving_view",
]
