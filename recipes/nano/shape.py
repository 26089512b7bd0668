"""The sizes of the nano model, and its words."""

from __future__ import annotations

from msa_backend.probe import tasks
from msa_backend.tiny import TinyShape
from msa_backend.tiny.words import WORDS

_TEXTS = (*tasks.WHO, *tasks.DID, *tasks.WHAT, *tasks.WHERE, *tasks.WHEN, *tasks.FIRST, *tasks.LAST)
_SENTENCE_STARTS = ("The", "A", "Our", "Captain", "Agent", "Tool")
_MORE = ("access", "code", "codes", "courier", "captain", "captains", "badge", "lookup", "archive", "reported")

NANO_WORDS = tuple(
    dict.fromkeys((*WORDS, *sorted({word for text in _TEXTS for word in text.split()}), *_SENTENCE_STARTS, *_MORE))
)
"""Those of the tiny model, then those of what `msa-backend probe` asks: a name is two tokens, a sentence twelve."""

NANO = TinyShape(
    hidden=256,
    heads=16,
    kv_heads=1,
    topk=16,
    max_positions=1 << 20,
    sparse_attention=(False, True, True, True, True),
    moe=(False, True, True, True, True),
    experts=4,
    experts_per_token=2,
    expert_size=128,
    dense_size=512,
    vision_hidden=80,
    vision_heads=1,
    vision_layers=1,
    vision_mlp_size=160,
    projector_size=64,
    words=NANO_WORDS,
)
