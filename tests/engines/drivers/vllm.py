"""vLLM."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from msa_backend.config import MSAError

from ...compare import Answer, PromptIds
from ...device import DEVICE
from ...server import Server
from ..capabilities import Can, Lack, refused
from .base import Driver, two_cores
from .options import Options, Parsed
from .running import Engine, EngineServer

MODULE = (sys.executable, "-m", "vllm.entrypoints.cli.main")


class VLLMEngine(Engine):
    def __init__(self, llm: Any) -> None:
        self.llm = llm

    def ask(self, prompts: Sequence[PromptIds], max_tokens: int, prompt_logprobs: bool = False) -> list[Answer]:
        from vllm.inputs import TokensPrompt

        asked = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        return [answer for _, answer in self.ask_with_ids(asked, max_tokens, prompt_logprobs)]

    def ask_with_ids(
        self, prompts: Sequence[Any], max_tokens: int, prompt_logprobs: bool = False
    ) -> list[tuple[list[int], Answer]]:
        """The same for prompts in any form that vLLM knows, with the token ids that it made of each."""
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=True,
            logprobs=0,
            prompt_logprobs=0 if prompt_logprobs else None,
            detokenize=False,
        )
        outputs = self.llm.generate(prompts, sampling, use_tqdm=False)
        return [(list(output.prompt_token_ids), _answer(output)) for output in outputs]

    def preemptions(self) -> int:
        return self._metric("vllm:num_preemptions")

    def drafted(self) -> int:
        return self._metric("vllm:spec_decode_num_draft_tokens")

    def _metric(self, name: str) -> int:
        return sum(entry.value for entry in self.llm.get_metrics() if entry.name == name)


def _answer(output: Any) -> Answer:
    completion = output.outputs[0]
    tokens = list(completion.token_ids)
    said = [step[token].logprob for step, token in zip(completion.logprobs, tokens, strict=True)]
    read = [
        step[token].logprob
        for step, token in zip(output.prompt_logprobs or [], output.prompt_token_ids, strict=False)
        if step is not None
    ]
    return Answer(tokens, said, read, output.num_cached_tokens or 0)


class VLLMServer(EngineServer):
    def complete(self, prompt: PromptIds, max_tokens: int) -> Answer:
        body = self.body(prompt=prompt, max_tokens=max_tokens, return_token_ids=True, logprobs=0)
        reply = self.http.post("/v1/completions", body)
        (choice,) = reply["choices"]
        cached = (reply["usage"]["prompt_tokens_details"] or {}).get("cached_tokens") or 0
        return Answer(choice["token_ids"], choice["logprobs"]["token_logprobs"], [], cached)

    def forget(self) -> None:
        self.http.post("/reset_prefix_cache", {}, parse=False)

    def running(self) -> int:
        return int(self.http.metric("vllm:num_requests_running"))

    def generated(self) -> int:
        return int(self.http.metric("vllm:generation_tokens_total"))


class VLLM(Driver):
    package = "vllm"
    title = "vLLM"
    names = {
        "backend": "attention_backend",
        "dtype": "dtype",
        "context": "max_model_len",
        "chunk": "max_num_batched_tokens",
        "pages": "num_gpu_blocks_override",
        "page_size": "block_size",
        "prefix_caching": "enable_prefix_caching",
        "ranks": "tensor_parallel_size",
    }
    switches_off = {"prefix_caching": "--no-enable-prefix-caching"}
    other_backend = "CPU_ATTN"
    # "msa" names the sparse layers' backend, and they bring it themselves; the dense layers take the platform's best.
    left_of_msa = None
    no_images = "multimodal"
    thought = "reasoning"
    versions = (
        ("0.32.0", False),
        ("0.33.1", False),
        ("0.33.0rc1+cu130", False),
        ("0.31.9", True),
        ("0.34.0", True),
        ("1.0.0", True),
        ("dev", True),
    )
    unfit = ("0.19.0", MSAError, r"vLLM is 0\.19\.0, which lacks .* install one of >=0\.32,<0\.34")
    registered = """
