"""SGLang."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...compare import Answer, PromptIds
from ...device import DEVICE
from ...server import Server
from ..capabilities import Can, Lack, refused
from .base import Driver, two_cores
from .options import PAGE, Options, Parsed
from .running import Engine, EngineServer

ENVIRONMENT = {"HF_HUB_OFFLINE": "1"}
if DEVICE == "cpu":
    # Without the first SGLang looks for a GPU, whatever its options say. The tensors of a tiny model are too small to
    # share, and another engine runs beside this one.
    ENVIRONMENT |= {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}


class SGLangEngine(Engine):
    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.retractions = 0

    def ask(self, prompts: Sequence[PromptIds], max_tokens: int, prompt_logprobs: bool = False) -> list[Answer]:
        outputs = self.llm.generate(
            input_ids=[list(prompt) for prompt in prompts],
            sampling_params={"temperature": 0, "max_new_tokens": max_tokens, "ignore_eos": True},
            return_logprob=True,
            logprob_start_len=0 if prompt_logprobs else -1,
        )
        self.retractions += sum(output["meta_info"]["num_retractions"] for output in outputs)
        return [_answer(output, prompt_logprobs) for output in outputs]

    def preemptions(self) -> int:
        return self.retractions


def _answer(output: Mapping[str, Any], prompt_logprobs: bool = False) -> Answer:
    """One answer of SGLang's own interface, which is the same in process and over HTTP."""
    meta = output["meta_info"]
    said = meta["output_token_logprobs"]
    # The first token of a prompt follows nothing.
    before = [entry[0] for entry in meta["input_token_logprobs"][1:]] if prompt_logprobs else []
    return Answer([entry[1] for entry in said], [entry[0] for entry in said], before, meta["cached_tokens"])


class SGLangServer(EngineServer):
    def complete(self, prompt: PromptIds, max_tokens: int) -> Answer:
        sampling = {"temperature": 0, "ignore_eos": True, "max_new_tokens": max_tokens}
        body = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}
        return _answer(self.http.post("/generate", body))

    def forget(self) -> None:
        self.http.post("/flush_cache", {}, parse=False)

    def running(self) -> int:
        return int(self.http.metric("sglang:num_running_reqs"))

    def generated(self) -> int:
        return int(self.http.metric("sglang:generation_tokens_total"))


