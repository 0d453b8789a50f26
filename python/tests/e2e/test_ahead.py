"""Routers that send no parameters: prefill pushes to the decode server that it knows, which looks. And NIXL's dialect to the same servers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

import harness
import prompts
from answers import assert_right
from conftest import Deployment
from harness import Server, until
from pd_backend import Status
from test_parked import prefilled

pytestmark = pytest.mark.usefixtures("nothing_left")

_numbers = itertools.count()


def counter(server: Server, name: str, label: str = "") -> float:
    """Of the daemon beside this server's only worker."""
    return harness.metric(server.daemon_ready()["metrics"], name, [label])


@pytest.fixture
def guessed(deployment: Deployment) -> Deployment:
    """Prefill takes `decode` for the server that is asked next: it was sent what was parked, twice in a row."""
    prompt = prompts.CONCURRENT[0]
    for _ in range(2):
        salt = f"guessed {next(_numbers)}"
        params = prefilled(deployment, prompt, cache_salt=salt)
        deployment.decode.complete(prompt, 1, kv_transfer_params=params, cache_salt=salt)
    return deployment


def complete(deployment: Deployment, prompt: list[int], **more: object) -> list[int]:
    """As such a router asks: one token of prefill, whose answer it drops, and then decode."""
    answer = deployment.prefill.complete(prompt, 1, **more)
    assert answer.get("kv_transfer_params") is None, "there is nothing to hand on"
    return harness.tokens_of(deployment.decode.complete(prompt, prompts.MAX_TOKENS, **more))


@pytest.mark.parametrize("count", prompts.LENGTHS)
def test_prompts_of_every_length_without_parameters(guessed: Deployment, count: int) -> None:
    # Broken in production: under routers that say nothing every prompt is computed twice.
    prompt = prompts.BY_LENGTH[count]
    salt = f"unsolicited {count}"
    before = guessed.decode.external_tokens()
    assert_right([complete(guessed, prompt, cache_salt=salt)], [guessed.expected(prompt)])
    assert guessed.decode.external_tokens() - before >= count - 1


def test_eight_clients_without_parameters(guessed: Deployment) -> None:
    # Broken in production: requests that run at the same time get each other's KV, or none.
    before = guessed.decode.external_tokens()
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(lambda prompt: complete(guessed, prompt, cache_salt="unsolicited"), prompts.CONCURRENT)
        )
    assert_right(answers, [guessed.expected(prompt) for prompt in prompts.CONCURRENT])
    assert guessed.decode.external_tokens() > before


def test_exchanged_chunks_show_without_parameters(guessed: Deployment) -> None:
    # Broken in production: the tests here, which would not notice chunks that arrive at each other's place.
    for prompt in prompts.OF_TWO_CHUNKS:
        salt = "unsolicited, exchanged"
        guessed.prefill.complete(prompt, 1, cache_salt=salt)
        answers = [
            harness.tokens_of(guessed.decode.complete(prompt, prompts.MAX_TOKENS, cache_salt=salt)),
            harness.tokens_of(guessed.decode.complete(prompts.next_of(prompt), prompts.MAX_TOKENS, cache_salt=salt)),
        ]
        right = [guessed.expected(prompt), guessed.expected(prompts.next_of(prompt))]
        assert answers != right, f"two chunks of the prompt of {len(prompt)} tokens were exchanged, and nothing shows it"


def test_what_was_pushed_ahead_is_not_sent_again(guessed: Deployment, status_of: Callable[[Server], Status]) -> None:
    # Broken in production: behind a router of NIXL's dialect every byte goes over the network twice.
    prompt = prompts.CONCURRENT[1]
    before = status_of(guessed.prefill).bytes
    pushed = counter(guessed.prefill, "pd_pushes_ahead_total", 'result="sent"')
    params = prefilled(guessed, prompt, cache_salt="once")
    until(lambda: counter(guessed.prefill, "pd_pushes_ahead_total", 'result="sent"') > pushed, "not pushed")
    sent = status_of(guessed.prefill).bytes - before
    assert sent > 0
    external = guessed.decode.external_tokens()
    answer = guessed.decode.complete(prompt, prompts.MAX_TOKENS, kv_transfer_params=params, cache_salt="once")
    assert_right([harness.tokens_of(answer)], [guessed.expected(prompt)])
    assert guessed.decode.external_tokens() - external >= len(prompt) - 1
    assert status_of(guessed.prefill).bytes - before == sent
    # And asked before all of it is there.
    params = prefilled(guessed, prompts.CONCURRENT[2], cache_salt="once")
    answer = guessed.decode.complete(
        prompts.CONCURRENT[2], prompts.MAX_TOKENS, kv_transfer_params=params, cache_salt="once"
    )
    assert_right([harness.tokens_of(answer)], [guessed.expected(prompts.CONCURRENT[2])])


def test_a_wrong_guess_is_right_and_counted(guessed: Deployment) -> None:
    # Broken in production: with a second decode server answers are wrong, or nobody sees what guesses cost.
    prompt = prompts.CONCURRENT[3]
    wrong = counter(guessed.prefill, "pd_wrong_guesses_total")
    params = prefilled(guessed, prompt, cache_salt="wrong")
    answer = guessed.small_decode.complete(
        prompt, prompts.MAX_TOKENS, kv_transfer_params=params, cache_salt="wrong"
    )
    assert_right([harness.tokens_of(answer)], [guessed.expected(prompt)])
    until(lambda: counter(guessed.prefill, "pd_wrong_guesses_total") == wrong + 1, "not counted")
