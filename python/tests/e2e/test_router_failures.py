"""What goes wrong between a client, a router and two servers: afterwards every slot is free within the lease, and every answer
is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import harness
import prompts
from answers import right_answer
from conftest import StatusOf, wait_until_nothing_is_left
from gate import Gate
from harness import Server, hang_up, runs, until
from router_client import NoAnswer, Running, transferred
from router_processes import ROUTERS, Servers
from test_tokens import metric

LEASE_S = 5
#: Longer than what a request may take to be noticed, freed and counted beyond its lease.
PATIENCE_S = 60
UNDER_TEST = ("toy proxy", "vllm-router, pull", "vllm-router, push")


@dataclass
class Pair:
    """A prefill and a decode server that can be started anew, and the ports where routers find them."""

    start: Callable[[str], Server]
    prefill: Server
    decode: Server
    prefill_gate: Gate
    decode_gate: Gate

    def again(self, role: str) -> None:
        """Starts the one that has ended."""
        server = self.start(role)
        server.wait_ready()
        setattr(self, role, server)
        (self.prefill_gate if role == "prefill" else self.decode_gate).behind = server.url


@pytest.fixture(scope="module")
def servers(folder: Path, model: Path) -> Iterator[Pair]:
    (rendezvous_port,) = harness.free_ports(1)
    shared = {"pd_buffer_size": "64MiB", "transfer_channel": "local"}
    answering = {"module": "swapping", "name": "AnsweringConnector"}
    configs = {
        "prefill": harness.producer(
            # vllm-router remembers the port.
            shared, kv_lease_duration=LEASE_S, transfer_mode="push", rendezvous_port=rendezvous_port, **answering
        ),
        "decode": harness.consumer(
            shared | {"pd_peer_host": "127.0.0.1", "pd_peer_init_port": 0, "pd_peer_alloc_port": 0}, policy="recompute"
        ),
    }
    arguments = ("--num-gpu-blocks-override", "64", "--max-model-len", "6144")
    chunked = ("--max-num-batched-tokens", "512", "--long-prefill-token-threshold", "256")
    with ExitStack() as stack:
        started: list[Server] = []

        def start(role: str) -> Server:
            args = (*arguments, *chunked) if role == "prefill" else arguments
            name = f"failures_{role}_{len(started)}"
            server = Server(name, folder, model, kv=configs[role], args=args, tokenizer=True)
            started.append(server)
            stack.callback(server.close)
            return server

        prefill, decode = start("prefill"), start("decode")
        prefill.wait_ready()
        decode.wait_ready()
        gates = [Gate(server.url) for server in (prefill, decode)]
        for gate in gates:
            stack.callback(gate.close)
        yield Pair(start, prefill, decode, *gates)


@pytest.fixture(scope="module", params=[router for router in ROUTERS if router.name in UNDER_TEST], ids=lambda router: router.name)
def running(request: pytest.FixtureRequest, servers: Pair, folder: Path, model: Path) -> Iterator[Running]:
    urls = servers.prefill_gate.url, servers.decode_gate.url
    process, url = request.param.start(Servers(*urls, 0, 0, 0, 0, model), folder)
    yield Running(request.param, url)
    process.close()


@pytest.fixture
def pair(servers: Pair, running: Running, status_of: StatusOf) -> Iterator[Pair]:
    """The servers, with a router that knows how prefill wants to be asked. After the test nothing is kept of any request."""
    right(servers, running, "before")
    yield servers
    wait_until_nothing_is_left((servers.prefill, servers.decode), status_of)
    assert status_of(servers.prefill).slots_parked == 0
    right(servers, running, "after")


def right(pair: Pair, running: Running, name: str, **more: Any) -> None:
    """The router answers, once it has noticed who serves, and what it answers is right and came from prefill."""
    prompt = prompts.tokens(f"failures {name}", 700)
    answers: list[list[int]] = []

    def answered() -> bool:
        try:
            answers.append(running.ask(prompt, **more))
        except NoAnswer:
            return False
        return True

    with transferred(pair.decode, prompt):
        until(answered, "the router does not answer", PATIENCE_S)
    assert answers == [expected(pair, prompt)]


def expected(pair: Pair, prompt: list[int]) -> list[int]:
    """What prefill answers by itself."""
    return right_answer(pair.prefill, prompt, prompts.MAX_TOKENS, cache_salt="by itself")


def test_a_client_that_leaves_during_prefill(pair: Pair, running: Running, status_of: StatusOf) -> None:
    # Broken in production: prefill's buffer fills up with prompts of clients that have gone.
    body = running.body(prompts.tokens("failures leaves prefill", 3000))
    hang_up(running.url, body, lambda: status_of(pair.prefill).requests_active > 0)


def test_a_client_that_leaves_before_decode(pair: Pair, running: Running, status_of: StatusOf) -> None:
    # Broken in production: what is parked for a client that has gone stays parked.
    with pair.decode_gate.holding():
        body = running.body(prompts.tokens("failures leaves between", 700))
        hang_up(running.url, body, lambda: pair.decode_gate.held == 1 and status_of(pair.prefill).slots_parked > 0)
        if running.router.name != "toy proxy":  # It notices once decode answers.
            until(lambda: pair.decode_gate.held == 0, "the router asks decode for a client that has gone")


def test_a_client_that_leaves_during_decode(pair: Pair, running: Running) -> None:
    # Broken in production: decode generates for clients that have gone, and keeps their slots.
    prompt = prompts.tokens("failures leaves decode", 700)
    with transferred(pair.decode, prompt):
        before = pair.decode.external_tokens()
        body = running.body(prompt, max_tokens=5000, stream=True)
        hang_up(running.url, body, lambda: pair.decode.external_tokens() > before)
    until(lambda: metric(pair.decode, "vllm:num_requests_running") == 0, "decode goes on")


def test_prefill_answers_with_an_error(pair: Pair, running: Running) -> None:
    # Broken in production: decode waits for what nobody computes, and the router's clients with it.
    with pair.prefill_gate.refusing(), pytest.raises(NoAnswer):
        running.ask(prompts.tokens("failures error", 700))


def test_decode_refuses(pair: Pair, running: Running) -> None:
    # Broken in production: requests that decode cannot take stay in prefill's buffer. vLLM tells its connector of them with
    # a request of its own making.
    with pytest.raises(NoAnswer):
        running.ask(prompts.tokens("failures refused", 700), max_tokens=1_000_000)


def test_decode_is_killed(pair: Pair, running: Running) -> None:
    # Broken in production: what was on its way to a decode server that died is kept for it, and the next one gets nothing.
    before = pair.decode.external_tokens()
    with ThreadPoolExecutor(2) as pool:
        # One that it generates for, and one that it has just been asked.
        asked = [pool.submit(running.ask, prompts.tokens(f"failures killed {i}", 700), max_tokens=5000) for i in range(2)]
        until(lambda: pair.decode.external_tokens() > before, "decode has not begun")
        (receiver,) = pair.decode.kill_engine()
        for answer in asked:
            with pytest.raises(NoAnswer):
                answer.result(PATIENCE_S)
    until(lambda: not runs(receiver), "its receiver has outlived it")
    pair.again("decode")


def test_prefill_is_started_anew_between_two_requests(pair: Pair, running: Running) -> None:
    # Broken in production: after a restart of prefill decode asks the one that has gone, or nobody, for ever.
    (sender,) = pair.prefill.kill_engine()
    until(lambda: not runs(sender), "its sender has outlived it")
    pair.again("prefill")
    # What vllm-router remembers of it is of the one before.
    right(pair, running, "restarted")


def test_the_lease_ends_before_decode_comes(pair: Pair, running: Running, status_of: StatusOf) -> None:
    # Broken in production: decode is given what is in the slots by then, with status 200.
    prompt = prompts.tokens("failures late", 700)
    with ThreadPoolExecutor(1) as pool:
        with pair.decode_gate.holding():
            asked = pool.submit(running.ask, prompt)
            until(lambda: status_of(pair.prefill).slots_parked > 0, "nothing is parked")
            until(lambda: pair.decode_gate.held == 1 and status_of(pair.prefill).slots_parked == 0, "it is kept")
        assert asked.result(PATIENCE_S) == expected(pair, prompt)
