"""One vLLM engine: requests one at a time, batches that decode, profiles, and what it made of its options."""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.session import CANDIDATES, Batch, FirstToken, Session


class VLLMSession(Session):
    """A `vllm.LLM`."""

    def __init__(self, options: dict[str, Any]) -> None:
        """Start an engine with `options` of `vllm.LLM`, the model among them; what they leave out is vLLM's default."""
        import vllm

        self._traces = tempfile.TemporaryDirectory(prefix="traces-")
        profiler = {
            "profiler": "torch",
            "torch_profiler_dir": self._traces.name,
            "torch_profiler_with_stack": False,
            "torch_profiler_use_gzip": False,
            "torch_profiler_dump_cuda_time_total": False,
        }
        started = time.monotonic()
        self.llm = vllm.LLM(disable_log_stats=False, profiler_config=profiler, **options)
        self.start_seconds = time.monotonic() - started
        self.resolved = self.llm.collective_rpc(resolved)[0]
        self.resolved["kv_cache_tokens"] = self._blocks() * self.resolved["block_size"]
        self._numbers = itertools.count()
        self.check_class(self.resolved["model_class"].startswith("msa_backend."), "vLLM")

    def _blocks(self) -> int:
        blocks = self.llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
        if not blocks:
            raise RuntimeError("vLLM does not say how many pages its KV cache has.")
        return blocks

    def drafts(self) -> dict[str, Any]:
        """By the names of vLLM's metrics."""
        named = (metric for metric in self.llm.get_metrics() if metric.name.startswith("vllm:spec_decode"))
        return {metric.name: getattr(metric, "values", getattr(metric, "value", None)) for metric in named}

    def start(self, tokens: list[int], new: int) -> str:
        """Hand a request over and return its name; `step` brings what comes of it."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        name = f"bench-{next(self._numbers)}"
        sampling = SamplingParams(
            temperature=0, max_tokens=new, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        self.llm.llm_engine.add_request(name, TokensPrompt(prompt_token_ids=tokens), sampling)
        return name

    def step(self) -> list[Any]:
        """The `RequestOutput` of each request that got tokens in the engine's next step."""
        return self.llm.llm_engine.step()

    def stop(self, names: set[str]) -> None:
        self.llm.llm_engine.abort_request(list(names))

    def batch(self) -> SteppedBatch:
        return SteppedBatch(self)

    def ask(self, tokens: list[int], new: int, *, fresh: bool = False) -> dict[str, Any]:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        # Asked for the prompt's log-probabilities, vLLM passes the prefix cache by.
        reading = {"prompt_logprobs": 0} if fresh else {}
        sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, logprobs=CANDIDATES, **reading)
        (output,) = self.llm.generate([TokensPrompt(prompt_token_ids=tokens)], sampling, use_tqdm=False)
        (said,) = output.outputs
        found = {
            "tokens": list(said.token_ids),
            "candidates": [{str(token): one.logprob for token, one in step.items()} for step in said.logprobs],
            "cached_tokens": output.num_cached_tokens,
        }
        if fresh:
            steps = zip(output.prompt_logprobs[1:], tokens[1:], strict=True)
            found["prompt"] = [step[token].logprob for step, token in steps]
        return found

    def first_token(self, tokens: list[int]) -> FirstToken:
        started = time.monotonic()
        name = self.start(tokens, new=1)
        while True:
            for output in self.step():
                if output.request_id == name:
                    wall, metrics = time.monotonic() - started, output.metrics
                    return FirstToken(wall, metrics.first_token_ts - metrics.queued_ts, output.num_cached_tokens or 0)

    @contextlib.contextmanager
    def profile(self) -> Iterator[list[Path]]:
        known = self._trace_files()
        found: list[Path] = []
        self.llm.start_profile()
        try:
            yield found
        finally:
            self.llm.stop_profile()
        found.extend(sorted(self._trace_files() - known))
        if not found:
            raise RuntimeError("vLLM wrote no trace; its log says why torch's profiler did not start.")

    def _trace_files(self) -> set[Path]:
        return set(Path(self._traces.name).glob("*.pt.trace.json*"))


class SteppedBatch(Batch):
    """Of an engine that says at each step which requests got a token."""

    def steps(self, count: int) -> list[float]:
        times: list[float] = []
        while len(times) <= count:
            outputs = self.session.step()
            if any(output.finished for output in outputs):
                raise self.ended()
            if self.names <= {output.request_id for output in outputs}:
                times.append(outputs[0].metrics.last_token_ts)
            elif outputs:
                times.clear()
        return times

    def steps_from_now(self, count: int) -> None:
        now = time.monotonic()  # the engine's clock, in every process of the machine
        while count > 0:
            count -= self.steps(0)[0] > now


def resolved(worker: Any) -> dict[str, Any]:
    """Runs in the engine's worker: the settings that vLLM chose or changed after it read its options."""
    config, runner = worker.vllm_config, worker.model_runner
    graphs = config.compilation_config
    manager = getattr(runner, "cudagraph_manager", None)
    mode = getattr(manager, "cudagraph_mode", graphs.cudagraph_mode)
    sizes = list(graphs.cudagraph_capture_sizes or [])
    groups = [group for groups in getattr(runner, "attn_groups", []) for group in groups]
    model = type(runner.get_model())
    return {
        "model_class": f"{model.__module__}.{model.__qualname__}",
        "model_runner": f"{type(runner).__module__}.{type(runner).__qualname__}",
        "attention_backends": sorted({group.backend.get_name() for group in groups}),
        "enforce_eager": config.model_config.enforce_eager,
        "compilation_mode": getattr(graphs.mode, "name", str(graphs.mode)),
        "cudagraph_mode": getattr(mode, "name", str(mode)),
        "cudagraph_capture_sizes": sizes,
        "max_model_len": config.model_config.max_model_len,
        "max_num_seqs": config.scheduler_config.max_num_seqs,
        "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
        "async_scheduling": config.scheduler_config.async_scheduling,
        "enable_prefix_caching": config.cache_config.enable_prefix_caching,
        "dtype": str(config.model_config.dtype),
        "kv_cache_dtype": config.cache_config.cache_dtype,
        "block_size": config.cache_config.block_size,
        "gpu_memory_utilization": config.cache_config.gpu_memory_utilization,
        "layers": config.model_config.hf_text_config.num_hidden_layers,
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(("VLLM_", "MSA_"))
        },
    }
