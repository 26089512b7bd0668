"""One SGLang engine: requests one at a time, batches that decode, profiles, and what it made of its options."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

from engine.session import CANDIDATES, Batch, FirstToken, Session

NEWS_EVERY = 16
"""Tokens between two pieces of news of a request that decodes. News of every token of 32 requests would take the front
end longer than the step itself."""
PATIENCE = 300
"""Seconds that an engine may be silent."""


class SGLangSession(Session):
    """A `sglang.Engine`."""

    def __init__(self, options: dict[str, Any]) -> None:
        """Start an engine with `options` of `sglang.Engine`, the model among them; else with SGLang's defaults."""
        import sglang

        self._traces = tempfile.TemporaryDirectory(prefix="traces-")
        started = time.monotonic()
        self.llm = sglang.Engine(**{"skip_tokenizer_init": True, "log_level": "info"} | options)
        self.start_seconds = time.monotonic() - started
        self.resolved = resolved(self.llm.get_server_info(), options["model_path"])
        self._numbers = itertools.count()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._news: asyncio.Queue[tuple[str, float, int, bool]] = asyncio.Queue()
        self.check_class(self.resolved["model_class"].startswith("msa_backend"), "SGLang")

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.llm.loop.run_until_complete(asyncio.wait_for(work, PATIENCE))

    def _generate(self, tokens: list[int], new: int, **more: Any) -> Any:
        sampling = {"temperature": 0, "max_new_tokens": new, "ignore_eos": True}
        return self._run(self.llm.async_generate(input_ids=tokens, sampling_params=sampling, **more))

    def first_token(self, tokens: list[int]) -> FirstToken:
        started = time.monotonic()
        found = self._generate(tokens, 1)
        return FirstToken(time.monotonic() - started, None, found["meta_info"]["cached_tokens"])

    def ask(self, tokens: list[int], new: int, *, fresh: bool = False) -> dict[str, Any]:
        if fresh:
            self._forget()
        meta = self._generate(tokens, new, return_logprob=True, top_logprobs_num=CANDIDATES)["meta_info"]
        said = meta["output_token_logprobs"]
        found = {
            "tokens": [token for _, token, _ in said],
            "candidates": [
                {str(token): logprob for logprob, token, _ in (*best, chosen)}
                for best, chosen in zip(meta["output_top_logprobs"], said, strict=True)
            ],
            "cached_tokens": meta["cached_tokens"],
        }
        if fresh:
            # By itself: of a prompt's tokens it would list all candidates too.
            reading = self._generate(tokens, 1, return_logprob=True, logprob_start_len=0)["meta_info"]
            found["prompt"] = [logprob for logprob, _, _ in reading["input_token_logprobs"][1:]]
        return found

    def _forget(self) -> None:
        """Empty the prefix cache, as soon as the last request has left it."""
        done = self._run(self.llm.tokenizer_manager.flush_cache(timeout_s=30.0))
        if not done.success:
            raise RuntimeError(f"SGLang did not empty its prefix cache: {done.message}")

    def batch(self) -> StreamedBatch:
        return StreamedBatch(self)

    def start(self, tokens: list[int], new: int) -> str:
        """Hand a request over and return its name; `news` tells what comes of it."""
        # None the beginning of another: SGLang stops all requests whose names begin so.
        name = f"bench-{next(self._numbers):06d}"
        sampling = {"temperature": 0, "max_new_tokens": new, "ignore_eos": True, "stream_interval": NEWS_EVERY}

        async def listen() -> None:
            stream = await self.llm.async_generate(input_ids=tokens, sampling_params=sampling, stream=True, rid=name)
            async for found in stream:
                meta = found["meta_info"]
                self._news.put_nowait((name, time.monotonic(), meta["completion_tokens"], bool(meta["finish_reason"])))

        self._tasks[name] = self.llm.loop.create_task(listen())
        return name

    def news(self) -> tuple[str, float, int, bool]:
        """The next request that said something: its name, when, how many tokens it has said, whether it came to its
        end."""
        return self._run(self._next())

    async def _next(self) -> tuple[str, float, int, bool]:
        return await self._news.get()

    def stop(self, names: set[str]) -> None:
        tasks = [self._tasks.pop(name) for name in names]

        async def stop() -> None:
            for name in names:
                self.llm.tokenizer_manager.abort_request(rid=name)
            await asyncio.gather(*tasks, return_exceptions=True)

        self._run(stop())
        while not self._news.empty():
            self._news.get_nowait()

    @contextlib.contextmanager
    def profile(self) -> Iterator[list[Path]]:
        folder = Path(tempfile.mkdtemp(dir=self._traces.name))
        found: list[Path] = []
        self.llm.start_profile(output_dir=str(folder), activities=["CPU", "GPU"], with_stack=False, record_shapes=False)
        try:
            yield found
        finally:
            self.llm.stop_profile()
        found.extend(sorted(folder.rglob("*.trace.json*")))
        if not found:
            raise RuntimeError("SGLang wrote no trace; its log says why torch's profiler did not start.")


