"""vLLM's NixlConnector such that it runs here, for the bench.

With NIXL's CUDA 12 package, which needs no CUDA on the machine, its progress thread at 1 ms instead of spinning, and
without pinning the worker to the last core. As shipped it is far slower on two cores.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import nixl_cu12
import nixl_cu12._api
import nixl_cu12._bindings

sys.modules.setdefault("nixl", nixl_cu12)
sys.modules.setdefault("nixl._api", nixl_cu12._api)
sys.modules.setdefault("nixl._bindings", nixl_cu12._bindings)


class _Config(nixl_cu12._bindings.nixlAgentConfig):
    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, 1000 if name == "pthrDelay" else value)


nixl_cu12._bindings.nixlAgentConfig = _Config
os.sched_setaffinity = lambda *_: None

from vllm.distributed.kv_transfer.kv_connector.v1.nixl import NixlConnector


class TamedNixlConnector(NixlConnector):
    """As it is, but for the above."""
