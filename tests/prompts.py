"""The prompts that every engine must answer as ``transformers`` does."""

from __future__ import annotations

from .oracle import random_prompt

# By length, the seed of the prompt. Reading a long prompt takes ten thousands of decisions, which blocks and which
# experts to take, and where two candidates are closer than fp32 rounding two correct implementations may part. Of
# each length this is a seed with a wide berth: `oracle.close_calls` finds no two candidates closer than 3e-6, relative,
# where rounding is a few 1e-7. If a comparison fails at one place alone, look there first.
SEEDS = {1: 1, 2: 1, 17: 1, 64: 1, 127: 1, 128: 1, 129: 1, 255: 1, 256: 1, 257: 1, 500: 1, 511: 1, 512: 2, 513: 1}
SEEDS |= {640: 1, 800: 2, 1023: 4, 1300: 1, 2048: 7, 2049: 3, 3333: 5, 6000: 22}
LENGTHS = list(SEEDS)
PROMPTS = [random_prompt(length, seed) for length, seed in SEEDS.items()]
NEW_TOKENS = 16
# Long enough that blocks the answer itself has filled are chosen from, or left out, like those of the prompt.
LONG_ANSWERS = [random_prompt(length, seed=1) for length in (300, 640, 1300)]
LONG = 400

# Prompts that share prefixes.
FIRST = random_prompt(1300, seed=3)
# Shares 900 tokens: seven whole blocks and a piece of the eighth, which must be computed anew.
BRANCH = FIRST[:900] + random_prompt(400, seed=4)
LONGER = FIRST + random_prompt(333, seed=5)
# A whole number of blocks: the last is recomputed all the same, for there must be a token to compute.
BLOCKS = random_prompt(1024, seed=6)

# More than a small cache holds at once; seeds with a wide berth again, the answers included.
MANY_SEEDS = {600: 7, 637: 7, 674: 7, 711: 7, 748: 7, 785: 7, 822: 9, 859: 8}
MANY = [random_prompt(length, seed) for length, seed in MANY_SEEDS.items()]
MANY_TOKENS = 150
