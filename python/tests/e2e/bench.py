#!/usr/bin/env python3
"""Time to first token over two vLLM servers, split into prefill's and decode's part, for several connectors by turns.

    make bench-vllm [BENCH='--rounds 20 --only ours,single --json bench.json']

Each round asks every way once for each length, with a prompt that no server has seen, so that what else the machine
does meets all alike. `ours` is asked both ways that its proxy knows: decode after prefill, and both at once, where decode's
part begins with prefill's answer. `single` is one server's whole time, and as decode's part what the same prompt takes
once more, with a token behind it: all of its KV is in the prefix cache, and no transport can be faster. All servers run all the time (some 2.5 GB each): `--only`
where memory is short.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

TOP = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(TOP / "python"), str(TOP / "examples"), str(Path(__file__).resolve().parent)]

import harness
from harness import Server
from make_tiny_model import make

VOCABULARY = 512
#: Of a request under load: tokens of its prompt, of its answer, and of both in whole blocks.
LOAD_PROMPT, LOAD_ANSWER, LOAD_TOKENS = 512, 32, 640


@dataclass
class Way:
    """One way to the first token: its servers, and how they are asked. Times are in seconds."""

    name: str
    servers: list[Server]
    #: A prompt, and how many tokens decode answers.
    ask: Callable[[list[int], int], tuple[float, float]]
    times: dict[int, list[tuple[float, float]]] = field(default_factory=dict)
    #: Of each turn with several clients: how long it took, and each of its requests.
    turns: list[tuple[float, list[float]]] = field(default_factory=list)


def timed(
    server: Server, prompt: list[int], params: dict[str, Any] | None, tokens: int = 1, **more: Any
) -> tuple[float, dict[str, Any]]:
    """An answer of so many tokens, and how long it took."""
    if params is not None:
        more["kv_transfer_params"] = params
    began = time.perf_counter()
    answer = server.complete(prompt, tokens, **more)
    return time.perf_counter() - began, answer


#: What routers of NIXL's dialect ask prefill with.
NIXL_ASKS = {"do_remote_decode": True, "do_remote_prefill": False}
#: What is left of prefill's answer where both are asked at once.
NIXL_KNOWS = ("do_remote_prefill", "do_remote_decode", "remote_engine_id", "remote_host", "remote_port", "tp_size")


class Servers:
    """Starts what the ways need."""

    def __init__(self, stack: ExitStack, folder: Path, model: Path, longest: int, clients: int) -> None:
        self._stack, self._folder, self._model = stack, folder, model
        tokens = -(-(longest + 16) // 128) * 128
        # Room for some prompts of the longest kind, and for every client's; each is new, so a prefix cache only costs.
        blocks = (4 * tokens + clients * LOAD_TOKENS) // 128 + 8
        self._args = ["--num-gpu-blocks-override", str(blocks), "--max-model-len", str(tokens)]
        self._args += ["--max-num-batched-tokens", str(max(2048, tokens)), "--no-enable-prefix-caching"]
        self._buffer = (4 * tokens + clients * LOAD_TOKENS) * 8192
        self._numbers = itertools.count(1)
        #: Asks decode, where both are asked at once.
        self._asking = stack.enter_context(ThreadPoolExecutor(max(1, clients)))

    def start(
        self, name: str, kv: dict[str, Any] | None, env: dict[str, str] | None = None, args: Sequence[str] = ()
    ) -> Server:
        server = Server(name, self._folder, self._model, kv=kv, args=[*self._args, *args], env=env, dtype="bfloat16")
        self._stack.callback(server.close)
        return server

    def req_id(self) -> str:
        return f"bench-{next(self._numbers)}"

    def single(self) -> list[Way]:
        server = self.start("single", None, args=["--enable-prefix-caching"])

        def ask(prompt: list[int], tokens: int) -> tuple[float, float]:
            if tokens > 1:
                return 0.0, timed(server, prompt, None, tokens)[0]
            return timed(server, prompt, None)[0], timed(server, [*prompt, 3], None)[0]

        return [Way("one instance", [server], ask)]

    def _spec(self, ports: dict[str, Any]) -> dict[str, Any]:
        return {"disagg_spec": {"req_id": self.req_id(), "receiver_host": "127.0.0.1", **ports}}

    def _in_turn(self, name: str, prefill: Server, decode: Server, ports: Callable[[], dict[str, Any]]) -> Way:
        def ask(prompt: list[int], tokens: int) -> tuple[float, float]:
            params = self._spec(ports())
            first, _ = timed(prefill, prompt, params)
            return first, timed(decode, prompt, params, tokens)[0]

        return Way(name, [prefill, decode], ask)

    def _overlap(self, name: str, prefill: Server, decode: Server, ports: Callable[[], dict[str, Any]]) -> Way:
        """The idle of these servers is another way's to count."""

        def ask(prompt: list[int], tokens: int) -> tuple[float, float]:
            params = self._spec(ports())
            return self._at_once(
                lambda: timed(prefill, prompt, params), lambda: timed(decode, prompt, params, tokens)
            )

        return Way(name, [], ask)

    def _at_once(self, prefill: Callable[[], Any], decode: Callable[[], Any]) -> tuple[float, float]:
        began = time.perf_counter()
        decoded = self._asking.submit(lambda: (decode(), time.perf_counter())[1])
        first, _ = prefill()
        return first, decoded.result() - began - first

    def _nixl_in_turn(self, name: str, prefill: Server, decode: Server) -> Way:
        def ask(prompt: list[int], tokens: int) -> tuple[float, float]:
            first, answer = timed(prefill, prompt, NIXL_ASKS)
            return first, timed(decode, prompt, answer["kv_transfer_params"], tokens)[0]

        return Way(name, [prefill, decode], ask)

    def _nixl_at_once(self, name: str, prefill: Server, decode: Server) -> Way:
        """As vllm-router does it from the second request on, with what prefill answered to the first."""
        known: dict[str, Any] = {}

        def ask(prompt: list[int], tokens: int) -> tuple[float, float]:
            req_id = self.req_id()
            if not known:
                answer = timed(prefill, prompt, NIXL_ASKS)[1]["kv_transfer_params"]
                known.update({field: answer[field] for field in NIXL_KNOWS})
            params = known | {"remote_request_id": req_id}
            return self._at_once(
                lambda: timed(prefill, prompt, NIXL_ASKS, request_id=req_id),
                lambda: timed(decode, prompt, params, tokens, request_id=req_id),
            )

        return Way(name, [], ask)

    def ours(self) -> list[Way]:
        sets = {"pd_buffer_size": self._buffer, "pd_peer_host": "127.0.0.1", "transfer_channel": "local"}
        sets |= {"pd_peer_init_port": 0, "pd_peer_alloc_port": 0}
        prefill = self.start("ours-prefill", harness.producer(sets))
        decode = self.start("ours-decode", harness.consumer(sets))

        def ports() -> dict[str, Any]:
            ready = decode.daemon_ready()
            return {"receiver_init_port": [int(ready["init_port"])], "receiver_alloc_port": [int(ready["alloc_port"])]}

        both = (prefill, decode, ports)
        return [
            self._in_turn("ours, LMCache's, in turn", *both),
            self._overlap("ours, LMCache's, at once", *both),
            replace(self._nixl_in_turn("ours, NIXL's, in turn", prefill, decode), servers=[]),
            self._nixl_at_once("ours, NIXL's, at once", prefill, decode),
        ]

    def file(self) -> list[Way]:
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm", prefix="pd-bench-")))

        def config(role: str) -> dict[str, Any]:
            kv = harness.connector_config(role, {}, module="file_connector", name="FileConnector")
            kv["kv_connector_extra_config"] = {"folder": str(folder), "lookup": False}
            return kv

        servers = [self.start(f"file-{role}", config(role)) for role in ("kv_producer", "kv_consumer")]
        ports = {"receiver_init_port": [1], "receiver_alloc_port": [1]}
        return [self._in_turn("files in /dev/shm", *servers, lambda: ports)]

    def nixl(self) -> list[Way]:
        servers = []
        for role in ("kv_producer", "kv_consumer"):
            (port,) = harness.free_ports(1)
            kv = {
                "kv_connector": "TamedNixlConnector", "kv_connector_module_path": "tamed_nixl", "kv_role": "kv_both",
                "kv_buffer_device": "cpu", "kv_load_failure_policy": "fail",
            }
            env = {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(port), "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1"}
            env["UCX_TLS"] = "all"
            servers.append(self.start(f"nixl-{role}", kv, env))
        return [self._nixl_in_turn("NixlConnector, tamed", *servers)]


