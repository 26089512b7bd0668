"""What of speculative decoding MSA cannot serve: asked before vLLM reads the options, and once it has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from msa_backend import refusals
from msa_backend.config import MSAError
from msa_backend.model.checkpoint import check_mtp_checkpoint
from msa_backend.model.config import M3Config, text_section
from msa_backend.model.mtp import MODULES_KEY, num_modules
from msa_backend.names import IMAGE_ARCHITECTURE

from .model_config import read_config_file

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = init_logger("vllm.msa_backend")

WITH_MODULES = IMAGE_ARCHITECTURE
"""The one architecture in which vLLM looks for MTP modules."""
TAPS_KEY = "eagle_aux_hidden_state_layer_ids"
OTHERWISE = "use ngram, or leave --speculative-config out"


def check_request(asked: Mapping[str, Any], model_config: ModelConfig) -> None:
    """Refuse what vLLM's own reading of the options would end in a stack trace or a dump.

    Args:
        asked: what the user gave for ``--speculative-config``.
        model_config: of the target.

    Raises:
        MSAError: the number of draft tokens is missing or does not fit the MTP modules, or there are no modules.
    """
    method, number = asked.get("method") or "", asked.get("num_speculative_tokens")
    if "mtp" not in method and method != "eagle3":
        return
    if number is None:
        raise MSAError(
            f"speculative method {method} was given without num_speculative_tokens; "
            "say in --speculative-config how many tokens to draft, 1 to 7"
        )
    if method == "eagle3":
        return
    draft = asked.get("model")
    if draft is None and WITH_MODULES not in model_config.architectures:
        raise MSAError(
            f"speculative method {method} was given for {' or '.join(model_config.architectures)}, but vLLM finds MTP "
            f"modules in {WITH_MODULES} alone; serve the whole checkpoint with --language-model-only, or {OTHERWISE}"
        )
    revision = asked.get("revision") if draft else model_config.revision
    modules = num_modules(text_section(read_config_file(draft or model_config.model, revision)))
    if modules < 1:
        raise MSAError(
            f"speculative method {method} was given, but {MODULES_KEY} is {modules} in config.json, so the model has "
            f"no MTP modules to draft with; {OTHERWISE}"
        )
    if number > modules and number % modules:
        raise MSAError(
            f"num_speculative_tokens is {number}, but with {MODULES_KEY}={modules} vLLM drafts up to {modules} tokens "
            f"or a multiple of it; choose {number - number % modules}"
        )


def check(vllm_config: VllmConfig, config: M3Config) -> None:
    """Check vLLM's reading of ``--speculative-config`` against what is served and tested.

    Raises:
        MSAError: the method is not served so, was never run, or reads layers the model has not.
        CheckpointError: the MTP modules are not those of the config.
    """
    speculative = vllm_config.speculative_config
    if speculative is None or speculative.method == "ngram":
        return
    from vllm.platforms import current_platform

    given = f"speculative method is {speculative.method}"
    if speculative.method not in ("mtp", "eagle3"):
        refusals.check_tested(given, "ngram, eagle3 and mtp")
        return
    if not (current_platform.is_cpu() or vllm_config.model_config.enforce_eager):
        refusals.check_tested(f"{given} with CUDA graphs", "drafts under --enforce-eager on a GPU, or n-gram ones")
    if (stages := vllm_config.parallel_config.pipeline_parallel_size) > 1:
        raise MSAError(
            f"{given} with --pipeline-parallel-size {stages}, but msa-backend drafts on one stage only; "
            f"leave it at 1, or {OTHERWISE}"
        )
    if speculative.method == "eagle3":
        _check_taps(speculative.draft_model_config.hf_config, config.num_layers)
        return
    if (dtype := speculative.kv_cache_dtype) not in (None, vllm_config.cache_config.cache_dtype):
        raise MSAError(
            f"kv_cache_dtype in --speculative-config is {dtype}, but MSA keeps K and V of MTP modules as it keeps the "
            "target's; leave it out"
        )
    draft = speculative.draft_model_config
    modules = getattr(draft.hf_config, MODULES_KEY, 1)
    if vllm_config.load_config.load_format != "dummy" and (folder := Path(draft.model)).is_dir():
        check_mtp_checkpoint(folder, config, modules)
    if modules > 1:
        logger.warning(
            "The first of the %d MTP modules drafts every token and the others stay idle: vLLM does not say which "
            "draft token a module is run for, so late drafts are accepted more rarely.",
            modules,
        )


def _check_taps(draft: Any, num_layers: int) -> None:
    """vLLM drops a tap that is named twice or lies outside of the model, and then fails on the shape of the others."""
    of_eagle = getattr(draft, "eagle_config", None) or {}
    if not of_eagle.get("use_aux_hidden_state", True):
        return
    named = getattr(draft, TAPS_KEY, None) or of_eagle.get(TAPS_KEY)
    # vLLM's default.
    taps = list(named or (2, num_layers // 2, num_layers - 3))
    if len(set(taps)) < len(taps) or not all(0 <= tap <= num_layers for tap in taps):
        raise MSAError(
            f"the EAGLE3 draft reads hidden states before layers {taps}{'' if named else ' by default'}, but the model "
            f"has {num_layers}; name different ones, 0 to {num_layers}, as {TAPS_KEY} in the draft's config.json"
        )
