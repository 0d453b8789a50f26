"""What vLLM tells clients and operators of prompts, with vLLM's objects played."""

from __future__ import annotations

from types import SimpleNamespace as Fake

import pytest

from pd_backend.messages import Attached, Group, HostBuffer
from pd_backend.vllm import longest_prompt
from pd_backend.vllm.prompt_tokens import transferred_are_not_cached

CHUNK, TOKEN_BYTES = 256, 10


def attached(chunks: int) -> Attached:
    buffer = HostBuffer(pid=1, fd=2, len_bytes=1, inode=3, present_bytes=1)
    return Attached(
        id=1, version=2, role="receiver", buffer=buffer, chunk_bytes=CHUNK * TOKEN_BYTES, slot_count=chunks, chunk_tokens=CHUNK,
        groups=[Group(name="", token_bytes=TOKEN_BYTES)], layout=[],
    )


def test_what_prefill_has_sent_is_not_cached() -> None:
    # Broken in production: a cold prompt is billed as cached.
    stats = Fake(num_cached_tokens=700, num_local_cached_tokens=128, num_external_cached_tokens=572)
    transferred_are_not_cached(Fake(prefill_stats=stats))
    assert (stats.num_cached_tokens, stats.num_external_cached_tokens) == (128, 572)
    # Releases that have no such thing, or have told it already.
    transferred_are_not_cached(Fake())
    transferred_are_not_cached(Fake(prefill_stats=None))


@pytest.mark.parametrize(
    ("sends", "receives", "chunks"), [(False, True, 4), (True, False, 4), (True, True, 16)]
)
def test_a_buffer_that_the_longest_prompt_does_not_fit(sends: bool, receives: bool, chunks: int) -> None:
    # Broken in production: long prompts fail, or are computed twice, and nobody was told when the server started.
    def warning(chunks: int, tokens: int) -> str | None:
        return longest_prompt.warning(attached(chunks), tokens, sends=sends, receives=receives)

    assert warning(chunks, 4 * CHUNK) is None
    said = warning(chunks, 4 * CHUNK + 1)
    assert said is not None and "more than 1024 tokens" in said and "max_model_len is 1025" in said
    needed = int(said.split(" at least ")[1].split(" bytes")[0])
    assert warning(needed // (CHUNK * TOKEN_BYTES), 4 * CHUNK + 1) is None
