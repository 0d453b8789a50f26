"""Two workers at both ends, each with a daemon of its own: the tokens of one server, or an error that says why."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import harness
import prompts
from answers import assert_right, right_answer
from conftest import TOP, StatusOf, wait_until_nothing_is_left
from free_ports import free_ports_in_a_row
from harness import BLOCK_TOKENS, Process, Server, hang_up, runs, until
from pd_backend import Daemon, find_binary
from pd_backend.vllm.layout import EngineLayout
from test_parked import ASKED
from test_tokens import metric

RANKS = (0, 1)
#: Of a block of all layers at one rank: 8 layers, K and V, two of the four heads, 64 elements of four bytes.
BLOCK_BYTES = BLOCK_TOKENS * 8 * 2 * 2 * 64 * 4


@dataclass
class Pair:
    """A prefill and a decode server of two ranks each."""

    prefill: Server
    #: Computes requests whose KV cannot be loaded.
    decode: Server
    notify_port: int
    #: Of prefill's first rank.
    rendezvous_port: int
    _numbers: Iterator[int]

    @property
    def ports(self) -> tuple[list[int], list[int]]:
        """Of the receivers, by rank: of the handshake, of allocations."""
        ready = [self.decode.daemon_ready(rank) for rank in RANKS]
        return [int(of["init_port"]) for of in ready], [int(of["alloc_port"]) for of in ready]

    def spec(self, init_ports: list[int] | None = None, alloc_ports: list[int] | None = None) -> dict[str, Any]:
        """`kv_transfer_params` of a new request."""
        init, alloc = self.ports
        return {
            "disagg_spec": {
                "req_id": f"tp-{next(self._numbers)}",
                "receiver_host": "127.0.0.1",
                "receiver_init_port": init if init_ports is None else init_ports,
                "receiver_alloc_port": alloc if alloc_ports is None else alloc_ports,
            }
        }

    def expected(self, prompt: list[int]) -> list[int]:
        """What a server of this size answers by itself, from blocks that it shares with no other request."""
        salt = f"by itself {next(self._numbers)}"
        return right_answer(self.prefill, prompt, prompts.MAX_TOKENS, cache_salt=salt)

    def complete(self, prompt: list[int]) -> list[int]:
        """Prefill, then decode."""
        spec = self.spec()
        answer = self.prefill.complete(prompt, 1, kv_transfer_params=spec)
        assert not (answer.get("kv_transfer_params") or {}).get("error"), answer
        return harness.tokens_of(self.decode.complete(prompt, prompts.MAX_TOKENS, kv_transfer_params=spec))

    def failed_loads(self) -> int:
        """How often a rank has said that it could not load what it was to."""
        return self.decode.log().count("was not loaded")

    def loaded_tokens(self) -> int:
        """Tokens that decode was to take from the receivers so far."""
        return int(metric(self.decode, "vllm:external_prefix_cache_hits_total"))


@pytest.fixture(scope="module")
def servers(folder: Path, model: Path) -> Iterator[Pair]:
    """Both, started together and taken down when this module ends."""
    *ports, notify_port = harness.free_ports(5)
    rendezvous_port = free_ports_in_a_row(len(RANKS))
    shared: dict[str, Any] = {"pd_buffer_size": "64MiB", "transfer_channel": "local", "pd_retention_sec": 60}
    sender = shared | {"pd_proxy_host": "127.0.0.1", "pd_proxy_port": notify_port}
    receiver = shared | {"pd_peer_host": "127.0.0.1", "pd_peer_init_port": ports[:2], "pd_peer_alloc_port": ports[2:]}
    blocks = ("--num-gpu-blocks-override", "64", "--max-model-len", "6144")
    chunked = ("--max-num-batched-tokens", "512", "--long-prefill-token-threshold", "256")
    with ExitStack() as stack:

        def start(name: str, kv: dict[str, Any], *args: str) -> Server:
            server = Server(name, folder, model, kv=kv, args=(*blocks, *args), tensor_parallel=2)
            stack.callback(server.close)
            return server

        prefill = start("tp_prefill", harness.producer(sender, rendezvous_port=rendezvous_port, kv_lease_duration=5), *chunked)
        decode = start("tp_decode", harness.consumer(receiver, policy="recompute", receive_wait_s=60, restarts_max=9))
        prefill.wait_ready()
        decode.wait_ready()
        assert decode.daemons_ready().keys() == prefill.daemons_ready().keys() == set(RANKS)
        daemons = []
        yield Pair(prefill, decode, notify_port, rendezvous_port, itertools.count())
        daemons = [int(server.daemon_ready(rank)["pid"]) for server in (prefill, decode) for rank in RANKS]
    # Broken in production: an engine that has gone leaves daemons behind, with their ports and their memory.
    until(lambda: not any(runs(pid) for pid in daemons), f"daemons have outlived their engines: {daemons}")


@pytest.fixture
def pair(servers: Pair, status_of: StatusOf) -> Iterator[Pair]:
    """Of which, after the test, no daemon holds anything for anybody."""
    yield servers
    wait_until_nothing_is_left((servers.prefill, servers.decode), status_of)


@pytest.fixture
def proxy(pair: Pair, folder: Path) -> Iterator[Callable[..., str]]:
    """Starts the example proxy, with ports of the receivers by rank, and returns its URL."""
    with ExitStack() as stack:

        def start(init_ports: list[int], alloc_ports: list[int], notify_timeout_s: int = 60) -> str:
            (port,) = harness.free_ports(1)
            init, alloc = ("+".join(map(str, ports)) for ports in (init_ports, alloc_ports))
            command = [sys.executable, str(TOP / "examples" / "proxy.py"), "--port", str(port)]
            command += ["--dialect", "lmcache", "--prefill", pair.prefill.url, "--decode", f"{pair.decode.url},127.0.0.1,{init},{alloc}"]
            command += ["--notify-port", str(pair.notify_port), "--notify-timeout", str(notify_timeout_s)]
            process = Process(command, folder / "tp_proxy.log", dict(os.environ))
            stack.callback(process.close)
            url = f"http://127.0.0.1:{port}"
            process.wait_healthy(url, 60)
            return url

        yield start


@pytest.mark.parametrize("count", [1, 100, 128, 256, 300, 700, 1500])
def test_prompts_of_every_kind(pair: Pair, status_of: StatusOf, count: int) -> None:
    # Broken in production: a rank gets the other one's heads, or none, and the answers are wrong.
    prompt = prompts.tokens(f"in two halves {count}", count)
    loaded, failed = pair.loaded_tokens(), pair.failed_loads()
    sent = [status_of(pair.prefill, rank).bytes for rank in RANKS]
    assert_right([pair.complete(prompt)], [pair.expected(prompt)])
    # The KV came from prefill, half of it from each rank.
    assert (pair.loaded_tokens() - loaded, pair.failed_loads() - failed) == (count, 0)
    blocks = -(-count // BLOCK_TOKENS)
    until(lambda: all_sent(pair, status_of), "it is not sent")
    assert [status_of(pair.prefill, rank).bytes - sent[rank] for rank in RANKS] == [blocks * BLOCK_BYTES] * 2


@pytest.mark.parametrize("lost", [(), ("pd", "remote_engine_id")], ids=["as it is", "rebuilt"])
def test_every_rank_is_asked_for_what_it_has_parked(pair: Pair, status_of: StatusOf, lost: tuple[str, ...]) -> None:
    # Broken in production: with a fixed port the second rank does not start; or decode's second rank asks the first one.
    prompt, salt = prompts.tokens("parked in two halves", 700), f"parked {lost}"
    # Once prefill knows who asks, it sends before it answers.
    before, sent = pair.decode.external_tokens(), [status_of(pair.prefill, rank).bytes for rank in RANKS]
    answer = pair.prefill.complete(prompt, 1, kv_transfer_params=dict(ASKED), cache_salt=salt)
    params = answer["kv_transfer_params"]
    assert params["pd"]["ports"] == [pair.rendezvous_port + rank for rank in RANKS]
    assert [int(pair.prefill.daemon_ready(rank)["rendezvous_port"]) for rank in RANKS] == params["pd"]["ports"]
    params = {name: value for name, value in params.items() if name not in lost}
    answer = pair.decode.complete(prompt, prompts.MAX_TOKENS, kv_transfer_params=params, cache_salt=salt)
    assert_right([harness.tokens_of(answer)], [pair.expected(prompt)])
    assert pair.decode.external_tokens() - before >= len(prompt) - 1
    for rank in RANKS:
        until(lambda: status_of(pair.prefill, rank).bytes > sent[rank], f"rank {rank} has sent nothing")


def test_clients_through_the_proxy(pair: Pair, proxy: Callable[..., str]) -> None:
    # Broken in production: requests at the same time get each other's KV, at one rank of two.
    url = proxy(*pair.ports)
    asked = [prompts.tokens(f"tensor parallel client {i}", 90 + 170 * i) for i in range(4)]
    loaded, failed = pair.loaded_tokens(), pair.failed_loads()

    def ask(prompt: list[int]) -> list[int]:
        body = harness.completion_body(prompt, prompts.MAX_TOKENS)
        return harness.tokens_of(harness.post(url + "/v1/completions", body))

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, asked))
    assert_right(answers, [pair.expected(prompt) for prompt in asked])
    assert (pair.loaded_tokens() - loaded, pair.failed_loads() - failed) == (sum(map(len, asked)), 0)


def test_a_prompt_of_which_one_rank_sends_nothing_is_computed(pair: Pair, proxy: Callable[..., str]) -> None:
    # Broken in production: a request goes on to decode as if it was across, when the first rank's KV is and the other's never will be.
    init_ports, alloc_ports = pair.ports
    # The second rank's sender is led to the first rank's receiver, which refuses it.
    url = proxy([init_ports[0]] * 2, [alloc_ports[0]] * 2, notify_timeout_s=60)
    before, external = pair.prefill.log().count("was not sent"), pair.decode.external_tokens()
    prompt = prompts.tokens("tensor parallel, half across", 300)
    answer = harness.post(url + "/v1/completions", harness.completion_body(prompt, prompts.MAX_TOKENS))
    assert_right([harness.tokens_of(answer)], [pair.expected(prompt)])
    assert pair.decode.external_tokens() == external, "it was taken for sent"
    until(lambda: pair.prefill.log().count("was not sent") > before, "nothing was refused")
    said = pair.prefill.log().rsplit("was not sent", 1)[1]
    assert re.search(r"layout_mismatch: receiver \S+: tp_rank is 1 at \S+ and 0 at ", said), said


def test_ports_in_the_wrong_order_are_refused(pair: Pair) -> None:
    # Broken in production: a router that lists the ranks' ports in another order gets answers from the wrong heads.
    init_ports, alloc_ports = pair.ports
    spec = pair.spec(init_ports[::-1], alloc_ports[::-1])
    answer = pair.prefill.complete(prompts.tokens("tensor parallel, crossed", 1500), 1, kv_transfer_params=spec)
    error = answer["kv_transfer_params"]["error"]
    assert re.search(r"layout_mismatch: receiver \S+: tp_rank is (0 at \S+ and 1|1 at \S+ and 0) at ", error), error


def test_too_few_ports_are_refused(pair: Pair) -> None:
    # Broken in production: a router that knows of one rank only ends the engine, or half of the KV goes nowhere.
    init_ports, alloc_ports = pair.ports
    spec = pair.spec(init_ports[:1], alloc_ports[:1])
    prompt = prompts.tokens("tensor parallel, one port", 300)
    error = pair.prefill.complete(prompt, 1, kv_transfer_params=spec)["kv_transfer_params"]["error"]
    assert f"receiver_init_port = [{init_ports[0]}]; expected 2 ports, one for each tensor-parallel rank" in error


def test_another_size_is_refused(pair: Pair, tmp_path: Path) -> None:
    # Broken in production: ranks of two sizes exchange KV of different heads.
    pattern = r"EngineLayout\(model='(.*?)', (.*), tp_rank=\d+, tp_size=2, engine=(\{.*?\})\)"
    said = re.search(pattern, pair.decode.log())
    assert said is not None
    numbers = {name: int(value) for name, value in (fact.split("=") for fact in said.group(2).split(", "))}
    facts = json.loads(said.group(3).replace("'", '"'))
    # As a decode server without tensor parallelism has it: all heads in each block.
    numbers["block_bytes"] *= 2
    facts["block_shape"] = str(numbers["block_bytes"])
    file = tmp_path / "layout.json"
    file.write_text(json.dumps(EngineLayout(model=said.group(1), engine=facts, **numbers).json()))
    arguments = ["--kv-layout", str(file)]
    for key in ("transfer_channel=local", "pd_buffer_size=16MiB", "pd_peer_init_port=0", "pd_peer_alloc_port=0"):
        arguments += ["--set", key]
    with Daemon(find_binary("pd-receiver"), arguments) as receiver:
        # The router gives each of our ranks a receiver: there is one.
        spec = pair.spec([receiver.ready.init_port or 0] * 2, [receiver.ready.alloc_port or 0] * 2)
        prompt = prompts.tokens("tensor parallel, another size", 1500)
        answer = pair.prefill.complete(prompt, 1, kv_transfer_params=spec)
    error = answer["kv_transfer_params"]["error"]
    assert re.search(r"layout_mismatch: receiver \S+: tp_size is 2 at \S+ and 1 at ", error), error


def test_clients_that_hang_up_leave_nothing(pair: Pair, status_of: StatusOf) -> None:
    # Broken in production: each client that gives up costs blocks, slots or a lease at one of the ranks.
    prompt = prompts.tokens("tensor parallel, aborted", 5000)
    # Nothing is sent under this name: decode waits until its client goes.
    body = harness.completion_body(prompt, 5, kv_transfer_params=pair.spec())
    hang_up(pair.decode.url, body, lambda: [status_of(pair.decode, rank).waits for rank in RANKS] == [1, 1])
    body = harness.completion_body(prompt, 1, kv_transfer_params=pair.spec())
    hang_up(pair.prefill.url, body, lambda: status_of(pair.prefill, 1).requests_active == 1)
    # All blocks are free again: this needs most of them.
    assert_right([pair.complete(prompt)], [pair.expected(prompt)])


def test_a_receiver_of_one_rank_that_dies(pair: Pair, status_of: StatusOf) -> None:
    # Broken in production: one rank has its KV and the other has not, and the answer is made of both.
    prompt, spec = prompts.tokens("tensor parallel, one killed", 5000), pair.spec()
    expected = pair.expected(prompt)
    given = {"kv_transfer_params": spec}
    pool = ThreadPoolExecutor(2)
    try:
        decoded = pool.submit(pair.decode.complete, prompt, prompts.MAX_TOKENS, **given)
        prefilled = pool.submit(pair.prefill.complete, prompt, 1, **given)
        until(lambda: status_of(pair.prefill, 1).requests_active == 1, "nothing is sent")
        ready = kill_receiver(pair, 1)
        assert harness.tokens_of(decoded.result(120)) == expected
        error = prefilled.result(120)["kv_transfer_params"]["error"]
    finally:
        pool.shutdown(wait=False)
    assert "peer_lost" in error
    assert f"request {spec['disagg_spec']['req_id']} was not loaded" in pair.decode.log()
    # Where it was: routers need not be told. And what comes next is loaded by both.
    again = receiver_again(pair, 1, ready)
    assert (again["init_port"], again["alloc_port"]) == (ready["init_port"], ready["alloc_port"])
    sent, failed = status_of(pair.prefill, 1).bytes, pair.failed_loads()
    prompt = prompts.tokens("tensor parallel, then", 400)
    assert_right([pair.complete(prompt)], [pair.expected(prompt)])
    until(lambda: all_sent(pair, status_of), "it is not sent")
    assert (status_of(pair.prefill, 1).bytes - sent, pair.failed_loads() - failed) == (4 * BLOCK_BYTES, 0)


def test_what_one_rank_has_lost_is_not_looked_up(pair: Pair, status_of: StatusOf) -> None:
    # Broken in production: a receiver comes back empty, and requests whose chunks the other rank has still fail, or
    # nothing is found any more.
    def prefilled(prompt: list[int]) -> list[int]:
        """As LMCache's proxy does it: the prompt with prefill's token, for decode."""
        spec = pair.spec() | {"ret_first_tok": True}
        first = pair.prefill.complete(prompt, 1, kv_transfer_params=spec)["kv_transfer_params"]["first_tok"]
        until(lambda: all_sent(pair, status_of), "it is not sent")
        return [*prompt, first]

    def decoded(asked: list[int]) -> list[int]:
        return harness.tokens_of(pair.decode.complete(asked, prompts.MAX_TOKENS - 1))

    lost, kept = (prompts.tokens(f"tensor parallel, {what}", 600) for what in ("lost", "kept"))
    asked = prefilled(lost)
    receiver_again(pair, 1, kill_receiver(pair, 1))
    # Its scheduler hears of it with any step.
    pair.decode.complete(prompts.tokens("tensor parallel, any", 5), 3)
    loaded, failed = pair.loaded_tokens(), pair.failed_loads()
    assert [asked[-1], *decoded(asked)] == pair.expected(lost)
    assert (pair.loaded_tokens(), pair.failed_loads()) == (loaded, failed)
    asked = prefilled(kept)
    assert_right([decoded(asked)], [pair.expected(kept)[1:]])
    assert (pair.loaded_tokens() - loaded, pair.failed_loads()) == (len(kept), failed)


def all_sent(pair: Pair, status_of: StatusOf) -> bool:
    """Whether no rank has anything under way."""
    return all(status_of(pair.prefill, rank).requests_active == 0 for rank in RANKS)


def kill_receiver(pair: Pair, rank: int) -> dict[str, str]:
    """Without a warning. Returns its ready line."""
    ready = pair.decode.daemon_ready(rank)
    os.kill(int(ready["pid"]), signal.SIGKILL)
    return ready


def receiver_again(pair: Pair, rank: int, before: dict[str, str]) -> dict[str, str]:
    """The ready line of the one that was started after it."""
    until(lambda: pair.decode.daemon_ready(rank)["pid"] != before["pid"], "the receiver was not started again")
    return pair.decode.daemon_ready(rank)
