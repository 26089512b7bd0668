"""Do two classes say the same? Log-probabilities of the same prompts and answers, compared by their distribution.

A long prompt takes ten thousands of decisions, which blocks and which experts, and bf16 rounding turns some: two right
implementations differ by a little almost everywhere and by much in a few places. So differences are compared over the
first 2,047 tokens, where every block is taken and nothing but rounding is left, and over the rest. Rounding alone does
not shift the mean.

A greedy answer says the more likely of two tokens, however close they are; the weights are random, so they often are.
Where two answers part, the gap between both tokens' log-probabilities tells rounding from a fault.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from engine import prompts
from engine.session import Session

DENSE_TOKENS = 16 * prompts.BLOCK - 1
NEW_TOKENS = 16
SUFFIX = 171


@dataclass(frozen=True)
class Plan:
    """Prompts of which lengths to ask for, in tokens."""

    lengths: tuple[int, ...]


def measure(session: Session, plan: Plan) -> Iterator[dict[str, Any]]:
    """The log-probability of every prompt token and of a greedy answer, cold and after a prefix hit, by length."""
    for length in plan.lengths:
        tokens = prompts.context(length, seed=0)
        longer = tokens + prompts.tokens(SUFFIX, "equal", length)
        cold = session.ask(tokens, NEW_TOKENS, fresh=True)
        # Fills the cache with all but the suffix, and the third request starts from there.
        session.ask(tokens, NEW_TOKENS)
        hit = session.ask(longer, NEW_TOKENS)
        miss = session.ask(longer, NEW_TOKENS, fresh=True)
        miss.pop("prompt")
        prompt = cold.pop("prompt")
        yield {"length": length, "prompt": prompt, "cold": cold, "hit": hit, "miss": miss, "drafts": session.drafts()}


def compare(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Each class against each other, and each one's prefix hit against its miss.

    Args:
        found: of each class the rows of `measure`.
    """
    result: dict[str, Any] = {}
    for row in next(iter(found.values())):
        of_length = {name: other for name, rows in found.items() for other in rows if other["length"] == row["length"]}
        entry: dict[str, Any] = {"prompt tokens": len(row["prompt"])}
        for (one, its), (other, theirs) in itertools.combinations(of_length.items(), 2):
            entry[f"{one} - {other}"] = distances(its["prompt"], theirs["prompt"])
            entry[f"{one}, {other}: answers"] = common(its["cold"], theirs["cold"])
        for name, its in of_length.items():
            if its.get("drafts"):
                entry[f"{name}: drafts until here"] = its["drafts"]
            hit = common(its["hit"], its["miss"]) | {"cached": its["hit"]["cached_tokens"]}
            entry[f"{name}: hit against miss"] = hit
        result[str(row["length"])] = entry
    return result


def distances(some: list[float], others: list[float]) -> dict[str, dict[str, float]]:
    gaps = [a - b for a, b in zip(some, others, strict=True)]
    parts = {"all blocks taken": gaps[:DENSE_TOKENS], "blocks selected": gaps[DENSE_TOKENS:]}
    result = {}
    for name, part in ((name, part) for name, part in parts.items() if part):
        sizes = sorted(map(abs, part))
        at = {f"p{share}": sizes[len(sizes) * share // 100] for share in (50, 90, 99)}
        result[name] = {"mean": statistics.fmean(part), "mean size": statistics.fmean(sizes), **at, "max": sizes[-1]}
    return result


def common(some: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """How many tokens of two answers agree from the start, how far their log-probabilities are apart there, and by how
    much each answer prefers its own token where they part."""
    pairs = list(zip(some["tokens"], others["tokens"], strict=True))
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    agreed = [[answer["candidates"][i][str(pairs[i][0])] for answer in (some, others)] for i in range(same)]
    result: dict[str, Any] = {
        "equal tokens": f"{same} of {len(pairs)}",
        "largest distance": max((abs(a - b) for a, b in agreed), default=None),
    }
    if same < len(pairs):
        a, b = pairs[same]
        result["gap where they part"] = [
            preference(some["candidates"][same], a, b),
            preference(others["candidates"][same], b, a),
        ]
    return result


def preference(candidates: dict[str, float], chosen: int, other: int) -> float | None:
    """By how much ``chosen`` is the more likely; None if ``other`` is not among the candidates."""
    least = candidates.get(str(other))
    return None if least is None else candidates[str(chosen)] - least
