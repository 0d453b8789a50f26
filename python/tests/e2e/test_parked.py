"""Requests as NIXL's routers send them: prefill is not told who decodes, and decode is told where to ask."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import harness
import prompts
from answers import assert_right
from conftest import Deployment
from harness import HttpError, Server, until
from pd_backend import Status

pytestmark = pytest.mark.usefixtures("nothing_left")

#: What such a router asks prefill with.
ASKED = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


def prefilled(deployment: Deployment, prompt: list[int], **more: Any) -> dict[str, Any]:
    """What prefill answers, which the router passes on as it is."""
    answer = deployment.prefill.complete(prompt, 1, kv_transfer_params=dict(ASKED), **more)
    return answer["kv_transfer_params"]


def complete(deployment: Deployment, prompt: list[int], decode: Server, **more: Any) -> list[int]:
    params = prefilled(deployment, prompt, **more)
    return harness.tokens_of(decode.complete(prompt, prompts.MAX_TOKENS, kv_transfer_params=params, **more))


@pytest.mark.parametrize("count", prompts.LENGTHS)
def test_prompts_of_every_length(deployment: Deployment, count: int) -> None:
    # Broken in production: under most routers nothing is transferred, or what is transferred is wrong.
    prompt = prompts.BY_LENGTH[count]
    salt = f"parked {count}"  # What decode has of it from other tests does not count.
    before = deployment.decode.external_tokens()
    assert_right(
        [complete(deployment, prompt, deployment.decode, cache_salt=salt)], [deployment.expected(prompt)]
    )
    # Of a whole prompt vLLM computes the last token in any case.
    assert deployment.decode.external_tokens() - before >= count - 1


def test_what_prefill_answers(deployment: Deployment) -> None:
    # Broken in production: a router, or vLLM itself, reads a field that is not there.
    params = prefilled(deployment, prompts.CONCURRENT[0])
    assert (params["do_remote_prefill"], params["do_remote_decode"]) == (True, False)
    assert params["remote_block_ids"][0] and all(isinstance(block, int) for block in params["remote_block_ids"][0])
    assert params["remote_request_id"].startswith("cmpl-") and params["remote_num_tokens"] == len(prompts.CONCURRENT[0])
    assert params["remote_port"] == int(deployment.prefill.daemon_ready()["rendezvous_port"])
    assert (params["tp_size"], params["remote_host"]) == (1, "127.0.0.1")
    harness.tokens_of(deployment.decode.complete(prompts.CONCURRENT[0], 1, kv_transfer_params=params))


def test_exchanged_chunks_show_in_the_tokens(deployment: Deployment) -> None:
    # Broken in production: the tests here, which would not notice chunks that arrive at each other's place.
    for prompt in prompts.OF_TWO_CHUNKS:
        params = prefilled(deployment, prompt, cache_salt="parked, exchanged")
        more = {"kv_transfer_params": params, "cache_salt": "parked, exchanged"}
        answers = [
            harness.tokens_of(deployment.decode.complete(prompt, prompts.MAX_TOKENS, **more)),
            harness.tokens_of(
                deployment.decode.complete(prompts.next_of(prompt), prompts.MAX_TOKENS, cache_salt="parked, exchanged")
            ),
        ]
        right = [deployment.expected(prompt), deployment.expected(prompts.next_of(prompt))]
        assert answers != right, f"two chunks of the prompt of {len(prompt)} tokens were exchanged, and nothing shows it"


def test_eight_clients(deployment: Deployment) -> None:
    # Broken in production: requests that run at the same time get each other's KV.
    with ThreadPoolExecutor(8) as pool:
        for turn in range(2):
            answers = list(
                pool.map(
                    lambda prompt: complete(deployment, prompt, deployment.decode, cache_salt=f"eight {turn}"),
                    prompts.CONCURRENT,
                )
            )
            assert_right(answers, [deployment.expected(prompt) for prompt in prompts.CONCURRENT])


def test_parameters_that_routers_rebuild(deployment: Deployment) -> None:
    # Broken in production: a router that drops the fields it does not know moves nothing, or the wrong request's KV.
    prompt = prompts.CONCURRENT[2]
    for number, rebuilt in enumerate(
        [
            lambda params: {name: params[name] for name in params if name not in ("pd", "remote_block_ids")},
            lambda params: params | {"pd": {"ports": "garbage"}, "remote_port": str(params["remote_port"])},
            lambda params: params | {"pd": None, "remote_engine_id": "another", "remote_request_id": "anybody's"},
            lambda params: {k: v for k, v in params.items() if k != "remote_request_id"},
        ]
    ):
        salt = f"rebuilt {number}"
        before = deployment.decode.external_tokens()
        params = rebuilt(prefilled(deployment, prompt, cache_salt=salt))
        answer = deployment.decode.complete(prompt, prompts.MAX_TOKENS, kv_transfer_params=params, cache_salt=salt)
        assert_right([harness.tokens_of(answer)], [deployment.expected(prompt)])
        assert deployment.decode.external_tokens() - before >= len(prompt) - 1, f"{number}: nothing was transferred"


def test_parameters_that_cannot_be_followed(deployment: Deployment) -> None:
    # Broken in production: what a client writes into its request ends the engine, or is waited for.
    prompt = prompts.CONCURRENT[3]
    good = prefilled(deployment, prompt, cache_salt="bad")
    unlike: list[dict[str, Any]] = [
        {"remote_host": 7}, {"remote_host": None}, {"remote_host": "h" * 10000}, {"tp_size": 2},
        {"pd": None, "remote_engine_id": None, "remote_port": None},
        {"pd": None, "remote_engine_id": None, "remote_port": 70000},
    ]
    for change in unlike:
        params = good | change
        answer = deployment.decode.complete(prompt, prompts.MAX_TOKENS, kv_transfer_params=params, cache_salt="other")
        assert_right([harness.tokens_of(answer)], [deployment.expected(prompt)])
    # Ports of another service, or of nobody: refused by the policy of this server, and computed by the other's.
    for port in (int(deployment.prefill.url.rsplit(":", 1)[1]), 1):
        params = good | {"pd": None, "remote_engine_id": None, "remote_port": port}
        with pytest.raises(HttpError):
            deployment.decode.complete(prompt, 1, kv_transfer_params=params, cache_salt="port")
        answer = deployment.small_decode.complete(
            prompt, prompts.MAX_TOKENS, kv_transfer_params=params, cache_salt=f"port {port}"
        )
        assert_right([harness.tokens_of(answer)], [deployment.expected(prompt)])
    deployment.decode.complete(prompt, 1, kv_transfer_params=good, cache_salt="bad")


def test_a_request_that_decode_refuses_gives_its_chunks_back(
    deployment: Deployment, status_of: Callable[[Server], Status]
) -> None:
    # Broken in production: requests that decode cannot take fill prefill's buffer until their leases end.
    prompt = prompts.CONCURRENT[4]
    params = prefilled(deployment, prompt, cache_salt="refused")
    until(lambda: status_of(deployment.prefill).slots_parked > 0, "nothing is parked")
    with pytest.raises(HttpError) as refused:
        deployment.decode.complete(prompt, 1_000_000, kv_transfer_params=params)
    assert refused.value.status == 400
    until(lambda: status_of(deployment.prefill).slots_parked == 0, "it is kept", timeout_s=20)


def test_prefill_begins_again_between_two_requests(
    deployment: Deployment, status_of: Callable[[Server], Status]
) -> None:
    # Broken in production: after a restart of prefill's daemon decode asks the one that is gone for ever.
    prompt = prompts.CONCURRENT[5]
    params = prefilled(deployment, prompt, cache_salt="restart")
    pid = int(deployment.prefill.daemon_ready()["pid"])
    os.kill(pid, signal.SIGKILL)
    answer = deployment.small_decode.complete(
        prompt, prompts.MAX_TOKENS, kv_transfer_params=params, cache_salt="restart"
    )
    assert_right([harness.tokens_of(answer)], [deployment.expected(prompt)])
    until(lambda: int(deployment.prefill.daemon_ready()["pid"]) != pid, "it is not started again")
    answers = [complete(deployment, prompt, deployment.decode, cache_salt="restarted")]
    assert_right(answers, [deployment.expected(prompt)])
