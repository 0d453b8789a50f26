"""What is read of vLLM's configuration: what names and bytes of chunks depend on."""

from __future__ import annotations

import logging
import platform
import sys
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

logger = logging.getLogger("vllm.pd_backend")

#: Of the workers of this process.
LOADED_ADAPTERS = LoadedAdapters()

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


def window_tokens(spec: KVCacheSpec) -> int | None:
    """How many tokens a layer sees at most, outside of which vLLM keeps no KV; None where it keeps all.

    Raises `ValueError` for layers whose blocks do not hold the KV of one token after the other.
    """
    if isinstance(spec, UniformTypeKVCacheSpecs):
        windows = [window_tokens(layer) for layer in spec.kv_cache_specs.values()]
        return min((window for window in windows if window is not None), default=None)
    if isinstance(spec, SlidingWindowSpec):
        return spec.sliding_window
    if isinstance(spec, ChunkedLocalAttentionSpec):
        return spec.attention_chunk_size
    if not isinstance(spec, FullAttentionSpec):
        raise ValueError(
            f"the model's layers keep {type(spec).__name__}; PdConnector moves the KV of attention over tokens"
        )
    if getattr(spec, "non_causal", False):
        raise ValueError("the model's attention is not causal: KV of a token depends on later ones, and keys do not")
    return None


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
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, paged: PagedKv, weights: str, version: str | None = None
) -> dict[str, str]:
    """What the bytes of a block depend on, besides their number. `version`: what to say instead of vLLM's own."""
    from vllm.distributed.kv_transfer.kv_connector.utils import get_current_attn_backend

    context = vllm_config.compilation_config.static_forward_context
    instruction_sets = {str(getattr(context.get(name), "isa", "")) for name in paged.layer_index} - {""}
    model = vllm_config.model_config
    facts = {
        "vllm": version or vllm.__version__,
        "dtype": dtype_name(vllm_config),
        "attention": get_current_attn_backend(vllm_config, list(paged.layer_index)).get_name(),
        "block_shape": "x".join(str(count) for count, _ in paged.shape.inner),
        "device": paged.device.type if paged.device.type != "cpu" else f"cpu {platform.machine()}",
        "cache_layout": str(getattr(kv_cache_config, "kv_cache_layout", None) or ""),
        # The packing of a block on a CPU depends on the instructions that read it.
        "instruction_set": ",".join(sorted(instruction_sets)),
        "revision": str(getattr(model, "revision", None) or ""),
        "quantization": str(getattr(model, "quantization", None) or ""),
        "weights": weights,
        "window": str(window_tokens(kv_cache_config.kv_cache_groups[0].kv_cache_spec) or ""),
    }
    return {name: value[:256] for name, value in facts.items() if value}
