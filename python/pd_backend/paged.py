"""An engine's paged KV memory, and the copies between it and chunk slots.

A chunk slot holds `[layers][blocks of the chunk][bytes of a block]`, so that one layer of it is contiguous. What the
bytes of a block mean is the engine's business: whole blocks are copied, and nothing is assumed of a tensor's shape but
that one of its dimensions counts blocks.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .cuda_buffer import CudaView

if TYPE_CHECKING:
    import torch

# Tried from the widest: a copy moves one element at a time, so 16 bytes at a time are several times as fast as one.
_WORDS = ((16, "complex128"), (8, "int64"), (4, "int32"), (2, "int16"), (1, "uint8"))


class PagedLayoutError(ValueError):
    """Tensors in which blocks cannot be told apart, or that differ from layer to layer."""


@dataclass(frozen=True)
class BlockShape:
    """Where a layer keeps its blocks: all in bytes, relative to the layer's first byte."""

    block_stride_bytes: int
    #: What is left of the shape once the blocks are taken out: `(count, stride_bytes)` from the outermost, dense bytes
    #: last.
    inner: tuple[tuple[int, int], ...]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of one layer."""
        product = 1
        for count, _ in self.inner:
            product *= count
        return product


def block_shape(
    shape: Sequence[int],
    strides: Sequence[int],
    element_bytes: int,
    num_blocks: int,
    block_stride_bytes: int | None = None,
) -> BlockShape:
    """Where the blocks are in a tensor of this shape; strides count elements, as tensors give them.

    `block_stride_bytes`, where the engine gives it, says which dimension counts blocks; without it the first one of a
    fitting length does, and two that fit are an error. A kernel's blocks may be smaller than the engine's: a dimension
    of `k * num_blocks` holds k of them for each of the engine's.
    """
    dims = [(size, stride * element_bytes) for size, stride in zip(shape, strides)]
    fitting = [d for d, (size, _) in enumerate(dims) if size >= num_blocks and size % num_blocks == 0]
    exact = [d for d in fitting if dims[d][0] == num_blocks]
    if block_stride_bytes is not None:
        fitting = [d for d in fitting if dims[d][1] * (dims[d][0] // num_blocks) == block_stride_bytes]
    elif exact:
        fitting = exact
    if len(fitting) != 1:
        found = "no dimension counts" if not fitting else f"dimensions {fitting} could all count"
        raise PagedLayoutError(
            f"a KV tensor of shape {tuple(shape)} and strides {tuple(strides)}: {found} {num_blocks} blocks"
            + (f" of {block_stride_bytes} bytes from one to the next" if block_stride_bytes is not None else "")
        )
    counted = fitting[0]
    per_block = dims[counted][0] // num_blocks
    inner = [dim for d, dim in enumerate(dims) if d != counted]
    if per_block > 1:
        inner.append((per_block, dims[counted][1]))
    inner.append((element_bytes, 1))
    # The order of bytes inside a block is free as long as both ends have the same: that of memory copies fastest.
    inner = sorted((dim for dim in inner if dim[0] > 1), key=lambda dim: -dim[1])
    merged: list[tuple[int, int]] = []
    for count, stride in inner:
        if merged and merged[-1][1] == count * stride:
            merged[-1] = (merged[-1][0] * count, stride)
        else:
            merged.append((count, stride))
    if not merged or merged[-1][1] != 1:
        merged.append((1, 1))
    return BlockShape(dims[counted][1] * per_block, tuple(merged))


@dataclass(frozen=True)
class _Run:
    """Consecutive layers that one strided view covers: dimensions are layers, blocks, then a block's words."""

    first: int
    count: int
    view: "torch.Tensor"


