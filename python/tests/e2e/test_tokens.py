"""Disaggregated runs answer with the tokens of one instance, or not at all. Real vLLM servers, greedy."""

from __future__ import annotations

import json
import re
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

import harness
import prompts
from conftest import Deployment
from harness import HttpError, Server
from pd_backend import ReceiverClient, RequestRefused, Status

pytestmark = pytest.mark.usefixtures("nothing_left")


def metric(server: Server, name: str) -> float:
    """Sum of one of vLLM's own metrics."""
    with urllib.request.urlopen(server.url + "/metrics", timeout=20) as answer:
        text = answer.read().decode()
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if re.match(rf"{name}(\{{|\s)", line))


@pytest.mark.parametrize("count", prompts.LENGTHS)
def test_prompts_of_every_length(deployment: Deployment, count: int) -> None:
    # Broken in production: answers that are wrong, or wrong at a boundary of blocks, chunks or prefill steps.
    prompt = prompts.BY_LENGTH[count]
    before = metric(deployment.decode, "vllm:external_prefix_cache_hits_total")
    assert deployment.complete(prompt, deployment.decode) == deployment.expected(prompt)
    # The KV came from prefill: decode has not computed it by itself.
    assert metric(deployment.decode, "vllm:external_prefix_cache_hits_total") - before == count


def test_misplaced_chunks_show_in_the_tokens(deployment: Deployment) -> None:
    # Broken in production: this test suite, which would not notice chunks that arrive at each other's place.
    swapped = deployment.complete(prompts.SWAPPED, deployment.decode, prefix="swap")
    assert swapped != deployment.expected(prompts.SWAPPED)


def test_a_shared_beginning_is_sent_once(deployment: Deployment, status_of: Callable[[Server], Status]) -> None:
    # Broken in production: a system prompt is sent again with every request.
    sent = []
    for prompt in prompts.SHARING:
        before = status_of(deployment.prefill).bytes
        assert deployment.complete(prompt, deployment.decode) == deployment.expected(prompt)
        sent.append(status_of(deployment.prefill).bytes - before)
    token_bytes = 8 * 2 * 4 * 64 * 2
    assert sent == [768 * token_bytes, 256 * token_bytes]


@pytest.fixture(params=["in turn", "overlap"])
def proxy_url(request: pytest.FixtureRequest, deployment: Deployment) -> str:
    """Of the example proxy, as it asks the two servers."""
    return deployment.proxy_url if request.param == "in turn" else deployment.overlap_url


def test_eight_clients_through_the_proxy(deployment: Deployment, proxy_url: str) -> None:
    # Broken in production: requests that run at the same time get each other's KV, or none.
    def ask(number: int) -> list[int]:
        prompt = prompts.CONCURRENT[number]
        body = harness.completion_body(prompt, prompts.MAX_TOKENS)
        return harness.tokens_of(harness.post(proxy_url + "/v1/completions", body))

    with ThreadPoolExecutor(8) as pool:
        for _ in range(2):
            answers = list(pool.map(ask, range(8)))
            assert answers == [deployment.expected(prompt) for prompt in prompts.CONCURRENT]


