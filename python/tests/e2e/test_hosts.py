"""Prefill, decode and a router on three hosts, which this machine plays: see ../hosts/network.py."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import harness
import prompts
import router_processes
from answers import assert_right
from conftest import TOP, Deployment
from harness import Process, Server, until

sys.path.append(str(TOP / "python" / "tests" / "hosts"))

from network import Host, Network, NotAllowed, check_allowed

#: Several hosts would share no kernel, so UCX has no other way between them.
OVER_TCP = {"UCX_TLS": "tcp,self"}


@dataclass
class Hosts:
    """The servers, each on its host, and the host from which a router asks them."""

    prefill: Server
    decode: Server
    router: Host
    prefill_host: Host
    #: Of one token, in all layers.
    kv_bytes: int

    def external_tokens(self) -> float:
        """Tokens that decode says came from prefill."""
        _, text = self.router.call("get", self.decode.url + "/metrics")
        lines = [line for line in text.splitlines() if line.startswith("vllm:prompt_tokens_by_source_total")]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if 'source="external_kv_transfer"' in line)


@pytest.fixture(scope="module")
def hosts(folder: Path, model: Path) -> Iterator[Hosts]:
    try:
        check_allowed()
    except NotAllowed as error:
        pytest.skip(f"no hosts can be made here: {error}")
    with ExitStack() as stack:
        network = stack.enter_context(Network())
        one, two, three = (network.host(name) for name in ("prefill", "decode", "router"))
        shared = {"pd_buffer_size": "64MiB", "transfer_channel": "nixl"}
        receiver = shared | {"pd_peer_host": two.address, "pd_peer_init_port": 0, "pd_peer_alloc_port": 0}

        def server(host: Host, kv: dict[str, Any]) -> Server:
            args = ("--num-gpu-blocks-override", "64", "--max-model-len", "6144")
            started = Server(
                f"hosts-{host.name}", folder, model, kv=kv, args=args, env=OVER_TCP, host=host.address, inside=host.inside()
            )
            stack.callback(started.close)
            return started

        prefill = server(one, harness.producer(shared, rendezvous_host=one.address, kv_lease_duration=5))
        decode = server(two, harness.consumer(receiver, receive_wait_s=60))
        for started in (prefill, decode):
            until(lambda: _answers(three, started.url + "/health", started), "it does not serve", harness.START_TIMEOUT_S)
        yield Hosts(prefill, decode, three, one, _kv_bytes(model))


def _kv_bytes(model: Path) -> int:
    config = json.loads((model / "config.json").read_text())
    # Keys and values, of four bytes each: servers compute in float32 here.
    return 2 * 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]


def _answers(host: Host, url: str, process: Process) -> bool:
    assert process.running(), process.log()[-4000:]
    return host.call("get", url)[0] == 200


@pytest.fixture(params=["vllm-router", "our proxy"])
def router(request: pytest.FixtureRequest, hosts: Hosts, folder: Path) -> Iterator[str]:
    """The URL of a router that serves on its host."""
    (port,) = harness.free_ports(1)
    if request.param == "vllm-router":
        command = router_processes.vllm_router("nixl", port)
    else:
        command = [sys.executable, str(TOP / "examples" / "proxy.py"), "--port", str(port)]
    command += ["--prefill", hosts.prefill.url, "--decode", hosts.decode.url]
    log = folder / f"hosts-{request.param.replace(' ', '-')}.log"
    process = Process([*hosts.router.inside(), *command], log, dict(os.environ))
    try:
        url = f"http://127.0.0.1:{port}"
        until(lambda: _answers(hosts.router, url + "/v1/models", process), "the router does not serve")
        yield url
    finally:
        process.close()


def test_tokens_across_hosts(deployment: Deployment, hosts: Hosts, router: str) -> None:
    # Broken in production: prefill and decode that work side by side move nothing, or wrong KV, between two machines.
    for count in (257, 1500):
        prompt = prompts.BY_LENGTH[count]
        before, sent = hosts.external_tokens(), hosts.prefill_host.traffic().sent
        body = harness.completion_body(prompt, prompts.MAX_TOKENS, cache_salt=f"hosts {router.rpartition(':')[2]}")
        answer = hosts.router.call("post", router + "/v1/completions", body)
        assert_right([harness.tokens_of(answer)], [deployment.expected(prompt)])
        assert hosts.external_tokens() - before >= count - 1, "nothing was transferred"
        # Over the link: nothing else joins the two.
        assert hosts.prefill_host.traffic().sent - sent >= count * hosts.kv_bytes
