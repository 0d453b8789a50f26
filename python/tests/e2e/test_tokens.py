"""Disaggregated runs answer with the tokens of one instance, or not at all. Real vLLM servers, greedy."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

import harness
import prompts
from answers import MARGIN_MIN, assert_right
from conftest import Deployment
from harness import HttpError, Server, hang_up, until
from pd_backend import ReceiverClient, RequestRefused, Status

pytestmark = pytest.mark.usefixtures("nothing_left")


def metric(server: Server, name: str) -> float:
    """Sum of one of vLLM's own metrics."""
    return harness.metric(server.url + "/metrics", name)


@pytest.mark.parametrize("count", prompts.LENGTHS)
def test_prompts_of_every_length(deployment: Deployment, count: int) -> None:
    # Broken in production: answers that are wrong, or wrong at a boundary of blocks, chunks or prefill steps.
    prompt = prompts.BY_LENGTH[count]
    before = metric(deployment.decode, "vllm:external_prefix_cache_hits_total")
    assert_right([deployment.complete(prompt, deployment.decode)], [deployment.expected(prompt)])
    # The KV came from prefill: decode has not computed it by itself.
    assert metric(deployment.decode, "vllm:external_prefix_cache_hits_total") - before == count


def asked_next(deployment: Deployment, prompt: list[int], **more: str) -> list[int]:
    """What decode answers to the next prompt, of which it has the first chunk since it has answered this one."""
    before = metric(deployment.decode, "vllm:prefix_cache_hits_total")
    answer = deployment.decode.complete(prompts.next_of(prompt), prompts.MAX_TOKENS, **more)
    assert metric(deployment.decode, "vllm:prefix_cache_hits_total") - before == prompts.CHUNK_TOKENS
    return harness.tokens_of(answer)


def test_the_next_prompt_begins_with_loaded_blocks(deployment: Deployment) -> None:
    # Broken in production: a conversation's next turn is answered from blocks that are not those of its beginning.
    for prompt in prompts.OF_TWO_CHUNKS[:3]:
        deployment.complete(prompt, deployment.decode)
        assert_right([asked_next(deployment, prompt)], [deployment.expected(prompts.next_of(prompt))])


def test_exchanged_chunks_show_in_the_tokens(deployment: Deployment) -> None:
    # Broken in production: this test suite, which would not notice chunks that arrive at each other's place.
    for prompt in prompts.OF_TWO_CHUNKS:
        # The prompt's own answer need not show two whole chunks that are exchanged: attention goes by what is in a key,
        # its position included, and not by where the key lies. The next prompt has the first of them only.
        answer = deployment.complete(prompt, deployment.decode, cache_salt="exchanged")
        answers = [answer, asked_next(deployment, prompt, cache_salt="exchanged")]
        right = [deployment.expected(prompt), deployment.expected(prompts.next_of(prompt))]
        assert answers != right, f"two chunks of the prompt of {len(prompt)} tokens were exchanged, and nothing shows it"


def test_a_shared_beginning_is_sent_once(deployment: Deployment, status_of: Callable[[Server], Status]) -> None:
    # Broken in production: a system prompt is sent again with every request.
    sent = []
    for prompt in prompts.SHARING:
        before = status_of(deployment.prefill).bytes
        assert_right([deployment.complete(prompt, deployment.decode)], [deployment.expected(prompt)])
        until(lambda: status_of(deployment.prefill).requests_active == 0, "it is not sent")
        sent.append(status_of(deployment.prefill).bytes - before)
    token_bytes = 8 * 2 * 4 * 64 * 4
    assert sent == [768 * token_bytes, 256 * token_bytes]


def test_as_lmcaches_proxy_asks(deployment: Deployment, status_of: Callable[[Server], Status]) -> None:
    # Broken in production: LMCache's proxy names nothing to decode and appends prefill's token to the prompt; nothing
    # is found.
    prompt = prompts.FIRST_TOKEN
    spec = {"ret_first_tok": True, **deployment.spec(deployment.decode)}
    first = deployment.prefill.complete(prompt, 1, kv_transfer_params=spec)["kv_transfer_params"]["first_tok"]
    # Decode is asked once it is all across, and looks it up.
    until(lambda: status_of(deployment.prefill).requests_active == 0, "it is not sent")
    before = metric(deployment.decode, "vllm:external_prefix_cache_hits_total")
    answer = deployment.decode.complete([*prompt, first], prompts.MAX_TOKENS - 1)
    assert_right([harness.tokens_of(answer)], [deployment.expected(prompt)[1:]])
    assert first == deployment.expected(prompt)[0]
    assert metric(deployment.decode, "vllm:external_prefix_cache_hits_total") - before == len(prompt)
    # Nobody will ask for the request by its name: its chunks need not wait for that.
    with ReceiverClient(deployment.decode.daemon_ready()["connector"], map_buffer=False) as client:
        with pytest.raises(RequestRefused, match="was fetched already"):
            client.wait(spec["disagg_spec"]["req_id"], wait_s=5)


