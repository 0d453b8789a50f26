"""MoRIIO's dialect, by vllm-router: in write mode both servers are asked at once, and the request's id names the hosts; in
read mode decode is given prefill's answer.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
import zmq

import harness
import prompts
from answers import assert_right
from conftest import Deployment
from harness import Process, Server, until
from router_client import NoAnswer, Running, transferred
from router_processes import Router, vllm_router

pytestmark = pytest.mark.usefixtures("nothing_left")


class Registrar:
    """Tells the router of servers, again and again, as MoRIIO's own connector does from within them."""

    def __init__(self, discovery_port: int, mode: str, prefill: Server, decode: Server) -> None:
        self._port, self._mode = discovery_port, mode
        self._servers = {"P": prefill, "D": decode}
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._tell)
        self._thread.start()

    def close(self) -> None:
        self._ends.set()
        self._thread.join()

    def _tell(self) -> None:
        with zmq.Context() as context, context.socket(zmq.DEALER) as router:
            router.linger = 0
            router.connect(f"tcp://127.0.0.1:{self._port}")
            while not self._ends.wait(0.5):
                for role, server in self._servers.items():
                    # Ports of MoRIIO's own, at which nobody listens here.
                    zmq_address = "host:127.0.0.1,handshake:1,notify:2"
                    at = {"type": role, "http_address": server.url.removeprefix("http://"), "zmq_address": zmq_address}
                    router.send(msgspec.msgpack.encode(at | {"transfer_mode": self._mode, "tp_size": 1, "dp_size": 1}))


@pytest.fixture(scope="module", params=["WRITE", "READ"])
def running(deployment: Deployment, folder: Path, request: pytest.FixtureRequest) -> Iterator[Running]:
    """vllm-router for MoRIIO, which is told of the servers."""
    port, discovery_port = harness.free_ports(2)
    command = [*vllm_router("moriio", port), "--vllm-discovery-address", f"127.0.0.1:{discovery_port}"]
    process = Process(command, folder / f"vllm_router_moriio_{request.param}.log", dict(os.environ))
    registrar = Registrar(discovery_port, request.param, deployment.prefill, deployment.decode)
    running = Running(Router(f"vllm-router, MoRIIO {request.param}", lambda *_: command), f"http://127.0.0.1:{port}")

    def serves() -> bool:
        try:
            return bool(running.ask([3]))
        except NoAnswer:
            return False

    try:
        until(serves, "the router has not heard of the servers")
        yield running
    finally:
        registrar.close()
        process.close()


@pytest.mark.parametrize("stream", [False, True])
def test_completions(deployment: Deployment, running: Running, stream: bool) -> None:
    # Broken in production: under routers of this dialect nothing is transferred, or what is transferred is wrong.
    for prompt in (prompts.BY_LENGTH[256], prompts.BY_LENGTH[3000]):
        with transferred(deployment.decode, prompt):
            assert_right([running.ask(prompt, stream=stream)], [deployment.expected(prompt)])


def test_eight_clients(deployment: Deployment, running: Running) -> None:
    # Broken in production: requests that run at the same time get each other's KV, or wait for it.
    with transferred(deployment.decode, *prompts.CONCURRENT), ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(running.ask, prompts.CONCURRENT))
    assert_right(answers, [deployment.expected(prompt) for prompt in prompts.CONCURRENT])


def test_what_cannot_be_followed(deployment: Deployment) -> None:
    # Broken in production: a request whose id names nobody, or a host without a port, ends the engine, or waits.
    prompt = prompts.CONCURRENT[2]
    params = {
        "do_remote_decode": False, "do_remote_prefill": True, "remote_engine_id": None, "remote_block_ids": None,
        "transfer_id": "tx-1", "remote_dp_size": 1, "remote_tp_size": 1,
    }
    ids = {
        "nobody": "names no address",
        "garbage": "___prefill_addr____decode_addr_",
        "elsewhere": "___prefill_addr_no.such.host.invalid:1___decode_addr_127.0.0.1:1_33432a44fd63417caf622ea27b684c5b",
        "long": "___prefill_addr_" + "h" * 10_000 + "___decode_addr_x",
    }
    for server in (deployment.decode, deployment.small_decode):
        before = server.external_tokens()
        for salt, name in ids.items():
            answer = server.complete(
                prompt, prompts.MAX_TOKENS, kv_transfer_params=params, cache_salt=f"moriio {salt}", request_id=name
            )
            assert harness.tokens_of(answer) == deployment.expected(prompt)
        assert server.external_tokens() == before
        assert "a host of prefill (seen: ''" in server.log()