def test_the_proxy_streams(deployment: Deployment, proxy_url: str) -> None:
    # Broken in production: a client that asked for a stream gets its first token with the last one.
    prompt = prompts.CONCURRENT[1]
    body = harness.completion_body(prompt, prompts.MAX_TOKENS, stream=True)
    request = urllib.request.Request(
        proxy_url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    generated: list[int] = []
    with urllib.request.urlopen(request, timeout=120) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        for line in answer:
            if line.startswith(b"data: {"):
                generated += json.loads(line[6:])["choices"][0].get("token_ids") or []
    assert generated == deployment.expected(prompt)


def test_the_proxy_passes_errors_on(proxy_url: str) -> None:
    # Broken in production: a client's mistake is answered with 200, or with nothing.
    with pytest.raises(HttpError) as refused:
        harness.post(proxy_url + "/v1/completions", harness.completion_body([1] * 7000, 5))
    assert refused.value.status == 400 and "maximum" in refused.value.text
    with pytest.raises(HttpError) as refused:
        body = harness.completion_body([], 5) | {"prompt": [[1, 2], [3, 4]]}
        harness.post(proxy_url + "/v1/completions", body)
    assert refused.value.status == 400 and "2 prompts in one request" in refused.value.text


def test_a_client_of_the_proxy_that_hangs_up_ends_its_requests(
    deployment: Deployment, proxy_url: str, status_of: Callable[[Server], Status]
) -> None:
    # Broken in production: prefill computes and sends, and decode keeps blocks, for clients that have gone.
    before = status_of(deployment.prefill)
    with pytest.raises(OSError):
        # Of a length that both decode servers take, and that prefill computes for longer than this.
        body = harness.completion_body(prompts.ABORTED[:3500], 5)
        harness.post(proxy_url + "/v1/completions", body, timeout_s=0.4)
    deadline = time.monotonic() + 20
    # One that goes on is done in two seconds. Decode's part of it would be left behind.
    while (after := status_of(deployment.prefill)).requests_failed == before.requests_failed:
        assert after.requests_done == before.requests_done, "it was sent all the same"
        assert time.monotonic() < deadline, "prefill has not given it up"
        time.sleep(0.05)


def test_as_lmcaches_proxy_asks(deployment: Deployment) -> None:
    # Broken in production: LMCache's proxy names nothing to decode and appends prefill's token to the prompt; nothing
    # is found.
    prompt = prompts.FIRST_TOKEN
    spec = {"ret_first_tok": True, **deployment.spec(deployment.decode)}
    first = deployment.prefill.complete(prompt, 1, kv_transfer_params=spec)["kv_transfer_params"]["first_tok"]
    before = metric(deployment.decode, "vllm:external_prefix_cache_hits_total")
    answer = deployment.decode.complete([*prompt, first], prompts.MAX_TOKENS - 1)
    assert [first, *harness.tokens_of(answer)] == deployment.expected(prompt)
    assert metric(deployment.decode, "vllm:external_prefix_cache_hits_total") - before == len(prompt)
    # Nobody will ask for the request by its name: its chunks need not wait for that.
    with ReceiverClient(deployment.decode.daemon_ready()["connector"], map_buffer=False) as client:
        with pytest.raises(RequestRefused, match="was fetched already"):
            client.wait(spec["disagg_spec"]["req_id"], wait_s=5)


def test_a_decode_that_preempts(deployment: Deployment) -> None:
    # Broken in production: a request that lost its blocks to another one goes on with what is left in them.
    before = metric(deployment.small_decode, "vllm:num_preemptions_total")

    def ask(prompt: list[int]) -> list[int]:
        return deployment.complete(prompt, deployment.small_decode, prompts.PREEMPTED_MAX_TOKENS)

    with ThreadPoolExecutor(len(prompts.PREEMPTED)) as pool:
        answers = list(pool.map(ask, prompts.PREEMPTED))
    assert answers == [deployment.expected(prompt, prompts.PREEMPTED_MAX_TOKENS) for prompt in prompts.PREEMPTED]
    assert metric(deployment.small_decode, "vllm:num_preemptions_total") > before


def test_few_blocks_and_few_slots_are_no_deadlock(
    deployment: Deployment, status_of: Callable[[Server], Status]
) -> None:
    # Broken in production: requests that wait for slots hold all blocks, those that have the slots wait for blocks, and
    # both run into their deadlines.
    decode, prefill = deployment.small_decode, deployment.prefill
    before = status_of(decode)
    specs = [deployment.spec(decode) for _ in prompts.SCARCE]

    def ask(number: int) -> list[int]:
        return harness.tokens_of(
            decode.complete(prompts.SCARCE[number], prompts.MAX_TOKENS, kv_transfer_params=specs[number])
        )

    def compute(number: int) -> str | None:
        answer = prefill.complete(prompts.SCARCE[number], 1, kv_transfer_params=specs[number])
        return (answer.get("kv_transfer_params") or {}).get("error")

    with ThreadPoolExecutor(2 * len(specs)) as pool:
        asked = [pool.submit(ask, number) for number in range(len(specs))]
        # In the order in which decode gives blocks, and prefill slots in the other one.
        deadline = time.monotonic() + 20
        while status_of(decode).waits < len(specs):
            assert time.monotonic() < deadline, "decode has not asked for all of them"
            time.sleep(0.05)
        errors = list(pool.map(compute, reversed(range(len(specs)))))
        answers = [answer.result() for answer in asked]
    assert answers == [deployment.expected(prompt) for prompt in prompts.SCARCE]
    assert errors == [None] * len(specs)
    after = status_of(decode)
    assert (after.requests_failed, after.requests_done) == (before.requests_failed, before.requests_done + len(specs))


def test_another_prompt_under_the_same_name_is_not_answered(deployment: Deployment) -> None:
    # Broken in production: a router that confuses two requests gets an answer to the wrong prompt.
    sent, asked = prompts.OTHER_PROMPT
    spec = deployment.spec(deployment.decode)
    deployment.prefill.complete(sent, 1, kv_transfer_params=spec)
    with pytest.raises(HttpError) as failed:
        deployment.decode.complete(asked, prompts.MAX_TOKENS, kv_transfer_params=spec)
    assert failed.value.status == 500
    assert "prefill was given another prompt" in deployment.decode.log()
    # With the other policy the prompt is computed, and the answer is right.
    spec = deployment.spec(deployment.small_decode)
    deployment.prefill.complete(sent, 1, kv_transfer_params=spec)
    answer = deployment.small_decode.complete(asked, prompts.MAX_TOKENS, kv_transfer_params=spec)
    assert harness.tokens_of(answer) == deployment.expected(asked)


def test_clients_that_hang_up_leave_nothing(deployment: Deployment, status_of: Callable[[Server], Status]) -> None:
    # Broken in production: each client that gives up costs a slot, a lease or a waiting request for good.
    spec = deployment.spec(deployment.decode)
    with pytest.raises(OSError):
        # Nothing is sent under this name: decode waits until its client goes.
        deployment.decode.complete(prompts.ABORTED, 5, timeout_s=1.0, kv_transfer_params=spec)
    with pytest.raises(OSError):
        # 5000 tokens take longer than this: prefill is in the midst of them when its client goes.
        deployment.prefill.complete(
            prompts.ABORTED, 1, timeout_s=0.4, kv_transfer_params=deployment.spec(deployment.decode)
        )


def test_a_receiver_that_dies_fails_its_requests_or_has_them_computed(deployment: Deployment) -> None:
    # Broken in production: decode hangs with its receiver, answers from empty blocks, or never recovers.
    import os
    import signal

    for number, decode in enumerate((deployment.decode, deployment.small_decode)):
        prompt = prompts.KILLED_RECEIVER[number]
        spec = deployment.spec(decode)
        outcome: list[object] = []

        def ask(decode: Server = decode, prompt: list[int] = prompt, spec: dict[str, object] = spec) -> None:
            try:
                outcome.append(harness.tokens_of(decode.complete(prompt, prompts.MAX_TOKENS, kv_transfer_params=spec)))
            except HttpError as error:
                outcome.append(error.status)

        asking = threading.Thread(target=ask)
        asking.start()
        ready = decode.daemon_ready()
        time.sleep(1.0)
        os.kill(int(ready["pid"]), signal.SIGKILL)
        asking.join(90)
        assert not asking.is_alive()
        assert outcome == ([500] if decode is deployment.decode else [deployment.expected(prompt)])
        deadline = time.monotonic() + 30
        while decode.daemon_ready()["pid"] == ready["pid"]:
            assert time.monotonic() < deadline, "the receiver was not started again"
            time.sleep(0.1)
        # Where it was: routers need not be told.
        again = decode.daemon_ready()
        assert (again["init_port"], again["alloc_port"]) == (ready["init_port"], ready["alloc_port"])
        prompt = prompts.AFTER_KILL[number]
        assert deployment.complete(prompt, decode) == deployment.expected(prompt)