class StreamedBatch(Batch):
    """Of an engine that tells of a request every NEWS_EVERY tokens; the steps in between are taken for equally long."""

    SHORTEST_WINDOW = 2 * NEWS_EVERY

    def steps(self, count: int) -> list[float]:
        heard: dict[str, list[tuple[int, float]]] = defaultdict(list)
        while True:
            name, when, tokens, ended = self.session.news()
            if name in self.names:
                if ended:
                    raise self.ended()
                heard[name].append((tokens, when))
            # All of them twice: each has then read its prompt before the first that counts.
            if len(heard) == len(self.names) and all(len(of_one) > 1 for of_one in heard.values()):
                break
        chosen, of_one = max(heard.items(), key=lambda entry: entry[1][-1][1])
        knots = of_one[-1:]
        while knots[-1][0] - knots[0][0] < count:
            name, when, tokens, ended = self.session.news()
            if name in self.names and ended:
                raise self.ended()
            if name == chosen:
                knots.append((tokens, when))
        return [at(knots, knots[0][0] + step) for step in range(count + 1)]

    def steps_from_now(self, count: int) -> None:
        self.steps(count)


def at(knots: list[tuple[int, float]], tokens: int) -> float:
    """When a request had said so many tokens, between two of `knots`: tokens and time, rising."""
    for (before, start), (after, end) in itertools.pairwise(knots):
        if tokens <= after:
            return start + (end - start) * (tokens - before) / (after - before)
    return knots[-1][1]


def resolved(info: dict[str, Any], model: str) -> dict[str, Any]:
    """The settings that SGLang chose or changed after it read its options."""
    state = info["internal_states"][0]
    graphs = info.get("cuda_graph_config") or {}
    modes = {phase: graphs.get(phase, {}).get("backend") for phase in ("decode", "prefill")}
    text = json.loads((Path(model) / "config.json").read_text())
    is_ours = "msa_text_config" in json.loads(info["json_model_override_args"])
    names = (
        "attention_backend", "moe_runner_backend", "sampling_backend", "page_size", "dtype", "kv_cache_dtype",
        "disable_overlap_schedule", "disable_radix_cache", "enable_multimodal", "mem_fraction_static", "version",
    )  # fmt: skip
    return {
        "model_class": "msa_backend.model.sglang" if is_ours else "sglang.srt.models",
        "model_runner": f"SGLang {info.get('version')}",
        "cudagraph_mode": ", ".join(f"{phase} {mode}" for phase, mode in modes.items()),
        "cudagraph_capture_sizes": graphs.get("decode", {}).get("bs") or [],
        "max_model_len": info["max_req_input_len"],
        "max_num_seqs": state["effective_max_running_requests_per_dp"],
        "max_num_batched_tokens": info["chunked_prefill_size"],
        "kv_cache_tokens": state["memory_usage"]["token_capacity"],
        "memory_usage": state["memory_usage"],
        "startup_time": state["startup_time"],
        "layers": text.get("text_config", text)["num_hidden_layers"],
        **{name: info.get(name) for name in names},
    }
