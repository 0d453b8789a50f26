"""The prompts of the end-to-end tests, all known beforehand: one instance answers them once."""

from __future__ import annotations

import random

VOCABULARY = 512
MAX_TOKENS = 12
CHUNK_TOKENS = 256


def tokens(seed: str, count: int) -> list[int]:
    """Any tokens but the special ones."""
    dice = random.Random(seed)
    return [dice.randrange(3, VOCABULARY) for _ in range(count)]


def next_of(prompt: list[int]) -> list[int]:
    """Another prompt that has the first chunk of this one, and nothing else, in common with it."""
    return [*prompt[:CHUNK_TOKENS], *tokens("next turn", 40)]


#: Of the lengths at which something changes: block 128, chunk 256, chunked prefill 512.
LENGTHS = (1, 5, 127, 128, 129, 255, 256, 257, 300, 512, 700, 1500, 3000)
BY_LENGTH = {count: tokens(f"length {count}", count) for count in LENGTHS}

_SHARED = tokens("shared", 512)
SHARING = [[*_SHARED, *tokens("shared 1", 150)], [*_SHARED, *tokens("shared 2", 150)]]

CONCURRENT = [tokens(f"concurrent {i}", 60 + 97 * i) for i in range(8)]
#: The small decode server has 31 blocks, these take 30 of them, and each needs one more for what it generates.
PREEMPTED = [tokens(f"preempted {i}", 760) for i in range(5)]
PREEMPTED_MAX_TOKENS = 60
#: Of the small decode server's 32 blocks, two of these take 24; of its receiver's 16 slots, 12.
SCARCE = [tokens(f"scarce {i}", 1500) for i in range(6)]
FIRST_TOKEN = tokens("first token", 600)
KILLED_RECEIVER = [tokens(f"receiver gone {i}", 700) for i in range(2)]
KILLED_PREFILL = [tokens(f"killed prefill {i}", 3000) for i in range(2)]
AFTER_KILL = [tokens(f"after kill {i}", 400) for i in range(2)]
ABORTED = tokens("aborted", 5000)
REFUSED = [tokens(f"refused {i}", 1500) for i in range(3)]
OTHER_PROMPT = [tokens("other prompt", 300), tokens("yet another prompt", 300)]

_USUAL = [
    *BY_LENGTH.values(), *SHARING, *CONCURRENT, *SCARCE, FIRST_TOKEN, *KILLED_RECEIVER, *KILLED_PREFILL, *AFTER_KILL,
    *OTHER_PROMPT,
]
#: Those with chunks that can be exchanged.
OF_TWO_CHUNKS = [prompt for prompt in [*_USUAL, *PREEMPTED] if len(prompt) > CHUNK_TOKENS]


def all_prompts() -> list[tuple[list[int], int]]:
    """Every prompt whose answer is compared, and how many tokens of it."""
    usual = [*_USUAL, *PREEMPTED, *(next_of(prompt) for prompt in OF_TWO_CHUNKS)]
    return [(prompt, MAX_TOKENS) for prompt in usual] + [(prompt, PREEMPTED_MAX_TOKENS) for prompt in PREEMPTED]
