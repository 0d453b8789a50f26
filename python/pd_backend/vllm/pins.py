"""Blocks that prefill still copies from, though the engine needs them no longer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol


class Pins(Protocol):
    """Keeps blocks from being given to another request."""

    def pin(self, block_ids: Sequence[int]) -> None:
        """These are not given away until `unpin`, whatever becomes of the request that has them now."""

    def unpin(self, block_ids: Sequence[int]) -> None:
        """Undoes one `pin`."""


class NoPins:
    """Where the engine keeps every block of a request until the request's copies are reported."""

    def pin(self, block_ids: Sequence[int]) -> None:
        """Does nothing."""

    def unpin(self, block_ids: Sequence[int]) -> None:
        """Does nothing."""


class BlockPins:
    """Holds one more reference of each block in vLLM's pool."""

    def __init__(self, block_pool: Callable[[], Any]) -> None:
        """`block_pool` gives vLLM's, which is bound after the connector is made."""
        self._block_pool = block_pool

    def pin(self, block_ids: Sequence[int]) -> None:
        """The blocks have to be some request's at this moment."""
        pool = self._block_pool()
        pool.touch([pool.blocks[block_id] for block_id in block_ids])

    def unpin(self, block_ids: Sequence[int]) -> None:
        """Those that no request has any more are free."""
        if block_ids:
            pool = self._block_pool()
            # The last ones are evicted first, as vLLM itself has it.
            pool.free_blocks([pool.blocks[block_id] for block_id in reversed(block_ids)])