class PagedKv:
    """The KV tensors of one worker, as blocks. `gather` fills a chunk slot from them, `scatter` empties one into them.
    """

    def __init__(
        self,
        kv_caches: Mapping[str, "torch.Tensor"],
        *,
        num_blocks: int,
        block_strides_bytes: Mapping[str, int] | None = None,
    ) -> None:
        """`kv_caches` as the engine registers them, by layer name. `block_strides_bytes` is the engine's own word on
        how far a layer's blocks are apart, where it gives it.

        Raises `PagedLayoutError` when blocks cannot be told apart, or are not the same in every layer.
        """
        if not kv_caches:
            raise PagedLayoutError("the engine has registered no KV tensors")
        self.num_blocks = num_blocks
        strides = block_strides_bytes or {}
        # Layers that share one tensor (cross-layer sharing) are one layer here. Numbers count as numbers: layer 10
        # comes after layer 9, at both ends, whatever order the engine registers them in.
        self.layer_index: dict[str, int] = {}
        tensors: list[torch.Tensor] = []
        shapes: list[BlockShape] = []
        known: dict[int, int] = {}
        for name in sorted(kv_caches, key=_natural):
            tensor = kv_caches[name]
            address = tensor.data_ptr()
            if address in known:
                self.layer_index[name] = known[address]
                continue
            shape = block_shape(
                tensor.shape, tensor.stride(), tensor.element_size(), num_blocks, strides.get(name)
            )
            if shapes and shape.inner != shapes[0].inner:
                raise PagedLayoutError(
                    f"layer {name} keeps {shape.block_bytes} bytes a block as {shape.inner}, the first layer "
                    f"{shapes[0].block_bytes} as {shapes[0].inner}: every layer must keep the same"
                )
            self.layer_index[name] = known[address] = len(tensors)
            tensors.append(tensor)
            shapes.append(shape)
        self.layers = len(tensors)
        self.shape = shapes[0]
        self.block_bytes = shapes[0].block_bytes
        self.device = tensors[0].device
        if self.device.type == "cuda":
            self._copies: Any = _cuda_copies(tensors, shapes, num_blocks)
        elif self.device.type == "cpu":
            self._copies = _HostCopies(tensors, shapes, num_blocks)
        else:
            raise PagedLayoutError(f"KV tensors on {self.device}: only cpu and cuda can be copied")

    @property
    def groups(self) -> "tuple[PagedKv]":
        """As `PagedGroups` has them: all layers are one group."""
        return (self,)

    def layer_bytes(self, blocks: int) -> int:
        """Bytes of one layer in the slot of a chunk of so many blocks."""
        return blocks * self.block_bytes

    def chunk_bytes(self, blocks: int) -> int:
        """Bytes of a chunk of so many blocks."""
        return self.layers * self.layer_bytes(blocks)

    def memory(self, buffer: "np.ndarray | CudaView") -> "torch.Tensor":
        """A daemon's buffer as `gather` and `scatter` take parts of it. Made once: read-only memory is warned of each
        time.

        Raises `PagedLayoutError` when it is not where the KV is: nothing takes KV on a detour through the host.
        """
        tensor = buffer.torch() if isinstance(buffer, CudaView) else _host_tensor(buffer)
        if tensor.device != self.device:
            raise PagedLayoutError(
                f"the engine's KV is on {self.device}, the pd_buffer on {tensor.device}: set pd_buffer_device to where "
                "the KV is"
            )
        return tensor

    def gather(
        self,
        block_ids: Sequence[int],
        slot: "torch.Tensor | np.ndarray",
        *,
        layers: range | None = None,
        first_block: int = 0,
    ) -> None:
        """Copies blocks into the slot of a chunk: at once in host memory; on a GPU along torch's current stream, behind
        which `send` waits by itself.

        The slot is that of the whole chunk, a one-dimensional array of bytes. `block_ids` are those of the chunk's
        blocks from `first_block` on, `layers` those to copy (all, when left out).
        """
        self._copies.gather(*self._checked(block_ids, slot, layers, first_block))

    def scatter(
        self,
        block_ids: Sequence[int],
        slot: "torch.Tensor | np.ndarray",
        *,
        layers: range | None = None,
        first_block: int = 0,
    ) -> None:
        """Copies the slot of a chunk into blocks; arguments as for `gather`. `release` comes after it in the same way.
        """
        self._copies.scatter(*self._checked(block_ids, slot, layers, first_block))

    def _checked(
        self, block_ids: Sequence[int], slot: "torch.Tensor | np.ndarray", layers: range | None, first_block: int
    ) -> tuple[Sequence[int], "torch.Tensor", range, int, int]:
        import torch

        slot = _host_tensor(slot) if isinstance(slot, np.ndarray) else slot
        blocks = first_block + len(block_ids)
        if slot.dim() != 1 or slot.dtype != torch.uint8 or slot.numel() != self.chunk_bytes(blocks):
            raise ValueError(
                f"a slot of shape {tuple(slot.shape)} and type {slot.dtype}, "
                f"expected {self.chunk_bytes(blocks)} bytes: "
                f"{self.layers} layers x {blocks} blocks x {self.block_bytes} bytes"
            )
        bad = [block for block in block_ids if not 0 <= block < self.num_blocks]
        if bad:
            raise ValueError(f"block {bad[0]} does not exist: there are {self.num_blocks}")
        layers = range(self.layers) if layers is None else layers
        if layers.step != 1 or not 0 <= layers.start <= layers.stop <= self.layers:
            raise ValueError(f"layers {layers} of {self.layers}")
        return block_ids, slot, layers, first_block, blocks


