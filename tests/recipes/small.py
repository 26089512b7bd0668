"""A model of the recipe that a CPU trains a step of in a moment, and a plan to go with it."""

from __future__ import annotations

from dataclasses import replace

from nano.plan import Phase
from nano.shape import NANO
from nano.text import Kind

SMALL = replace(
    NANO,
    hidden=64,
    heads=4,
    kv_heads=2,
    topk=4,
    sparse_attention=(False, True, True),
    moe=(False, True, True),
    expert_size=32,
    dense_size=64,
)
PLAN = (
    Phase("first", Kind(128, plain=1.0, facts=3), batch=2, steps=40, lr=2e-3),
    Phase("second", Kind(256), batch=2, steps=40, lr=1e-3),
    Phase("third", Kind(512), batch=1, steps=20, lr=1e-3, topk=4),
)
