"""A decode server that is asked for far more than it can do at once: everybody is served in the end, as one server would do it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import harness
import prompts
from answers import assert_right
from conftest import ENGINE, TOP, Deployment, StatusOf, wait_until_nothing_is_left
from harness import Process, Server, until
from test_parked import ASKED

CLIENTS = 36
MAX_TOKENS = 24
#: Those whose answers are known, asked last.
KNOWN = prompts.CONCURRENT[4:]

Ask = Callable[[list[int], str], dict[str, Any]]


@pytest.fixture(scope="module")
def busy(deployment: Deployment, folder: Path, model: Path) -> Iterator[Server]:
    """Decodes two requests at a time, and has 16 slots; each of the prompts here takes two or three."""
    init_port, alloc_port = harness.free_ports(2)
    sets = {
        "pd_buffer_size": "64MiB", "transfer_channel": ENGINE, "pd_retention_sec": 60, "pd_peer_host": "127.0.0.1",
        "pd_peer_init_port": init_port, "pd_peer_alloc_port": alloc_port,
    }
    blocks = ("--num-gpu-blocks-override", "64", "--max-model-len", "6144", "--max-num-seqs", "2")
    server = Server("busy_decode", folder, model, kv=harness.consumer(sets), args=blocks, tokenizer=True)
    with ExitStack() as stack:
        stack.callback(server.close)
        server.wait_ready()
        yield server


@pytest.fixture
def ask(deployment: Deployment, busy: Server, folder: Path, request: pytest.FixtureRequest) -> Iterator[Ask]:
    """Has a prompt answered as a router of this kind does it."""

    def decoded(prompt: list[int], salt: str, params: Any, **more: Any) -> dict[str, Any]:
        return busy.complete(prompt, MAX_TOKENS, 600, kv_transfer_params=params, cache_salt=salt, **more)

    def prefilled(prompt: list[int], salt: str, params: Any) -> dict[str, Any]:
        return deployment.prefill.complete(prompt, 1, 600, kv_transfer_params=params, cache_salt=salt)

    def in_turn(prompt: list[int], salt: str) -> dict[str, Any]:
        spec = deployment.spec(busy, "in-turn")
        prefilled(prompt, salt, spec)
        return decoded(prompt, salt, spec)

    def overlapped(prompt: list[int], salt: str) -> dict[str, Any]:
        spec = deployment.spec(busy, "overlapped")
        prefilling = threading.Thread(target=prefilled, args=(prompt, salt, spec))
        prefilling.start()
        try:
            return decoded(prompt, salt, spec)
        finally:
            prefilling.join()

    def parked(prompt: list[int], salt: str) -> dict[str, Any]:
        params = prefilled(prompt, salt, dict(ASKED))["kv_transfer_params"]
        assert params, "it is parked, or waits to be"
        return decoded(prompt, salt, params)

    ways: dict[str, Ask] = {"in turn": in_turn, "overlapped": overlapped, "NIXL's": parked}
    if request.param in ways:
        yield ways[request.param]
        return
    # Asks both at once from the second request on, as vllm-router does.
    (port,) = harness.free_ports(1)
    command = [sys.executable, str(TOP / "examples" / "proxy.py"), "--port", str(port)]
    command += ["--prefill", deployment.prefill.url, "--decode", busy.url]
    proxy = Process(command, folder / "busy_proxy.log", dict(os.environ))
    try:
        proxy.wait_healthy(f"http://127.0.0.1:{port}", 60)
        body = harness.completion_body
        yield lambda prompt, salt: harness.post(
            f"http://127.0.0.1:{port}/v1/completions", body(prompt, MAX_TOKENS, cache_salt=salt), 600
        )
    finally:
        proxy.close()


@pytest.mark.parametrize("ask", ["in turn", "overlapped", "NIXL's", "NIXL's, pushed"], indirect=True)
def test_everybody_is_served_by_a_decode_server_that_is_busy(
    deployment: Deployment, busy: Server, status_of: StatusOf, ask: Ask, request: pytest.FixtureRequest
) -> None:
    # Broken in production: of 36 clients 15 get an error, because the decode server had other clients before them.
    name = request.node.name
    before = busy.external_tokens()
    asked = [prompts.tokens(f"busy {number}", 500) for number in range(CLIENTS - len(KNOWN))] + KNOWN
    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(lambda prompt: harness.tokens_of(ask(prompt, name)), asked))
    assert {len(answer) for answer in answers} == {MAX_TOKENS}
    right = [deployment.expected(prompt) for prompt in KNOWN]
    assert_right([answer[: prompts.MAX_TOKENS] for answer in answers[-len(KNOWN) :]], right)
    # Nobody was answered by computing it there.
    assert busy.external_tokens() - before >= sum(len(prompt) - 1 for prompt in asked)
    wait_until_nothing_is_left((deployment.prefill, busy), status_of)


def test_an_operator_sees_the_transfer_in_vllms_own_metrics(
    deployment: Deployment, busy: Server, status_of: StatusOf
) -> None:
    # Broken in production: requests wait or fail for want of slots, and the graphs of neither server show it.
    tokens, length = 700, 700 * 8 * 2 * 4 * 64 * 4

    def seen(server: Server, name: str, *labels: str) -> float:
        return harness.metric(server.url + "/metrics", f"vllm:pd_{name}", labels)

    def moved(server: Server, direction: str) -> tuple[float, float]:
        label = f'direction="{direction}"'
        return seen(server, "tokens_total", label), seen(server, "bytes_total", label)

    def phase(server: Server, name: str) -> float:
        return seen(server, "phase_seconds_count", f'phase="{name}"')

    prefill = deployment.prefill
    sent, received = moved(prefill, "sent"), moved(busy, "received")
    phases = phase(prefill, "commit"), phase(busy, "load")
    for number in range(2):
        prompt, spec = prompts.tokens(f"metrics {number}", tokens), deployment.spec(busy, "metrics")
        prefill.complete(prompt, 1, kv_transfer_params=spec)
        busy.complete(prompt, MAX_TOKENS, kv_transfer_params=spec)

    def stepped(server: Server) -> None:
        """Figures of the daemon itself are asked for between steps, once in a second."""
        server.complete([5, 6, 7], 2)

    def are_moved() -> bool:
        stepped(prefill)
        now = moved(prefill, "sent"), moved(busy, "received")
        return [now[0][0] - sent[0], now[1][0] - received[0]] == [2 * tokens] * 2 and now[0][1] - sent[1] >= 2 * length

    until(are_moved, "other tokens and bytes are shown than were moved")
    assert moved(busy, "received")[1] - received[1] >= 2 * length
    assert (phase(prefill, "commit"), phase(busy, "load")) == (phases[0] + 2, phases[1] + 2)
    # Where the daemon of the rank is, for Prometheus.
    for server in (prefill, busy):
        port = int(server.daemon_ready()["metrics"].rsplit(":", 1)[1].split("/")[0])

        def is_shown(server: Server = server, port: int = port) -> bool:
            stepped(server)
            return seen(server, "daemon_metrics_port", 'rank="0"') == port and seen(server, "daemon_up", 'rank="0"') == 1

        until(is_shown, "it is not said where the daemon's metrics are")
    assert seen(busy, "slots", 'rank="0"', 'state="available"') == 16
