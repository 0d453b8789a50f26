"""The kernel between paged KV and slots: on the machine's GPU, or by Triton's interpreter on the CPU."""

import os
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest

torch = pytest.importorskip(
    "torch",
    reason="no torch: `pip install torch triton` into an environment of its own, and there `pytest "
    "python/tests/test_paged_cuda.py`; without a GPU Triton's interpreter runs the kernel",
)
ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # Read when the kernel is defined.
pytest.importorskip("triton", reason="no Triton: `pip install triton` beside torch; its interpreter needs no GPU")

from pd_backend import paged_cuda

DEVICE = "cuda" if ON_GPU else "cpu"


@dataclass(frozen=True)
class Shape:
    block_stride_bytes: int
    inner: tuple[tuple[int, int], ...]


BLOCKS = 11


def one_allocation(layers, block_bytes):
    """Layer-major in one tensor, a block dense in each layer."""
    memory = torch.randint(0, 256, (layers, BLOCKS, block_bytes), dtype=torch.uint8, device=DEVICE)
    shape = Shape(block_bytes, ((block_bytes, 1),))
    return list(memory), [shape] * layers, lambda layer, block: memory[layer, block]


def block_major(layers, block_bytes):
    """All layers of a block side by side: large strides, and layers that begin inside each other."""
    memory = torch.randint(0, 256, (BLOCKS, layers, block_bytes), dtype=torch.uint8, device=DEVICE)
    shape = Shape(layers * block_bytes, ((block_bytes, 1),))
    return [memory[0, layer] for layer in range(layers)], [shape] * layers, lambda layer, block: memory[block, layer]


def keys_apart_from_values(layers, block_bytes):
    """`[2, blocks, ...]` for each layer, in allocations of their own: two runs a block."""
    half = block_bytes // 2
    memory = [torch.randint(0, 256, (2, BLOCKS, half), dtype=torch.uint8, device=DEVICE) for _ in range(layers)]
    shape = Shape(half, ((2, BLOCKS * half), (half, 1)))
    return memory, [shape] * layers, lambda layer, block: memory[layer][:, block].reshape(-1)


def strided_heads(layers, block_bytes):
    """Runs in two dimensions, with gaps."""
    run = block_bytes // 6
    memory = [torch.randint(0, 256, (BLOCKS, 3, 2, run + 8), dtype=torch.uint8, device=DEVICE) for _ in range(layers)]
    stride = run + 8
    shape = Shape(6 * stride, ((3, 2 * stride), (2, stride), (run, 1)))
    return memory, [shape] * layers, lambda layer, block: memory[layer][block, :, :, :run].reshape(-1)


LAYOUTS = [one_allocation, block_major, keys_apart_from_values, strided_heads]


@pytest.mark.parametrize("block_bytes", [48, 6 * 1024, 30_000, 66], ids=lambda length: f"{length} bytes")
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_a_chunk_is_gathered_and_scattered_whole(layout, block_bytes):
    # Broken in production: the decode worker computes with another layer's, or another prompt's, keys and values.
    layers, ids = 3, [7, 0, 10, 3]
    tensors, shapes, block_of = layout(layers, block_bytes)
    copies = paged_cuda.CudaCopies(tensors, shapes, BLOCKS)
    slot = torch.zeros(layers * len(ids) * block_bytes, dtype=torch.uint8, device=DEVICE)
    copies.gather(ids, slot, range(layers), 0, len(ids))
    expected = torch.cat([block_of(layer, block) for layer in range(layers) for block in ids])
    assert torch.equal(slot, expected)
    before = [block_of(layer, block).clone() for layer in range(layers) for block in range(BLOCKS)]
    new = torch.randint(0, 256, slot.shape, dtype=torch.uint8, device=DEVICE)
    target = [4, 9, 1, 2]
    copies.scatter(target, new, range(layers), 0, len(target))
    cut = new.view(layers, len(ids), block_bytes)
    for layer in range(layers):
        for block in range(BLOCKS):
            place = target.index(block) if block in target else None
            wanted = before[layer * BLOCKS + block] if place is None else cut[layer, place]
            assert torch.equal(block_of(layer, block), wanted), f"block {block} of layer {layer}"


def test_some_layers_and_some_blocks_leave_the_rest_alone():
    # Broken in production: a chunk that is filled layer by layer, or block by block, is overwritten by its own parts.
    tensors, shapes, block_of = block_major(4, 64)
    copies = paged_cuda.CudaCopies(tensors, shapes, BLOCKS)
    slot = torch.zeros(4 * 5 * 64, dtype=torch.uint8, device=DEVICE)
    copies.gather([8, 6], slot, range(1, 3), 3, 5)
    cut = slot.view(4, 5, 64)
    for layer in range(4):
        for place in range(5):
            written = layer in (1, 2) and place >= 3
            nothing = torch.zeros(64, dtype=torch.uint8, device=DEVICE)
            wanted = block_of(layer, [8, 6][place - 3]) if written else nothing
            assert torch.equal(cut[layer, place], wanted), f"layer {layer}, block {place}"
    copies.gather([], slot, range(4), 0, 5)
    copies.gather([1], slot, range(2, 2), 0, 5)
    with pytest.raises(ValueError, match="multiple of 8"):
        copies.gather([1], torch.zeros(4 * 64 + 1, dtype=torch.uint8, device=DEVICE)[1:], range(4), 0, 1)


def test_a_chunk_of_32_layers_is_one_launch(monkeypatch):
    # Broken in production: thousands of small copies for each chunk, and the GPU waits for the host.
    launches = []
    real = paged_cuda._copy

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return real[grid]

    monkeypatch.setattr(paged_cuda, "_copy", Counted())
    tensors, shapes, _ = keys_apart_from_values(32, 64)
    slot = torch.zeros(32 * 8 * 64, dtype=torch.uint8, device=DEVICE)
    paged_cuda.CudaCopies(tensors, shapes, BLOCKS).gather(list(range(8)), slot, range(32), 0, 8)
    assert len(launches) == 1 and np.prod(launches[0]) == 32 * 8 * 2


def test_the_kernel_compiles_for_a_gpu():
    # Broken in production: what an interpreter runs is refused by the compiler on the first prompt.
    code = """
from pd_backend import paged_cuda
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
pointers = dict.fromkeys(["bases", "block_strides", "run_offsets", "block_ids"], "*i64")
numbers = dict.fromkeys(["first_layer", "first_block", "blocks", "run_words", "runs", "tiles"], "i32")
constants = {"TO_SLOT": "constexpr", "TILE": "constexpr"}
for word in ("*i64", "*i32", "*i16", "*i8"):
    for to_slot in (True, False):
        signature = {**pointers, "slot": word, **numbers, **constants}
        source = ASTSource(fn=paged_cuda._copy, signature=signature, constexprs={(11,): to_slot, (12,): 1024})
        assert compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, "-c", code], env=environment | {"PYTHONPATH": path}, check=True, timeout=300)
