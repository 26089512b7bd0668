"""A logits processor for a server: the model says what the request scripts, as far as a grammar lets it.

The server's processes import it by this name, from a folder on their path.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

BONUS = 1e3
"""More than two logits differ by."""


class Script(CustomLogitProcessor):
    """Prefers the tokens of ``custom_params["script"]`` in their order, the next one most.

    A grammar may forbid the next; then the script goes on with the first that is said instead, or else after whatever
    the grammar leaves.
    """

    def __call__(self, logits: Any, custom_param_list: list[dict[str, Any]] | None = None) -> Any:
        for row, given in zip(logits, custom_param_list or [], strict=True):
            script = given["script"]
            said = 0
            for token in given["__req__"].output_ids:
                if token in script[said:]:
                    said = script.index(token, said) + 1
            left = script[said:]
            for place, token in enumerate(dict.fromkeys(left)):
                row[token] += BONUS * (len(left) - place)
        return logits


def answer_messages() -> None:
    """A plugin of SGLang's: ``/v1/messages`` has no field for a processor, so a script comes in its ``metadata``."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def convert(original: Any, self: Any, request: Any) -> Any:
        chat = original(self, request)
        for name, value in (request.metadata or {}).items():
            setattr(chat, name, value)
        return chat

    target = "sglang.srt.entrypoints.anthropic.serving.AnthropicServing._convert_to_chat_completion_request"
    HookRegistry.register(target, convert, HookType.AROUND)