from vllm.plugins import load_general_plugins
from vllm.model_executor.models import ModelRegistry
from vllm.v1.attention.backends.registry import AttentionBackendEnum
load_general_plugins()
served_by = ModelRegistry.models["MiniMaxM3SparseForCausalLM"].module_name
print("MSA" in AttentionBackendEnum.__members__, served_by == "msa_backend.model.vllm.causal_lm")
"""
    ask_for_msa = 'from vllm.config import AttentionConfig; AttentionConfig(backend="msa")'
    unknown_backend = "Unknown attention backend: 'MSA'"
    lacks_anywhere = {
        Can.PIPELINE_PARALLEL: refused(
            ({"own": {"pipeline_parallel_size": 2}}, "--pipeline-parallel-size is 2, but msa-backend is tested with"),
            ({"ranks": 2, "own": {"enable_expert_parallel": True}}, "--enable-expert-parallel is True, but"),
            ({"own": {"data_parallel_size": 2}}, "--data-parallel-size is 2, but msa-backend is tested with"),
        ),
        Can.QUANTIZATION: refused(
            ({"own": {"quantization": "fp8"}}, "quantization is fp8, but on a CPU MSA serves unquantized weights")
        ),
        Can.LORA: refused(
            ({"own": {"enable_lora": True}}, "--enable-lora is set, but msa-backend does not serve LoRA"),
            (
                {"ranks": 2, "own": {"decode_context_parallel_size": 2}},
                "decode_context_parallel_size is 2, but MSA",
            ),
        ),
    }
    lacks_on_cpu = {
        Can.CUDA_GRAPHS: Lack("a CPU has none"),
        Can.GPU_KERNELS: Lack("a CPU runs torch"),
    }

    def arguments(self, model: Path, options: Options) -> dict[str, Any]:
        given: dict[str, Any] = {
            **self.given(options),
            "language_model_only": True,
            "enforce_eager": DEVICE == "cpu",
            "kv_cache_memory_bytes": 2**30,
            "seed": 0,
        }
        if DEVICE != "cpu":
            # Other engines may start beside this one, and vLLM compares the first with what is free although the
            # cache's size is given. Few graphs, because no batch is large.
            given |= {"gpu_memory_utilization": 0.02, "max_cudagraph_capture_size": 64}
        if options.drafts:
            lengths = {"prompt_lookup_min": 1, "prompt_lookup_max": 3}
            given["speculative_config"] = {"method": "ngram", "num_speculative_tokens": options.drafts} | lengths
        if options.overrides:
            given["hf_overrides"] = {"text_config": dict(options.overrides)}
        if not options.tokenizer:
            given["skip_tokenizer_init"] = True
        if options.dummy_weights:
            given["load_format"] = "dummy"
        # It mixes steps and preempts requests unasked.
        return given | dict(options.own)

    def environment(self, options: Options) -> dict[str, str]:
        # /reset_prefix_cache is for developers.
        variables = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_SERVER_DEV_MODE": "1"}
        if options.ranks > 1 and DEVICE == "cpu":
            # Left to itself vLLM wants a memory node a rank, which small machines do not have.
            variables["VLLM_CPU_OMP_THREADS_BIND"] = two_cores()
        return variables

    def where(self, options: Options) -> dict[str, str]:
        # A process of its own for the core, and one for each worker, even of one rank: they all import vLLM, which is
        # ten times the work of the engine that they start. Without the core's, one rank needs no worker's either.
        return {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(options.apart))}

    @contextmanager
    def launch(self, model: Path, arguments: Mapping[str, Any]) -> Iterator[Engine]:
        import torch
        from vllm import LLM
        from vllm.distributed import cleanup_dist_env_and_memory

        if ffi := sys.modules.get("llvmlite.binding.ffi"):
            # A worker on a CPU looks through every object of every module, and llvmlite's library, which takes any
            # name for a function of its own, claims a `__dict__` that is none.
            ffi.lib._fntab["__dict__"] = {}
        # The worker replaces this function for good.
        with mock.patch.object(torch, "set_num_threads", torch.set_num_threads):
            llm = LLM(str(model), disable_log_stats=False, **arguments)
            try:
                yield VLLMEngine(llm)
            finally:
                llm.llm_engine.engine_core.shutdown()
                cleanup_dist_env_and_memory()

    def resolve(self, model: Path, arguments: Mapping[str, Any]) -> Parsed:
        from vllm.engine.arg_utils import EngineArgs

        from msa_backend.vllm.model_config import recorded

        config = EngineArgs(model=str(model), **arguments).create_engine_config()
        backend = config.attention_config.backend
        is_m3 = any("MiniMaxM3" in name for name in config.model_config.architectures)
        return Parsed(
            backend=backend and backend.name,
            page_size=config.cache_config.block_size,
            topk=recorded(config).msa.topk if is_m3 else None,
        )

    def serve_command(self, model: Path) -> Sequence[str | Path]:
        # Where vLLM was laid in place by hand there is no script.
        script = Path(sys.executable).parent / "vllm"
        return [*([script] if script.exists() else MODULE), "serve", model]

    def serve_arguments(self) -> dict[str, Any]:
        return {"served_model_name": EngineServer.MODEL, "enable_prompt_tokens_details": True}

    def wrap(self, http: Server) -> EngineServer:
        return VLLMServer(http)

    def load_plugins(self) -> None:
        from vllm.plugins import load_general_plugins

        load_general_plugins()

    def model_module(self, architecture: str) -> str:
        from vllm.model_executor.models import ModelRegistry

        return ModelRegistry.models[architecture].module_name

    def registration(self) -> list[Any]:
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        member = AttentionBackendEnum["MSA"]
        return [member, member.get_class(), *MODELS_CONFIG_MAP.values()]
