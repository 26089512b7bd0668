"""vLLM's counters of speculative decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Accepted:
    """What was drafted and taken so far.

    Attributes:
        drafts: how often tokens were drafted for a request.
        tokens: the draft tokens in all.
        places: how many were accepted of the first of each draft, of the second, and so on.
    """

    drafts: int
    tokens: int
    places: list[int]

    @classmethod
    def read(cls, llm: Any) -> Accepted:
        """The counters of a ``vllm.LLM`` that was started with ``disable_log_stats=False``."""
        found = {metric.name.removeprefix("vllm:spec_decode_"): metric for metric in llm.get_metrics()}
        places = list(found["num_accepted_tokens_per_pos"].values)
        assert sum(places) == found["num_accepted_tokens"].value
        return cls(found["num_drafts"].value, found["num_draft_tokens"].value, places)

    def since(self, before: Accepted) -> Accepted:
        places = [now - then for now, then in zip(self.places, before.places, strict=True)]
        return Accepted(self.drafts - before.drafts, self.tokens - before.tokens, places)

    @property
    def rates(self) -> list[float]:
        """Of each place the share accepted of the drafts that were accepted up to there."""
        reached = [self.drafts, *self.places[:-1]]
        return [place / max(before, 1) for place, before in zip(self.places, reached, strict=True)]
