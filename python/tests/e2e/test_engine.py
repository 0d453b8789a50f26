"""What is read of vLLM, from vLLM's own classes; no server is needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace as Fake
from typing import Any

import pytest
import torch
from vllm.config import CacheConfig, ModelConfig, ParallelConfig, VllmConfig
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    CircularBufferSpec,
    CrossAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowMLASpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.request import Request

from pd_backend.vllm import engine
from pd_backend.vllm.adapters import Adapters
from pd_backend.vllm.groups import Group, Groups
from pd_backend.vllm.naming import NULL_BLOCK
from pd_backend.vllm.weights import Weights

SHAPE = {"block_size": 128, "num_kv_heads": 2, "head_size": 64, "dtype": torch.float32}
SLIDING = SlidingWindowSpec(**SHAPE, sliding_window=256)
LOCAL = ChunkedLocalAttentionSpec(**SHAPE, attention_chunk_size=512)
FULL = FullAttentionSpec(**SHAPE)


@pytest.mark.parametrize(
    ("size", "external", "engine_id", "chosen"),
    [
        (1, False, "an id", False),
        (2, False, "an id_dp1", True),
        # Another load balancer chooses: vLLM has nothing to choose from.
        (2, True, "an id_dp1", False),
    ],
)
def test_engines_that_vllm_chooses_among(size: int, external: bool, engine_id: str, chosen: bool) -> None:
    # Broken in production: a request waits for chunks that went to another engine; or none is waited for where there is one.
    parallel = ParallelConfig(
        data_parallel_size=size, data_parallel_external_lb=external, distributed_executor_backend="uni"
    )
    # As vLLM makes one engine of each data-parallel rank of a dense model.
    parallel.data_parallel_index = size - 1
    parallel.reconfigure_for_independent_dp_rank()
    config = Fake(parallel_config=parallel, kv_transfer_config=Fake(engine_id=engine_id))
    assert engine.one_of_several(config) == chosen


def config_of(*specs: Any, num_blocks: int = 256) -> KVCacheConfig:
    groups = [KVCacheGroupSpec([f"layer.{number}"], spec) for number, spec in enumerate(specs)]
    return KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups)


def groups_of(*specs: Any) -> Groups:
    return engine.groups_of(config_of(*specs), 256)


def test_groups_of_layers() -> None:
    # Broken in production: a model with a window is sent as if all of its KV were kept; or one without loses its last token.
    assert groups_of(FULL).is_plain
    # Several kinds without vLLM's hybrid manager: the window is recorded, and all blocks are kept.
    assert groups_of(FullAttentionSpec(**SHAPE, sliding_window=256)).is_plain
    assert groups_of(MLAAttentionSpec(**SHAPE | {"num_kv_heads": 1})).is_plain
    assert list(groups_of(SLIDING)) == [Group(128, (0,), window_tokens=256, name="window256")]
    # Those in which the same is needed are one, whatever the shape of their blocks.
    narrow = SlidingWindowSpec(**SHAPE | {"head_size": 32}, sliding_window=256)
    assert list(groups_of(FULL, SLIDING, narrow, LOCAL)) == [
        Group(128, (0,), name="full"),
        Group(128, (1, 2), window_tokens=256, name="window256"),
        Group(128, (3,), stretch_tokens=512, name="local512"),
    ]
    layers = UniformTypeKVCacheSpecs(block_size=128, kv_cache_specs={"a": SLIDING, "b": narrow})
    assert [group.window_tokens for group in groups_of(FULL, layers)] == [None, 256]
    short = FullAttentionSpec(**SHAPE | {"block_size": 64})
    assert [group.name for group in groups_of(FULL, short)] == ["full-b128", "full-b64"]
    # Draft layers that compute the last tokens again see further back.
    assert groups_of(SlidingWindowSpec(**SHAPE, sliding_window=256, extra_retained_tokens=2))[0].window_tokens == 258


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (MambaSpec(block_size=4096, shapes=((2, 2),), dtypes=(torch.float32,)), "layers that keep MambaSpec: PdConnector moves"),
        (CrossAttentionSpec(**SHAPE), "layers that keep CrossAttentionSpec"),
        (CircularBufferSpec(**SHAPE), "layers that keep CircularBufferSpec"),
        (FullAttentionSpec(**SHAPE, non_causal=True), "not causal"),
        (
            SlidingWindowMLASpec(**SHAPE | {"num_kv_heads": 1}, sliding_window=256, bounded_replay=True),
            "layers that keep SlidingWindowMLASpec",
        ),
    ],
)
def test_layers_that_keep_something_else_are_refused_by_name(spec: Any, said: str) -> None:
    # Broken in production: states are sent as if they were KV of tokens; or advice is given that changes nothing.
    for specs in ((spec,), (FULL, spec)):
        with pytest.raises(ValueError, match=said) as refused:
            groups_of(*specs)
        assert "disable-hybrid" not in str(refused.value) and "chunk_size" not in str(refused.value)


def _names(specs: Any) -> str:
    return " ".join(type(spec).__name__ for spec in specs)


@pytest.mark.parametrize("specs", [(FULL,), (SLIDING,), (FULL, SLIDING), (FULL, LOCAL), (FULL, SLIDING, LOCAL)], ids=_names)
@pytest.mark.parametrize("tokens", [2, 128, 129, 256, 257, 384, 385, 513, 640, 1025, 1500, 2049])
def test_vllms_own_tables_have_the_blocks_that_are_needed(specs: tuple[Any, ...], tokens: int) -> None:
    # Broken in production: what vLLM skips is sent, or what it attends to is not; at prefill or at decode, with a hit or without.
    init_none_hash(sha256)
    groups = groups_of(*specs)
    sent = groups.sent_tokens(tokens)

    def manager() -> KVCacheManager:
        made = KVCacheManager(
            kv_cache_config=config_of(*specs), max_model_len=8192, scheduler_block_size=128, hash_block_size=128,
            enable_caching=True, max_in_flight_tokens=512,
        )
        assert made.block_pool.null_block.block_id == NULL_BLOCK
        return made

    def request(name: str, count: int = tokens) -> Request:
        return Request(
            name, list(range(count)), SamplingParams(max_tokens=1), None, block_hasher=get_request_block_hasher(128, sha256)
        )

    def check(tables: Any) -> None:
        for group in groups:
            for member in group.members:
                needed = group.needed(sent)
                assert NULL_BLOCK not in [tables[member][at] for at in needed], "a block that is needed is skipped"
                kept = [at for at in range(-(-sent // 128)) if at < len(tables[member]) and tables[member][at] != NULL_BLOCK]
                if not groups.is_plain:
                    # At decode vLLM keeps no others; at prefill it may have freed none of them yet.
                    assert exact is False or set(kept) <= set(needed) | {len(tables[member]) - 1}

    # Decode: everything comes, and then all behind a prefix hit.
    exact = True
    decode = manager()
    for name in ("loaded", "hit"):
        decode.new_step_starts()
        one = request(name)
        blocks, computed = decode.get_computed_blocks(one)[:2]
        if name == "hit" and sent - computed <= 0:
            continue
        assert decode.allocate_slots(one, 0, computed, blocks, num_external_computed_tokens=sent - computed, delay_cache_blocks=True)
        check(decode.get_block_ids(name))
        one.num_computed_tokens = sent
        decode.cache_blocks(one, sent)
        decode.free(one)

    # Prefill, 512 tokens at a time, and then with a prefix hit.
    exact = False
    prefill = manager()
    for name in ("computed", "hit"):
        prefill.new_step_starts()
        one = request(name)
        blocks, computed = prefill.get_computed_blocks(one)[:2]
        while computed < tokens:
            scheduled = min(512, tokens - computed)
            new = computed - one.num_computed_tokens
            assert prefill.allocate_slots(one, scheduled, new, blocks if new else None)
            one.num_computed_tokens = computed = computed + scheduled
        check(prefill.get_block_ids(name))
        prefill.free(one)


@pytest.mark.parametrize(
    ("caching", "cache_gb", "counted"), [(False, 0, True), (True, 0, False), (False, 4, False), (True, 4, False)]
)
def test_when_vllm_counts_images(caching: bool, cache_gb: float, counted: bool) -> None:
    # Broken in production: images that vLLM calls by a counter are sent; or those that it calls by content are not.
    multimodal = Fake(mm_processor_cache_gb=cache_gb)
    config = Fake(model_config=Fake(multimodal_config=multimodal), cache_config=Fake(enable_prefix_caching=caching))
    assert engine.images_by_count(config) == counted
    config.model_config.multimodal_config = None
    assert not engine.images_by_count(config)
    assert {"enable_prefix_caching"} <= set(CacheConfig.__dataclass_fields__), "vLLM calls it otherwise now"
    assert {"multimodal_config"} <= set(ModelConfig.__dataclass_fields__) and VllmConfig


def test_the_workers_loads_of_adapters_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Broken in production: a new vLLM loads adapters otherwise, and their files are taken for what is loaded.
    monkeypatch.setattr(WorkerLoRAManager, "_load_adapter", WorkerLoRAManager._load_adapter)
    assert engine.watch_adapter_loads() and engine.watch_adapter_loads()
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"one")
    asked = LoRARequest("ad", 77, str(tmp_path))
    before = Adapters(engine.adapter_folder).of(asked)
    with pytest.raises(Exception):  # What it is loaded into is nothing.
        WorkerLoRAManager._load_adapter(Fake(), asked)
    assert engine.LOADED_ADAPTERS.news() == {}
    monkeypatch.setattr(WorkerLoRAManager, "_load_adapter", lambda manager, request: "a model")
    assert engine.watch_adapter_loads()
    assert WorkerLoRAManager._load_adapter(Fake(), asked) == "a model"
    assert engine.LOADED_ADAPTERS.may_be(before) and engine.LOADED_ADAPTERS.news() == {77: before.signature}


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.proj = torch.nn.Linear(300, 200)
        self.transposed = torch.nn.Parameter(torch.randn(40, 70).t(), requires_grad=False)
        self.register_buffer("k_scale", torch.ones(()))
        self.half_precise = torch.nn.Parameter(torch.randn(500).to(torch.bfloat16), requires_grad=False)
        self.packed = torch.nn.Parameter(torch.randint(0, 99, (64, 3), dtype=torch.int32), requires_grad=False)
        self.sparse = torch.nn.Parameter(torch.randn(9, 9)[::2, ::2], requires_grad=False)


@torch.no_grad()
def replaced(model: Model) -> None:
    model.proj.weight = torch.nn.Parameter(model.proj.weight * 2)


CHANGES: list[Callable[[Model], Any]] = [
    # As vLLM's loaders write: behind autograd's back.
    lambda model: model.proj.weight.data.copy_(torch.zeros(200, 300)),
    lambda model: model.proj.bias.data.mul_(0.5),
    lambda model: model.transposed.data.add_(1),
    lambda model: model.k_scale.fill_(2.0),
    lambda model: model.half_precise.data.mul_(1.5),
    lambda model: model.packed.data.add_(1),
    lambda model: model.sparse.data.neg_(),
    replaced,
]


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_change_in_place(change: Callable[[Model], Any]) -> None:
    # Broken in production: weights are updated, and the former ones' KV is used.
    model, twin, other = Model(), Model(), Model()
    watched = [Weights("checkpoint", each) for each in (model, twin, other)]
    assert [each.identity() for each in watched] == ["checkpoint"] * 3
    keep = {name: parameter.detach().clone() for name, parameter in model.state_dict().items()}
    change(model)
    changed = watched[0].identity()
    assert changed != "checkpoint" and watched[0].identity() == changed == watched[0].last
    # A server of the same kind, updated alike, agrees; whatever it was before.
    change(twin)
    assert watched[1].identity() == changed and watched[2].identity() == "checkpoint"
    with torch.no_grad():
        model.load_state_dict(keep)
    assert watched[0].identity() == "checkpoint"
    assert Weights("checkpoint", None).identity() == "checkpoint"
