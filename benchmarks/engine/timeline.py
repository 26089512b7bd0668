"""What a trace of torch's profiler says of an engine's steps: kernels, time on the GPU, time of the host.

Both engines' workers wrap each forward pass in an annotation that counts its requests and tokens. A step lasts from one
annotation to the next, and a kernel belongs to the step in which the host launched it, whenever it ran; the kernels of
a CUDA graph are launched by the call that replays it.
"""

from __future__ import annotations

import gzip
import json
import re
import statistics
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VLLM = re.compile(r"execute_context_(\d+)\((\d+)\)_generation_(\d+)\((\d+)\)")
SGLANG = re.compile(r"step\[(?:(EXTEND) bs=(\d+) toks=(\d+)|DECODE bs=(\d+))\]")
LAUNCHES = ("cuda_runtime", "cuda_driver")
COPIES = ("gpu_memcpy", "gpu_memset")


@dataclass(frozen=True)
class Kernel:
    """Times in microseconds of the trace's clock."""

    name: str
    start: float
    length: float


@dataclass
class Step:
    """One forward pass and what follows it until the next.

    Attributes:
        prompts, prompt_tokens: requests that read their prompt, and how many tokens of it.
        decodes, decode_tokens: requests that decode, and their tokens.
        start: when the host began, in microseconds of the trace's clock.
        host: how long its forward pass took the host, in microseconds.
        period: until the next step began; None in the last.
        kernels: in the order of their start.
        copies: what the GPU copied and cleared.
    """

    prompts: int
    prompt_tokens: int
    decodes: int
    decode_tokens: int
    start: float
    host: float
    period: float | None = None
    kernels: list[Kernel] = field(default_factory=list)
    copies: list[Kernel] = field(default_factory=list)

    @property
    def gpu(self) -> float:
        """Microseconds of all kernels together; what overlaps counts twice, as does a kernel launched to wait early."""
        return sum(kernel.length for kernel in self.kernels)

    @property
    def span(self) -> float:
        """Microseconds from the host's beginning to the end of the last kernel or copy."""
        return (
            max((work.start + work.length for work in (*self.kernels, *self.copies)), default=self.start) - self.start
        )

    @property
    def idle(self) -> float:
        """Microseconds in which the GPU did nothing for this step, until the next one or, in the last, to its end."""
        return (self.span if self.period is None else self.period) - self.busy

    @property
    def busy(self) -> float:
        """Microseconds in which the GPU ran or copied anything for this step."""
        total, end = 0.0, float("-inf")
        for work in sorted((*self.kernels, *self.copies), key=lambda work: work.start):
            total += max(0.0, work.start + work.length - max(end, work.start))
            end = max(end, work.start + work.length)
        return total


def read(file: Path) -> list[Step]:
    """The steps of a trace file, gzipped or not; the last may miss kernels that ran after the profile ended."""
    data = file.read_bytes()
    text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode(errors="replace")
    return steps(json.loads(text)["traceEvents"])


def steps(events: Iterable[dict[str, Any]]) -> list[Step]:
    """Group a trace's events by step; what was launched before the first step is left out."""
    found: list[Step] = []
    launched: dict[int, float] = {}
    on_gpu: list[dict[str, Any]] = []
    for event in events:
        category = event.get("cat")
        if category == "user_annotation":
            if counts := requests_and_tokens(event["name"]):
                found.append(Step(*counts, event["ts"], event["dur"]))
        elif category in LAUNCHES:
            correlation = event.get("args", {}).get("correlation")
            if correlation is not None:
                launched[correlation] = event["ts"]
        elif category == "kernel" or category in COPIES:
            on_gpu.append(event)
    found.sort(key=lambda step: step.start)
    for step, following in zip(found, found[1:], strict=False):
        step.period = following.start - step.start
    starts = [step.start for step in found]
    for event in sorted(on_gpu, key=lambda event: event["ts"]):
        number = bisect_right(starts, launched.get(event.get("args", {}).get("correlation"), event["ts"])) - 1
        if number >= 0:
            work = Kernel(event["name"], event["ts"], event["dur"])
            (found[number].kernels if event["cat"] == "kernel" else found[number].copies).append(work)
    return found


