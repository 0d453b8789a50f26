"""Mooncake's dialect: both servers are told a `transfer_id`, and decode the address at which prefill says where it is."""

from __future__ import annotations

import itertools
import json
import os
import signal
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest

import harness
import prompts
from answering import answering, says, says_nothing, says_without_end
from answers import assert_right
from conftest import Deployment
from harness import HttpError, until
from router_client import transferred
from swapping import EXCHANGED

pytestmark = pytest.mark.usefixtures("nothing_left")

Ask = Callable[..., list[int]]

_numbers = itertools.count()


def engine_of(deployment: Deployment) -> dict[str, Any]:
    """What prefill answers of itself."""
    with urllib.request.urlopen(f"http://127.0.0.1:{deployment.bootstrap_port}/query", timeout=60) as answer:
        return json.loads(answer.read())["0"]


def params_of(deployment: Deployment) -> tuple[dict[str, Any], dict[str, Any]]:
    """What such a router sends to prefill, and to decode."""
    transfer_id = f"xfer-{next(_numbers)}"
    to_prefill = {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": transfer_id}
    to_decode = {
        "do_remote_decode": False, "do_remote_prefill": True, "transfer_id": transfer_id,
        "remote_bootstrap_addr": f"http://127.0.0.1:{deployment.bootstrap_port}",
        "remote_engine_id": engine_of(deployment)["engine_id"],
    }
    return to_prefill, to_decode


@pytest.fixture
def ask(deployment: Deployment) -> Ask:
    """Asks both servers at once, as vLLM's example proxy for Mooncake does."""

    def ask(prompt: list[int], **more: Any) -> list[int]:
        to_prefill, to_decode = params_of(deployment)
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(
                deployment.decode.complete, prompt, prompts.MAX_TOKENS, kv_transfer_params=to_decode, **more
            )
            prefilled = deployment.prefill.complete(prompt, 1, kv_transfer_params=to_prefill, **more)
            assert prefilled.get("kv_transfer_params") is None
            return harness.tokens_of(answer.result())

    return ask


def test_what_prefill_says_of_itself(deployment: Deployment) -> None:
    # Broken in production: a router of this dialect does not start, or decode asks at another port.
    port = deployment.prefill.daemon_ready()["rendezvous_port"]
    assert engine_of(deployment)["worker_addr"] == {"0": {"0": f"tcp://127.0.0.1:{port}"}}


@pytest.mark.parametrize("count", prompts.LENGTHS)
def test_prompts_of_every_length(deployment: Deployment, ask: Ask, count: int) -> None:
    # Broken in production: under routers of this dialect nothing is transferred, or what is transferred is wrong.
    prompt = prompts.BY_LENGTH[count]
    with transferred(deployment.decode, prompt):
        assert_right([ask(prompt, cache_salt=f"mooncake {count}")], [deployment.expected(prompt)])


def test_eight_clients(deployment: Deployment, ask: Ask) -> None:
    # Broken in production: requests that run at the same time get each other's KV, or wait for it.
    with transferred(deployment.decode, *prompts.CONCURRENT), ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda prompt: ask(prompt, cache_salt="mooncake eight"), prompts.CONCURRENT))
    assert_right(answers, [deployment.expected(prompt) for prompt in prompts.CONCURRENT])


def test_exchanged_chunks_show_in_the_tokens(deployment: Deployment, ask: Ask) -> None:
    # Broken in production: the tests here, which would not notice chunks that arrive at each other's place.
    prompt, salt = prompts.OF_TWO_CHUNKS[0], f"mooncake, {EXCHANGED}"
    both = [prompt, prompts.next_of(prompt)]
    with transferred(deployment.decode, prompt):
        answers = [ask(asked, cache_salt=salt) for asked in both]
    assert answers != [deployment.expected(asked) for asked in both], "two chunks were exchanged, and nothing shows it"


def test_prefill_that_fails_is_waited_for_no_longer_than_it_has_to_be(deployment: Deployment) -> None:
    # Broken in production: with this dialect nobody tells decode that prefill has refused the request.
    prompt = prompts.CONCURRENT[3]
    _, to_decode = params_of(deployment)
    answer = deployment.small_decode.complete(
        prompt, prompts.MAX_TOKENS, kv_transfer_params=to_decode, cache_salt="mooncake, nobody"
    )
    assert harness.tokens_of(answer) == deployment.expected(prompt)


