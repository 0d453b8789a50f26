"""Routers, other people's and our own, as processes in front of a prefill and a decode server."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import harness
from harness import TOP, HttpError, Process

_SOURCES = TOP / ".deps" / "routers"
_VLLM = _SOURCES / "vllm-0.32.0"
_LMCACHE = _SOURCES / "lmcache-0.5.6"
#: Modules that LMCache's proxy takes two message types and a logger from.
_STAND_INS = TOP / "python" / "tests" / "e2e" / "routers" / "stand_ins"

#: Tests of what some routers do not do.
TWO_SAMPLES, TWO_PROMPTS, LEAVES = "test_two_samples", "test_two_prompts", "test_a_client_that_leaves"


@dataclass(frozen=True)
class Servers:
    """What a router is told."""

    prefill: str
    decode: str
    #: Where decode asks for what prefill has parked.
    rendezvous_port: int
    #: Of the receiver beside decode.
    init_port: int
    alloc_port: int
    #: Where LMCache's routers are notified by the sender beside prefill.
    notify_port: int
    #: The model's folder.
    model: Path
    #: Where routers of Mooncake's dialect ask prefill who it is.
    bootstrap_port: int = 0

    @property
    def prefill_port(self) -> str:
        return str(urlsplit(self.prefill).port)

    @property
    def decode_port(self) -> str:
        return str(urlsplit(self.decode).port)


@dataclass(frozen=True)
class Router:
    """One kind of router, or of its use."""

    name: str
    command: Callable[[Servers, int], list[str]]
    #: What prefill's answers have to say, as cache salts have it say.
    mode: str = "pull"
    #: A path that is answered with 200 once it serves.
    ready_path: str = "/openapi.json"
    #: Tests of what it does not do, which are not run with it, and why.
    lacks: dict[str, str] = field(default_factory=dict)
    #: Whether it answers with 503 until prefill has said who it is, which no path of it tells.
    asks_prefill_first: bool = False
    #: Whether it hands several samples on in streams alone.
    samples_in_streams: bool = False

    def start(self, servers: Servers, folder: Path) -> tuple[Process, str]:
        """The process, which serves, and its URL."""
        (port,) = harness.free_ports(1)
        log = folder / f"{self.name.replace(' ', '_').replace('/', '_')}.log"
        environment = {**os.environ, "PYTHONPATH": str(_STAND_INS), "HF_HUB_OFFLINE": "1"}
        process = Process(self.command(servers, port), log, environment)
        url = f"http://127.0.0.1:{port}"
        try:
            process.wait_healthy(url, 60, self.ready_path)
            if self.asks_prefill_first:
                harness.until(lambda: _serves(process, url), f"{self.name} has not asked prefill who it is")
        except BaseException:
            process.close()
            raise
        return process, url


def _serves(process: Process, url: str) -> bool:
    assert process.running(), process.log()
    try:
        harness.post(url + "/v1/completions", harness.completion_body([3], 1))
    except HttpError as error:
        assert error.status == 503, error
        return False
    return True


def _python(program: Path, *options: str) -> list[str]:
    return [sys.executable, str(program), *options]


def _vllm_router(servers: Servers, port: int) -> list[str]:
    return [*vllm_router("nixl", port), "--prefill", servers.prefill, "--decode", servers.decode]


def _vllm_router_for_mooncake(servers: Servers, port: int) -> list[str]:
    prefill = ["--prefill", servers.prefill, str(servers.bootstrap_port)]
    return [*vllm_router("mooncake", port), *prefill, "--decode", servers.decode]


def vllm_router(connector: str, port: int) -> list[str]:
    """vllm-router for this connector of vLLM's; not yet told where the servers are."""
    (prometheus_port,) = harness.free_ports(1)
    command = [str(Path(sys.executable).parent / "vllm-router"), "--vllm-pd-disaggregation", "--kv-connector", connector]
    command += ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(prometheus_port)]
    return [*command, "--policy", "round_robin"]


