"""Routers that people run, and our own, in front of the shared servers: each speaks its dialect as it is."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import prompts
from answers import assert_right
from conftest import Deployment
from harness import Server, hang_up, until
from pd_backend import Status
from router_client import NoAnswer, Running, answers_in, transferred, words
from router_processes import ROUTERS, Servers
from swapping import EXCHANGED

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture(scope="module", params=ROUTERS, ids=lambda router: router.name)
def running(request: pytest.FixtureRequest, deployment: Deployment, folder: Path, model: Path) -> Iterator[Running]:
    sender, receiver = deployment.prefill.daemon_ready(), deployment.decode.daemon_ready()
    servers = Servers(
        deployment.prefill.url, deployment.decode.url, int(sender["rendezvous_port"]), int(receiver["init_port"]),
        int(receiver["alloc_port"]), deployment.notify_port, model, deployment.bootstrap_port,
    )
    process, url = request.param.start(servers, folder)
    yield Running(request.param, url)
    process.close()


def test_completion(deployment: Deployment, running: Running) -> None:
    # Broken in production: under a router that people use nothing is moved, and prefill is computed twice.
    for prompt in prompts.CONCURRENT[:4]:
        # Where prefill pushes, the first in turn and the others at once.
        with transferred(deployment.decode, prompt):
            assert_right([running.ask(prompt)], [deployment.expected(prompt)])


def test_chat(deployment: Deployment, running: Running) -> None:
    # Broken in production: chats are computed twice, or answered from the KV of something else.
    prompt = prompts.CONCURRENT[4]
    for stream in (False, True):
        body = running.body(prompt, messages=[{"role": "user", "content": words(prompt)}], stream=stream)
        del body["prompt"]
        with transferred(deployment.decode, prompt):
            assert_right(running.answers("/v1/chat/completions", body), [deployment.expected(prompt)])


def test_streaming(deployment: Deployment, running: Running) -> None:
    # Broken in production: a stream that breaks off, or comes with its last token.
    prompt = prompts.CONCURRENT[3]
    content = json.dumps(running.body(prompt, stream=True)).encode()
    request = urllib.request.Request(running.url + "/v1/completions", content, {"Content-Type": "application/json"})
    with transferred(deployment.decode, prompt), urllib.request.urlopen(request, timeout=120) as answer:
        lines = [line.decode() for line in answer]
    pieces = [line for line in lines if line.startswith("data: {")]
    assert len(pieces) > 3 and lines[-1] in ("\n", "data: [DONE]\n"), lines[-2:]
    assert_right(answers_in("".join(lines)), [deployment.expected(prompt)])


def test_two_samples(deployment: Deployment, running: Running) -> None:
    # Broken in production: the second sample finds its chunks given to the first one, and is computed, or fails.
    # As short as test_two_samples_of_a_request says.
    prompt, given = prompts.tokens("two samples", 200), {"temperature": 1.0, "seed": 7, "n": 2}
    alone = deployment.prefill.complete(prompt, 4, cache_salt=running.salt("alone"), **given)
    alone = [choice["token_ids"] for choice in alone["choices"]]
    with transferred(deployment.decode, prompt):
        body = running.body(prompt, max_tokens=4, stream=running.router.samples_in_streams, **given)
        assert_right(running.answers("/v1/completions", body), alone)
    assert alone[0] != alone[1]


def test_two_prompts(deployment: Deployment, running: Running) -> None:
    # Broken in production: of a list the second prompt is given the first one's KV, whose parameters all of them get.
    asked = prompts.CONCURRENT[2:4]
    body = running.body([], stream=running.router.samples_in_streams) | {"prompt": [words(prompt) for prompt in asked]}
    with transferred(deployment.decode, *asked):
        assert_right(running.answers("/v1/completions", body), [deployment.expected(prompt) for prompt in asked])


def test_eight_clients(deployment: Deployment, running: Running) -> None:
    # Broken in production: requests that run at the same time get each other's KV, or wait for it.
    with transferred(deployment.decode, *prompts.CONCURRENT), ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(running.ask, prompts.CONCURRENT))
    assert_right(answers, [deployment.expected(prompt) for prompt in prompts.CONCURRENT])


def test_exchanged_chunks(deployment: Deployment, running: Running) -> None:
    # Broken in production: the tests here, which would not notice chunks that arrive at each other's place.
    for prompt in prompts.OF_TWO_CHUNKS[-2:]:
        salt = running.salt(EXCHANGED)
        both = [prompt, prompts.next_of(prompt)]
        with transferred(deployment.decode, prompt):
            answers = [running.ask(asked, cache_salt=salt) for asked in both]
        assert answers != [deployment.expected(asked) for asked in both], "two chunks were exchanged, and nothing shows it"


def test_a_client_that_leaves(
    deployment: Deployment, running: Running, status_of: Callable[[Server], Status]
) -> None:
    # Broken in production: each client that hangs up costs slots at both ends for ever.
    body = running.body(prompts.BY_LENGTH[3000], max_tokens=500)
    hang_up(running.url, body, lambda: status_of(deployment.prefill).requests_active > 0)
    until(lambda: status_of(deployment.prefill).requests_active == 0, "prefill goes on with it")
    prompt = prompts.CONCURRENT[0]
    assert_right([running.ask(prompt)], [deployment.expected(prompt)])


def test_a_request_that_is_refused(deployment: Deployment, running: Running) -> None:
    # Broken in production: a request that prefill refuses keeps decode waiting for what never comes.
    with pytest.raises(NoAnswer):
        running.ask([3] * 7000)
    prompt = prompts.CONCURRENT[1]
    assert_right([running.ask(prompt)], [deployment.expected(prompt)])
