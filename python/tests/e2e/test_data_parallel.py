"""Servers of several engines, each with a scheduler, a cache and daemons of its own: the engine that has the KV answers for
itself, and the engine that wants it fetches it, whichever they are.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import harness
import prompts
from answers import assert_right
from conftest import Deployment, StatusOf, wait_until_nothing_is_left
from free_ports import free_ports, free_ports_in_a_row
from harness import Server, runs, until
from router_processes import Router, Servers, vllm_router
from test_parked import ASKED

ENGINES = (0, 1)


@dataclass
class Pair:
    """A prefill and a decode server of two engines each."""

    prefill: Server
    #: Fails requests whose KV cannot be loaded.
    decode: Server
    #: The first of prefill's, which are fixed.
    rendezvous_port: int
    metrics_port: int
    #: The first of decode's.
    init_port: int
    alloc_ports: list[int]
    _numbers: Iterator[int]

    def salt(self) -> str:
        """Of a request that shares its blocks with no other."""
        return f"data parallel {next(self._numbers)}"

    def spec(self, engine: int) -> dict[str, Any]:
        """`kv_transfer_params` as LMCache's routers send them, of a new request that this engine is to decode."""
        return {
            "disagg_spec": {
                "req_id": f"dp-{next(self._numbers)}",
                "receiver_host": "127.0.0.1",
                "receiver_init_port": [self.init_port + engine],
                "receiver_alloc_port": [self.alloc_ports[engine]],
            }
        }


@pytest.fixture(scope="module")
def servers(folder: Path, model: Path) -> Iterator[Pair]:
    """Both, started together and taken down when this module ends."""
    rendezvous, metrics, init = (free_ports_in_a_row(len(ENGINES)) for _ in range(3))
    alloc = free_ports(len(ENGINES))
    shared: dict[str, Any] = {"pd_buffer_size": "64MiB", "transfer_channel": "local", "pd_retention_sec": 60}
    receiver = {"pd_peer_host": "127.0.0.1", "pd_peer_init_port": init, "pd_peer_alloc_port": alloc}
    arguments = ("--data-parallel-size", str(len(ENGINES)), "--num-gpu-blocks-override", "64", "--max-model-len", "6144")
    with ExitStack() as stack:

        def start(name: str, kv: dict[str, Any]) -> Server:
            server = Server(name, folder, model, kv=kv, args=arguments)
            stack.callback(server.close)
            return server

        prefill = start(
            "dp_prefill",
            harness.producer(
                shared | {"pd_metrics_port": metrics, "pd_push_ahead": False},  # Here counts what is asked for.
                rendezvous_port=rendezvous, kv_lease_duration=5, transfer_mode="push",
            ),
        )
        decode = start("dp_decode", harness.consumer(shared | receiver, receive_wait_s=60))
        prefill.wait_ready()
        decode.wait_ready()
        yield Pair(prefill, decode, rendezvous, metrics, init, alloc, itertools.count())
        daemons = [int(server.daemon_ready(engine)["pid"]) for server in (prefill, decode) for engine in ENGINES]
    # Broken in production: an engine that has gone leaves daemons behind, with their ports and their memory.
    until(lambda: not any(runs(pid) for pid in daemons), f"daemons have outlived their engines: {daemons}")


@pytest.fixture
def pair(servers: Pair, status_of: StatusOf) -> Iterator[Pair]:
    """Of which, after the test, no daemon holds anything for anybody."""
    yield servers
    wait_until_nothing_is_left((servers.prefill, servers.decode), status_of)


def test_each_engine_has_ports_of_its_own(pair: Pair) -> None:
    # Broken in production: the second engine does not start, or decode asks the first one for what the second one has.
    for server in (pair.prefill, pair.decode):
        assert server.daemons_ready().keys() == set(ENGINES)
    for engine in ENGINES:
        sender, receiver = (server.daemon_ready(engine) for server in (pair.prefill, pair.decode))
        assert int(sender["rendezvous_port"]) == pair.rendezvous_port + engine
        assert sender["metrics"] == f"http://127.0.0.1:{pair.metrics_port + engine}/metrics"
        assert int(receiver["init_port"]) == pair.init_port + engine
        assert int(receiver["alloc_port"]) == pair.alloc_ports[engine]


