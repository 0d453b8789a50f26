"""The engine's KV memory by its groups of layers: what blocks are copied from, and how long chunks are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..paged import PagedKv, PagedLayoutError
from ..paged_groups import PagedGroup, PagedGroups, of_one_shape
from .groups import Group, Groups
from .layout import GroupBytes

if TYPE_CHECKING:
    import torch
    from vllm.v1.kv_cache_interface import KVCacheConfig


@dataclass(frozen=True)
class EngineMemory:
    """One worker's."""

    kv: PagedKv | PagedGroups
    #: All layers, by block tables and shapes of blocks.
    parts: list[PagedKv]
    #: Of each group; empty where all layers are one, with blocks of one shape.
    group_bytes: tuple[GroupBytes, ...] = ()


def block_strides(config: KVCacheConfig) -> dict[str, int]:
    """How far a layer's blocks are apart, in bytes, where vLLM says it."""
    strides: dict[str, int] = {}
    for tensor in config.kv_cache_tensors:
        stride = getattr(tensor, "block_stride", None)  # Older releases leave it to the tensors.
        if stride:
            strides.update(dict.fromkeys(tensor.layers, stride))
    return strides


def memory_of(
    kv_caches: Mapping[str, torch.Tensor],
    config: KVCacheConfig,
    groups: Groups,
    make_paged: Callable[[dict[str, Any]], PagedKv],
) -> EngineMemory:
    """`make_paged` makes the copies of layers with one block table and blocks of one shape. Raises `PagedLayoutError`."""
    strides = block_strides(config)
    if groups.is_plain and len(of_one_shape(kv_caches, config.num_blocks, strides)) <= 1:
        paged = make_paged(dict(kv_caches))
        return EngineMemory(paged, [paged])
    # The bytes of one group may lie where those of another do, in blocks of other numbers. Layers that use another one's KV are
    # registered too, and need not be in a group.
    made, known = [], set()
    for group in groups:
        parts = []
        for member, table in enumerate(group.members):
            names = config.kv_cache_groups[table].layer_names
            layers = {name: kv_caches[name] for name in names if name in kv_caches}
            known.update(tensor.data_ptr() for tensor in layers.values())
            parts += [(member, make_paged(part)) for part in of_one_shape(layers, config.num_blocks, strides)]
        # The daemons count in tokens, of which a whole chunk has `chunk_tokens` whatever is in it.
        step_bytes = 1 if group.keeps_all else groups.chunk_tokens
        step_blocks = groups.last_chunk_step // group.block_tokens if group.keeps_all else 1
        made.append(PagedGroup(parts, len(group.members), step_blocks=step_blocks, step_bytes=step_bytes))
    lost = [name for name, tensor in kv_caches.items() if tensor.data_ptr() not in known]
    if lost:
        raise PagedLayoutError(f"layer {lost[0]} has KV of its own and is in none of vLLM's groups of layers")
    kv = PagedGroups(made)
    sizes = tuple(_bytes_of(group, paged, groups.chunk_tokens) for group, paged in zip(groups, kv.groups))
    return EngineMemory(kv, [part for paged in kv.groups for _, part in paged.parts], sizes)


def _bytes_of(group: Group, paged: PagedGroup, chunk_tokens: int) -> GroupBytes:
    blocks = chunk_tokens // group.block_tokens if group.keeps_all else 1
    layers = " + ".join(f"{part.layers}x{part.block_bytes}" for _, part in paged.parts)
    return GroupBytes(layers, paged.chunk_bytes(blocks * len(group.members)))
