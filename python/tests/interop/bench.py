"""LMCache to LMCache and ours to ours by turns, on the same NIXL, UCX and machine: what `make bench-lmcache` runs.

For each transport and chunk size there are three pairs of processes, alive from the first round to the last: LMCache's
synchronous backend, its asynchronous one, and our daemons. LMCache's processes burn a core each while they wait (NIXL's
progress thread), so all pairs but the one whose turn it is are stopped (SIGSTOP). A turn is one request to get warm
again and one that counts; the order of the turns changes from round to round.

`ms` is from the submission to the ProxyNotif in the proxy's hands. Both sides have filled their memory by then. What is
submitted: LMCache, `batched_submit_put_task`, which asks the receiver for pages, writes and notifies; ours, `open` (that
stages) and `send`, which do the same. `send_ms` is from our `send` alone, for in use `open` comes before prefill.

CPU is of whole processes, from the kernel's clocks: LMCache's two from submission to ProxyNotif, ours from submission
until the client has been told as well. The client runs in this process, so all that this process uses meanwhile is
ours too, the reading of the ProxyNotif included.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_report import Row, seen_transport, size_of, tables
from harness import (
    LAYOUT,
    Addresses,
    Proxy,
    StockProcess,
    keys_of,
    missing,
    pattern,
    spec,
    start_daemon,
    token_bytes,
    write_config,
)
from free_ports import free_ports
from pd_backend import PeerAddress, ReceiverClient, SenderClient

# On one host UCX writes by CMA where it is left to choose; each run looks into UCX's own log whether it did.
TRANSPORTS: dict[str, dict[str, str]] = {"cma": {}, "tcp": {"UCX_TLS": "tcp,self"}}
# 2 planes x 8 layers x 8 heads x 32 elements x 2 bytes = 8 KiB a token, 2 MiB a chunk.
LARGE = LAYOUT | {"layers": 8, "kv_heads": 8, "head_size": 32}
CASES: list[tuple[dict[str, Any], list[int]]] = [(LAYOUT, [1, 8]), (LARGE, [256])]
WARM_UP = 2
SETTLE_S = 0.02
# Neither side's log is measured.
QUIET = {"LMCACHE_LOG_LEVEL": "WARNING", "PD_LOG": "warn"}


def cpu_s(pid: int) -> float:
    """CPU seconds of a process so far: clock_getcpuclockid(3), which Python does not have for processes."""
    return time.clock_gettime((~pid << 3) | 2)


@dataclass
class Figures:
    """What one request took."""

    ms: float
    sender_cpu_s: float
    receiver_cpu_s: float
    # Ours only: until `open` was granted; from `send`, of it the write as the daemon says; the CPU of the client.
    open_ms: float | None = None
    send_ms: float | None = None
    write_ms: float | None = None
    client_cpu_s: float = 0.0


class Pair:
    """A sender and a receiver that can be stopped. `request` moves `count` chunks that were never there before."""

    name: str
    pids: tuple[int, int]

    def request(self, req_id: str, count: int) -> Figures:
        raise NotImplementedError

    def verify(self, req_id: str, count: int) -> None:
        """As `request`, and compares every byte at the receiver."""
        raise NotImplementedError

    def signal(self, number: signal.Signals) -> None:
        for pid in self.pids:
            os.kill(pid, number)

    @contextmanager
    def awake(self) -> Iterator[None]:
        self.signal(signal.SIGCONT)
        time.sleep(SETTLE_S)
        try:
            yield
        finally:
            self.signal(signal.SIGSTOP)

    def idle_cores(self, for_s: float) -> tuple[float, float]:
        """Of a core, what sender and receiver use when nothing is asked of them."""
        began_s, before = time.monotonic(), [cpu_s(pid) for pid in self.pids]
        time.sleep(for_s)
        took_s, after = time.monotonic() - began_s, [cpu_s(pid) for pid in self.pids]
        sender, receiver = ((later - earlier) / took_s for earlier, later in zip(before, after, strict=True))
        return sender, receiver


class StockPair(Pair):
    def __init__(self, mode: str, setting: Setting, stack: ExitStack) -> None:
        self.name = f"LMCache {mode}"
        self.mode, self.setting = mode, setting
        self.at = Addresses(*free_ports(2))
        self.processes = [
            stack.enter_context(
                StockProcess(
                    role,
                    setting.config(role, mode, self.at if role == "receiver" else None),
                    setting.layout_file,
                    log=setting.folder / f"{mode}-{role}.log",
                    env=setting.env(f"{mode}-{role}"),
                )
            )
            for role in ("sender", "receiver")
        ]
        self.sender, self.receiver = self.processes
        self.pids = self.sender.process.pid, self.receiver.process.pid

    def wait_ready(self) -> None:
        for process in self.processes:
            process.wait_ready()

    def request(self, req_id: str, count: int) -> Figures:
        keys = keys_of(self.setting.layout, req_id, count)
        figures = self._send(req_id, keys, [None] * count)
        self._free(keys)
        return figures

    def verify(self, req_id: str, count: int) -> None:
        keys = keys_of(self.setting.layout, req_id, count)
        self._send(req_id, keys, keys)
        seen = [chunk["sha256"] for chunk in self.receiver.ask("read", keys=keys)["chunks"]]
        assert seen == [hashlib.sha256(pattern(key, self.setting.chunk_bytes)).hexdigest() for key in keys]
        self._free(keys)

    def _send(self, req_id: str, keys: list[str], seeds: list[str] | list[None]) -> Figures:
        self.sender.ask(
            "put",
            keys=keys,
            seeds=seeds,
            last_tokens=self.setting.layout["chunk_tokens"],
            spec=spec(self.at, req_id, len(keys)),
            hold=True,
            cpu_of=self.pids,
        )
        self.sender.ask("submit", req_id=req_id)
        told, at_s = self.setting.proxy.next()
        after = [cpu_s(pid) for pid in self.pids]
        assert told == req_id
        submitted = self.sender.event("submitted")
        if self.mode == "sync":
            self.sender.event("future")
        spent = [later - earlier for earlier, later in zip(submitted["began_cpu_s"], after, strict=True)]
        return Figures((at_s - submitted["began_s"]) * 1000, *spent)

    def _free(self, keys: list[str]) -> None:
        self.receiver.ask("free", keys=keys)
        # The proxy is told before the sender's pages are free again.
        deadline = time.monotonic() + 10
        while (free := self.sender.ask("status")["pages_free"]) < self.setting.pages:
            assert time.monotonic() < deadline, f"{self.name}: {free} of {self.setting.pages} pages free at the sender"


class OurPair(Pair):
    name = "ours"

    def __init__(self, setting: Setting, stack: ExitStack) -> None:
        self.setting = setting
        # A stopped peer is not to be given up while the others have their turns.
        sets = ["pd_peer_timeout_sec=600", *setting.our_sets]

        def env(role: str) -> dict[str, str]:
            return setting.env(f"ours-{role}") | setting.our_env

        daemons = {
            role: stack.enter_context(
                start_daemon(role, setting.config(role, "sync", at), setting.layout_file, sets, env(role))
            )
            for role, at in (("receiver", Addresses(0, 0)), ("sender", None))
        }
        ready = daemons["receiver"].ready
        assert ready.init_port and ready.alloc_port
        self.at = PeerAddress(host="127.0.0.1", init_port=ready.init_port, alloc_port=ready.alloc_port)
        self.pids = daemons["sender"].ready.pid, ready.pid
        self.sender = stack.enter_context(SenderClient(daemons["sender"].ready.connector))
        self.receiver = stack.enter_context(ReceiverClient(ready.connector))

    def request(self, req_id: str, count: int) -> Figures:
        keys = keys_of(self.setting.layout, req_id, count)
        figures = self._send(req_id, keys, fill=False)
        self.receiver.wait(req_id).release()
        return figures

    def verify(self, req_id: str, count: int) -> None:
        keys = keys_of(self.setting.layout, req_id, count)
        self._send(req_id, keys, fill=True)
        with self.receiver.wait(req_id) as lease:
            for index, key in enumerate(keys):
                assert bytes(lease.view(index)) == pattern(key, self.setting.chunk_bytes), f"chunk {index} of {req_id}"

    def _send(self, req_id: str, keys: list[str], *, fill: bool) -> Figures:
        pids = (*self.pids, os.getpid())
        tokens = self.setting.layout["chunk_tokens"]
        before, began_s = [cpu_s(pid) for pid in pids], time.monotonic()
        slots = self.sender.open(req_id, keys, last_chunk_tokens=tokens, receiver=self.at, stage=True).slots
        opened_s = time.monotonic()
        assert len(slots) == len(keys), "the buffer has room for the largest request"
        if fill:
            for slot in slots:
                self.sender.view(slot)[:] = memoryview(pattern(keys[slot.chunk], slot.len_bytes))
        send_s = time.monotonic()
        self.sender.send(req_id, slots, last=True)
        told, at_s = self.setting.proxy.next()
        assert told == req_id
        sent = self.sender.wait_sent(req_id)
        spent = [cpu_s(pid) - earlier for pid, earlier in zip(pids, before, strict=True)]
        return Figures(
            (at_s - began_s) * 1000,
            spent[0],
            spent[1],
            open_ms=(opened_s - began_s) * 1000,
            send_ms=(at_s - send_s) * 1000,
            write_ms=sent.timings.transfer_us / 1000,
            client_cpu_s=spent[2],
        )


@dataclass
class Setting:
    """What the three pairs of a transport and a chunk size share."""

    transport: str
    layout: dict[str, Any]
    pages: int
    folder: Path
    proxy: Proxy
    our_sets: list[str]
    our_env: dict[str, str]

    @property
    def chunk_bytes(self) -> int:
        return token_bytes(self.layout) * int(self.layout["chunk_tokens"])

    @property
    def layout_file(self) -> Path:
        path = self.folder / "layout.json"
        path.write_text(json.dumps(self.layout))
        return path

    def config(self, role: str, mode: str, at: Addresses | None) -> Path:
        path = self.folder / f"{role}-{mode}-{'free' if at is None else at.init_port}.yaml"
        proxy_port = self.proxy.port if role == "sender" else None
        return write_config(path, role, mode=mode, pages=self.pages, proxy_port=proxy_port, layout=self.layout, at=at)

    def env(self, name: str) -> dict[str, str]:
        # UCX says once for each connection by which transport it writes what; a file, for standard output is taken.
        log = {"UCX_PROTO_INFO": "y", "UCX_LOG_LEVEL": "info", "UCX_LOG_FILE": str(self.folder / f"ucx-{name}.log")}
        return QUIET | log | TRANSPORTS[self.transport]

    def writes_by(self, name: str, chunk_bytes: int) -> str:
        """By which transport UCX says that it writes ranges as long as a chunk: what its table names there."""
        log = self.folder / f"ucx-{name}.log"
        return seen_transport(log.read_text(errors="replace"), chunk_bytes) if log.is_file() else "no log"


def summary(pair: Pair, setting: Setting, count: int, taken: list[Figures], idle: tuple[float, float]) -> Row:
    times = sorted(one.ms for one in taken)
    gib = count * setting.chunk_bytes / 2**30
    median = statistics.median(times)
    log = "ours-sender" if isinstance(pair, OurPair) else f"{pair.name.split()[1]}-sender"
    phases = ([one.open_ms for one in taken], [one.send_ms for one in taken], [one.write_ms for one in taken])
    known = ([one for one in phase if one is not None] for phase in phases)
    return Row(
        pair.name,
        setting.transport,
        setting.chunk_bytes,
        count,
        len(times),
        median,
        times[len(times) // 10],
        times[-1 - len(times) // 10],
        gib / (median / 1000),
        statistics.median(one.sender_cpu_s for one in taken) / gib,
        statistics.median(one.receiver_cpu_s for one in taken) / gib,
        idle,
        setting.writes_by(log, setting.chunk_bytes),
        *(statistics.median(phase) if phase else None for phase in known),
        client_cpu_s_per_gib=statistics.median(one.client_cpu_s for one in taken) / gib,
    )


def measure(setting: Setting, counts: list[int], rounds: int, idle_s: float) -> Iterator[Row]:
    """All pairs of one transport and chunk size, by turns."""
    with ExitStack() as stack:
        stock = [StockPair(mode, setting, stack) for mode in ("sync", "async")]
        for one in stock:
            one.wait_ready()
        say(f"{setting.transport}, chunks of {setting.chunk_bytes >> 10} KiB: LMCache is ready")
        pairs: list[Pair] = [*stock, OurPair(setting, stack)]
        for pair in pairs:
            # A stopped process would not hear that it is to end.
            stack.callback(pair.signal, signal.SIGCONT)
            pair.signal(signal.SIGSTOP)
        sent = 0

        def next_request() -> str:
            nonlocal sent
            sent += 1
            return f"request-{sent}"

        idle = {}
        for pair in pairs:
            with pair.awake():
                # Also the handshake; every page of both buffers is touched before anything is measured.
                for count in {setting.pages, *counts}:
                    pair.verify(next_request(), count)
                idle[pair.name] = pair.idle_cores(idle_s)
        say("every byte was right, of each pair")
        for count in counts:
            taken: dict[str, list[Figures]] = {pair.name: [] for pair in pairs}
            for turn in range(WARM_UP + rounds):
                first = turn % len(pairs)
                for pair in pairs[first:] + pairs[:first]:
                    with pair.awake():
                        pair.request(next_request(), count)
                        figures = pair.request(next_request(), count)
                    if turn >= WARM_UP:
                        taken[pair.name].append(figures)
            for pair in pairs:
                yield summary(pair, setting, count, taken[pair.name], idle[pair.name])


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def machine() -> str:
    with open("/proc/cpuinfo") as file:
        cpu = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), platform.machine())
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    return f"{os.cpu_count()} cores, {cpu}, {platform.system()} {platform.release()}; load {load}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=200, help="of the small sizes")
    parser.add_argument("--large-rounds", type=int, default=20, help="of 512 MiB")
    parser.add_argument("--idle-s", type=float, default=10.0)
    parser.add_argument("--transport", choices=TRANSPORTS, action="append", help="left out: each of them")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of our daemons")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="of our daemons")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args()
    if (reason := missing()) is not None:
        raise SystemExit(reason)
    began_s, before = time.monotonic(), machine()
    say(f"machine: {before}")
    our_env = dict(one.split("=", 1) for one in args.env)
    rows: list[Row] = []
    for transport in args.transport or TRANSPORTS:
        for layout, counts in CASES:
            proxy = Proxy()
            with tempfile.TemporaryDirectory() as folder:
                setting = Setting(transport, layout, max(counts), Path(folder), proxy, args.set, our_env)
                rounds = args.large_rounds if layout is LARGE else args.rounds
                for row in measure(setting, counts, rounds, args.idle_s):
                    rows.append(row)
                    say(f"{size_of(row)}: {row.pair} {row.ms:.3f} ms")
            proxy.close()
    after = machine()
    if args.json:
        figures = [vars(row) | {"cpu_s_per_gib": row.cpu_s_per_gib} for row in rows]
        result = {"before": before, "after": after, "set": args.set, "env": args.env, "rows": figures}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{after}; {time.monotonic() - began_s:.0f} s\n\n{tables(rows)}")


if __name__ == "__main__":
    main()
