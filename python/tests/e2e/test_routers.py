"""Routers that people run, from PyPI, in front of the shared servers: each speaks its dialect as it is."""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import harness
import prompts
from answers import assert_right
from conftest import Deployment
from harness import HttpError, Process, Server, hang_up, until
from pd_backend import Status

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture(scope="module")
def vllm_router(deployment: Deployment, folder: Path) -> Iterator[str]:
    """vllm-router, which asks both servers at once from its second request on: prefill's answer says so."""
    port, prometheus_port = harness.free_ports(2)
    program = Path(sys.executable).parent / "vllm-router"
    command = [str(program), "--vllm-pd-disaggregation", "--kv-connector", "nixl", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--prometheus-port", str(prometheus_port), "--policy", "round_robin"]
    command += ["--prefill", deployment.prefill.url, "--decode", deployment.decode.url]
    process = Process(command, folder / "vllm_router.log", dict(os.environ))
    try:
        process.wait_healthy(f"http://127.0.0.1:{port}", 60)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.close()


def ask(url: str, prompt: list[int], salt: str, **more: Any) -> list[int]:
    body = harness.completion_body(prompt, prompts.MAX_TOKENS, cache_salt=salt, **more)
    return harness.tokens_of(harness.post(url + "/v1/completions", body))


def test_vllm_router(deployment: Deployment, vllm_router: str) -> None:
    # Broken in production: the router that vLLM recommends moves nothing, and prefill is computed twice.
    for number, prompt in enumerate(prompts.CONCURRENT[:4]):
        # The first request in turn, the others at once.
        before = deployment.decode.external_tokens()
        assert_right([ask(vllm_router, prompt, f"vr {number}")], [deployment.expected(prompt)])
        assert deployment.decode.external_tokens() - before >= len(prompt) - 1, f"request {number} moved nothing"


def test_vllm_router_with_eight_clients(deployment: Deployment, vllm_router: str) -> None:
    # Broken in production: requests that run at the same time get each other's KV, or wait for it.
    before = deployment.decode.external_tokens()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda prompt: ask(vllm_router, prompt, "vr eight"), prompts.CONCURRENT))
    assert_right(answers, [deployment.expected(prompt) for prompt in prompts.CONCURRENT])
    assert deployment.decode.external_tokens() - before >= sum(map(len, prompts.CONCURRENT)) - len(prompts.CONCURRENT)


def test_vllm_router_streams(deployment: Deployment, vllm_router: str) -> None:
    # Broken in production: a stream that breaks off, or comes with its last token.
    prompt = prompts.CONCURRENT[1]
    body = harness.completion_body(prompt, prompts.MAX_TOKENS, stream=True, cache_salt="vr stream")
    request = urllib.request.Request(
        vllm_router + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    generated: list[int] = []
    with urllib.request.urlopen(request, timeout=120) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                generated += json.loads(line[6:])["choices"][0].get("token_ids") or []
    assert_right([generated], [deployment.expected(prompt)])


def test_two_samples_through_vllm_router(deployment: Deployment, vllm_router: str) -> None:
    # Broken in production: the second sample finds its chunks given to the first one, and is computed, or fails.
    # As short as test_two_samples_of_a_request says.
    prompt, given = prompts.tokens("two samples", 200), {"temperature": 1.0, "seed": 7, "n": 2}
    alone = deployment.prefill.complete(prompt, 4, cache_salt="vr alone", **given)
    across = harness.post(
        vllm_router + "/v1/completions", harness.completion_body(prompt, 4, cache_salt="vr samples", **given)
    )
    alone, across = ([choice["token_ids"] for choice in answer["choices"]] for answer in (alone, across))
    assert_right(across, alone)
    assert alone[0] != alone[1]


def test_a_list_of_prompts_through_vllm_router(deployment: Deployment, vllm_router: str) -> None:
    # Broken in production: of a list the second prompt is given the first one's KV, whose parameters all of them get.
    asked = prompts.CONCURRENT[2:4]
    body = harness.completion_body(asked[0], prompts.MAX_TOKENS, cache_salt="vr list") | {"prompt": asked}
    answer = harness.post(vllm_router + "/v1/completions", body)
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    assert_right([choice["token_ids"] for choice in choices], [deployment.expected(prompt) for prompt in asked])


def test_a_client_of_vllm_router_that_leaves(
    deployment: Deployment, vllm_router: str, status_of: Callable[[Server], Status]
) -> None:
    # Broken in production: each client that hangs up costs slots at both ends, for the time of a lease or for ever.
    prompt = prompts.BY_LENGTH[3000]
    body = harness.completion_body(prompt, 500, cache_salt="vr leaves", ignore_eos=True)
    hang_up(vllm_router, body, lambda: status_of(deployment.prefill).requests_active > 0)
    until(lambda: status_of(deployment.prefill).requests_active == 0, "prefill goes on with it")
    assert_right([ask(vllm_router, prompts.CONCURRENT[0], "vr after")], [deployment.expected(prompts.CONCURRENT[0])])


def test_errors_through_vllm_router(deployment: Deployment, vllm_router: str) -> None:
    # Broken in production: a request that prefill refuses keeps decode waiting for what never comes.
    with pytest.raises(HttpError) as refused:
        harness.post(vllm_router + "/v1/completions", harness.completion_body([1] * 7000, 5))
    assert refused.value.status in (400, 500)
    assert_right([ask(vllm_router, prompts.CONCURRENT[1], "vr error")], [deployment.expected(prompts.CONCURRENT[1])])