def _hosts_and_ports(servers: Servers, port: int) -> list[str]:
    """As vLLM's and LMCache's proxies are told."""
    options = ["--host", "127.0.0.1", "--port", str(port), "--prefiller-host", "127.0.0.1", "--decoder-host", "127.0.0.1"]
    return [*options, "--prefiller-port", servers.prefill_port, "--decoder-port", servers.decode_port]


def _toy_proxy(servers: Servers, port: int) -> list[str]:
    folder = _VLLM / "tests" / "v1" / "kv_connector" / "nixl_integration"
    return _python(folder / "toy_proxy_server.py", *_hosts_and_ports(servers, port))


_SERVING = _VLLM / "examples" / "disaggregated" / "disaggregated_serving"


def _multiturn_proxy(servers: Servers, port: int) -> list[str]:
    return _python(_SERVING / "disagg_proxy_multiturn.py", *_hosts_and_ports(servers, port))


def _push_demo(servers: Servers, port: int) -> list[str]:
    options = ["--model", harness.MODEL_NAME, "--port", str(port), "--prefill-engine-id", "any", "--prefill-kv-host", "127.0.0.1"]
    options += ["--prefill", f"127.0.0.1:{servers.prefill_port}", "--decode", f"127.0.0.1:{servers.decode_port}"]
    options += ["--prefill-side-channel-port", str(servers.rendezvous_port)]
    return _python(_SERVING / "disagg_proxy_pushconnector_demo.py", *options)


def _mooncakes_proxy(servers: Servers, port: int) -> list[str]:
    folder = _VLLM / "examples" / "disaggregated" / "mooncake_connector"
    options = ["--host", "127.0.0.1", "--port", str(port), "--prefill", servers.prefill, str(servers.bootstrap_port)]
    return _python(folder / "mooncake_connector_proxy.py", *options, "--decode", servers.decode)


def _lmcaches_proxy(servers: Servers, port: int) -> list[str]:
    options = [*_hosts_and_ports(servers, port), "--decoder-init-port", str(servers.init_port)]
    options += ["--decoder-alloc-port", str(servers.alloc_port), "--proxy-host", "127.0.0.1"]
    options += ["--proxy-port", str(servers.notify_port), "--model", str(servers.model)]
    return _python(_LMCACHE / "examples" / "disagg_prefill" / "disagg_proxy_server.py", *options)


def _proxy(*dialect: str) -> Callable[[Servers, int], list[str]]:
    def command(servers: Servers, port: int) -> list[str]:
        decode, options = servers.decode, list(dialect)
        if dialect:
            decode += f",127.0.0.1,{servers.init_port},{servers.alloc_port}"
            options += ["--notify-port", str(servers.notify_port), "--notify-timeout", "60"]
        options += ["--port", str(port), "--prefill", servers.prefill, "--decode", decode]
        return _python(TOP / "examples" / "proxy.py", *options)

    return command


#: Of LMCache's dialect.
_ONE_NAME = {TWO_PROMPTS: "a request has one name for one prompt"}
_LMCACHES_PROXY = _ONE_NAME | {
    TWO_SAMPLES: "all samples are given one first token",
    LEAVES: "it does not notice, and nobody is told: decode keeps the KV for pd_retention_sec",
}

ROUTERS = [
    Router("vllm-router, pull", _vllm_router, ready_path="/health"),
    Router("vllm-router, push", _vllm_router, "push", "/health"),
    Router("toy proxy", _toy_proxy),
    Router("multi-turn proxy", _multiturn_proxy, samples_in_streams=True),
    Router("push demo", _push_demo),
    Router("vllm-router, Mooncake", _vllm_router_for_mooncake, ready_path="/health"),
    Router("Mooncake's proxy", _mooncakes_proxy, asks_prefill_first=True),
    Router("LMCache's proxy", _lmcaches_proxy, lacks=_LMCACHES_PROXY),
    Router("proxy.py, pull", _proxy(), ready_path="/health"),
    Router("proxy.py, push", _proxy(), "push", "/health"),
    Router("proxy.py, LMCache's dialect", _proxy("--dialect", "lmcache"), ready_path="/health", lacks=_ONE_NAME),
    Router("proxy.py, the same at once", _proxy("--dialect", "lmcache", "--overlap"), ready_path="/health", lacks=_ONE_NAME),
]
