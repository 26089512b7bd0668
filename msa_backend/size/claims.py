"""What MiniMax said of speed, with sources: two sets, against different things, neither measured here."""

from __future__ import annotations

from typing import NamedTuple


class Claims(NamedTuple):
    """What one source says, against what."""

    source: str
    against: str
    sentences: tuple[str, ...]


REPORT = Claims(
    "MSA report, arXiv:2606.13392",
    "dense GQA attention in a model of 109 billion parameters, 1M tokens",
    ("28.4x less attention compute a token", "prefill 14.2x as fast on H800", "decode 7.6x as fast on H800"),
)
ANNOUNCEMENT = Claims(
    "announcement of MiniMax-M3",
    "the full attention of MiniMax-M2, 1M tokens",
    ("prefill 9.7x as fast", "decode 15.6x as fast"),
)