def test_a_decode_that_preempts(deployment: Deployment) -> None:
    # Broken in production: a request that lost its blocks to another one goes on with what is left in them.
    decode = deployment.small_decode
    before = metric(decode, "vllm:num_preemptions_total")
    # All of it is there before decode is asked, so that its requests run at the same time.
    specs = [deployment.sent(prompt, decode) for prompt in prompts.PREEMPTED]

    def ask(number: int) -> list[int]:
        asked = (prompts.PREEMPTED[number], prompts.PREEMPTED_MAX_TOKENS)
        return harness.tokens_of(decode.complete(*asked, kv_transfer_params=specs[number]))

    with ThreadPoolExecutor(len(specs)) as pool:
        answers = list(pool.map(ask, range(len(specs))))
    assert_right(answers, [deployment.expected(prompt, prompts.PREEMPTED_MAX_TOKENS) for prompt in prompts.PREEMPTED])
    assert metric(decode, "vllm:num_preemptions_total") > before


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
        until(lambda: status_of(decode).waits == len(specs), "decode has not asked for all of them")
        errors = list(pool.map(compute, reversed(range(len(specs)))))
        answers = [answer.result() for answer in asked]
    assert_right(answers, [deployment.expected(prompt) for prompt in prompts.SCARCE])
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
    decode, prefill = deployment.decode, deployment.prefill
    # Nothing is sent under this name: decode waits until its client goes.
    body = harness.completion_body(prompts.ABORTED, 5, kv_transfer_params=deployment.spec(decode))
    hang_up(decode.url, body, lambda: status_of(decode).waits == 1)
    # Prefill has just begun with these 5000 tokens when its client goes.
    body = harness.completion_body(prompts.ABORTED, 1, kv_transfer_params=deployment.spec(decode))
    hang_up(prefill.url, body, lambda: status_of(prefill).requests_active == 1)


def test_two_samples_of_a_request(deployment: Deployment) -> None:
    # Broken in production: the second sample finds its chunks handed out to the first one, and fails.
    # Short enough for one step: vLLM's servers on the CPU end where a prompt with a seed takes two.
    prompt, given = prompts.tokens("two samples", 200), {"temperature": 1.0, "seed": 7}
    spec = deployment.sent(prompt, deployment.decode, **given)
    alone, across = (
        [choice["token_ids"] for choice in server.complete(prompt, 4, n=2, **given, **more)["choices"]]
        for server, more in (
            (deployment.prefill, {"cache_salt": "two samples"}), (deployment.decode, {"kv_transfer_params": spec})
        )
    )
    assert_right(across, alone)
    assert alone[0] != alone[1]


def test_log_probabilities_of_a_prompt(deployment: Deployment) -> None:
    # Broken in production: decode needs the prompt's activations for these, and takes the KV without them; or it
    # computes the prompt, and keeps the chunks that it does not take for good.
    prompt = prompts.tokens("log probabilities", 300)
    spec = deployment.sent(prompt, deployment.decode)
    alone, across = (
        [found[str(token)]["logprob"] for token, found in zip(prompt[1:], choice["prompt_logprobs"][1:], strict=True)]
        for choice in (
            server.complete(prompt, 1, prompt_logprobs=0, **more)["choices"][0]
            for server, more in (
                (deployment.prefill, {"cache_salt": "by itself"}), (deployment.decode, {"kv_transfer_params": spec})
            )
        )
    )
    assert across == pytest.approx(alone, abs=MARGIN_MIN)


def test_a_receiver_that_dies_fails_its_requests_or_has_them_computed(
    deployment: Deployment, status_of: Callable[[Server], Status]
) -> None:
    # Broken in production: decode hangs with its receiver, answers from empty blocks, or never recovers.
    for number, decode in enumerate((deployment.decode, deployment.small_decode)):
        prompt = prompts.KILLED_RECEIVER[number]
        given = {"kv_transfer_params": deployment.spec(decode)}
        ready = decode.daemon_ready()
        pool = ThreadPoolExecutor(1)
        try:
            asked = pool.submit(decode.complete, prompt, prompts.MAX_TOKENS, **given)
            until(lambda: status_of(decode).waits == 1, "decode does not wait")
            os.kill(int(ready["pid"]), signal.SIGKILL)
            if decode is deployment.decode:
                with pytest.raises(HttpError) as failed:
                    asked.result(90)
                assert failed.value.status == 500
            else:
                assert harness.tokens_of(asked.result(90)) == deployment.expected(prompt)
        finally:
            pool.shutdown(wait=False)
        until(lambda: decode.daemon_ready()["pid"] != ready["pid"], "the receiver was not started again")
        # Where it was: routers need not be told.
        again = decode.daemon_ready()
        assert (again["init_port"], again["alloc_port"]) == (ready["init_port"], ready["alloc_port"])
        prompt = prompts.AFTER_KILL[number]
        assert_right([deployment.complete(prompt, decode)], [deployment.expected(prompt)])