def serve(way: Way, prompts: list[list[int]], tokens: int, clients: int) -> None:
    """Asks for all of these, so many at a time, and keeps how long it took."""

    def one(prompt: list[int]) -> float:
        began = time.perf_counter()
        way.ask(prompt, tokens)
        return time.perf_counter() - began

    with ThreadPoolExecutor(clients) as pool:
        began = time.perf_counter()
        took = list(pool.map(one, prompts))
        way.turns.append((time.perf_counter() - began, took))


def cpu_seconds(server: Server) -> float:
    """Of the server, its engine and their daemons."""
    total = 0
    for pid in family(server.pid):
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


def family(pid: int) -> list[int]:
    """A process and all that it has started."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += family(int(child))
    return found


def idle(ways: list[Way], seconds: float) -> dict[str, float]:
    """Percent of a core that a server, its engine and its daemon use when nothing is asked; the larger of a pair's."""
    before = [[cpu_seconds(server) for server in way.servers] for way in ways]
    time.sleep(seconds)
    used = {}
    for way, were in ((way, were) for way, were in zip(ways, before) if were):
        used[way.name] = max(100 * (cpu_seconds(s) - was) / seconds for s, was in zip(way.servers, were))
    return used


def percentile(values: list[float], share: float) -> float:
    """The nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def report(ways: list[Way], lengths: list[int], used: dict[str, float]) -> dict[str, Any]:
    """Prints the table; the same as an object."""
    result: dict[str, Any] = {"idle_percent_of_a_core": used, "ms": {}, "load": {}}
    print(f"{'ms':24}" + "".join(f"{f'{length} tokens':>36}" for length in lengths))
    print(f"{'':24}" + f"{'prefill p50':>12}{'decode p50':>12}{'p90':>12}" * len(lengths))
    for way in ways:
        line = f"{way.name:24}"
        result["ms"][way.name] = {}
        for length in lengths:
            first = [1000 * prefill for prefill, _ in way.times[length]]
            second = [1000 * decode for _, decode in way.times[length]]
            numbers = (statistics.median(first), statistics.median(second), percentile(second, 0.9))
            line += "".join(f"{number:12.1f}" for number in numbers)
            result["ms"][way.name][length] = {
                "prefill_p50": numbers[0], "decode_p50": numbers[1], "decode_p90": numbers[2], "n": len(first)
            }
        print(line)
    for way in ways if all(way.turns for way in ways) else ():
        rates = [len(took) / whole for whole, took in way.turns]
        took = [1000 * one for _, turn in way.turns for one in turn]
        numbers = (statistics.median(rates), statistics.median(took), percentile(took, 0.95), percentile(took, 0.99))
        print(
            f"{way.name:24} under load: {numbers[0]:.2f} requests a second (turns: "
            f"{', '.join(f'{rate:.2f}' for rate in rates)}); one takes p50 {numbers[1]:.0f}, p95 {numbers[2]:.0f}, "
            f"p99 {numbers[3]:.0f} ms"
        )
        result["load"] |= {way.name: dict(zip(("requests_per_s", "p50_ms", "p95_ms", "p99_ms"), numbers))}
    for name, percent in used.items():
        print(f"idle, percent of a core, server with engine and daemon: {name}: {percent:.1f}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--lengths", default="256,1024,4096", help="tokens of the prompts")
    parser.add_argument("--only", default="ours,single,file,nixl")
    parser.add_argument("--clients", type=int, default=0, help="how many ask at a time, afterwards; 0: none do")
    parser.add_argument("--turns", type=int, default=5, help="how often each way serves the clients")
    parser.add_argument("--idle-seconds", type=float, default=20.0)
    parser.add_argument("--logs", type=Path, help="where the servers' output goes")
    parser.add_argument("--json", type=Path, help="where the numbers go as well")
    given = parser.parse_args()
    lengths = [int(length) for length in given.lengths.split(",")]
    dice = random.Random(os.urandom(8))
    with ExitStack() as stack:
        folder = given.logs or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pd-bench-vllm-")))
        folder.mkdir(parents=True, exist_ok=True)
        model = folder / "tiny"
        make(model, layers=8, vocabulary=VOCABULARY, dtype="bfloat16", max_tokens=16384, seed=1)
        longest = max(*lengths, LOAD_TOKENS if given.clients else 0)
        servers = Servers(stack, folder, model, longest, given.clients)
        ways = [way for name in given.only.split(",") for way in getattr(servers, name)()]
        for way in ways:
            for server in way.servers:
                server.wait_ready(600)
        for round_number in range(given.rounds + 2):
            for length in lengths:
                for way in dice.sample(ways, len(ways)):
                    prompt = [dice.randrange(3, VOCABULARY) for _ in range(length)]
                    times = way.ask(prompt, 1)
                    # The first two rounds shake hands and warm up.
                    if round_number >= 2:
                        way.times.setdefault(length, []).append(times)
            print(f"round {round_number + 1} of {given.rounds + 2}", file=sys.stderr, flush=True)
        for turn in range((given.turns + 1) if given.clients else 0):
            for way in dice.sample(ways, len(ways)):
                count = 4 * given.clients
                fresh = [[dice.randrange(3, VOCABULARY) for _ in range(LOAD_PROMPT)] for _ in range(count)]
                serve(way, fresh, LOAD_ANSWER, given.clients)
            print(f"turn {turn + 1} of {given.turns + 1}", file=sys.stderr, flush=True)
        for way in ways:
            del way.turns[:1]  # It warmed up.
        used = idle(ways, given.idle_seconds)
        result = report(ways, lengths, used)
        if given.json:
            given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
