"""What happens when vLLM starts on a MiniMax-M3 model: everything MSA cannot serve is refused here, in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from msa_backend import __version__, refusals
from msa_backend.config import MSAError
from msa_backend.kernels.batch import BLOCK_SIZE
from msa_backend.kernels.caches import FP8_DTYPES
from msa_backend.model.checkpoint import check_checkpoint
from msa_backend.model.config import M3Config, text_section
from msa_backend.model.vision import VisionConfig
from msa_backend.names import BACKEND_NAME

from . import drafts, graphs, images
from . import model_config as m3
from .cache_dtypes import check_cache_dtypes, kv_dtype
from .connectors import check_connectors
from .quantization import check_quantization
from .sharing import check_sharing
from .together import check_together

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.msa_backend")

ONE_RANK_OR_TENSOR_PARALLEL = {"pipeline_parallel_size": 1, "data_parallel_size": 1, "enable_expert_parallel": False}
"""Other ways of using several ranks, and what leaves them out."""
SWIGLU_ON_CPU = (1.702, 7.0)
"""Alpha and limit that vLLM's CPU expert kernel has built in."""


def prepare(vllm_config: VllmConfig) -> None:
    """Check the model and the options against what MSA serves, and hand the model its config.

    Runs once in the process that parses the options, before any worker exists.

    Raises:
        MSAError: with the one sentence for the user.
    """
    whole_config = m3.read_config(vllm_config.model_config)
    config = M3Config.from_text_config(text_section(whole_config))
    _check_options(vllm_config)
    _check_parallelism(vllm_config, config)
    check_sharing(vllm_config)
    _check_device(vllm_config, config)
    check_quantization(vllm_config)
    check_cache_dtypes(vllm_config)
    check_connectors(vllm_config)
    vision = VisionConfig.from_config(whole_config) if images.settle(vllm_config) else None
    if vllm_config.load_config.load_format != "dummy" and (folder := Path(vllm_config.model_config.model)).is_dir():
        check_checkpoint(folder, config, vision, fp8_cache=kv_dtype(vllm_config) in FP8_DTYPES)
    drafts.check(vllm_config, config)
    check_together(vllm_config)
    m3.record(vllm_config, whole_config)
    graphs.choose(vllm_config)
    logger.info(
        "msa-backend %s serves this model: %d of %d layers attend to %d of their blocks of %d tokens.",
        __version__,
        sum(config.msa.sparse_layers),
        config.num_layers,
        config.msa.topk,
        config.msa.block_size,
    )

    # "msa" names the sparse layers' backend, and they bring it themselves. Left in place it would also be asked of
    # the dense layers, which take the platform's best, or whichever other backend the user named.
    selected = vllm_config.attention_config.backend
    if selected is not None and selected.name == BACKEND_NAME:
        vllm_config.attention_config.backend = None


def _check_options(vllm_config: VllmConfig) -> None:
    cache = vllm_config.cache_config
    if cache.user_specified_block_size and cache.block_size != BLOCK_SIZE:
        raise refusals.page_size("--block-size", cache.block_size)
    if vllm_config.lora_config is not None:
        raise MSAError("--enable-lora is set, but msa-backend does not serve LoRA adapters yet; leave it out")
    if vllm_config.model_config.enable_sleep_mode:
        refusals.check_tested("--enable-sleep-mode is set", "servers that stay awake")


def _check_parallelism(vllm_config: VllmConfig, config: M3Config) -> None:
    parallel = vllm_config.parallel_config
    refusals.check_even_heads("--tensor-parallel-size", parallel.tensor_parallel_size, config.msa)
    for option in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if (size := getattr(parallel, option, 1)) > 1:
            raise MSAError(f"{option} is {size}, but MSA does not support context parallelism yet; leave it at 1")
    for name, left_out in ONE_RANK_OR_TENSOR_PARALLEL.items():
        if (given := getattr(parallel, name)) != left_out:
            refusals.check_tested(f"--{name.replace('_', '-')} is {given}", "tensor parallelism")


def _check_device(vllm_config: VllmConfig, config: M3Config) -> None:
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and (config.swiglu_alpha, config.swiglu_limit) != SWIGLU_ON_CPU:
        raise MSAError(
            f"swiglu_alpha and swiglu_limit are {config.swiglu_alpha} and {config.swiglu_limit}, but vLLM's CPU "
            f"experts have {SWIGLU_ON_CPU[0]} and {SWIGLU_ON_CPU[1]} built in; serve this model on a GPU"
        )
