"""Is a served model right? The log-probabilities of prompts beside those of ``transformers``.

Where the engine runs there may be no ``transformers`` that knows MiniMax-M3, and no hour for it to compute in. So the
truth is written first, on any CPU, and carried along. It is computed in fp32 from the checkpoint's weights, whatever
dtype they are in; how far ``transformers`` itself is from it in bf16 is the yardstick, as in `tests/compare.py`.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.session import Session

LENGTHS = (100, 129, 700, 1500, 2049, 4000, 6000)
NEW_TOKENS = 16
GRANTED = 1.5
"""An engine and ``transformers`` do not round equally often."""


@dataclass(frozen=True)
class Plan:
    """Which truth.

    Attributes:
        file: that `write` wrote.
    """

    file: str


def write(model: Path, file: Path, lengths: Sequence[int] = LENGTHS) -> None:
    """Write prompts of `lengths` tokens and the log-probabilities of their tokens but the first: minutes of a CPU."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import torch

    from tests import oracle

    exact, rounded = oracle.load(model), oracle.load(model, torch.bfloat16)
    entries = []
    for length in lengths:
        prompt = oracle.random_prompt(length, seed=9)
        fp32, bf16 = (oracle.prompt_logprobs(reader, prompt).float().tolist() for reader in (exact, rounded))
        entries.append({"prompt": prompt, "fp32": fp32, "bf16": bf16})
        file.write_text(json.dumps(entries))


def measure(session: Session, plan: Plan) -> Iterator[dict[str, Any]]:
    """Distances to the truth by length, the engine's and those of ``transformers`` in bf16; the answer cold and after a
    hit."""
    for entry in json.loads(Path(plan.file).read_text()):
        cold = session.ask(entry["prompt"], NEW_TOKENS, fresh=True)
        session.ask(entry["prompt"], NEW_TOKENS)
        hit = session.ask(entry["prompt"], NEW_TOKENS)
        yield {
            "length": len(entry["prompt"]),
            "distances": distances(cold["prompt"], entry["fp32"]),
            "transformers": distances(entry["bf16"], entry["fp32"]),
            "cold": cold["tokens"],
            "hit": hit["tokens"],
            "cached_tokens": hit["cached_tokens"],
        }


def distances(some: Sequence[float], others: Sequence[float]) -> list[float]:
    return [round(abs(one - other), 5) for one, other in zip(some, others, strict=True)]


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How far from the truth all prompts together are, beside ``transformers`` in bf16."""
    found: dict[str, Any] = {"prompts of": [row["length"] for row in rows]}
    both = {name: sorted(d for row in rows for d in row[name]) for name in ("distances", "transformers")}
    measures = {"mean": statistics.fmean} | {f"p{share}": at(share) for share in (50, 90, 99)}
    for name, measure_ in measures.items():
        ours, theirs = (measure_(values) for values in both.values())
        found[name] = {"engine": round(ours, 5), "transformers in bf16": round(theirs, 5)}
    found["max"] = both["distances"][-1]
    found["as close"] = all(found[name]["engine"] <= GRANTED * found[name]["transformers in bf16"] for name in measures)
    found["answers equal after a hit"] = f"{sum(row['cold'] == row['hit'] for row in rows)} of {len(rows)}"
    found["cached"] = [row["cached_tokens"] for row in rows]
    return found


def at(share: int) -> Any:
    return lambda values: values[len(values) * share // 100]
