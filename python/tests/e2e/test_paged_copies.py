"""`PagedKv`'s copies against a loop over blocks and layers, for tensors of many shapes. Needs torch, no server."""

from __future__ import annotations

import random

import pytest
import torch

from pd_backend.paged import PagedKv, PagedLayoutError
from pd_backend.paged_groups import PagedGroup, PagedGroups, of_one_shape

LAYERS, BLOCKS = 5, 12


def one_storage(inner: tuple[int, ...], dtype: torch.dtype, pad: int, order: str) -> dict[str, torch.Tensor]:
    """Layers as views of one allocation, layer-major or block-major, with padding after each block."""
    elements = torch.Size(inner).numel()
    page = elements + pad
    storage = torch.randint(0, 255, (3 + LAYERS * BLOCKS * page,), dtype=torch.uint8)
    storage = storage.repeat_interleave(torch.empty(0, dtype=dtype).element_size())
    storage[:] = torch.randint(0, 255, storage.shape, dtype=torch.uint8)
    layer_stride, block_stride = (BLOCKS * page, page) if order == "layer" else (page, LAYERS * page)
    strides = list(torch.empty(inner, device="meta").stride())
    return {
        f"model.layers.{layer}.attn": storage.view(dtype).as_strided(
            (BLOCKS, *inner), (block_stride, *strides), 3 + layer * layer_stride
        )
        for layer in range(LAYERS)
    }