class Moved:
    """What the daemons beside a server's engines have sent or received since this was made."""

    def __init__(self, server: Server, status_of: StatusOf) -> None:
        self._server, self._status_of = server, status_of
        self._bytes = {engine: status_of(server, engine).bytes for engine in server.daemons_ready()}
        self._tokens = {engine: server.external_tokens(engine) for engine in self._bytes}

    def bytes(self, engine: int) -> int:
        return self._status_of(self._server, engine).bytes - self._bytes[engine]

    def tokens(self, engine: int) -> float:
        """That vLLM counts as transferred."""
        return self._server.external_tokens(engine) - self._tokens[engine]

    def only_at(self, engine: int, tokens: int | None = None) -> None:
        """Of the whole prompt, where it has so many `tokens`."""
        # A sender counts what the receiver has acknowledged, which may come after the answer.
        until(lambda: self.bytes(engine) > 0, f"nothing was moved at engine {engine} of {self._server.name}")
        for other in self._bytes.keys() - {engine}:
            assert (self.bytes(other), self.tokens(other)) == (0, 0)
        # Of a whole prompt vLLM computes the last token in any case.
        assert tokens is None or self.tokens(engine) >= tokens - 1


#: Which engine prefills and which decodes; None: the server of one engine.
WAYS = [(0, None), (1, None), (None, 0), (None, 1), (0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.parametrize(("prefills", "decodes"), WAYS)
def test_the_engine_that_has_the_kv_is_asked(
    deployment: Deployment, pair: Pair, status_of: StatusOf, prefills: int | None, decodes: int | None
) -> None:
    # Broken in production: with data parallelism on either side nothing is transferred, or another engine's KV is.
    prefill = deployment.prefill if prefills is None else pair.prefill
    decode = deployment.decode if decodes is None else pair.decode
    prompt, more = prompts.BY_LENGTH[700], {"cache_salt": pair.salt()}
    params = prefill.complete(prompt, 1, engine=prefills, kv_transfer_params=dict(ASKED), **more)["kv_transfer_params"]
    if prefills is not None:
        port = pair.rendezvous_port + prefills
        assert (params["remote_port"], params["pd"]["ports"]) == (port, [port])
        assert params["remote_engine_id"].startswith("pd1:") and params["remote_engine_id"].endswith(f"_dp{prefills}:{port}")
    sent = Moved(prefill, status_of)
    received = Moved(decode, status_of)
    answer = decode.complete(prompt, prompts.MAX_TOKENS, engine=decodes, kv_transfer_params=params, **more)
    assert_right([harness.tokens_of(answer)], [deployment.expected(prompt)])
    received.only_at(decodes or 0, tokens=len(prompt))
    sent.only_at(prefills or 0)


def test_parameters_without_our_field_name_the_engine(
    deployment: Deployment, pair: Pair, status_of: StatusOf
) -> None:
    # Broken in production: a router that drops what it does not know has every request ask the first engine.
    prompt = prompts.BY_LENGTH[300]
    for lost in (("pd",), ("pd", "remote_engine_id")):
        more = {"cache_salt": pair.salt()}
        params = pair.prefill.complete(prompt, 1, engine=1, kv_transfer_params=dict(ASKED), **more)["kv_transfer_params"]
        params = {name: value for name, value in params.items() if name not in lost}
        received = Moved(pair.decode, status_of)
        answer = pair.decode.complete(prompt, prompts.MAX_TOKENS, engine=0, kv_transfer_params=params, **more)
        assert_right([harness.tokens_of(answer)], [deployment.expected(prompt)])
        received.only_at(0, tokens=len(prompt))


def test_eight_clients_whose_engines_vllm_chooses(deployment: Deployment, pair: Pair, status_of: StatusOf) -> None:
    # Broken in production: requests that run at the same time get another engine's KV.
    received = Moved(pair.decode, status_of)

    def complete(prompt: list[int]) -> list[int]:
        more = {"cache_salt": salt}
        params = pair.prefill.complete(prompt, 1, kv_transfer_params=dict(ASKED), **more)["kv_transfer_params"]
        return harness.tokens_of(pair.decode.complete(prompt, prompts.MAX_TOKENS, kv_transfer_params=params, **more))

    with ThreadPoolExecutor(8) as pool:
        for _ in range(2):
            salt = pair.salt()
            answers = list(pool.map(complete, prompts.CONCURRENT))
            assert_right(answers, [deployment.expected(prompt) for prompt in prompts.CONCURRENT])
    assert all(received.bytes(engine) > 0 for engine in ENGINES), "one engine did everything"


def test_vllm_router_that_chooses_the_engines(
    deployment: Deployment, pair: Pair, folder: Path, model: Path, status_of: StatusOf
) -> None:
    # Broken in production: the router remembers one engine's ports for all of them, and moves nothing, or waits.
    def command(servers: Servers, port: int) -> list[str]:
        told = ["--prefill", servers.prefill, "--decode", servers.decode]
        return [*vllm_router("nixl", port), *told, "--intra-node-data-parallel-size", str(len(ENGINES))]

    sent, received = Moved(pair.prefill, status_of), Moved(pair.decode, status_of)
    asked, salt = prompts.CONCURRENT[:6], pair.salt()
    servers = Servers(pair.prefill.url, pair.decode.url, pair.rendezvous_port, 0, 0, 0, model)
    process, url = Router("vllm-router, data parallel", command, ready_path="/health").start(servers, folder)
    try:
        # The first of each engine in turn, the others at once.
        for prompt in asked:
            body = harness.completion_body(prompt, prompts.MAX_TOKENS, cache_salt=salt)
            answer = harness.post(url + "/v1/completions", body)
            assert_right([harness.tokens_of(answer)], [deployment.expected(prompt)])
    finally:
        process.close()
    until(lambda: all(sent.bytes(engine) > 0 for engine in ENGINES), "one engine has prefilled everything")
    assert sum(received.tokens(engine) for engine in ENGINES) >= sum(map(len, asked)) - len(asked)
    assert all(received.tokens(engine) > 0 for engine in ENGINES), "one engine has decoded everything"


@pytest.mark.parametrize("decodes", ENGINES)
@pytest.mark.parametrize("named", ENGINES)
def test_a_router_that_names_an_engines_receivers(
    deployment: Deployment, pair: Pair, status_of: StatusOf, named: int, decodes: int
) -> None:
    # Broken in production: where vLLM gives a request to another engine than the router meant, that one waits for chunks that
    # never come, and the request fails.
    prompt, more = prompts.BY_LENGTH[512], {"cache_salt": pair.salt(), "kv_transfer_params": pair.spec(named)}
    received = Moved(pair.decode, status_of)
    answer = pair.prefill.complete(prompt, 1, engine=1 - named, **more)
    assert not (answer.get("kv_transfer_params") or {}).get("error"), answer
    # Were it waited for, the request would fail: that is this server's policy.
    answer = pair.decode.complete(prompt, prompts.MAX_TOKENS, engine=decodes, **more)
    if named == decodes:
        assert_right([harness.tokens_of(answer)], [deployment.expected(prompt)])
        received.only_at(named, tokens=len(prompt))
    else:
        assert harness.tokens_of(answer) == deployment.expected(prompt)
        received.only_at(named)
        assert received.tokens(named) == 0
        assert "this data-parallel rank has" in pair.decode.log()
        # They are there for whoever asks that engine for them.
        answer = pair.decode.complete(prompt, prompts.MAX_TOKENS, engine=named, **more)
        assert_right([harness.tokens_of(answer)], [deployment.expected(prompt)])
        received.only_at(named, tokens=len(prompt))


def test_a_daemon_of_the_second_engine_comes_back_where_it_was(deployment: Deployment, pair: Pair) -> None:
    # Broken in production: after a crash, the daemon of one engine takes the ports of another one's.
    daemons = [(server, int(server.daemon_ready(1)["pid"])) for server in (pair.prefill, pair.decode)]
    for server, pid in daemons:
        os.kill(pid, signal.SIGKILL)
        until(lambda: int(server.daemon_ready(1)["pid"]) != pid, f"the daemon of {server.name} is not started again")
    test_each_engine_has_ports_of_its_own(pair)
    prompt, more = prompts.BY_LENGTH[129], {"cache_salt": pair.salt()}
    params = pair.prefill.complete(prompt, 1, engine=1, kv_transfer_params=dict(ASKED), **more)["kv_transfer_params"]
    answer = pair.decode.complete(prompt, prompts.MAX_TOKENS, engine=1, kv_transfer_params=params, **more)
    assert_right([harness.tokens_of(answer)], [deployment.expected(prompt)])


@pytest.fixture(scope="module")
def external(folder: Path, model: Path, deployment: Deployment) -> Iterator[list[Server]]:
    """Prefill servers that are each one engine of the same group, by rank: an external load balancer chooses among them.

    vLLM does so with models of experts alone, whose parts it computes together, and lacks for that what it needs on a CPU
    (`all_gatherv`). So this model says that it has experts, and no layer has any: the weights are those of the others.
    """
    (weights,) = set(re.findall(r"'weights': '(\w+)'", deployment.prefill.log()))
    (rpc_port,), metrics_port = free_ports(1), free_ports_in_a_row(len(ENGINES))
    sets = {"pd_buffer_size": "64MiB", "transfer_channel": "local", "pd_metrics_port": metrics_port, "pd_push_ahead": False}
    arguments = ("--data-parallel-size", str(len(ENGINES)), "--data-parallel-rpc-port", str(rpc_port))
    arguments += ("--hf-overrides", '{"num_local_experts": 2}', "--num-gpu-blocks-override", "64", "--max-model-len", "6144")
    with ExitStack() as stack:
        servers = []
        for rank in ENGINES:
            kv = harness.producer(sets, weights_id=weights, kv_lease_duration=5)
            server = Server(f"dp_rank_{rank}", folder, model, kv=kv, args=(*arguments, "--data-parallel-rank", str(rank)))
            stack.callback(server.close)
            servers.append(server)
        for rank, server in enumerate(servers):
            server.wait_ready()
            assert server.daemons_ready().keys() == {rank}
            assert server.daemon_ready(rank)["metrics"] == f"http://127.0.0.1:{metrics_port + rank}/metrics"
        yield servers


@pytest.mark.parametrize("rank", ENGINES)
def test_ranks_behind_an_external_load_balancer(
    deployment: Deployment, pair: Pair, external: list[Server], status_of: StatusOf, rank: int
) -> None:
    # Broken in production: where each rank is a server, the second one does not start, or the first one's KV is asked for.
    prefill, other = external[rank], external[1 - rank]
    prompt, more = prompts.BY_LENGTH[700], {"cache_salt": pair.salt()}
    sent, others = Moved(prefill, status_of), Moved(other, status_of)
    params = prefill.complete(prompt, 1, kv_transfer_params=dict(ASKED), **more)["kv_transfer_params"]
    port = int(prefill.daemon_ready(rank)["rendezvous_port"])
    assert params["remote_port"] == port and params["remote_engine_id"].endswith(f"_dp{rank}:{port}")
    received = Moved(pair.decode, status_of)
    answer = pair.decode.complete(prompt, prompts.MAX_TOKENS, engine=1 - rank, kv_transfer_params=params, **more)
    assert_right([harness.tokens_of(answer)], [deployment.expected(prompt)])
    received.only_at(1 - rank, tokens=len(prompt))
    sent.only_at(rank)
    assert others.bytes(1 - rank) == 0
    wait_until_nothing_is_left(external, status_of)
