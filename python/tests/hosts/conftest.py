"""Fixtures of tests over several hosts, which one machine plays: see network.py."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from network import Host, Network, NotAllowed, check_allowed

#: 4 MiB a chunk, so that a chunk is some time on a slow link.
LAYOUT = {
    "model": "tests/hosts", "dtype": "bfloat16", "layers": 32, "kv_heads": 8, "head_size": 128, "kv_planes": 2,
    "chunk_tokens": 32, "tp_rank": 0, "tp_size": 1,
}
CHUNK_BYTES = 4 << 20
#: The hosts share a kernel, and UCX would write from process to process: over TCP alone, as between hosts that share nothing.
OVER_TCP = {"UCX_TLS": "tcp,self"}


@pytest.fixture(scope="session")
def _allowed() -> None:
    try:
        check_allowed()
    except NotAllowed as error:
        pytest.skip(f"no hosts can be made here: {error}")


@pytest.fixture
def network(_allowed: None) -> Iterator[Network]:
    """A switch without hosts."""
    with Network() as network:
        yield network


@pytest.fixture
def start() -> Callable[..., dict[str, Any]]:
    """Starts a daemon on a host, with a buffer of 16 chunks, reachable at the host's own address."""

    def start(host: Host, role: str, *sets: str, engine: str = "nixl") -> dict[str, Any]:
        keys = [f"transfer_channel={engine}", f"pd_buffer_size={16 * CHUNK_BYTES}", f"pd_peer_host='{host.address}'"]
        parks = [f"pd_rendezvous_host='{host.address}'", "pd_rendezvous_port=0"]
        return host.call("start", role, LAYOUT, [*keys, *(parks if role != "receiver" else []), *sets])

    return start
