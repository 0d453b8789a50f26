"""The dialect of vllm-ascend's layerwise proxy: decode is asked first, and has the router ask prefill."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

import harness
import prompts
from answers import assert_right
from conftest import Deployment
from harness import Server
from router_client import transferred

pytestmark = pytest.mark.usefixtures("nothing_left")

_numbers = itertools.count()


class Router:
    """Does what such a proxy does: remembers what it was asked, and asks prefill for it when decode says so."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._asked: dict[str, dict[str, Any]] = {}
        router = self

        class Metaserver(BaseHTTPRequestHandler):
            """Answers once prefill has ended."""

            def do_POST(self) -> None:
                params = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status = 200 if router.has_prefilled(params) else 500
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                """Not into the tests' output."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Metaserver)
        self.metaserver = f"http://127.0.0.1:{self._server.server_address[1]}/v1/metaserver"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def has_prefilled(self, params: dict[str, Any]) -> bool:
        """Whether it knows the request that decode names, and prefill was asked for it."""
        body = self._asked.pop(params["request_id"], None)
        if body is None:
            return False
        harness.post(
            self._deployment.prefill.url + "/v1/completions",
            body | {"max_tokens": 1, "min_tokens": 1, "kv_transfer_params": params},
        )
        return True

    def ask(self, prompt: list[int], decode: Server, known: bool = True, **more: Any) -> list[int]:
        name = f"layerwise-{next(_numbers)}"
        body = harness.completion_body(prompt, prompts.MAX_TOKENS, request_id=name, **more)
        if known:
            self._asked[f"cmpl-{name}-0"] = body
        params = {"do_remote_decode": False, "do_remote_prefill": True, "metaserver": self.metaserver}
        return harness.tokens_of(harness.post(decode.url + "/v1/completions", body | {"kv_transfer_params": params}))


@pytest.fixture(scope="module")
def router(deployment: Deployment) -> Iterator[Router]:
    made = Router(deployment)
    yield made
    made.close()


def test_completions(deployment: Deployment, router: Router) -> None:
    # Broken in production: under this proxy nothing is transferred, or what is transferred is wrong.
    for count in (5, 256, 700, 3000):
        prompt = prompts.BY_LENGTH[count]
        with transferred(deployment.decode, prompt):
            answer = router.ask(prompt, deployment.decode, cache_salt=f"layerwise {count}")
        assert_right([answer], [deployment.expected(prompt)])


def test_eight_clients(deployment: Deployment, router: Router) -> None:
    # Broken in production: requests that run at the same time get each other's KV, or wait for it.
    def ask(prompt: list[int]) -> list[int]:
        return router.ask(prompt, deployment.decode, cache_salt="layerwise eight")

    with transferred(deployment.decode, *prompts.CONCURRENT), ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, prompts.CONCURRENT))
    assert_right(answers, [deployment.expected(prompt) for prompt in prompts.CONCURRENT])


def test_a_router_that_does_not_ask_prefill(deployment: Deployment, router: Router) -> None:
    # Broken in production: a request whose router has failed waits for minutes, or ends the engine.
    prompt = prompts.CONCURRENT[3]
    answer = router.ask(prompt, deployment.decode, known=False, cache_salt="layerwise unknown")
    assert answer == deployment.expected(prompt)
    (nobody,) = harness.free_ports(1)
    for number, metaserver in enumerate((7, None, "x" * 10_000, f"http://127.0.0.1:{nobody}/", "file:///etc/passwd")):
        params = {"do_remote_decode": False, "do_remote_prefill": True, "metaserver": metaserver}
        answer = deployment.decode.complete(
            prompt, prompts.MAX_TOKENS, kv_transfer_params=params, cache_salt=f"layerwise bad {number}"
        )
        assert harness.tokens_of(answer) == deployment.expected(prompt)
