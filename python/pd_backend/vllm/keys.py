"""Names of chunks that prefill and decode compute independently of each other, from what a chunk's KV depends on.

A chunk's KV depends on its tokens and on all before them, so its hash is chained: that of a chunk goes into the next
one's. Two prompts that begin alike have equal keys as far as whole chunks of them are equal, and those are sent once.
The last chunk's key has the number of its tokens in it, for whole blocks are copied and those behind it are not
computed.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_DIGEST_BYTES = 16
# Changes with what goes into the hash: old and new releases must not agree by chance.
_SEED = b"pd-backend chunk 2"


@dataclass(frozen=True)
class Item:
    """A multimodal input: what it is (its hash), and where in the prompt it begins."""

    offset: int
    identifier: str


@dataclass(frozen=True)
class Context:
    """What changes a prompt's KV besides its tokens and the model, which is in the key itself, and in the handshake."""

    #: A LoRA adapter by what it is, not by its name.
    adapter: str = ""
    salt: str = ""
    items: tuple[Item, ...] = ()


def chunk_hashes(token_ids: Sequence[int], chunk_tokens: int, context: Context = Context()) -> list[str]:
    """One hash for each chunk of the prompt, in hexadecimal digits; the last chunk may be short."""
    running = _start(chunk_tokens, context)
    hashes = []
    for first in range(0, len(token_ids), chunk_tokens):
        running = _chained(running, token_ids[first : first + chunk_tokens], first, context)
        hashes.append(_hexadecimal(running))
    return hashes


def prefix_hashes(
    token_ids: Sequence[int], ends: Iterable[int], chunk_tokens: int, context: Context = Context()
) -> dict[int, str]:
    """For each of `ends`, the hash of the prompt's first `end` tokens: that of their last chunk, which may be short."""
    hashes: dict[int, str] = {}
    running, first = _start(chunk_tokens, context), 0
    for end in sorted(ends):
        while first + chunk_tokens < end:
            running = _chained(running, token_ids[first : first + chunk_tokens], first, context)
            first += chunk_tokens
        hashes[end] = _hexadecimal(_chained(running, token_ids[first:end], first, context))
    return hashes


def grouped_name(group: str, prefix_hash: str) -> str:
    """The hash of what one group of layers keeps of these tokens."""
    return _hexadecimal(_digest(_text(group), _text(prefix_hash)))


def chunk_key(model: str, tp_size: int, tp_rank: int, weights: str, chunk_hash: str, dtype: str) -> str:
    """The key as it goes over the wire, in LMCache's form: a rank's chunks are its own, and those of its weights."""
    return f"{model}@{tp_size}@{tp_rank}@{_hexadecimal(_digest(_text(weights), _text(chunk_hash)))}@{dtype}"


def _start(chunk_tokens: int, context: Context) -> bytes:
    return _digest(_SEED, chunk_tokens.to_bytes(8, "little"), _text(context.adapter), _text(context.salt))


def _chained(running: bytes, tokens: Sequence[int], first: int, context: Context) -> bytes:
    """The digest of a chunk that begins at token `first`, from that of the one before it."""
    parts = [running, len(tokens).to_bytes(8, "little"), array("Q", tokens).tobytes()]
    for item in context.items:
        if first <= item.offset < first + len(tokens):
            parts += [item.offset.to_bytes(8, "little"), _text(item.identifier)]
    return _digest(*parts)


def _hexadecimal(digest: bytes) -> str:
    # Without leading zeros, as LMCache writes them: its receivers refuse others.
    return format(int.from_bytes(digest, "big"), "x")


def _digest(*parts: bytes) -> bytes:
    state = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for part in parts:
        state.update(part)
    return state.digest()


def _text(text: str) -> bytes:
    encoded = text.encode("utf-8")
    return len(encoded).to_bytes(8, "little") + encoded
