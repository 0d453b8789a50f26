"""The deployment that the end-to-end tests share: one prefill server and two decode servers.

Servers are started once, together: on two cores that is most of the time that these tests take.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

TOP = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(TOP / "python"), str(Path(__file__).resolve().parent)]

import harness
import prompts
from answers import right_answer
from harness import Server
from pd_backend import Client, NodeClient, ReceiverClient, SenderClient, Status
from router_processes import Router

StatusOf = Callable[..., Status]

#: Of the deployment that the tests share: PD_E2E_ENGINE=nixl has it shipped by NIXL, which NIXL_LIB_DIR names.
ENGINE = os.environ.get("PD_E2E_ENGINE", "local")

_BEGAN = time.monotonic()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How long it all took, servers included."""
    terminalreporter.write_line(f"end-to-end tests took {time.monotonic() - _BEGAN:.0f} s, servers included")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the logs are; PD_E2E_LOGS names another one, to be kept."""
    given = os.environ.get("PD_E2E_LOGS")
    if given is None:
        return tmp_path_factory.mktemp("e2e")
    Path(given).mkdir(parents=True, exist_ok=True)
    return Path(given)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model."""
    sys.path.insert(0, str(TOP / "examples"))
    from make_tiny_model import make, make_tokenizer

    path = tmp_path_factory.mktemp("model") / "tiny"
    # Weights that are the same in either of the types that servers compute in.
    make(path, layers=8, vocabulary=prompts.VOCABULARY, dtype="bfloat16", max_tokens=16384, seed=1)
    make_tokenizer(path, prompts.VOCABULARY)
    return path


@dataclass
class Deployment:
    """The servers, and what one instance answers to every prompt."""

    single: dict[tuple[tuple[int, ...], int], list[int]]
    prefill: Server
    #: Fails requests whose KV cannot be loaded.
    decode: Server
    #: Computes them instead; with few blocks, and few slots beside it.
    small_decode: Server
    #: Where the sender beside prefill tells LMCache's routers that KV is across.
    notify_port: int
    #: Where routers of Mooncake's dialect ask prefill.
    bootstrap_port: int
    _number: Iterator[int]

    def expected(self, prompt: list[int], max_tokens: int = prompts.MAX_TOKENS) -> list[int]:
        """What one instance, without a connector, has answered."""
        return self.single[tuple(prompt), max_tokens]

    def spec(self, decode: Server, prefix: str = "e2e") -> dict[str, Any]:
        """`kv_transfer_params` of a new request, for prefill and decode alike."""
        ready = decode.daemon_ready()
        return {
            "disagg_spec": {
                "req_id": f"{prefix}-{next(self._number)}",
                "receiver_host": "127.0.0.1",
                "receiver_init_port": [int(ready["init_port"])],
                "receiver_alloc_port": [int(ready["alloc_port"])],
            }
        }

    def sent(self, prompt: list[int], decode: Server, prefix: str = "e2e", **more: Any) -> dict[str, Any]:
        """Has a prompt prefilled. Returns the `kv_transfer_params` that decode is to be asked with."""
        spec = self.spec(decode, prefix)
        answer = self.prefill.complete(prompt, 1, kv_transfer_params=spec, **more)
        assert not (answer.get("kv_transfer_params") or {}).get("error"), answer
        return spec

    def complete(self, prompt: list[int], decode: Server, prefix: str = "e2e", **more: Any) -> list[int]:
        """Prefill, then decode, as a router does it that waits for nothing in between."""
        spec = self.sent(prompt, decode, prefix, **more)
        return harness.tokens_of(decode.complete(prompt, prompts.MAX_TOKENS, kv_transfer_params=spec, **more))


