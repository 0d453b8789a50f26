"""Requests that are refused, given up or too large, and receivers that are not there: the next request does not notice."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import harness
import prompts
from answers import assert_right
from conftest import ENGINE, Deployment, StatusOf, wait_until_nothing_is_left
from harness import TOP, Process, Server, hang_up, until
from router_client import NoAnswer, Running, transferred
from router_processes import ROUTERS, Router, Servers

#: Of the receiver beside decode here, and what does not fit it.
SLOTS = 4
FILLING = prompts.BY_LENGTH[700]
TOO_LONG = [prompts.BY_LENGTH[1500], prompts.BY_LENGTH[3000]]
#: In turn and at once, in either dialect.
OURS = [router for router in ROUTERS if router.name.startswith("proxy.py")]


@pytest.fixture(scope="module")
def decode(deployment: Deployment, folder: Path, model: Path) -> Iterator[Server]:
    """Has room for one prompt, and does without KV that does not come."""
    init_port, alloc_port = harness.free_ports(2)
    sets = {
        "pd_buffer_size": f"{4 * SLOTS}MiB", "transfer_channel": ENGINE, "pd_peer_host": "127.0.0.1",
        "pd_peer_init_port": init_port, "pd_peer_alloc_port": alloc_port,
        # Of the tests here each would run into its client's time-out, if it waited for one of these.
        "pd_retention_sec": 3600, "pd_wait_timeout_sec": 3600,
    }
    args = ("--num-gpu-blocks-override", "64", "--max-model-len", "6144", "--enable-prompt-tokens-details")
    server = Server("busy_decode", folder, model, kv=harness.consumer(sets, policy="recompute"), args=args, tokenizer=True)
    try:
        server.wait_ready()
        yield server
    finally:
        server.close()


@pytest.fixture(autouse=True)
def nothing_kept(deployment: Deployment, decode: Server, status_of: StatusOf) -> Iterator[None]:
    """After each test no slot is held for anybody."""
    yield
    wait_until_nothing_is_left((deployment.prefill, decode), status_of)


@pytest.fixture(scope="module", params=OURS, ids=lambda router: router.name)
def running(request: pytest.FixtureRequest, deployment: Deployment, decode: Server, folder: Path, model: Path) -> Iterator[Running]:
    router: Router = request.param
    sender, receiver = deployment.prefill.daemon_ready(), decode.daemon_ready()
    servers = Servers(
        deployment.prefill.url, decode.url, int(sender["rendezvous_port"]), int(receiver["init_port"]), int(receiver["alloc_port"]),
        deployment.notify_port, model, deployment.bootstrap_port,
    )
    process, url = router.start(servers, folder)
    yield Running(router, url)
    process.close()


@pytest.mark.parametrize("overlap", [False, True], ids=["in turn", "at once"])
def test_a_receiver_that_is_not_there(
    deployment: Deployment, decode: Server, folder: Path, overlap: bool
) -> None:
    # Broken in production: what is found out after prefill's answer is told to nobody, and the client waits half a minute for an error.
    init_port, alloc_port, port = harness.free_ports(3)
    command = [sys.executable, str(TOP / "examples" / "proxy.py"), "--dialect", "lmcache", "--port", str(port)]
    command += ["--prefill", deployment.prefill.url, "--decode", f"{decode.url},127.0.0.1,{init_port},{alloc_port}"]
    command += ["--notify-port", str(deployment.notify_port), "--notify-timeout", "3600", *(["--overlap"] if overlap else [])]
    process = Process(command, folder / f"nobody_{overlap}.log", dict(os.environ))
    url = f"http://127.0.0.1:{port}"
    try:
        process.wait_healthy(url, 60)
        for prompt in (prompts.BY_LENGTH[129], prompts.BY_LENGTH[512]):
            body = harness.completion_body(prompt, prompts.MAX_TOKENS, cache_salt=f"nobody {overlap}")
            assert harness.tokens_of(harness.post(url + "/v1/completions", body)) == deployment.expected(prompt)
    finally:
        process.close()


@pytest.mark.parametrize("back", [False, True], ids=["at once", "when it is back"])
def test_a_receiver_that_ends_after_everything_was_sent(
    deployment: Deployment, decode: Server, status_of: StatusOf, back: bool
) -> None:
    # Broken in production: decode waits for receive_wait_s for chunks that have gone with the receiver before.
    prompt, salt = prompts.BY_LENGTH[512], f"ends after {back}"
    spec = deployment.sent(prompt, decode, cache_salt=salt)
    until(lambda: status_of(decode).slots_held > 0, "nothing has come")
    pid = decode.daemon_ready()["pid"]
    os.kill(int(pid), signal.SIGKILL)
    if back:
        until(lambda: decode.daemon_ready()["pid"] != pid, "it is not started again")
    params: dict[str, Any] = {**spec, "sent": True}
    answer = decode.complete(prompt, prompts.MAX_TOKENS, kv_transfer_params=params, cache_salt=salt)
    assert harness.tokens_of(answer) == deployment.expected(prompt)
    until(lambda: decode.daemon_ready()["pid"] != pid, "it is not started again")


def test_a_buffer_that_is_too_small_is_said_at_start(decode: Server) -> None:
    # Broken in production: nobody knows that long prompts cannot be moved, until they come.
    assert f"prompts of more than {SLOTS * prompts.CHUNK_TOKENS} tokens cannot be received" in decode.log()


def good(deployment: Deployment, running: Running, decode: Server) -> None:
    """A request that needs nearly all of the room gets it, and its KV comes from prefill."""
    with transferred(decode, FILLING):
        assert_right([running.ask(FILLING)], [deployment.expected(FILLING)])


def test_what_decode_refuses_holds_nothing(deployment: Deployment, running: Running, decode: Server) -> None:
    # Broken in production: a few requests that decode cannot take fill its receiver for five minutes, and every other one is an
    # error for so long.
    for number in range(4):
        with pytest.raises(NoAnswer):
            running.ask(prompts.tokens(f"refused by decode {number}", 300), max_tokens=1_000_000)
        with pytest.raises(NoAnswer):  # By its form, of which vLLM tells no connector.
            running.ask(prompts.tokens(f"refused by form {number}", 300), n=0)
    good(deployment, running, decode)


def test_clients_that_hang_up_hold_nothing(
    deployment: Deployment, running: Running, decode: Server, status_of: StatusOf
) -> None:
    # Broken in production: ordinary clients that leave at any moment fill the receiver for five minutes.
    def prefills() -> bool:
        return status_of(deployment.prefill).requests_active > 0

    def has_come() -> bool:
        return status_of(decode).bytes > before

    for number in range(8):
        body = running.body(prompts.tokens(f"leaves {running.router.name} {number}", 600), max_tokens=200)
        before = status_of(decode).bytes
        hang_up(running.url, body, prefills if number % 2 else has_come)
    good(deployment, running, decode)


def test_a_prompt_that_is_larger_than_the_buffer_is_computed(deployment: Deployment, running: Running, decode: Server) -> None:
    # Broken in production: a prompt that decode could compute, as kv_load_failure_policy allows, is answered with an error or after
    # half a minute.
    for prompt in TOO_LONG:
        assert running.ask(prompt) == deployment.expected(prompt)
    good(deployment, running, decode)


def test_cached_tokens_are_those_that_prefill_had(deployment: Deployment, running: Running) -> None:
    # Broken in production: clients are billed for a cold prompt as if all of it had been cached.
    salt = running.salt()

    def cached(prompt: list[int]) -> int:
        body = running.body(prompt, max_tokens=2, cache_salt=salt)
        return harness.post(running.url + "/v1/completions", body)["usage"]["prompt_tokens_details"]["cached_tokens"]

    first, second = prompts.SHARING
    assert cached(first) == 0
    assert cached(second) == 512
