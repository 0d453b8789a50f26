"""Copies between an engine's paged KV on a GPU and chunk slots: one kernel for a chunk, all its layers and blocks.

The slot holds `[layers][blocks of the chunk][bytes of a block]`. A layer keeps its blocks at any stride, and the bytes
of a block in any number of equal dense runs; where each is stands in small tables on the GPU. Needs torch and
Triton, which comes with torch for CUDA. Nothing here waits: the copies are on torch's current stream.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import triton
import triton.language as tl

#: Words that one program copies: some KiB, so that a few blocks fill a GPU.
_TILE_WORDS = 1024
_WORDS = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.int8))


class Shape(Protocol):
    """Where a layer keeps its blocks, in bytes: `paged.BlockShape`."""

    @property
    def block_stride_bytes(self) -> int: ...

    @property
    def inner(self) -> Sequence[tuple[int, int]]: ...


@triton.jit
def _copy(
    bases,
    block_strides,
    run_offsets,
    block_ids,
    slot,
    first_layer,
    first_block,
    blocks,
    run_words,
    runs,
    tiles,
    TO_SLOT: tl.constexpr,
    TILE: tl.constexpr,
):
    """One tile of one run of one block of one layer. Strides, offsets and lengths count words."""
    program = tl.program_id(0)
    tile = program % tiles
    run = (program // tiles) % runs
    item = program // tiles // runs
    layer = (first_layer + tl.program_id(1)).to(tl.int64)
    block = tl.load(block_ids + item)
    words = tile * TILE + tl.arange(0, TILE)
    mask = words < run_words
    # A table has addresses as numbers.
    base = tl.load(bases + layer).to(slot.dtype)
    paged = base + (block * tl.load(block_strides + layer) + tl.load(run_offsets + run)) + words
    at = ((layer * blocks + first_block + item) * runs + run) * run_words
    flat = slot + at + words
    if TO_SLOT:
        tl.store(flat, tl.load(paged, mask=mask), mask=mask)
    else:
        tl.store(paged, tl.load(flat, mask=mask), mask=mask)


class BlockTable:
    """Where an engine's blocks are, on the GPU: made once for its KV tensors."""

    def __init__(self, addresses: Sequence[int], shapes: Sequence[Shape], device: Any) -> None:
        """The first byte and the shape of each layer; blocks are cut into the same runs in all of them."""
        runs, self.run_bytes = _runs(shapes[0])
        self.layers = len(addresses)
        self.block_bytes = len(runs) * self.run_bytes
        numbers = [*addresses, *runs, self.run_bytes, *(shape.block_stride_bytes for shape in shapes)]
        self.word_bytes, self.dtype = next(
            (size, dtype) for size, dtype in _WORDS if all(number % size == 0 for number in numbers)
        )

        def words(values: Sequence[int]) -> torch.Tensor:
            return torch.tensor([value // self.word_bytes for value in values], dtype=torch.int64, device=device)

        self.bases = torch.tensor(addresses, dtype=torch.int64, device=device)
        self.block_strides = words([shape.block_stride_bytes for shape in shapes])
        self.run_offsets = words(runs)


def copy_blocks(
    to_slot: bool,
    table: BlockTable,
    block_ids: torch.Tensor,
    slot: torch.Tensor,
    layers: range,
    first_block: int,
    blocks: int,
) -> None:
    """Copies whole blocks to the slot of a chunk, or from it, by one kernel on torch's current stream.

    `block_ids`: int64, on the GPU, those of the chunk from `first_block` on. `slot`: all bytes of a chunk of `blocks`
    blocks, at a multiple of the table's word.
    """
    if len(block_ids) == 0 or len(layers) == 0:
        return
    if slot.data_ptr() % table.word_bytes:
        raise ValueError(f"a slot at {slot.data_ptr():#x}, expected a multiple of {table.word_bytes} bytes")
    run_words = table.run_bytes // table.word_bytes
    tiles = triton.cdiv(run_words, _TILE_WORDS)
    runs = len(table.run_offsets)
    _copy[(len(block_ids) * runs * tiles, len(layers))](
        table.bases,
        table.block_strides,
        table.run_offsets,
        block_ids,
        slot.view(table.dtype),
        layers.start,
        first_block,
        blocks,
        run_words,
        runs,
        tiles,
        TO_SLOT=to_slot,
        TILE=min(_TILE_WORDS, triton.next_power_of_2(run_words)),
    )


class CudaCopies:
    """What `paged.PagedKv` copies by where its tensors are on a GPU."""

    def __init__(self, tensors: Sequence[torch.Tensor], shapes: Sequence[Shape], num_blocks: int) -> None:
        """One tensor and shape for each layer; they are kept, since a table has nothing but their addresses."""
        self._tensors = list(tensors)
        self._device = tensors[0].device
        self._table = BlockTable([tensor.data_ptr() for tensor in tensors], shapes, self._device)

    def gather(self, block_ids: Sequence[int], slot: torch.Tensor, layers: range, first: int, blocks: int) -> None:
        """Puts copies of these blocks into a slot on torch's current stream."""
        copy_blocks(True, self._table, self._ids(block_ids), slot, layers, first, blocks)

    def scatter(self, block_ids: Sequence[int], slot: torch.Tensor, layers: range, first: int, blocks: int) -> None:
        """Puts copies of a slot into these blocks on torch's current stream."""
        copy_blocks(False, self._table, self._ids(block_ids), slot, layers, first, blocks)

    def _ids(self, block_ids: Sequence[int]) -> torch.Tensor:
        on_gpu = self._device.type == "cuda"
        # Pinned, or the copy would wait for the stream.
        ids = torch.tensor(block_ids, dtype=torch.int64, pin_memory=on_gpu)
        return ids.to(self._device, non_blocking=True)


def _runs(shape: Shape) -> tuple[list[int], int]:
    """Where the dense runs of a block start, in the slot's order, and how long each is."""
    *outer, (run_bytes, dense) = shape.inner
    if dense != 1:
        raise ValueError(f"a block's innermost bytes are {dense} apart, expected dense ones")
    starts = itertools.product(*(range(0, count * stride, stride) for count, stride in outer))
    return [sum(start) for start in starts], run_bytes
