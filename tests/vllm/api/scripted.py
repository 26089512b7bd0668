"""A logits processor for a server: the model says what the request scripts, as far as a grammar lets it.

Loaded by the server as a module of its own: ``--logits-processors scripted:Script``.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

BONUS = 1e3
"""More than two logits differ by."""


class Script(AdapterLogitsProcessor):
    """Prefers the tokens of ``vllm_xargs["script"]`` in their order, the next one most.

    A grammar may forbid the next; then the script goes on with the first that is said instead, or else after whatever
    the grammar leaves.
    """

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        pass

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: Any) -> Any:
        given = (params.extra_args or {}).get("script")
        if not given:
            return None
        script = [int(token) for token in given]

        def prefer(output_ids: list[int], logits: Any) -> Any:
            said = 0
            for token in output_ids:
                if token in script[said:]:
                    said = script.index(token, said) + 1
            left = script[said:]
            for place, token in enumerate(dict.fromkeys(left)):
                logits[token] += BONUS * (len(left) - place)
            return logits

        return prefer
