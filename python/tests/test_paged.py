"""Blocks found in an engine's tensors, whatever their shape; the copies are tested where torch is (make e2e)."""

from __future__ import annotations

import pytest

from pd_backend.paged import BlockShape, PagedLayoutError, block_shape


def test_a_cpu_layer_has_dense_blocks() -> None:
    # Broken in production: vLLM's CPU tensors (num_blocks, heads, block_size, 2 * head_dim) are cut in the wrong place.
    shape = block_shape((64, 4, 128, 128), (65536, 16384, 128, 1), 2, 64, 131072)
    assert shape == BlockShape(131072, ((131072, 1),))
    assert shape.block_bytes == 131072


def test_older_gpu_tensors_keep_keys_and_values_apart() -> None:
    # Broken in production: of a tensor [2, num_blocks, ...] only the keys are copied.
    shape = block_shape((2, 100, 16, 8, 64), (100 * 8192, 8192, 512, 64, 1), 2, 100)
    assert shape == BlockShape(16384, ((2, 100 * 16384), (16384, 1)))
    assert shape.block_bytes == 32768


def test_padding_between_blocks_is_not_copied() -> None:
    # Broken in production: pages padded to a common size, or layers packed within a block, are copied with their
    # neighbours.
    assert block_shape((10, 4, 8), (1000, 8, 1), 1, 10) == BlockShape(1000, ((32, 1),))
    assert block_shape((10, 4, 8), (1000, 16, 1), 1, 10) == BlockShape(1000, ((4, 16), (8, 1)))


def test_kernel_blocks_smaller_than_the_engines_belong_together() -> None:
    # Broken in production: where the kernel's blocks are half as long as the engine's, the wrong half is sent.
    assert block_shape((20, 16, 8), (128, 8, 1), 2, 10) == BlockShape(512, ((512, 1),))
    assert block_shape((2, 20, 16), (320, 16, 1), 2, 10) == BlockShape(64, ((2, 640), (64, 1)))


def test_the_engines_word_decides_between_dimensions_of_the_same_length() -> None:
    # Broken in production: 16 blocks of 16 tokens; which dimension is which cannot be seen from the lengths.
    shape, strides = (16, 16, 8), (8, 128, 1)
    assert block_shape(shape, strides, 2, 16, 256) == BlockShape(256, ((256, 1),))
    assert block_shape(shape, strides, 2, 16, 16) == BlockShape(16, ((16, 256), (16, 1)))
    with pytest.raises(PagedLayoutError, match=r"dimensions \[0, 1\] could all count 16 blocks"):
        block_shape(shape, strides, 2, 16)


def test_a_tensor_without_blocks_is_refused() -> None:
    # Broken in production: a state that is not paged (Mamba) is taken for KV.
    with pytest.raises(PagedLayoutError, match="no dimension counts 100 blocks"):
        block_shape((7, 3), (3, 1), 2, 100)
    with pytest.raises(PagedLayoutError, match="of 4096 bytes from one to the next"):
        block_shape((100, 16), (16, 1), 2, 100, 4096)
