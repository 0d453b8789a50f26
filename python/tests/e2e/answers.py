"""The right answers, and comparing with them: what a deployment answers has to be right on any processor.

No two servers need compute a prompt in the same steps: prefill takes it in chunks, others run beside it, and a decode
server that preempts a request computes it once more. Each of these rounds differently, and so do processors. Therefore
servers compute in float32 here, where that moves the margin between the logits of two tokens by 0.00045 at most (in
bfloat16 by 4), and no answer is compared in which a token has a margin of less than ten times that over the next best.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import harness

#: Between the logits of a token and of the next best one.
MARGIN_MIN = 0.005


def right_answer(server: harness.Server, prompt: Sequence[int], max_tokens: int, **more: Any) -> list[int]:
    """What this server answers by itself. Raises `AssertionError` where rounding could make it another answer."""
    asked = {"logprobs": 2, "return_tokens_as_token_ids": True, **more}
    (choice,) = server.complete(prompt, max_tokens, **asked)["choices"]
    for place, best in enumerate(choice["logprobs"]["top_logprobs"]):
        first, second = sorted(best.values(), reverse=True)[:2]
        assert first - second >= MARGIN_MIN, (
            f"token {place} of the answer to the prompt of {len(prompt)} tokens that begins with {prompt[:3]} has a margin of "
            f"{first - second:.5f} over the next best one, expected at least {MARGIN_MIN}: give that prompt another seed"
        )
    return choice["token_ids"]


def assert_right(answers: Sequence[list[int]], right: Sequence[list[int]]) -> None:
    """Of answers from KV that came from prefill."""
    if harness.MISPLACED:
        for answer, other in zip(answers, right, strict=True):
            assert answer != other, "a block of the KV was misplaced, and the answer is the right one all the same"
    else:
        assert list(answers) == list(right)
