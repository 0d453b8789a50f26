"""Which blocks of a prompt's KV decode needs: a pure function of the engine's groups of layers and of the prompt's length.

A model's layers keep their KV by groups, each with a block table of its own. Groups of which the same tokens are needed are one
group here, its *members* in the engine's order. What is sent of a group is cut into *pieces*, each of which is a chunk to the
daemons: `chunk_tokens` tokens of a group that keeps all of them, and single blocks of a group that keeps only what later tokens
see. docs/decisions/0010-groups.md says why.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from .keys import Context, chunk_hashes, grouped_name, prefix_hashes


class LayoutMismatch(ValueError):
    """Chunks that blocks do not fit into."""


@dataclass(frozen=True)
class Group:
    """Layers that keep KV of the same tokens, in blocks of the same length."""

    block_tokens: int
    #: Its block tables among those of the engine.
    members: tuple[int, ...] = (0,)
    #: A token sees so many tokens, itself included; those before are not kept. None: it is not so.
    window_tokens: int | None = None
    #: A token sees those of its own stretch of so many tokens, and no earlier one; those are not kept. None: it is not so.
    stretch_tokens: int | None = None
    #: Both ends must call it the same. Empty where it is the only one.
    name: str = ""

    @property
    def keeps_all(self) -> bool:
        """Whether every token's KV is kept to the end."""
        return self.window_tokens is None and self.stretch_tokens is None

    def first_seen(self, computed: int) -> int:
        """The first token that the one behind `computed` tokens sees, or any later one."""
        if self.window_tokens is not None:
            return max(0, computed - self.window_tokens + 1)
        if self.stretch_tokens is not None:
            return computed // self.stretch_tokens * self.stretch_tokens
        return 0

    def needed(self, computed: int) -> range:
        """Positions in a block table: the blocks that whoever goes on behind `computed` tokens needs. All others are skipped."""
        end, first = -(-computed // self.block_tokens), self.first_seen(computed)
        return range(first // self.block_tokens if first < computed else end, end)


@dataclass(frozen=True)
class Piece:
    """What is one chunk to the daemons."""

    #: Its group, by position.
    group: int
    #: Positions in a block table of the group.
    blocks: range
    #: How many of the prompt's tokens it depends on: all before its last one, and that one.
    end: int


class Groups:
    """The groups of an engine."""

    def __init__(self, groups: Sequence[Group], chunk_tokens: int) -> None:
        """Raises `LayoutMismatch` where chunks of `chunk_tokens` tokens have no whole number of blocks."""
        self._groups = tuple(groups)
        self.chunk_tokens = chunk_tokens
        #: Every layer keeps the KV of every token, and all have one block table.
        self.is_plain = len(self._groups) == 1 and self._groups[0].keeps_all and self._groups[0].members == (0,)
        blocks = [group.block_tokens for group in self._groups if group.keeps_all]
        #: The last chunk of a group that keeps all of its tokens has a multiple of so many.
        self.last_chunk_step = step = math.lcm(*blocks)
        if chunk_tokens % step:
            fitting = step * max(1, round(chunk_tokens / step))
            raise LayoutMismatch(
                f"chunk_size = {chunk_tokens} is no multiple of the engine's block of {step} tokens; set chunk_size to "
                f"{fitting}, at both ends"
            )

    @classmethod
    def plain(cls, chunk_tokens: int, block_tokens: int) -> Groups:
        """Of an engine all of whose layers keep the KV of all tokens."""
        return cls([Group(block_tokens)], chunk_tokens)

    def __iter__(self) -> Iterator[Group]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, position: int) -> Group:
        return self._groups[position]

    def sent_tokens(self, tokens: int) -> int:
        """Of so many tokens of a prompt, how many prefill sends and decode takes as computed.

        vLLM computes the last token again where all are loaded. A window has moved on by then, and what that token sees would be
        skipped: so all but the last one are loaded where there are windows.
        """
        return tokens if self.is_plain else tokens - 1

    def pieces(self, sent: int) -> list[Piece]:
        """What is sent of a prompt of which `sent` tokens are, by the tokens that have to be computed for it."""
        if self.is_plain:
            return list(self._chunks(0, sent))
        found: list[Piece] = []
        for position, group in enumerate(self._groups):
            if group.keeps_all:
                found += self._chunks(position, sent)
            else:
                size = group.block_tokens
                found += (Piece(position, range(at, at + 1), min((at + 1) * size, sent)) for at in group.needed(sent))
        return sorted(found, key=lambda piece: piece.end)

    def names(self, token_ids: Sequence[int], pieces: Iterable[Piece], context: Context = Context()) -> list[str]:
        """What these pieces of a prompt are called, of whose tokens `token_ids` are those that are sent."""
        if self.is_plain:
            return chunk_hashes(token_ids, self.chunk_tokens, context)
        pieces = list(pieces)
        hashes = prefix_hashes(token_ids, {piece.end for piece in pieces}, self.chunk_tokens, context)
        return [grouped_name(self._groups[piece.group].name, hashes[piece.end]) for piece in pieces]

    def block_count(self, pieces: Iterable[Piece]) -> int:
        """Blocks of the engine that these take."""
        return sum(len(piece.blocks) * len(self._groups[piece.group].members) for piece in pieces)

    def block_ids(self, piece: Piece, tables: Sequence[Sequence[int]], first: int = 0) -> list[int]:
        """The piece's blocks in the engine's block tables, those of one member after those of another; of each from position
        `first` on.
        """
        start = max(piece.blocks.start, first)
        members = self._groups[piece.group].members
        return [block for member in members for block in tables[member][start : piece.blocks.stop]]

    def _chunks(self, position: int, sent: int) -> Iterator[Piece]:
        size, block = self.chunk_tokens, self._groups[position].block_tokens
        for start in range(0, sent, size):
            end = min(start + size, sent)
            yield Piece(position, range(start // block, -(-end // block)), end)
