"""Names of chunks that prefill and decode compute independently of each other, from what a chunk's KV depends on.

A chunk's KV depends on its tokens and on all before them, so its hash is chained: that of a chunk goes into the next
one's. Two prompts that begin alike have equal keys as far as whole chunks of them are equal, and those are sent once.
The last chunk's key has the number of its tokens in it, for whole blocks are copied and those behind it are not
computed.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
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
    running = _digest(_SEED, chunk_tokens.to_bytes(8, "little"), _text(context.adapter), _text(context.salt))
    hashes = []
    for first in range(0, len(token_ids), chunk_tokens):
        tokens = token_ids[first : first + chunk_tokens]
        parts = [running, len(tokens).to_bytes(8, "little"), array("Q", tokens).tobytes()]
        for item in context.items:
            if first <= item.offset < first + chunk_tokens:
                parts += [item.offset.to_bytes(8, "little"), _text(item.identifier)]
        running = _digest(*parts)
        hashes.append(_hexadecimal(running))
    return hashes


def chunk_key(model: str, tp_size: int, tp_rank: int, weights: str, chunk_hash: str, dtype: str) -> str:
    """The key as it goes over the wire, in LMCache's form: a rank's chunks are its own, and those of its weights."""
    return f"{model}@{tp_size}@{tp_rank}@{_hexadecimal(_digest(_text(weights), _text(chunk_hash)))}@{dtype}"


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
