"""Do two classes say the same? Log-probabilities of the same prompts and answers, compared by their distribution.

A long prompt takes ten thousands of decisions, which blocks and which experts, and bf16 rounding turns some: two right
implementations differ by a little almost everywhere and by much in a few places. So differences are compared over the
first 2,047 tokens, where every block is taken and nothing but rounding is left, and over the rest. Rounding alone does
not shift the mean.
"""

from __future__ import annotations

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
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    reading = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, prompt_logprobs=0, logprobs=0)
    answering = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=0)

    def ask(tokens: list[int], sampling: Any) -> Any:
        (output,) = session.llm.generate([TokensPrompt(prompt_token_ids=tokens)], sampling, use_tqdm=False)
        return output

    for length in plan.lengths:
        tokens = prompts.context(length, seed=0)
        longer = tokens + prompts.tokens(SUFFIX, "equal", length)
        # Asked for the prompt's log-probabilities, vLLM passes the prefix cache by; the second request fills it
        # with all but the suffix, and the third starts from there.
        cold = ask(tokens, reading)
        ask(tokens, answering)
        hit = ask(longer, answering)
        miss = ask(longer, reading)
        yield {
            "length": length,
            "prompt": [step[token].logprob for step, token in zip(cold.prompt_logprobs[1:], tokens[1:], strict=True)],
            "cold": answer(cold),
            "hit": answer(hit) | {"cached_tokens": hit.num_cached_tokens},
            "miss": answer(miss),
        }


def answer(output: Any) -> dict[str, Any]:
    completion = output.outputs[0]
    tokens = list(completion.token_ids)
    logprobs = [step[token].logprob for step, token in zip(completion.logprobs, tokens, strict=True)]
    return {"tokens": tokens, "logprobs": logprobs}


def compare(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Each class against the first, and each one's prefix hit against its miss.

    Args:
        found: of each class the rows of `measure`.
    """
    (first, ours), *others = found.items()
    result: dict[str, Any] = {}
    for row in ours:
        entry: dict[str, Any] = {"prompt tokens": len(row["prompt"])}
        for name, rows in others:
            theirs = next((other for other in rows if other["length"] == row["length"]), None)
            if theirs:
                entry[f"{first} - {name}"] = distances(row["prompt"], theirs["prompt"])
                entry[f"{first}, {name}: answers"] = common(row["cold"], theirs["cold"])
        for name, rows in found.items():
            for other in (other for other in rows if other["length"] == row["length"]):
                hit = common(other["hit"], other["miss"]) | {"cached": other["hit"]["cached_tokens"]}
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
    """How many tokens of two answers agree from the start, and how far their log-probabilities are apart there."""
    same = 0
    while same < len(some["tokens"]) and some["tokens"][same] == others["tokens"][same]:
        same += 1
    apart = [abs(a - b) for a, b in zip(some["logprobs"][:same], others["logprobs"][:same], strict=True)]
    return {"equal tokens": f"{same} of {len(some['tokens'])}", "largest distance": max(apart, default=None)}
