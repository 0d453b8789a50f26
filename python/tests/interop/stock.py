"""What stock_sender.py and stock_receiver.py share: LMCache's PD backend, made as its engine makes it, behind JSON lines.

The backend is LMCache's own, unmodified; here it only gets its configuration, and memory to move. Each line on standard
input is a command, `{"id": 1, "op": ...}`; each is answered by one line with that id. Lines with `event` come by themselves.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Standard output carries answers alone: LMCache's and UCX's logs go where standard error goes.
_ANSWERS = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)
os.environ.setdefault("LMCACHE_TRACK_USAGE", "false")

import torch


def _import_nixl() -> None:
    """NIXL's `nixl` package takes the wheel that was built for torch's CUDA, 13, and refuses another.

    Without a GPU either will do, and the one for CUDA 12 is what this project's daemons are tested with: torch is
    made to say 12 while `nixl` looks.
    """
    import importlib

    built_for = torch.version.cuda
    torch.version.cuda = "12"
    try:
        importlib.import_module("nixl._api")
    finally:
        torch.version.cuda = built_for


@dataclass
class Layout:
    """The layout file that pd-sender and pd-receiver take with --kv-layout, for a model with K and V planes."""

    model: str
    dtype: str
    layers: int
    kv_heads: int
    head_size: int
    kv_planes: int
    chunk_tokens: int
    tp_rank: int = 0
    tp_size: int = 1

    def kv_shape(self) -> tuple[int, int, int, int, int]:
        return self.layers, self.kv_planes, self.chunk_tokens, self.kv_heads, self.head_size

    def object_shape(self, tokens: int) -> torch.Size:
        """KV_2LTD: planes, layers, tokens, heads x head size."""
        return torch.Size([self.kv_planes, self.layers, tokens, self.kv_heads * self.head_size])


def pattern(seed: str, len_bytes: int) -> bytes:
    """The bytes of a chunk: any length of it, in any process, from its seed alone."""
    return hashlib.shake_128(seed.encode()).digest(len_bytes)


class Stock:
    """A stock backend and the loop that obeys commands. `commands` maps an op's name to what it does."""

    def __init__(self, role: str) -> None:
        parser = argparse.ArgumentParser()
        parser.add_argument("--config", required=True, help="lmcache.yaml")
        parser.add_argument("--kv-layout", required=True)
        args = parser.parse_args()
        with open(args.kv_layout) as file:
            self.layout = Layout(**json.load(file))
        _import_nixl()

        from lmcache.utils import CacheEngineKey
        from lmcache.v1.config import load_engine_config_with_overrides
        from lmcache.v1.metadata import LMCacheMetadata

        layout = self.layout
        self.dtype = getattr(torch, layout.dtype)
        config = load_engine_config_with_overrides(config_file_path=args.config)
        config.validate()
        if config.pd_role != role:
            raise SystemExit(f"{args.config} has pd_role {config.pd_role}, this is a {role}")
        self.mode: str = config.pd_backend_mode
        metadata = LMCacheMetadata(
            model_name=layout.model,
            world_size=layout.tp_size,
            local_world_size=layout.tp_size,
            worker_id=layout.tp_rank,
            local_worker_id=layout.tp_rank,
            kv_dtype=self.dtype,
            kv_shape=layout.kv_shape(),
            chunk_size=layout.chunk_tokens,
            role="worker",
        )
        # As lmcache.v1.storage_backend.CreateStorageBackends chooses, without the backends beside it.
        if self.mode == "async":
            from lmcache.v1.storage_backend.pd_backend_async import PDBackendAsync as Backend
        else:
            from lmcache.v1.storage_backend.pd_backend import PDBackend as Backend
        self.key_type = CacheEngineKey
        self.backend: Any = Backend(config, metadata)
        self.allocator = self.backend.memory_allocator.cpu_allocator
        self._answering = threading.Lock()
        self.say(
            event="ready",
            role=role,
            mode=self.mode,
            pid=os.getpid(),
            page_bytes=self.allocator.align_bytes,
            page_count=self.allocator.buffer_size // self.allocator.align_bytes,
            buffer_ptr=self.allocator.buffer_ptr,
            agent=self.backend.transfer_channel.nixl_agent.name,
        )

    def say(self, **answer: Any) -> None:
        with self._answering:
            _ANSWERS.write(json.dumps(answer) + "\n")

    def key(self, text: str) -> Any:
        return self.key_type.from_string(text)

    def status(self, _: dict[str, Any]) -> dict[str, Any]:
        return {
            "pages_free": len(self.allocator.free_blocks),
            "keys": len(self.backend.data),
            "cpu_s": time.process_time(),
            "monotonic_s": time.monotonic(),
        }

    def run(self, commands: dict[str, Callable[[dict[str, Any]], dict[str, Any]]]) -> None:
        """Obeys until standard input ends or `exit` comes; a command that fails is answered with its error."""
        commands = {"status": self.status, **commands}
        for line in sys.stdin:
            command = json.loads(line)
            if command["op"] == "exit":
                self.say(id=command["id"])
                break
            try:
                self.say(id=command["id"], **commands[command["op"]](command))
            except Exception as error:
                self.say(id=command["id"], error=f"{type(error).__name__}: {error}")
        # close() waits for a thread that sits in a blocking recv; the process ends as an engine's that is killed.
        os._exit(0)
