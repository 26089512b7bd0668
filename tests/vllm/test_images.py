"""Images and videos in vLLM are what ``transformers`` makes of them, to the rounding of fp32.

One engine is asked nearly everything, from a sharded checkpoint: in chunks that cut through images, with its caches
of prefixes, of processed images and of their tokens on. Two more read the other forms, one of them on two ranks.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from ..compare import Answer
from ..engines.capabilities import Can, needs
from ..engines.drivers import DRIVER
from ..engines.drivers.options import PAGE
from ..images import IMAGE, VIDEO, Prompt, Reader, metadata, picture, video

pytest.importorskip("torchvision", reason="vLLM's processors of MiniMax-M3 need it")
pytestmark = needs(Can.IMAGES, Can.FP32)

# Measured: at most 1e-5 for an image, 2e-5 in a prompt of a thousand tokens. Reversed patches move the last token's
# distribution by 0.8 and more.
TOLERANCE = 5e-5
NEW_TOKENS = 8
TAKES_IMAGES = {"language_model_only": False, "limit_mm_per_prompt": {"image": 3, "video": 1}}


class Said(NamedTuple):
    """An answer, and the token ids that were made of its prompt."""

    ids: list[int]
    answer: Answer


def words(count: int, seed: int = 0) -> str:
    """Each is one token, with the blank before it."""
    dice = random.Random(seed)
    return "".join(f" {dice.choice(('sugar', 'tree', 'river', 'stone', 'green', 'dog', 'five'))}" for _ in range(count))


SMALL, WIDE, LARGE = picture(224, 280, 1), picture(112, 336, 2), picture(560, 448, 3)
LONG_TEXT = words(500)
PROMPTS = {
    "an image": Prompt(f"What{IMAGE} is it?", [SMALL]),
    "an image alone": Prompt(IMAGE, [WIDE]),
    "an image that is resized": Prompt(f"{words(40)}{IMAGE}{words(5)}", [picture(333, 500, 4)]),
    "three images, two of them equal": Prompt(f"{IMAGE}{words(3)}{IMAGE} and{IMAGE}", [SMALL, WIDE, SMALL]),
    "an image in a long prompt": Prompt(f"{LONG_TEXT}{IMAGE}{words(300, 1)}", [LARGE]),
    "a video": Prompt(f"Watch{VIDEO} now", videos=[video(5, 112, 168)]),
    "a video and an image": Prompt(f"{VIDEO}{words(9)}{IMAGE}", [WIDE], [video(2, 84, 84, 7)]),
    "no image": Prompt(words(200, 2)),
}
BESIDE = Prompt(f"{LONG_TEXT}{IMAGE}{words(300, 1)}", [picture(560, 448, 5)])
each_prompt = pytest.mark.parametrize("name", PROMPTS)


@contextmanager
def asking(model: Path, **options: Any) -> Iterator[Any]:
    """A running engine that takes images, as a function from prompts to what it says to each."""
    with DRIVER.engine(model, own=TAKES_IMAGES, **options) as engine:
        yield lambda prompts, **more: ask(engine, prompts, **more)


def ask(engine: Any, prompts: Sequence[Prompt], prompt_logprobs: bool = True) -> list[Said]:
    asked = [
        {
            "prompt": prompt.text,
            "multi_modal_data": {
                "image": list(prompt.images),
                "video": [(frames, metadata(frames)) for frames in prompt.videos],
            },
        }
        for prompt in prompts
    ]
    return [Said(*said) for said in engine.ask_with_ids(asked, NEW_TOKENS, prompt_logprobs)]


@pytest.fixture(scope="module")
def reader(tiny: Path, truth: Any) -> Reader:
    return Reader(tiny, truth)


class Chunked(NamedTuple):
    """What the engine says to all prompts together, and to long ones whose beginning is in the cache."""

    together: list[Said]
    again: Said
    beside: Said


@pytest.fixture(scope="module")
def chunked(tiny: Path) -> Chunked:
    """Chunks of 192 tokens; the long prompt's image has 320."""
    with asking(tiny, chunk=192, prefix_caching=True) as say:
        together = say(list(PROMPTS.values()))
        (again,) = say([PROMPTS["an image in a long prompt"]], prompt_logprobs=False)
        (beside,) = say([BESIDE], prompt_logprobs=False)
    return Chunked(together, again, beside)


def assert_true(said: Said, prompt: Prompt, reader: Reader) -> None:
    """The same token ids, every log-probability, and every token the most probable one or as good as that."""
    ids, _ = reader.read(prompt)
    assert said.ids == ids
    expected = reader.logprobs(prompt, said.answer.tokens)
    targets = torch.tensor((ids + said.answer.tokens)[1:])
    found = torch.tensor(said.answer.prompt_logprobs + said.answer.logprobs)
    worst = (found - expected.gather(1, targets[:, None])[-len(found) :, 0]).abs().max().item()
    print(f"{len(ids)} tokens: off by {worst:.1e}")
    assert worst <= TOLERANCE
    own = expected[-NEW_TOKENS:]
    behind = own.amax(-1) - own.gather(1, targets[-NEW_TOKENS:, None])[:, 0]
    assert behind.max().item() <= TOLERANCE


@each_prompt
def test_in_chunks(chunked: Chunked, reader: Reader, name: str):
    said = dict(zip(PROMPTS, chunked.together, strict=True))[name]
    assert len(said.answer.prompt_logprobs) == len(said.ids) - 1
    assert_true(said, PROMPTS[name], reader)


def test_a_prefix_that_ends_behind_the_image(chunked: Chunked, reader: Reader):
    assert chunked.again.answer.cached == (len(chunked.again.ids) - 1) // PAGE * PAGE
    assert_true(chunked.again, PROMPTS["an image in a long prompt"], reader)


def test_another_image_is_no_prefix(chunked: Chunked, reader: Reader):
    """The same token ids with another image share what lies before it."""
    assert chunked.beside.ids == chunked.again.ids
    image = chunked.beside.ids.index(reader.processor.image_token_id)
    assert chunked.beside.answer.cached == image // PAGE * PAGE > 0
    assert_true(chunked.beside, BESIDE, reader)


@pytest.mark.parametrize(("form", "ranks"), [("native", 1), ("default", 2)])
def test_other_forms(form: str, ranks: int, reader: Reader, request: pytest.FixtureRequest):
    prompts = [PROMPTS["an image"], PROMPTS["a video and an image"]]
    with asking(request.getfixturevalue(form), ranks=ranks) as say:
        found = say(prompts)
    for said, prompt in zip(found, prompts, strict=True):
        assert_true(said, prompt, reader)


@pytest.mark.parametrize("name", [name for name, prompt in PROMPTS.items() if prompt.images or prompt.videos])
def test_reversed_patches_would_show(reader: Reader, name: str):
    whole = reader.logprobs(PROMPTS[name])
    moved = (whole - reader.logprobs(PROMPTS[name], reverse_patches=True))[-1].abs().max().item()
    print(f"moved by {moved:.2f}")
    assert moved > 0.1