def requests_and_tokens(annotation: str) -> tuple[int, int, int, int] | None:
    """Requests that read their prompt and tokens of it, requests that decode and theirs; None of another annotation."""
    if match := VLLM.fullmatch(annotation):
        prompts, prompt_tokens, decodes, decode_tokens = map(int, match.groups())
        return prompts, prompt_tokens, decodes, decode_tokens
    if match := SGLANG.fullmatch(annotation):
        prompts, prompt_tokens, decodes = (int(found or 0) for found in match.groups()[1:])
        return prompts, prompt_tokens, decodes, decodes
    return None


def decoding(found: Sequence[Step], batch: int) -> list[Step]:
    """The steps in which `batch` requests decoded and nothing else, without the first and the last of them.

    The profile may have begun or ended within those.
    """
    return [step for step in found if step.decodes == batch and not step.prompts][1:-1]


def reading(found: Sequence[Step]) -> list[Step]:
    """The step that read most tokens of a prompt, alone in a list; empty if none did."""
    prompts = [step for step in found if step.prompts]
    return [max(prompts, key=lambda step: step.prompt_tokens)] if prompts else []


def summary(found: Sequence[Step]) -> dict[str, Any]:
    """Means a step, times in milliseconds; medians of what depends on the host, which has outliers.

    Raises:
        ValueError: no steps.
    """
    if not found:
        raise ValueError("The trace has none of the steps that were to be profiled.")
    count = len(found)
    periods = [step.period for step in found if step.period is not None]
    kernels: Counter[str] = Counter()
    lengths: dict[str, float] = defaultdict(float)
    for kernel in (kernel for step in found for kernel in step.kernels):
        name = short_name(kernel.name)
        kernels[name] += 1
        lengths[name] += kernel.length
    return {
        "steps": count,
        "kernels": sum(len(step.kernels) for step in found) / count,
        "copies": sum(len(step.copies) for step in found) / count,
        "gpu_ms": sum(step.gpu for step in found) / count / 1e3,
        "busy_ms": sum(step.busy for step in found) / count / 1e3,
        "idle_ms": statistics.median(step.idle for step in found) / 1e3,
        "span_ms": statistics.median(step.span for step in found) / 1e3,
        "host_ms": statistics.median(step.host for step in found) / 1e3,
        "period_ms": statistics.median(periods) / 1e3 if periods else None,
        "by_name": {
            name: {"count": kernels[name] / count, "ms": length / count / 1e3}
            for name, length in sorted(lengths.items(), key=lambda entry: -entry[1])
        },
    }


# Templates that launch whatever they are given: what they were given says more than their own name.
GENERIC = re.compile(r"(?:\w*elementwise_kernel\w*|reduce_kernel|device_kernel|kernel|Kernel2?|\w*_kernel_impl)$")
TELLING = re.compile(r"\b(\w*Functor\w*|\w+Ops|\w+_kernel_cuda|\w+_kernel_impl|[A-Z][a-z]\w*(?:Sm\d+|Universal)\w*)\b")


def short_name(name: str) -> str:
    """A kernel's name without its arguments and namespaces; of a generic template also what it computes."""
    plain, depth = "", 0
    for letter in name.replace("(anonymous namespace)::", ""):
        depth += letter == "<"
        if letter == "(" and depth == 0:
            break
        plain += letter if depth == 0 else ""
        depth -= letter == ">"
    path = (plain.split() or [name])[-1].split("::")
    short = path[-1]
    if GENERIC.match(short):
        inner = [word for word in TELLING.findall(name) if word != short and not word.startswith("gpu_kernel_impl")]
        short = f"{short}[{inner[-1]}]" if inner else "::".join(path[-2:])
    return short[:72]
