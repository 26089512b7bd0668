"""Pictures, prompts with them, and what ``transformers`` makes of both: the truth for images and videos.

``transformers`` lets all images of a prompt attend to each other in its vision tower, which vLLM keeps apart. So the
tower is asked for one image at a time, and its tokens are put where they belong.
Nothing of this project is in here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .oracle import CHUNK, new_cache

IMAGE, VIDEO = "]<]image[>[", "]<]video[>["


@dataclass(frozen=True)
class Prompt:
    """Text with a marker for each image and video.

    Attributes:
        text: with ``IMAGE`` and ``VIDEO`` in it.
        images: uint8 ``[height, width, 3]``, in the order of their markers.
        videos: frames ``[frames, height, width, 3]``, one frame a second.
    """

    text: str
    images: Sequence[np.ndarray] = ()
    videos: Sequence[np.ndarray] = field(default=())


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Noise, in which every patch differs from every other."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def video(frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.stack([picture(height, width, seed * 1000 + frame) for frame in range(frames)])


def metadata(frames: np.ndarray) -> dict[str, Any]:
    """Of a video of one frame a second that was taken whole."""
    count = len(frames)
    return {"fps": 1.0, "frames_indices": list(range(count)), "total_num_frames": count, "duration": float(count)}


class Reader:
    """A checkpoint as ``transformers`` runs it, with its processors.

    Args:
        folder: of the checkpoint.
        model: what ``oracle.load`` made of it.
    """

    def __init__(self, folder: Path, model: Any) -> None:
        from transformers import MiniMaxM3VLProcessor

        self.model = model
        # By name: in a process that has loaded vLLM, its config class stands in AutoProcessor's way.
        self.processor = MiniMaxM3VLProcessor.from_pretrained(folder, local_files_only=True)

    def read(self, prompt: Prompt, reverse_patches: bool = False) -> tuple[list[int], torch.Tensor]:
        """Token ids of a prompt, and what goes into the text model for them, fp32 ``[tokens, hidden_size]``.

        Args:
            reverse_patches: give the tower the patches of each image and video last to first.
        """
        from transformers.video_utils import VideoMetadata

        given: dict[str, Any] = {"text": prompt.text, "return_tensors": "pt"}
        if prompt.images:
            given["images"] = list(prompt.images)
        if prompt.videos:
            given["videos"] = list(prompt.videos)
            given["video_metadata"] = [VideoMetadata(**metadata(frames)) for frames in prompt.videos]
            given |= {"do_resize": True, "do_sample_frames": False}
        inputs = self.processor(**given)
        ids = inputs["input_ids"][0]
        with torch.inference_mode():
            embedded = self.model.get_input_embeddings()(ids)
            for pixels, grid, token in (
                ("pixel_values", "image_grid_thw", self.processor.image_token_id),
                ("pixel_values_videos", "video_grid_thw", self.processor.video_token_id),
            ):
                if pixels in inputs:
                    embedded[ids == token] = torch.cat(
                        list(self._features(inputs[pixels], inputs[grid], reverse_patches))
                    )
        return ids.tolist(), embedded

    def _features(self, pixels: torch.Tensor, grids: torch.Tensor, reverse: bool) -> Iterator[torch.Tensor]:
        patches = pixels.split(grids.prod(-1).tolist())
        for part, grid in zip(patches, grids, strict=True):
            found = self.model.model.get_image_features(part.flip(0) if reverse else part, grid[None])
            yield found.pooler_output[0]

    @torch.inference_mode()
    def logprobs(self, prompt: Prompt, answer: Sequence[int] = (), reverse_patches: bool = False) -> torch.Tensor:
        """After every token of a prompt and its answer but the last, fp32 ``[tokens - 1, vocab]``."""
        _, embedded = self.read(prompt, reverse_patches)
        said = self.model.get_input_embeddings()(torch.tensor(answer, dtype=torch.long))
        cache = new_cache(self.model)
        logits = [
            self.model(inputs_embeds=part[None], past_key_values=cache, use_cache=True).logits[0].float()
            for part in torch.cat([embedded, said]).split(CHUNK)
        ]
        return torch.cat(logits)[:-1].log_softmax(-1)