@pytest.fixture(scope="session")
def deployment(folder: Path, model: Path) -> Iterator[Deployment]:
    """Starts everything, asks one instance everything, and takes it all down at the end."""
    with ExitStack() as stack:

        def start(name: str, kv: dict[str, Any] | None, *args: str) -> Server:
            # Some routers take text alone.
            server = Server(name, folder, model, kv=kv, args=args, tokenizer=True)
            stack.callback(server.close)
            return server

        notify_port, bootstrap_port = harness.free_ports(2)
        shared = {"pd_buffer_size": "128MiB", "transfer_channel": ENGINE, "pd_retention_sec": 60}
        sender = shared | {"pd_proxy_host": "127.0.0.1", "pd_proxy_port": notify_port}

        def receiver(buffer: str) -> dict[str, Any]:
            # Ports that it can have again when it is restarted.
            init_port, alloc_port = harness.free_ports(2)
            return shared | {"pd_buffer_size": buffer, "pd_peer_host": "127.0.0.1", "pd_peer_init_port": init_port, "pd_peer_alloc_port": alloc_port}

        blocks = ("--num-gpu-blocks-override", "64", "--max-model-len", "6144")
        # Two long prompts at a time, each a chunk a step.
        chunked = ("--max-num-batched-tokens", "512", "--long-prefill-token-threshold", "256")
        single = Server("single", folder, model, args=blocks)
        try:
            prefill = start(
                "prefill",
                # Tests wait until nothing is kept.
                harness.producer(
                    sender, kv_lease_duration=5, transfer_mode="push", module="swapping", name="AnsweringConnector",
                    bootstrap_port=bootstrap_port,
                ),
                *blocks, *chunked,
            )
            single.wait_ready()
            with ThreadPoolExecutor(1) as pool:
                answers = pool.submit(_answers, single)
                prefill.wait_ready()
                expected = answers.result()
        finally:
            single.close()
        decode = start(
            "decode",
            harness.consumer(
                receiver("128MiB"), restarts_max=2, receive_wait_s=60, module="swapping", name="SwappingConnector",
                bootstrap_port=bootstrap_port,
            ),
            *blocks,
        )
        small = start(
            "small_decode",
            # By the name that routers of Mooncake's dialect know.
            harness.consumer(receiver("64MiB"), policy="recompute", receive_wait_s=60, name="MooncakeConnector"),
            "--num-gpu-blocks-override", "32", "--max-model-len", "3900",
        )
        decode.wait_ready()
        small.wait_ready()

        yield Deployment(expected, prefill, decode, small, notify_port, bootstrap_port, itertools.count())


def _answers(single: Server) -> dict[tuple[tuple[int, ...], int], list[int]]:
    return {
        (tuple(prompt), max_tokens): right_answer(single, prompt, max_tokens)
        for prompt, max_tokens in prompts.all_prompts()
    }


_CLIENTS: dict[str, type[Client]] = {"sender": SenderClient, "receiver": ReceiverClient, "both": NodeClient}


@pytest.fixture
def status_of() -> Iterator[StatusOf]:
    """The counters of the daemon beside a server, or beside its worker of another rank."""
    clients: dict[str, Client] = {}

    def status(server: Server, rank: int = 0) -> Status:
        ready = server.daemon_ready(rank)
        key = f"{ready['connector']} {ready['pid']}"
        if key not in clients:
            clients[key] = _CLIENTS[ready["role"]](ready["connector"], name="e2e test", map_buffer=False)
        return clients[key].status()

    yield status
    for client in clients.values():
        client.close()


def wait_until_nothing_is_left(servers: Iterable[Server], status_of: StatusOf) -> None:
    """Soon, no daemon beside these servers holds anything for anybody."""
    daemons = [(server, rank) for server in servers if server.running() for rank in server.daemons_ready()]
    left: dict[tuple[str, int, str], int] = {}

    def nothing() -> bool:
        left.clear()
        for server, rank in daemons:
            status = status_of(server, rank)
            held = {
                "requests_active": status.requests_active, "waits": status.waits, "leases": status.leases,
                "slots_reserved": status.slots_reserved, "slots_quarantined": status.slots_quarantined,
                "slots_held": status.slots_held, "transfers_in_flight": status.transfers_in_flight,
            }
            left.update({(server.name, rank, what): count for what, count in held.items() if count})
        return not left

    harness.until(nothing, {"left behind": left})


@pytest.fixture
def nothing_left(deployment: Deployment, status_of: StatusOf) -> Iterator[None]:
    """After the test, soon, no daemon holds anything for anybody."""
    yield
    wait_until_nothing_is_left((deployment.prefill, deployment.decode, deployment.small_decode), status_of)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs no server first, then what has servers of its own, which are gone before the shared ones start; what
    ends one of these last. No prompts of one token where KV is misplaced: decode computes that token in any case. With a
    router no tests of what it does not do.
    """
    items[:] = [item for item in items if not _is_beyond_its_router(item)]
    if harness.MISPLACED:
        items[:] = [item for item in items if not item.name.endswith("[1]")]
    order = ["test_paged_copies", "test_engine", "test_tensor_parallel", "test_variants", "test_models", "test_names", "test_router_failures", "test_tokens", "test_parked", "test_ahead", "test_data_parallel", "test_mooncake", "test_moriio", "test_layerwise", "test_hosts", "test_routers", "test_requests", "test_busy", "test_both", "test_overload", "test_refused", "test_unhealthy"]
    items.sort(key=lambda item: order.index(Path(str(item.path)).stem) if Path(str(item.path)).stem in order else 1)


def _is_beyond_its_router(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    router = callspec.params.get("running") if callspec is not None else None
    return isinstance(router, Router) and item.originalname in router.lacks
