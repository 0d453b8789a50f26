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
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.request import Request

from pd_backend.vllm import engine
from pd_backend.vllm.adapters import Adapters
from pd_backend.vllm.naming import NULL_BLOCK, Naming
from pd_backend.vllm.producer_scheduler import ProducerScheduler
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


def test_windows_of_layers() -> None:
    # Broken in production: a model with a window is sent as if all of its KV were kept; or one without is not sent.
    assert engine.window_tokens(SLIDING) == 256 and engine.window_tokens(LOCAL) == 512
    assert engine.window_tokens(FULL) is None
    # Several kinds without vLLM's hybrid manager: the window is recorded, and all blocks are kept.
    assert engine.window_tokens(FullAttentionSpec(**SHAPE, sliding_window=256)) is None
    assert engine.window_tokens(MLAAttentionSpec(**SHAPE | {"num_kv_heads": 1})) is None
    layers = {"a": SLIDING, "b": SlidingWindowSpec(**SHAPE | {"head_size": 32}, sliding_window=256)}
    assert engine.window_tokens(UniformTypeKVCacheSpecs(block_size=128, kv_cache_specs=layers)) == 256
    with pytest.raises(ValueError, match="keep MambaSpec"):
        engine.window_tokens(MambaSpec(block_size=4096, shapes=((2, 2),), dtypes=(torch.float32,)))
    with pytest.raises(ValueError, match="not causal"):
        engine.window_tokens(FullAttentionSpec(**SHAPE, non_causal=True))


@pytest.mark.parametrize("spec", [SLIDING, LOCAL], ids=["window", "local chunks"])
def test_a_prefix_hit_of_vllms_own_cache_with_skipped_blocks_is_not_sent(spec: Any) -> None:
    # Broken in production: a hit begins with vLLM's null block, which is sent under the keys of the first tokens.
    init_none_hash(sha256)
    config = KVCacheConfig(num_blocks=64, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    manager = KVCacheManager(
        kv_cache_config=config, max_model_len=8192, scheduler_block_size=128, hash_block_size=128, enable_caching=True,
    )
    assert manager.block_pool.null_block.block_id == NULL_BLOCK
    scheduler = ProducerScheduler(256, 128, 1, Naming())
    steps = []
    for name in ("computed", "hit"):
        params = {"disagg_spec": {"req_id": name, "receiver_host": "h", "receiver_init_port": 1, "receiver_alloc_port": 2}}
        sampling = SamplingParams(max_tokens=1, extra_args={"kv_transfer_params": params})
        request = Request(
            name, list(range(1500)), sampling, None, block_hasher=get_request_block_hasher(128, sha256)
        )
        blocks, computed = manager.get_computed_blocks(request)[:2]
        # Of local chunks vLLM takes all before the last one as computed, also what nobody has computed.
        assert (computed > 0) == (name == "hit" or spec is LOCAL)
        assert manager.allocate_slots(request, 1500 - computed, computed, blocks) is not None
        scheduler.allocated(request)
        new = Fake(req_id=name, block_ids=manager.get_block_ids(name), num_computed_tokens=computed)
        steps.append(scheduler.build(Fake(
            scheduled_new_reqs=[new],
            scheduled_cached_reqs=Fake(req_ids=[], resumed_req_ids=set(), new_block_ids=[], num_computed_tokens=[]),
            num_scheduled_tokens={name: 1500 - computed},
            total_num_scheduled_tokens=1500 - computed,
            preempted_req_ids=set(),
        )))
        request.num_computed_tokens = 1500
        manager.free(request)
    computed, hit = steps
    assert len(computed.chunks) == (6 if spec is SLIDING else 0)
    assert not any(NULL_BLOCK in chunk.block_ids for chunk in computed.chunks)
    assert (hit.plans, hit.chunks) == ([], [])


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
