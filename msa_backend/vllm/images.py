"""Whether vLLM takes images with MiniMax-M3 here, and with which class of ours it serves the model."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from msa_backend import refusals
from msa_backend.config import MSAError
from msa_backend.names import IMAGE_ARCHITECTURE, TEXT_ARCHITECTURE

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.msa_backend")

MODALITIES = ("image", "video")
UNSERVED = {"enable_mm_embeds": "embeddings made elsewhere", "mm_encoder_only": "a vision tower alone"}
"""Options of vLLM that nothing here serves, and what they ask for."""


def no_images() -> str | None:
    """Why images cannot be served here, as a sentence; None where they can."""
    from vllm.platforms import current_platform

    if find_spec("torchvision") is None:
        return "images need torchvision, which is not installed; install the build that goes with your torch"
    if not current_platform.is_cpu():
        try:
            refusals.check_tested("this server runs on a GPU and the model takes images", "images on CPUs")
        except MSAError as untested:
            return str(untested)
    return None


def settle(vllm_config: VllmConfig) -> bool:
    """Whether this server takes images; where the user wants none, the text class serves the model.

    vLLM chooses between its classes before it asks any of them, so ours are told apart by what the class that was
    registered brought: vLLM has a multimodal config only for one that takes images.

    Raises:
        MSAError: images are wanted in a way that is not served.
    """
    model_config = vllm_config.model_config
    multimodal = model_config.multimodal_config
    if multimodal is None:
        if IMAGE_ARCHITECTURE in model_config.architectures and (reason := no_images()):
            logger.info("Text only, an image is answered with 400: %s.", reason)
        return False
    if all(multimodal.get_limit_per_prompt(modality) == 0 for modality in MODALITIES):
        model_config.hf_config.architectures = [TEXT_ARCHITECTURE]
        model_config.multimodal_config = None
        return False
    for option, asked in UNSERVED.items():
        if getattr(multimodal, option):
            raise MSAError(
                f"--{option.replace('_', '-')} is set, but msa-backend does not serve {asked}, only text, images and "
                "videos; leave it out"
            )
    if vllm_config.speculative_config is not None:
        refusals.check_tested("--speculative-config is given and the model takes images", "--language-model-only then")
    # Imports what loads images and videos, which text does not need.
    from .media import use_own_connector

    use_own_connector()
    return True
