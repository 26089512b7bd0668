"""One vLLM engine with given options, asked from short to long and then in a batch: does it live through it?

    python ask.py '{"model": "DIR", "kv_cache_dtype": "fp8"}'

prints a line for each answer. What it dies of is in its log, so no more is done with it.
"""

import faulthandler
import json
import sys

LENGTHS = (300, 16_555, 16_726, 30_000)
"""Of prompts asked alone; after the second one, four tokens later, a server was seen to die."""
BATCH = 20
NEW_TOKENS = 40


def prompt(length: int) -> dict[str, list[int]]:
    # Ids that every vocabulary of ours has.
    return {"prompt_token_ids": [(place * 7919) % 1200 + 1 for place in range(length)]}


def main() -> None:
    from vllm import LLM, SamplingParams

    faulthandler.enable()
    engine = LLM(**json.loads(sys.argv[1]))
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    for lengths in (*((length,) for length in LENGTHS), tuple(1000 + 137 * row for row in range(BATCH))):
        answers = engine.generate([prompt(length) for length in lengths], sampling, use_tqdm=False)
        new = [len(answer.outputs[0].token_ids) for answer in answers]
        if set(new) != {NEW_TOKENS}:
            sys.exit(f"prompts of {lengths} tokens were answered with {new} tokens, not {NEW_TOKENS} each")
        print(f"answered: {lengths} tokens; first {answers[0].outputs[0].token_ids[:12]}", flush=True)


# vLLM's processes import this file again.
if __name__ == "__main__":
    main()