def separate(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A tensor for each layer, as older releases have it."""
    width = torch.empty(0, dtype=dtype).element_size()
    in_bytes = (*shape[:-1], shape[-1] * width)
    return {
        f"model.layers.{layer}.attn": torch.randint(0, 255, in_bytes, dtype=torch.uint8).view(dtype)
        for layer in range(LAYERS)
    }


def halves() -> dict[str, torch.Tensor]:
    """Heads that are not adjacent: a block in two pieces that no single view covers without its neighbours' bytes."""
    whole = torch.randint(0, 255, (LAYERS, BLOCKS, 2, 6, 32), dtype=torch.uint8)
    return {f"model.layers.{layer}.attn": whole[layer, :, :, :3] for layer in range(LAYERS)}


CASES = {
    "layers of one storage": lambda: one_storage((4, 16, 8), torch.bfloat16, 0, "layer"),
    "blocks of one storage": lambda: one_storage((4, 16, 8), torch.bfloat16, 0, "block"),
    "padded pages": lambda: one_storage((4, 16, 8), torch.float32, 24, "layer"),
    "odd bytes": lambda: one_storage((3, 7), torch.uint8, 2, "layer"),
    "separate tensors": lambda: separate((BLOCKS, 16, 2, 8), torch.float16),
    "keys and values apart": lambda: separate((2, BLOCKS, 16, 2, 8), torch.bfloat16),
    "half as long kernel blocks": lambda: separate((2 * BLOCKS, 8, 2, 8), torch.bfloat16),
    "pieces": halves,
}


def block_bytes_of(tensor: torch.Tensor, block: int) -> list[torch.Tensor]:
    """Views of one block's memory, the slow and obvious way."""
    if tensor.shape[0] == 2 and tensor.shape[1] == BLOCKS:
        return [tensor[0, block], tensor[1, block]]
    if tensor.shape[0] == 2 * BLOCKS:
        return [tensor[2 * block], tensor[2 * block + 1]]
    if tensor.dim() == 4 and not tensor[block].is_contiguous():
        return [tensor[block, half] for half in range(tensor.shape[1])]
    return [tensor[block]]


def naive_slot(kv: dict[str, torch.Tensor], block_ids: list[int]) -> torch.Tensor:
    pieces = []
    for layer in range(LAYERS):
        for block in block_ids:
            for piece in block_bytes_of(kv[f"model.layers.{layer}.attn"], block):
                pieces.append(piece.contiguous().view(torch.uint8).flatten())
    return torch.cat(pieces)


def paged_of(kv: dict[str, torch.Tensor]) -> PagedKv:
    # Registered in another order than that of the layers: names decide.
    return PagedKv(dict(sorted(kv.items(), reverse=True)), num_blocks=BLOCKS)


@pytest.mark.parametrize("name", CASES)
def test_gather_takes_exactly_the_blocks(name: str) -> None:
    # Broken in production: prefill sends other bytes than its engine computed, and decode answers with other tokens.
    torch.manual_seed(1)
    kv = CASES[name]()
    paged = paged_of(kv)
    dice = random.Random(name)
    for count in (1, 2, 5, BLOCKS):
        block_ids = dice.sample(range(BLOCKS), count)
        expected = naive_slot(kv, block_ids)
        assert expected.numel() == paged.chunk_bytes(count)
        slot = torch.zeros_like(expected)
        paged.gather(block_ids, slot)
        assert torch.equal(slot, expected)
        # Layer by layer, as they are computed, and part of the blocks.
        slot.zero_()
        for layers in (range(0, 2), range(2, 3), range(3, LAYERS)):
            paged.gather(block_ids, slot, layers=layers)
        assert torch.equal(slot, expected)
        if count > 1:
            slot.zero_()
            paged.gather(block_ids[1:], slot, first_block=1)
            shape = (LAYERS, count, paged.block_bytes)
            assert torch.equal(slot.view(shape)[:, 1:], expected.view(shape)[:, 1:])
            assert not slot.view(shape)[:, 0].any()


@pytest.mark.parametrize("name", CASES)
def test_scatter_puts_them_there_and_touches_nothing_else(name: str) -> None:
    # Broken in production: loading one request overwrites the KV of another.
    torch.manual_seed(2)
    kv = CASES[name]()
    paged = paged_of(kv)
    dice = random.Random(name)
    everything = list(range(BLOCKS))
    for count, first in ((1, 0), (3, 0), (3, 1), (BLOCKS, 0)):
        block_ids = dice.sample(everything, count)
        slot = torch.randint(0, 255, (paged.chunk_bytes(count),), dtype=torch.uint8)
        before = naive_slot(kv, everything).view(LAYERS, BLOCKS, -1).clone()
        storages = [tensor.untyped_storage() for tensor in kv.values()]
        everything_there = torch.empty(0, dtype=torch.uint8).set_(storages[0])
        sum_before = int(everything_there.sum())
        paged.scatter(block_ids[first:], slot, first_block=first)
        after = naive_slot(kv, everything).view(LAYERS, BLOCKS, -1)
        for position, block in enumerate(block_ids):
            came = slot.view(LAYERS, count, -1)[:, position]
            assert torch.equal(after[:, block], came if position >= first else before[:, block])
        others = [block for block in everything if block not in block_ids]
        assert torch.equal(after[:, others], before[:, others])
        # Padding between blocks as well: what the storage sums to changed by the blocks' own bytes alone.
        covered = LAYERS if len({storage.data_ptr() for storage in storages}) == 1 else 1
        assert int(everything_there.sum()) - sum_before == int(after[:covered].sum()) - int(before[:covered].sum())


def test_layers_that_share_a_tensor_are_one() -> None:
    # Broken in production: a model whose later layers reuse the KV of earlier ones sends it twice, and lengths differ.
    kv = separate((BLOCKS, 16), torch.float16)
    kv["model.layers.9.attn"] = kv["model.layers.0.attn"]
    paged = paged_of(kv)
    assert paged.layers == LAYERS
    assert paged.layer_index["model.layers.9.attn"] == paged.layer_index["model.layers.0.attn"] == 0


def test_ten_comes_after_nine() -> None:
    # Broken in production: one engine registers layers in another order than the other, and layers are exchanged.
    kv = {f"model.layers.{layer}.attn": torch.zeros(BLOCKS, 4) for layer in (10, 9, 1)}
    assert [index for _, index in sorted(PagedKv(kv, num_blocks=BLOCKS).layer_index.items())] == [0, 2, 1]


def test_wrong_slots_and_blocks_are_refused() -> None:
    # Broken in production: a slot of another length is filled past its end, into the chunk after it.
    paged = paged_of(separate((BLOCKS, 16), torch.float16))
    slot = torch.zeros(paged.chunk_bytes(2), dtype=torch.uint8)
    with pytest.raises(ValueError, match="expected 480 bytes: 5 layers x 3 blocks x 32 bytes"):
        paged.gather([1, 2, 3], slot)
    with pytest.raises(ValueError, match=f"block {BLOCKS} does not exist"):
        paged.scatter([1, BLOCKS], slot)
    with pytest.raises(ValueError, match="block -1 does not exist"):
        paged.gather([-1, 2], slot)
    with pytest.raises(ValueError, match="layers"):
        paged.gather([1, 2], slot, layers=range(0, 6))


def test_a_buffer_elsewhere_is_refused() -> None:
    # Broken in production: a kernel on a GPU is given an address of the host.
    kv = PagedKv({"l.0": torch.zeros(4, 2, 8, dtype=torch.uint8)}, num_blocks=4)
    buffer = torch.zeros(64, dtype=torch.uint8).numpy()
    assert kv.memory(buffer).data_ptr() == buffer.ctypes.data
    kv.device = torch.device("cuda:0")
    with pytest.raises(PagedLayoutError, match="KV is on cuda:0, the pd_buffer on cpu"):
        kv.memory(buffer)


def test_layers_of_different_shape_are_refused() -> None:
    # Broken in production: a hybrid model's layers are cut as if they were alike.
    kv = {"a.0": torch.zeros(BLOCKS, 4), "a.1": torch.zeros(BLOCKS, 8)}
    with pytest.raises(PagedLayoutError, match="layer a.1 keeps 32 bytes a block"):
        PagedKv(kv, num_blocks=BLOCKS)


def test_groups_share_memory_and_are_copied_apart() -> None:
    # Broken in production: layers of another group lie at the same address and are left out; members' blocks are exchanged.
    torch.manual_seed(2)
    memory = one_storage((4, 16, 8), torch.bfloat16, 0, "layer")
    names = sorted(memory)
    # Two members of the same layers' memory, in blocks of other numbers, and layers of another shape beside one.
    wide = separate((BLOCKS, 16, 2, 24), torch.float16)
    first, second = PagedKv(memory, num_blocks=BLOCKS), PagedKv(memory, num_blocks=BLOCKS)
    assert [list(part) for part in of_one_shape(memory | {"z": wide[names[0]]}, BLOCKS, {})] == [names, ["z"]]
    other = PagedKv({"z": wide[names[0]]}, num_blocks=BLOCKS)
    group = PagedGroup([(0, first), (0, other), (1, second)], 2, step_bytes=1 << 12)
    both = PagedGroups([PagedGroup([(0, first)], 1), group])
    assert both.groups[1] is group and both.device == first.device
    ids = [3, 5, 7, 2, 9, 4]
    parts = [naive_slot(memory, ids[:3]), wide[names[0]][ids[:3]].contiguous().view(torch.uint8).flatten(), naive_slot(memory, ids[3:])]
    expected = torch.cat(parts)
    assert expected.numel() == 3 * group.block_bytes < group.chunk_bytes(6) and group.chunk_bytes(6) % (1 << 12) == 0
    slot = torch.zeros(group.chunk_bytes(6), dtype=torch.uint8)
    group.gather(ids, slot)
    assert torch.equal(slot[: expected.numel()], expected)
    # Back into others of the engine's blocks, the last two of each member.
    group.scatter([1, 6, 8, 10], slot, first_block=1)
    assert torch.equal(naive_slot(memory, [1, 6]), naive_slot(memory, [5, 7]))
    assert torch.equal(naive_slot(memory, [8, 10]), naive_slot(memory, [9, 4]))
    assert torch.equal(*(wide[names[0]][ids].view(torch.int16) for ids in ([1, 6], [5, 7])))
    with pytest.raises(ValueError, match="5 blocks of 2 block tables"):
        group.gather(ids[:5], slot)
    with pytest.raises(PagedLayoutError, match="expected a multiple of 16"):
        narrow = PagedKv(one_storage((3, 7), torch.uint8, 2, "layer"), num_blocks=BLOCKS)
        PagedGroup([(0, narrow), (1, narrow)], 2)
