"""The paged KV memory of an engine whose layers keep their KV by groups, each with block tables of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .paged import PagedKv, PagedLayoutError, block_shape

if TYPE_CHECKING:
    import torch


#: The longest word that is copied: every part begins at a multiple of it.
_WORD_BYTES = 16


class PagedGroup:
    """The layers of one group. Copies as `PagedKv` does, all layers at once.

    A group may have several *members*: block tables of the engine in which the same positions are needed. `block_ids` are those of
    the first member, then as many of the second, and so on. A slot holds one part after another, and a part is what `PagedKv` calls
    the slot of a chunk: the layers of one member whose blocks have the same shape.
    """

    layers = 1
    #: No layer is pushed by itself.
    layer_index: Mapping[str, int] = {}

    def __init__(self, parts: Sequence[tuple[int, PagedKv]], members: int, *, step_blocks: int = 1, step_bytes: int = 1) -> None:
        """`parts`: each with the position of its member. A chunk is as long as a multiple of `step_blocks` blocks, and of
        `step_bytes` bytes.
        """
        self.parts = tuple(parts)
        self._members = members
        self._step_blocks, self._step_bytes = step_blocks, step_bytes
        odd = [paged.chunk_bytes(1) for _, paged in self.parts if paged.chunk_bytes(1) % _WORD_BYTES]
        if odd and len(self.parts) > 1:
            raise PagedLayoutError(
                f"a block has {odd[0]} bytes in its layers of one shape; expected a multiple of {_WORD_BYTES}, for the next shape's "
                "lie behind it"
            )
        #: Of one block of each member, in all layers.
        self.block_bytes = sum(paged.chunk_bytes(1) for _, paged in self.parts)

    def chunk_bytes(self, blocks: int) -> int:
        """Bytes of a chunk of so many blocks, those of all members counted."""
        of_member = _round_up(blocks // self._members, self._step_blocks)
        return _round_up(of_member * self.block_bytes, self._step_bytes)

    def layer_bytes(self, blocks: int) -> int:
        """As `chunk_bytes`: all layers are copied together."""
        return self.chunk_bytes(blocks)

    def gather(self, block_ids: Sequence[int], slot: Any, *, layers: range = range(1)) -> None:
        """Copies blocks into the slot of a chunk, as `PagedKv.gather` does."""
        for paged, ids, part in self._cut(block_ids, slot, 0):
            paged.gather(ids, part)

    def scatter(self, block_ids: Sequence[int], slot: Any, *, first_block: int = 0) -> None:
        """Copies the slot of a chunk into blocks, of each member those from `first_block` of the chunk on."""
        for paged, ids, part in self._cut(block_ids, slot, first_block):
            paged.scatter(ids, part, first_block=first_block)

    def _cut(self, block_ids: Sequence[int], slot: Any, first_block: int) -> Any:
        count = len(block_ids) // self._members
        if count * self._members != len(block_ids):
            raise ValueError(f"{len(block_ids)} blocks of {self._members} block tables; expected as many of each")
        start = 0
        for member, paged in self.parts:
            stop = start + paged.chunk_bytes(first_block + count)
            yield paged, block_ids[member * count : (member + 1) * count], slot[start:stop]
            start = stop


class PagedGroups:
    """All groups of an engine."""

    def __init__(self, groups: Sequence[PagedGroup]) -> None:
        self.groups = tuple(groups)
        devices = {paged.device for group in self.groups for _, paged in group.parts}
        if len(devices) != 1:
            raise PagedLayoutError(f"KV tensors on {sorted(map(str, devices))}: all must be on one device")
        self._first = self.groups[0].parts[0][1]
        self.device = self._first.device
        self.num_blocks = self._first.num_blocks

    def memory(self, buffer: Any) -> "torch.Tensor":
        """As `PagedKv.memory`."""
        return self._first.memory(buffer)


def _round_up(count: int, step: int) -> int:
    return -(-count // step) * step


def of_one_shape(
    kv_caches: "Mapping[str, torch.Tensor]", num_blocks: int, block_strides_bytes: Mapping[str, int]
) -> "list[dict[str, torch.Tensor]]":
    """These layers, by the shape of their blocks, in the order of their first names."""
    found: dict[Any, dict[str, torch.Tensor]] = {}
    for name in sorted(kv_caches):
        tensor = kv_caches[name]
        shape = block_shape(
            tensor.shape, tensor.stride(), tensor.element_size(), num_blocks, block_strides_bytes.get(name)
        )
        found.setdefault(shape.inner, {})[name] = tensor
    return list(found.values())
