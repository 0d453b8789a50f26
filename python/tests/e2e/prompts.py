"""The prompts of the end-to-end tests, all known beforehand: one instance answers them once."""

from __future__ import annotations

import random

VOCABULARY = 512
MAX_TOKENS = 12


def tokens(seed: str, count: int) -> list[int]:
    """Any tokens but the special ones."""
    dice = random.Random(seed)
    return [dice.randrange(3, VOCABULARY) for _ in range(count)]


#: Of the lengths at which something changes: block 128, chunk 256, chunked prefill 512.
LENGTHS = (1, 5, 127, 128, 129, 255, 256, 257, 300, 512, 700, 1500, 3000)
BY_LENGTH = {count: tokens(f"length {count}", count) for count in LENGTHS}

_SHARED = tokens("shared", 512)
SHARING = [[*_SHARED, *tokens("shared 1", 150)], [*_SHARED, *tokens("shared 2", 150)]]

CONCURRENT = [tokens(f"concurrent {i}", 60 + 97 * i) for i in range(8)]
#: The small decode server has blocks for all of these, but not for what they generate as well.
PREEMPTED = [tokens(f"preempted {i}", 870) for i in range(4)]
PREEMPTED_MAX_TOKENS = 260
#: Of the small decode server's 32 blocks, two of these take 24; of its receiver's 16 slots, 12.
SCARCE = [tokens(f"scarce {i}", 1500) for i in range(6)]
SWAPPED = tokens("swapped", 512)
FIRST_TOKEN = tokens("first token", 600)
KILLED_RECEIVER = [tokens(f"killed receiver {i}", 700) for i in range(3)]
KILLED_PREFILL = [tokens(f"killed prefill {i}", 3000) for i in range(2)]
AFTER_KILL = [tokens(f"after kill {i}", 400) for i in range(2)]
ABORTED = tokens("aborted", 5000)
REFUSED = [tokens(f"refused {i}", 1500) for i in range(3)]
OTHER_PROMPT = [tokens("other prompt", 300), tokens("yet another prompt", 300)]


def all_prompts() -> list[tuple[list[int], int]]:
    """Every prompt whose answer is compared, and how many tokens of it."""
    usual = [
        *BY_LENGTH.values(), *SHARING, *CONCURRENT, *SCARCE, SWAPPED, FIRST_TOKEN, *KILLED_RECEIVER, *KILLED_PREFILL,
        *AFTER_KILL, *OTHER_PROMPT,
    ]
    return [(prompt, MAX_TOKENS) for prompt in usual] + [(prompt, PREEMPTED_MAX_TOKENS) for prompt in PREEMPTED]