def test_parameters_that_cannot_be_followed(deployment: Deployment) -> None:
    # Broken in production: what a client writes into its request ends the engine, has it wait, or fills its log.
    prompt = prompts.CONCURRENT[2]
    to_prefill, to_decode = params_of(deployment)
    deployment.prefill.complete(prompt, 1, kv_transfer_params=to_prefill, cache_salt="mooncake bad")
    http_port, (nobody,) = deployment.prefill.port, harness.free_ports(1)
    with ExitStack() as stack:
        listening = [
            stack.enter_context(answering(answer))[0]
            for answer in (
                says("500 Internal Server Error"), says("200 OK", b"\x00garbage"), says("200 OK", b"x" * 4_000_000),
                says("302 Found", b"", f"Location: http://127.0.0.1:{deployment.bootstrap_port}/query"),
                says_nothing, says_without_end,
            )
        ]
        unlike: list[dict[str, Any]] = [
            {"remote_bootstrap_addr": f"http://127.0.0.1:{port}"} for port in (*listening, http_port, nobody)
        ]
        unlike += [
            {"remote_bootstrap_addr": address}
            for address in (7, None, "", {"a": 1}, "x" * 10_000, "file:///etc/passwd", "http://no.such.host.invalid:1")
        ]
        unlike += [{"transfer_id": name} for name in (7, "", None, ["x"], "x" * 10_000)]
        with ThreadPoolExecutor(4) as pool:
            answers = list(
                pool.map(
                    lambda number: deployment.decode.complete(
                        prompt, prompts.MAX_TOKENS, kv_transfer_params=to_decode | unlike[number],
                        cache_salt=f"mooncake bad {number}",
                    ),
                    range(len(unlike)),
                )
            )
    assert [harness.tokens_of(answer) for answer in answers] == [deployment.expected(prompt)] * len(unlike)
    said = [line for line in deployment.decode.log().splitlines() if "is computed here: " in line]
    assert len(said) >= len(unlike) and max(map(len, said)) < 1000
    # What names a service of another kind as the rendezvous port is refused by this server's policy, and computed by the other's.
    wrong = {"0": {"engine_id": "e", "worker_addr": {"0": {"0": f"tcp://127.0.0.1:{http_port}"}}}}
    with answering(says("200 OK", json.dumps(wrong).encode())) as (port, _):
        params = to_decode | {"remote_bootstrap_addr": f"http://127.0.0.1:{port}"}
        with pytest.raises(HttpError):
            deployment.decode.complete(prompt, 1, kv_transfer_params=params, cache_salt="mooncake port")
        answer = deployment.small_decode.complete(
            prompt, prompts.MAX_TOKENS, kv_transfer_params=params, cache_salt="mooncake port"
        )
        assert harness.tokens_of(answer) == deployment.expected(prompt)
    # An id of the engine that is not, or not any more, costs nothing.
    params = to_decode | {"remote_engine_id": "of before"}
    with transferred(deployment.decode, prompt):
        answer = deployment.decode.complete(
            prompt, prompts.MAX_TOKENS, kv_transfer_params=params, cache_salt="mooncake bad"
        )
    assert_right([harness.tokens_of(answer)], [deployment.expected(prompt)])


def test_prefills_daemon_begins_again_between_two_requests(deployment: Deployment, ask: Ask) -> None:
    # Broken in production: after a restart of prefill's daemon decode goes on asking for what is gone.
    prompt = prompts.CONCURRENT[5]
    ask(prompt, cache_salt="mooncake restart 0")
    pid = int(deployment.prefill.daemon_ready()["pid"])
    os.kill(pid, signal.SIGKILL)
    until(lambda: int(deployment.prefill.daemon_ready()["pid"]) != pid, "it is not started again")
    port = deployment.prefill.daemon_ready()["rendezvous_port"]
    assert engine_of(deployment)["worker_addr"] == {"0": {"0": f"tcp://127.0.0.1:{port}"}}
    with transferred(deployment.decode, prompt):
        assert_right([ask(prompt, cache_salt="mooncake restart 1")], [deployment.expected(prompt)])
