"""What happens when SGLang starts on a MiniMax-M3 model: what MSA cannot serve is refused here, in one sentence."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from msa_backend import __version__, refusals
from msa_backend.config import MSAError
from msa_backend.kernels.batch import BLOCK_SIZE
from msa_backend.model.checkpoint import check_checkpoint
from msa_backend.model.config import M3Config
from msa_backend.model.quantization import section_of
from msa_backend.names import M3_ARCHITECTURES, SGLANG_BACKEND_NAME
from msa_backend.sharing import SWITCH, least_tokens

from . import model_config as m3
from .engine import declare_resolution, resolving_view
from .in_place import MODEL_PACKAGE, MODEL_PACKAGE_VARIABLE, require_in_place

logger = logging.getLogger("sglang.msa_backend")

NOT_SERVED = {
    "enable_lora": ("--enable-lora", "does not serve LoRA adapters yet"),
    "lora_paths": ("--lora-paths", "does not serve LoRA adapters yet"),
    "enable_memory_saver": ("--enable-memory-saver", "does not give back its memory yet"),
    "enable_hisparse": ("--enable-hisparse", "does not keep K and V on the host yet"),
    "enable_hierarchical_cache": ("--enable-hierarchical-cache", "does not keep K and V on the host yet"),
    "enable_page_major_kv_layout": ("--enable-page-major-kv-layout", "reads token-major caches"),
    "enable_unified_memory": ("--enable-unified-memory", "reads token-major caches"),
    "enable_pdmux": ("--enable-pdmux", "does not split prefill from decode yet"),
    "enable_two_batch_overlap": ("--enable-two-batch-overlap", "does not split a batch in two yet"),
}
KV_DTYPES = ("auto", "bf16", "bfloat16")
GRAPHS = {
    "decode": (("full", "disabled"), "no test has run MSA in such a graph"),
    "prefill": (("breakable", "disabled"), "such a graph would replay the prompt that it was recorded with"),
}
MUST_BE_ONE = {
    "pp_size": ("--pp-size", "does not split the layers over ranks on SGLang yet"),
    "ep_size": ("--ep-size", "does not split the experts over ranks on SGLang yet"),
    "attn_dp_size": ("--attn-dp-size", "does not run attention data-parallel yet"),
    "attn_cp_size": ("--attn-cp-size", "does not support context parallelism yet"),
    "dcp_size": ("--dcp-size", "does not support context parallelism yet"),
}


def prepare(server_args: Any, hf_config: Any) -> dict[str, Any]:
    """Check the model and the options against what MSA serves, and hand the model its config.

    Runs in the process that parses the options, before any other exists.

    Returns:
        Options of SGLang to be set, by their names.

    Raises:
        MSAError: with the one sentence for the user.
    """
    options = resolving_view(server_args)
    text_config = m3.read_text_config(options.model_path, options.revision, options.json_model_override_args)
    config = M3Config.from_text_config(text_config)
    _check_registered()
    _check_backends(server_args)
    _check_options(server_args, options)
    _check_quantization(options, hf_config)
    _check_parallelism(options, config)
    if options.load_format != "dummy" and (folder := Path(options.model_path)).is_dir():
        check_checkpoint(folder, config)
    logger.info(
        "msa-backend %s serves this model: %d of %d layers attend to %d of their blocks of %d tokens.",
        __version__,
        sum(config.msa.sparse_layers),
        config.num_layers,
        config.msa.topk,
        config.msa.block_size,
    )

    # Of these two, a model's start-up step may not decide by returning them.
    declare_resolution(
        server_args,
        "msa-backend",
        enable_multimodal=False,
        json_model_override_args=m3.record(
            options.json_model_override_args,
            text_config,
            hf_config.architectures[0],
            is_whole=hasattr(hf_config, "text_config"),
        ),
    )
    return _selected_backend(server_args) | {"page_size": BLOCK_SIZE}


def refuse_other_models(server_args: Any, hf_config: Any) -> None:
    """Stop when the backend is asked for on a model without MSA layers.

    Raises:
        MSAError: with the one sentence for the user.
    """
    if SGLANG_BACKEND_NAME in _given_backends(server_args).values():
        raise refusals.no_msa_layers(server_args.model_path, hf_config.architectures, M3_ARCHITECTURES)


def _check_registered() -> None:
    require_in_place()
    if (package := os.environ.get(MODEL_PACKAGE_VARIABLE)) != MODEL_PACKAGE:
        raise MSAError(
            f"{MODEL_PACKAGE_VARIABLE} is {package}, but SGLang takes one such package and msa-backend's MiniMax-M3 "
            f"class comes in {MODEL_PACKAGE}; unset it, or set MSA_DISABLE=1 to serve without msa-backend"
        )


def _given_backends(server_args: Any) -> dict[str, str | None]:
    """What the user gave, which on ``server_args`` itself no default has filled in."""
    return {
        "--attention-backend": server_args.attention_backend,
        "--prefill-attention-backend": server_args.prefill_attention_backend,
        "--decode-attention-backend": server_args.decode_attention_backend,
    }


def _check_backends(server_args: Any) -> None:
    given = _given_backends(server_args)
    base = given.pop("--attention-backend")
    split = {name: backend or base for name, backend in given.items()}
    if SGLANG_BACKEND_NAME in split.values() and len(set(split.values())) > 1:
        raise MSAError(
            "MSA serves prefill and decode alike, but "
            + " and ".join(f"{name} is {backend}" for name, backend in split.items())
            + "; pass --attention-backend msa alone, or name other backends alone, which then serve the dense layers"
        )


def _selected_backend(server_args: Any) -> dict[str, str]:
    """Installed means used: the sparse layers are ours whatever is named, and naming nothing means ``msa``."""
    if any(_given_backends(server_args).values()):
        return {}
    return {"attention_backend": SGLANG_BACKEND_NAME}


def _check_options(server_args: Any, options: Any) -> None:
    # What another start-up step filled in is no choice of the user's.
    if server_args.page_size not in (None, BLOCK_SIZE):
        raise refusals.page_size("--page-size", server_args.page_size)
    for name, (option, reason) in NOT_SERVED.items():
        if getattr(options, name, None):
            raise MSAError(f"{option} is set, but msa-backend {reason}; leave it out")
    if options.disaggregation_mode != "null":
        raise MSAError(
            f"--disaggregation-mode is {options.disaggregation_mode}, but MSA does not transfer its caches between "
            "servers yet; leave it out"
        )
    if options.speculative_algorithm is not None:
        raise MSAError(
            f"--speculative-algorithm is {options.speculative_algorithm}, but msa-backend does not serve drafts on "
            "SGLang yet; leave it out, or set MSA_DISABLE=1 for SGLang's own class"
        )
    if options.device != "cpu":
        refusals.check_tested(f"--device is {options.device}", "SGLang on a CPU")
    if options.device == "cpu" and os.environ.get("SGLANG_USE_CPU_ENGINE") != "1":
        raise MSAError(
            "--device is cpu, but SGLang builds its CPU layers only with SGLANG_USE_CPU_ENGINE=1 in the environment; "
            "set it"
        )
    if options.kv_cache_dtype not in KV_DTYPES:
        _check_quantized_cache(options)
    for phase, (served, reason) in GRAPHS.items():
        # Resolved by now of all the options that may say it.
        if (graphs := getattr(options.cuda_graph_config, phase).backend) not in served:
            raise MSAError(
                f"--cuda-graph-backend-{phase} is {graphs}, but {reason}; leave it out, or pass {' or '.join(served)}"
            )


def _check_quantized_cache(options: Any) -> None:
    given = f"--kv-cache-dtype is {options.kv_cache_dtype}"
    if options.device == "cpu":
        raise MSAError(
            f"{given}, but on a CPU MSA keeps K and V as {' or '.join(KV_DTYPES)}; "
            "a quantized cache is not served yet, leave it out"
        )
    if options.kv_cache_dtype != "fp8_e4m3":
        raise MSAError(
            f"{given}, but SGLang's FlashAttention-3, which MSA leaves the dense layers to, takes fp8 as e4m3 alone; "
            "pass fp8_e4m3, or leave it out"
        )
    refusals.check_tested(given, f"caches in {' or '.join(KV_DTYPES)}")


def _check_quantization(options: Any, hf_config: Any) -> None:
    # SGLang takes the checkpoint's own quantization without an option.
    quantization = options.quantization or section_of(hf_config).get("quant_method")
    if quantization is not None:
        refusals.check_quantization(quantization, on_cpu=options.device == "cpu")


def _check_parallelism(options: Any, config: M3Config) -> None:
    refusals.check_even_heads("--tp-size", options.tp_size, config.msa)
    if least_tokens() and options.tp_size > 1:
        raise MSAError(f"{SWITCH} is set, but msa-backend shares scoring among ranks on vLLM only; leave it out")
    for name, (option, reason) in MUST_BE_ONE.items():
        if (size := getattr(options, name, 1)) > 1:
            raise MSAError(f"{option} is {size}, but msa-backend {reason}; leave it at 1")
