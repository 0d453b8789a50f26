"""What the two daemons compare before they talk: the chunk's length, and what its bytes depend on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class LayoutMismatch(ValueError):
    """Chunks that blocks do not fit into."""


@dataclass(frozen=True)
class EngineLayout:
    """A rank's chunk, read from its engine's tensors."""

    model: str
    chunk_tokens: int
    block_tokens: int
    #: Of one block of one layer.
    block_bytes: int
    layers: int
    tp_rank: int = 0
    tp_size: int = 1
    #: What else changes what the bytes of a block mean: both ends must have it the same.
    engine: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.chunk_tokens % self.block_tokens:
            fitting = self.block_tokens * max(1, round(self.chunk_tokens / self.block_tokens))
            raise LayoutMismatch(
                f"chunk_size = {self.chunk_tokens} is no multiple of the engine's block of {self.block_tokens} tokens; "
                f"set chunk_size to {fitting}, at both ends"
            )
        if (self.layers * self.block_bytes) % self.block_tokens:
            raise LayoutMismatch(
                f"a block of {self.block_tokens} tokens has {self.layers * self.block_bytes} bytes in all layers, "
                "which is no whole number of bytes a token"
            )

    @property
    def chunk_blocks(self) -> int:
        """Blocks of a whole chunk."""
        return self.chunk_tokens // self.block_tokens

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a whole chunk."""
        return self.layers * self.chunk_blocks * self.block_bytes

    def last_chunk_tokens(self, tokens: int) -> int:
        """Length of the last chunk of such a prompt as the daemons see it: blocks are copied whole."""
        last = tokens % self.chunk_tokens or self.chunk_tokens
        return -(-last // self.block_tokens) * self.block_tokens

    def json(self) -> dict[str, Any]:
        """The file that `--kv-layout` takes. The bytes are the engine's own: only their number is said."""
        return {
            "model": self.model,
            "chunk_bytes": self.chunk_bytes,
            "chunk_tokens": self.chunk_tokens,
            "tp_rank": self.tp_rank,
            "tp_size": self.tp_size,
            "engine": {
                "block_tokens": str(self.block_tokens),
                "block_bytes": str(self.block_bytes),
                "layers": str(self.layers),
                **self.engine,
            },
        }


def blocks_of(chunk: int, chunk_tokens: int, block_tokens: int, tokens: int) -> range:
    """Positions, in a request's block table, of the blocks of one chunk of so many tokens."""
    end = min((chunk + 1) * chunk_tokens, tokens)
    return range(chunk * chunk_tokens // block_tokens, -(-end // block_tokens))
