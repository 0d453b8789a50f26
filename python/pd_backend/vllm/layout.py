"""What the two daemons compare before they talk: the chunk's length, and what its bytes depend on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from .groups import Groups, LayoutMismatch


@dataclass(frozen=True)
class GroupBytes:
    """What is kept of a group of layers."""

    #: Of one block of one layer, for each kind of layer that the group has, of how many layers: `2x65536`.
    layers: str
    #: Of a whole chunk.
    chunk_bytes: int


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
    #: The engine's groups, where it has others than one that keeps all tokens. `block_tokens`, `block_bytes` and `layers` are of
    #: the first of them then.
    several: Groups | None = field(default=None, repr=False)
    #: Of each of these.
    group_bytes: tuple[GroupBytes, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        assert self.groups is not None  # Raises where they do not fit.
        if self.several is None and (self.layers * self.block_bytes) % self.block_tokens:
            raise LayoutMismatch(
                f"a block of {self.block_tokens} tokens has {self.layers * self.block_bytes} bytes in all layers, "
                "which is no whole number of bytes a token"
            )

    @cached_property
    def groups(self) -> Groups:
        """The engine's groups."""
        return self.several or Groups.plain(self.chunk_tokens, self.block_tokens)

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
        last, step = tokens % self.chunk_tokens or self.chunk_tokens, self.groups.last_chunk_step
        return -(-last // step) * step

    def json(self) -> dict[str, Any]:
        """The file that `--kv-layout` takes. The bytes are the engine's own: only their number is said."""
        given: dict[str, Any] = {
            "model": self.model,
            "chunk_tokens": self.chunk_tokens,
            "tp_rank": self.tp_rank,
            "tp_size": self.tp_size,
        }
        if self.several is None:
            facts = {"block_tokens": self.block_tokens, "block_bytes": self.block_bytes, "layers": self.layers}
            given["chunk_bytes"] = self.chunk_bytes
            given["engine"] = {name: str(number) for name, number in facts.items()} | dict(self.engine)
            return given
        of_groups = list(zip(self.several, self.group_bytes, strict=True))
        given["groups"] = [
            {"name": group.name, "chunk_bytes": size.chunk_bytes, **({} if group.keeps_all else {"whole": True})}
            for group, size in of_groups
        ]
        given["engine"] = {
            **{f"{group.name}_blocks": f"{group.block_tokens} tokens, {size.layers} bytes" for group, size in of_groups},
            **self.engine,
        }
        return given
