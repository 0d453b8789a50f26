"""Speed of LMCache against LMCache: a JSON line for each mode, transport and size. Compare figures of one run only.

    PYTHONPATH=.deps/python python3 python/tests/interop/bench_stock.py [ROUNDS]

`ms` is from the call of batched_submit_put_task to the ProxyNotif in the proxy's hands; `first_ms` the first request, with
its handshake. CPU is of the measured rounds; what each process burns when idle is in it, and given beside it.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import LAYOUT, Addresses, Proxy, StockProcess, free_ports, keys_of, missing, spec, token_bytes, write_config

TRANSPORTS: dict[str, dict[str, str]] = {"default": {}, "tcp": {"UCX_TLS": "tcp,self"}}
# 2 planes x 8 layers x 8 heads x 32 elements x 2 bytes = 8 KiB a token, 2 MiB a chunk.
LARGE = LAYOUT | {"layers": 8, "kv_heads": 8, "head_size": 32}
CASES: list[tuple[dict[str, Any], list[int]]] = [(LAYOUT, [1, 8]), (LARGE, [256])]
IDLE_S = 3.0


def cpu(process: StockProcess) -> tuple[float, float]:
    status = process.ask("status")
    return status["cpu_s"], status["monotonic_s"]


def measure(mode: str, transport: str, layout: dict[str, Any], counts: list[int], rounds: int) -> Iterator[dict[str, Any]]:
    """One pair of fresh processes, and all counts through it."""
    init, alloc = free_ports(2)
    at = Addresses(init, alloc)
    proxy = Proxy()
    env = TRANSPORTS[transport]
    chunk_tokens = int(layout["chunk_tokens"])
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        (top / "layout.json").write_text(json.dumps(layout))
        pages = max(counts)
        configs = {
            "receiver": write_config(top / "receiver.yaml", "receiver", mode=mode, pages=pages, layout=layout, at=at),
            "sender": write_config(top / "sender.yaml", "sender", mode=mode, pages=pages, layout=layout, proxy_port=proxy.port),
        }
        with (
            StockProcess("receiver", configs["receiver"], top / "layout.json", log=top / "receiver.log", env=env) as receiver,
            StockProcess("sender", configs["sender"], top / "layout.json", log=top / "sender.log", env=env) as sender,
        ):
            receiver.wait_ready()
            sender.wait_ready()
            idle = [cpu(sender), cpu(receiver)]
            time.sleep(IDLE_S)
            idle_cores = [
                (after[0] - before[0]) / (after[1] - before[1])
                for before, after in zip(idle, [cpu(sender), cpu(receiver)], strict=True)
            ]
            sent = 0

            def once(count: int, fill: bool) -> float:
                nonlocal sent
                sent += 1
                req_id, keys = f"request-{sent}", keys_of(layout, f"request-{sent}", count)
                sender.ask(
                    "put",
                    keys=keys,
                    seeds=keys if fill else [None] * count,
                    last_tokens=chunk_tokens,
                    spec=spec(at, req_id, count),
                )
                told, at_s = proxy.next()
                assert told == req_id
                began_s = float(sender.event("submitted")["began_s"])
                if mode == "sync":
                    sender.event("future")
                receiver.ask("free", keys=keys)
                return (at_s - began_s) * 1000

            # Every page of both buffers is touched before anything is measured.
            first_ms = once(max(counts), fill=True)
            for count in counts:
                for _ in range(3):
                    once(count, fill=False)
                before = [cpu(sender), cpu(receiver)]
                times = [once(count, fill=False) for _ in range(rounds)]
                after = [cpu(sender), cpu(receiver)]
                gib = count * token_bytes(layout) * chunk_tokens / 2**30
                spent = [(later[0] - earlier[0]) / (gib * rounds) for earlier, later in zip(before, after, strict=True)]
                median = statistics.median(times)
                yield {
                    "mode": mode,
                    "transport": transport,
                    "chunk_bytes": token_bytes(layout) * chunk_tokens,
                    "chunks": count,
                    "rounds": rounds,
                    "ms": {"median": round(median, 3), "min": round(min(times), 3), "max": round(max(times), 3)},
                    "gib_per_s": round(gib / (median / 1000), 3),
                    "cpu_s_per_gib": {"sender": round(spent[0], 3), "receiver": round(spent[1], 3)},
                    "idle_cores": {"sender": round(idle_cores[0], 3), "receiver": round(idle_cores[1], 3)},
                    "first_ms": round(first_ms, 1),
                }
    proxy.close()


def main() -> None:
    if (reason := missing()) is not None:
        raise SystemExit(reason)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    for layout, counts in CASES:
        for transport in TRANSPORTS:
            for mode in ("sync", "async"):
                for result in measure(mode, transport, layout, counts, rounds):
                    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
