"""What is read of vLLM's configuration: what names and bytes of chunks depend on."""

from __future__ import annotations

import logging
import platform
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import vllm
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from ..paged import PagedKv
from .adapters import LoadedAdapters
from .groups import Group, Groups

logger = logging.getLogger("vllm.pd_backend")

#: Of the workers of this process.
LOADED_ADAPTERS = LoadedAdapters()

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


#: Most groups that the daemons tell apart.
GROUPS_MAX = 8


def groups_of(kv_cache_config: KVCacheConfig, chunk_tokens: int) -> Groups:
    """The engine's groups, those as one of which the same tokens are needed.

    Raises `ValueError` for layers that keep something else than the KV of one token after another, by the name of what they
    keep.
    """
    found: dict[Group, list[int]] = {}
    for table, given in enumerate(kv_cache_config.kv_cache_groups):
        # Older releases move every group.
        if getattr(given, "enable_kv_transfer", True):
            found.setdefault(_group(given.kv_cache_spec), []).append(table)
    if len(found) > GROUPS_MAX:
        raise ValueError(f"the model keeps {len(found)} kinds of KV ({', '.join(map(_name, found))}); expected {GROUPS_MAX} at most")
    names = Counter(_name(group) for group in found)
    groups = []
    for group, members in found.items():
        name = _name(group) + (f"-b{group.block_tokens}" if names[_name(group)] > 1 else "")
        groups.append(replace(group, members=tuple(members), name=name))
    return Groups(groups, chunk_tokens)


def _name(group: Group) -> str:
    if group.window_tokens is not None:
        return f"window{group.window_tokens}"
    if group.stretch_tokens is not None:
        return f"local{group.stretch_tokens}"
    return "full"


def _group(spec: KVCacheSpec) -> Group:
    """What is needed of a group of layers that keep this."""
    if isinstance(spec, UniformTypeKVCacheSpecs):
        kinds = [_group(layer) for layer in spec.kv_cache_specs.values()]
        if any(kind != kinds[0] for kind in kinds):
            names = sorted({type(layer).__name__ for layer in spec.kv_cache_specs.values()})
            raise ValueError(f"the model has layers in one group that keep different tokens ({', '.join(names)}): {_MOVED}")
        return kinds[0]
    if getattr(spec, "non_causal", False):
        raise ValueError("the model's attention is not causal: KV of a token depends on later ones, and keys do not")
    if type(spec) is SlidingWindowSpec or (isinstance(spec, SlidingWindowSpec) and spec.prefix_cacheable):
        # vLLM keeps some tokens more for draft layers that compute the last ones again.
        return Group(spec.block_size, window_tokens=spec.sliding_window + getattr(spec, "extra_retained_tokens", 0))
    if isinstance(spec, ChunkedLocalAttentionSpec):
        return Group(spec.block_size, stretch_tokens=spec.attention_chunk_size)
    if isinstance(spec, FullAttentionSpec):
        return Group(spec.block_size)
    raise ValueError(f"the model has layers that keep {type(spec).__name__}: {_MOVED}")


#: vLLM offers nothing that makes another kind of these.
_MOVED = "PdConnector moves the KV of attention to all tokens, to a window or within chunks; prefill and decode in one server"


def one_of_several(vllm_config: VllmConfig) -> bool:
    """Whether the server has other engines beside this one, among which vLLM chooses for each request.

    vLLM tells the engines of a dense model that each is alone. What it appends to the engine's id stays.
    """
    parallel = vllm_config.parallel_config
    named = str(vllm_config.kv_transfer_config.engine_id).endswith(f"_dp{parallel.data_parallel_index}")
    return named and not parallel.data_parallel_external_lb


def images_by_count(vllm_config: VllmConfig) -> bool:
    """Whether vLLM names multimodal inputs by a counter of its process: nothing there needs them by content."""
    multimodal = vllm_config.model_config.multimodal_config
    if multimodal is None or vllm_config.cache_config.enable_prefix_caching:
        return False
    return not multimodal.mm_processor_cache_gb


def adapter_folder(lora_path: str) -> str:
    """Where vLLM reads an adapter from."""
    from vllm.lora.utils import get_adapter_absolute_path

    return get_adapter_absolute_path(lora_path)


def watch_adapter_loads() -> bool:
    """Has `LOADED_ADAPTERS` note what the workers of this process load; false where this vLLM cannot be watched."""
    from vllm.lora.worker_manager import WorkerLoRAManager

    load = getattr(WorkerLoRAManager, "_load_adapter", None)
    if load is None:
        return False
    if getattr(load, "notes_for_pd_backend", False):
        return True

    def noting(manager: Any, lora_request: Any) -> Any:
        return LOADED_ADAPTERS.load(
            lora_request.lora_int_id,
            lambda: adapter_folder(lora_request.lora_path),
            lambda: load(manager, lora_request),
        )

    noting.notes_for_pd_backend = True  # type: ignore[attr-defined]
    WorkerLoRAManager._load_adapter = noting
    return True


def dtype_name(vllm_config: VllmConfig) -> str:
    """Element type of the KV, as keys have it."""
    cache_dtype = str(vllm_config.cache_config.cache_dtype)
    return (str(vllm_config.model_config.dtype) if cache_dtype == "auto" else cache_dtype).removeprefix("torch.")


def running_model(vllm_config: VllmConfig) -> torch.nn.Module | None:
    """The model whose KV is being registered: that of the model runner that calls; None where its weights move by
    themselves (experts that are balanced), or no such caller is found.
    """
    if vllm_config.parallel_config.enable_eplb:
        return None
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if callable(getattr(caller, "get_model", None)):
            return caller.get_model()
        frame = frame.f_back
    logger.warning("this vLLM's model is not found: weights that are changed in place are not noticed; reset the cache then")
    return None


def engine_facts(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, parts: Sequence[PagedKv], groups: Groups, weights: str,
    version: str | None = None,
) -> dict[str, str]:
    """What the bytes of a block depend on, besides their number. `parts`: all that blocks are copied from. `version`: what to say
    instead of vLLM's own.
    """
    from vllm.distributed.kv_transfer.kv_connector.utils import get_current_attn_backends

    context = vllm_config.compilation_config.static_forward_context
    layers = [name for paged in parts for name in paged.layer_index]
    instruction_sets = {str(getattr(context.get(name), "isa", "")) for name in layers} - {""}
    shapes = dict.fromkeys("x".join(str(count) for count, _ in paged.shape.inner) for paged in parts)
    model, device = vllm_config.model_config, parts[0].device
    windows = [str(group.window_tokens or group.stretch_tokens) for group in groups if not group.keeps_all]
    backends = dict.fromkeys(backend.get_name() for backend in get_current_attn_backends(vllm_config, layers))
    facts = {
        "vllm": version or vllm.__version__,
        "dtype": dtype_name(vllm_config),
        "attention": ", ".join(backends),
        "block_shape": ", ".join(shapes),
        "device": device.type if device.type != "cpu" else f"cpu {platform.machine()}",
        "cache_layout": str(getattr(kv_cache_config, "kv_cache_layout", None) or ""),
        # The packing of a block on a CPU depends on the instructions that read it.
        "instruction_set": ",".join(sorted(instruction_sets)),
        "revision": str(getattr(model, "revision", None) or ""),
        "quantization": str(getattr(model, "quantization", None) or ""),
        "weights": weights,
        "window": ", ".join(windows),
    }
    return {name: value[:256] for name, value in facts.items() if value}