class _HostCopies:
    """Copies in host memory: one indexed copy for all layers that one view covers."""

    def __init__(self, tensors: "Sequence[torch.Tensor]", shapes: Sequence[BlockShape], num_blocks: int) -> None:
        self._word_bytes, self._dtype = _word(tensors, shapes)
        self._inner = tuple(count for count, _ in shapes[0].inner[:-1]) + (shapes[0].inner[-1][0] // self._word_bytes,)
        self._runs: list[_Run] = []
        first = 0
        while first < len(tensors):
            count, layer_stride = _run_length(tensors, shapes, first)
            view = self._view(tensors[first], shapes[first], count, layer_stride, num_blocks)
            self._runs.append(_Run(first, count, view))
            first += count

    def gather(self, block_ids: Sequence[int], slot: "torch.Tensor", layers: range, first: int, blocks: int) -> None:
        import torch

        index = torch.tensor(block_ids, dtype=torch.int64)
        for source, target in self._pairs(slot, layers, first, blocks):
            if target.is_contiguous():
                torch.index_select(source, 1, index, out=target)
            else:
                target.copy_(torch.index_select(source, 1, index))

    def scatter(self, block_ids: Sequence[int], slot: "torch.Tensor", layers: range, first: int, blocks: int) -> None:
        import torch

        index = torch.tensor(block_ids, dtype=torch.int64)
        for target, source in self._pairs(slot, layers, first, blocks):
            target.index_copy_(1, index, source)

    def _pairs(self, slot: "torch.Tensor", layers: range, first_block: int, blocks: int) -> Any:
        """Views of paged memory and of the slot, for each run of layers."""
        words = slot.view(self._dtype)
        per_layer = blocks * (slot.numel() // self._total(blocks)) if blocks else 0
        for run in self._runs:
            low, high = max(run.first, layers.start), min(run.first + run.count, layers.stop)
            if low >= high or not blocks:
                continue
            part = words[low * per_layer : high * per_layer].view(high - low, blocks, *self._inner)
            yield run.view[low - run.first : high - run.first], part[:, first_block:]

    def _total(self, blocks: int) -> int:
        """How many blocks of words all layers of a slot have, times the bytes of a word."""
        return sum(run.count for run in self._runs) * blocks * self._word_bytes

    def _view(
        self, tensor: "torch.Tensor", shape: BlockShape, count: int, layer_stride: int, num_blocks: int
    ) -> "torch.Tensor":
        import torch

        word = self._word_bytes
        offset = tensor.storage_offset() * tensor.element_size()
        strides = [layer_stride // word, shape.block_stride_bytes // word]
        strides += [stride // word for _, stride in shape.inner[:-1]] + [1]
        return torch.empty(0, dtype=self._dtype).set_(
            tensor.untyped_storage(), offset // word, (count, num_blocks, *self._inner), tuple(strides)
        )


def _word(tensors: "Sequence[torch.Tensor]", shapes: Sequence[BlockShape]) -> "tuple[int, torch.dtype]":
    """The widest word that every offset, stride and length is a multiple of."""
    import torch

    numbers = [shapes[0].inner[-1][0]]
    for tensor, shape in zip(tensors, shapes):
        numbers += [tensor.storage_offset() * tensor.element_size(), tensor.data_ptr(), shape.block_stride_bytes]
        numbers += [stride for _, stride in shape.inner[:-1]]
    for size, name in _WORDS:
        if all(number % size == 0 for number in numbers):
            return size, getattr(torch, name)
    raise AssertionError("every number is a multiple of 1")


def _run_length(tensors: "Sequence[torch.Tensor]", shapes: Sequence[BlockShape], first: int) -> tuple[int, int]:
    """How many layers from `first` on lie at even distances in one storage, and that distance in bytes."""

    def offset(index: int) -> int:
        return int(tensors[index].storage_offset() * tensors[index].element_size())

    storage = tensors[first].untyped_storage().data_ptr()
    count, stride = 1, 0
    while first + count < len(tensors):
        here = first + count
        if tensors[here].untyped_storage().data_ptr() != storage or shapes[here] != shapes[first]:
            break
        distance = offset(here) - offset(here - 1)
        # A view cannot step backwards, nor by half words: the distance has to be as even as the blocks are.
        if distance <= 0 or (count > 1 and distance != stride):
            break
        stride, count = distance, count + 1
    return count, stride


def _cuda_copies(tensors: "Sequence[torch.Tensor]", shapes: Sequence[BlockShape], num_blocks: int) -> Any:
    """Copies of KV on a GPU: an object with the `gather` and `scatter` of `_HostCopies`, whose arguments are checked
    already.

    They are called in the worker's thread, with the engine's stream current: after the forward that computed what is
    gathered, before the one that reads what is scattered. The client has the daemon wait for that stream.
    """
    try:
        from . import paged_cuda
    except ImportError as error:
        raise PagedLayoutError(
            f"KV tensors on {tensors[0].device}, but pd_backend.paged_cuda cannot be imported ({error}): install a "
            "build of this package that has it"
        ) from error
    return paged_cuda.CudaCopies(tensors, shapes, num_blocks)


def _host_tensor(array: np.ndarray) -> "torch.Tensor":
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(array)


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sorts the numbers in a name as numbers."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]