class SGLang(Driver):
    package = "sglang"
    title = "SGLang"
    names = {
        "backend": "attention_backend",
        "dtype": "dtype",
        "context": "context_length",
        "chunk": "chunked_prefill_size",
        "mixed": "enable_mixed_chunk",
        "page_size": "page_size",
        "ranks": "tp_size",
    }
    switches_off = {"prefix_caching": "--disable-radix-cache"}
    other_backend = "torch_native"
    left_of_msa = "msa"
    no_images = "only supports text input"
    thought = "reasoning_content"
    versions = (
        ("0.5.23", False),
        ("0.5.23.post1", False),
        ("0.5.22", True),
        ("0.5.24", True),
        ("1.0.0", True),
        ("dev", True),
    )
    # An exit, because SGLang logs any exception of a plugin and serves on without us.
    unfit = ("0.4.0", SystemExit, r"SGLang is 0\.4\.0, which lacks .* install one of >=0\.5\.23,<0\.5\.24")
    registered = """
import os
from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.plugins import load_plugins
load_plugins()
package = os.environ.get("SGLANG_EXTERNAL_MODEL_PACKAGE")
print("msa" in ATTENTION_BACKEND_CHOICES, "msa" in ATTENTION_BACKENDS, package == "msa_backend.model.sglang.entry")
"""
    ask_for_msa = """
from sglang.srt.server_args import prepare_server_args
prepare_server_args(["--model-path", "m", "--attention-backend", "msa"])
"""
    unknown_backend = "invalid choice: 'msa'"
    lacks_anywhere = {
        Can.DRAFTS: refused(
            ({"own": {"speculative_algorithm": "NGRAM"}}, "--speculative-algorithm is NGRAM, but msa-backend"),
            ({"own": {"speculative_algorithm": "EAGLE"}}, "--speculative-algorithm is EAGLE, but msa-backend"),
        ),
        Can.PIPELINE_PARALLEL: refused(
            ({"own": {"pp_size": 2}}, "--pp-size is 2, but msa-backend does not split the layers"),
            ({"ranks": 2, "own": {"ep_size": 2}}, "--ep-size is 2, but msa-backend does not split the experts"),
        ),
        Can.FP8_CACHES: refused(
            (
                {"own": {"kv_cache_dtype": "fp8_e4m3"}},
                "--kv-cache-dtype is fp8_e4m3, but on a CPU MSA keeps K and V as auto or",
            ),
        ),
        Can.QUANTIZATION: refused(
            ({"own": {"quantization": "fp8"}}, "quantization is fp8, but on a CPU MSA serves unquantized weights")
        ),
        Can.IMAGES: Lack("text only"),
        Can.KV_TRANSFER: refused(
            ({"own": {"disaggregation_mode": "prefill"}}, "--disaggregation-mode is prefill, but MSA does not"),
        ),
        Can.LORA: refused(
            (
                {"own": {"enable_lora": True, "max_lora_rank": 8, "lora_target_modules": ["q_proj"]}},
                "--enable-lora is set, but msa-backend does not serve LoRA",
            ),
            (
                {"own": {"enable_memory_saver": True}},
                "--enable-memory-saver is set, but msa-backend does not give back",
            ),
            ({"ranks": 2, "own": {"attn_cp_size": 2}}, "--attn-cp-size is 2, but msa-backend does not support"),
        ),
        Can.ANY_CHUNK: Lack("it computes whole pages of 128 tokens"),
    }
    lacks_on_cpu = {
        Can.CUDA_GRAPHS: Lack("a CPU has none"),
        Can.GPU_KERNELS: Lack("a CPU runs torch"),
    }

    def arguments(self, model: Path, options: Options) -> dict[str, Any]:
        given: dict[str, Any] = {
            **self.given(options),
            "device": DEVICE,
            "max_total_tokens": options.pages * PAGE,
            "disable_radix_cache": not options.prefix_caching,
            "disable_cuda_graph": DEVICE == "cpu",
            "skip_tokenizer_init": not options.tokenizer,
            "random_seed": 0,
        }
        if DEVICE != "cpu":
            given["mem_fraction_static"] = 0.5  # other engines may start beside this one
        if options.overrides:
            given["json_model_override_args"] = _whole_text_config(model, options.overrides)
        if options.dummy_weights:
            given["load_format"] = "dummy"
        given |= options.own
        return {name: value for name, value in given.items() if value is not False}

    def environment(self, options: Options) -> dict[str, str]:
        variables = dict(ENVIRONMENT)
        if options.preempting:
            # Where an answer's end is ignored, SGLang keeps room for the whole of it and never has to take a request
            # back. Its own switch for tests does it every 50 steps, on the path that it takes when memory has run out.
            variables |= {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "50"}
        if options.ranks > 1 and DEVICE == "cpu":
            # SGLang wants a NUMA node for each rank, or to be told of the cores.
            variables["SGLANG_CPU_OMP_THREADS_BIND"] = two_cores()
        return variables

    @contextmanager
    def launch(self, model: Path, arguments: Mapping[str, Any]) -> Iterator[Engine]:
        from sglang import Engine as Native

        llm = Native(model_path=str(model), log_level="warning", **({"skip_tokenizer_init": True} | arguments))
        try:
            yield SGLangEngine(llm)
        finally:
            llm.shutdown()

    def resolve(self, model: Path, arguments: Mapping[str, Any]) -> Parsed:
        options = resolved(model, arguments)
        config = json.loads(options.json_model_override_args)
        sparse = config.get("text_config", config).get("sparse_attention_config", {})
        return Parsed(options.attention_backend, options.page_size, sparse.get("sparse_topk_blocks"))

    def serve_command(self, model: Path) -> Sequence[str | Path]:
        return [sys.executable, "-m", "sglang.launch_server", "--model-path", model]

    def serve_arguments(self) -> dict[str, Any]:
        # Show at once in the metrics what runs.
        return {"served_model_name": EngineServer.MODEL, "enable_metrics": True, "decode_log_interval": 1}

    def wrap(self, http: Server) -> EngineServer:
        return SGLangServer(http)

    def load_plugins(self) -> None:
        from sglang.srt.plugins import load_plugins

        load_plugins()

    def model_module(self, architecture: str) -> str:
        from sglang.srt.models.registry import ModelRegistry

        return ModelRegistry.models[architecture].__module__

    def registration(self) -> list[Any]:
        from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES
        from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

        return [ATTENTION_BACKENDS["msa"], ATTENTION_BACKEND_CHOICES.count("msa")]

    def inherited(self) -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if name != "SGLANG_EXTERNAL_MODEL_PACKAGE"}


def resolved(model: Path, arguments: Mapping[str, Any]) -> Any:
    """SGLang's options after all that it does with them before it starts a process."""
    from sglang.srt.arg_groups.model_override_base import resolving_view
    from sglang.srt.server_args import ServerArgs

    server_args = ServerArgs(model_path=str(model), **arguments)
    server_args.resolve_once()
    return resolving_view(server_args)


def _whole_text_config(model: Path, changes: Mapping[str, Any]) -> str:
    """A change of the text section as SGLang takes one: with the whole section, since it replaces sections."""
    text = json.loads((model / "config.json").read_text())["text_config"]
    return json.dumps({"text_config": _merged(text, changes)})


def _merged(section: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(section)
    for key, value in changes.items():
        merged[key] = _merged(merged[key], value) if isinstance(value, Mapping) else value
    return merged
