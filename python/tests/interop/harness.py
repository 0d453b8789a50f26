"""Starts stock LMCache processes, plays the proxy, and writes the lmcache.yaml that either kind of process reads."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import zmq

HERE = Path(__file__).resolve().parent
TOP = HERE.parents[2]
# The package need not be installed to be tested.
sys.path.insert(0, str(TOP / "python"))
sys.path.append(str(HERE.parent))

from pd_backend import Daemon, find_binary

ENVIRONMENT = TOP / ".deps" / "interop"
# How long a process may take to import torch and LMCache, and how long anything else may.
START_TIMEOUT_S = 240.0
TIMEOUT_S = 120.0

# 2 planes x 2 layers x 8 heads x 4 elements x 2 bytes = 256 bytes a token, 64 KiB a chunk.
LAYOUT = {
    "model": "tests/tiny",
    "dtype": "bfloat16",
    "layers": 2,
    "kv_heads": 8,
    "head_size": 4,
    "kv_planes": 2,
    "chunk_tokens": 256,
    "tp_rank": 0,
    "tp_size": 1,
}


def token_bytes(layout: dict[str, Any]) -> int:
    element = {"bfloat16": 2, "float16": 2, "float32": 4}[layout["dtype"]]
    return layout["kv_planes"] * layout["layers"] * layout["kv_heads"] * layout["head_size"] * element


def pattern(seed: str, len_bytes: int) -> bytes:
    """As in stock.py."""
    return hashlib.shake_128(seed.encode()).digest(len_bytes)


def keys_of(layout: dict[str, Any], name: str, count: int) -> list[str]:
    """`count` keys as LMCache writes them, other ones for every `name`."""
    return [
        f"{layout['model']}@{layout['tp_size']}@{layout['tp_rank']}"
        f"@{hashlib.sha256(f'{name}-{index}'.encode()).hexdigest()[:16].lstrip('0')}@{layout['dtype']}"
        for index in range(count)
    ]


@dataclass
class Addresses:
    """Where one receiver listens, for the router's part."""

    init_port: int
    alloc_port: int
    query_port: int | None = None


def write_config(
    path: Path, role: str, *, mode: str, pages: int, proxy_port: int | None = None, layout: dict[str, Any] = LAYOUT,
    at: Addresses | None = None, **more: Any,
) -> Path:
    """An lmcache.yaml of one role, as LMCache's own examples have it, which a pd-sender or pd-receiver takes as it is.

    A sender's names no peer port: an asynchronous sender that finds one binds it, and takes its name from it.
    """
    config: dict[str, Any] = {
        "chunk_size": layout["chunk_tokens"],
        "local_cpu": False,
        "save_unfull_chunk": True,
        "enable_pd": True,
        "pd_role": role,
        "pd_backend_mode": mode,
        "pd_buffer_size": pages * token_bytes(layout) * layout["chunk_tokens"],
        "pd_buffer_device": "cpu",
        "pd_allocation_timeout_sec": 10.0,
        "transfer_channel": "nixl",
        "nixl_backends": ["UCX"],
    }
    if at is not None:
        config |= {"pd_peer_host": "127.0.0.1", "pd_peer_init_port": [at.init_port], "pd_peer_alloc_port": [at.alloc_port]}
        if at.query_port is not None:
            config["pd_peer_query_port"] = [at.query_port]
    if proxy_port is not None:
        config |= {"pd_proxy_host": "127.0.0.1", "pd_proxy_port": proxy_port}
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in (config | more).items()))
    return path


def spec(at: Addresses, req_id: str, total_chunks: int, last: bool = True) -> dict[str, Any]:
    """LMCache's DisaggSpec, as its vLLM connector fills it from the router's kv_transfer_params."""
    return {
        "req_id": req_id,
        "receiver_id": f"127.0.0.1[{at.init_port}]",
        "receiver_host": "127.0.0.1",
        "receiver_init_port": [at.init_port],
        "receiver_alloc_port": [at.alloc_port],
        "receiver_query_port": None if at.query_port is None else [at.query_port],
        "is_last_prefill": last,
        "num_transferred_tokens": 0,
        "total_chunks": total_chunks,
    }


class Proxy:
    """The router's end: a PULL socket that remembers who could be decoded when."""

    def __init__(self) -> None:
        self._socket = zmq.Context.instance().socket(zmq.PULL)
        self.port = self._socket.bind_to_random_port("tcp://127.0.0.1")

    def next(self, timeout_s: float = TIMEOUT_S) -> tuple[str, float]:
        """The request of the next ProxyNotif, and when it was read (time.monotonic, which all processes share)."""
        if not self._socket.poll(int(timeout_s * 1000)):
            raise TimeoutError(f"no ProxyNotif within {timeout_s} s")
        frame = self._socket.recv()
        at = time.monotonic()
        message = msgspec.msgpack.decode(frame)
        assert message["type"] == "ProxyNotif", message
        return message["req_id"], at

    def quiet(self, for_s: float) -> bool:
        """Whether nothing comes for so long. Where something else follows, that it comes next is a better proof."""
        return not self._socket.poll(int(for_s * 1000))

    def close(self) -> None:
        self._socket.close(linger=0)


def wait_listening(at: Addresses, timeout_s: float = TIMEOUT_S) -> None:
    """Waits until a receiver's ports are bound: an asynchronous LMCache receiver binds them some time after it is made."""
    deadline = time.monotonic() + timeout_s
    for port in (at.init_port, at.alloc_port):
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
                break
            except ConnectionRefusedError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"nobody listens on port {port} after {timeout_s} s") from None
                time.sleep(0.02)


class StockProcess:
    """stock_sender.py or stock_receiver.py, running; a context manager that ends it."""

    def __init__(
        self,
        role: str,
        config: Path,
        layout: Path,
        *,
        log: Path | None = None,
        env: dict[str, str] | None = None,
    ) -> None:
        python = ENVIRONMENT / "bin" / "python"
        environment = os.environ | {
            # Hollow CUDA libraries, see hollow_cuda.py.
            "LD_LIBRARY_PATH": str(ENVIRONMENT / "hollow"),
            "LMCACHE_TRACK_USAGE": "false",
            "UCX_NET_DEVICES": "lo",
            "UCX_LOG_LEVEL": "error",
            "OMP_NUM_THREADS": "1",
        }
        for name in ("PYTHONPATH", "PYTHONHOME", "LMCACHE_CONFIG_FILE"):
            environment.pop(name, None)
        self._answers: queue.Queue[dict[str, Any]] = queue.Queue()
        self._events: queue.Queue[dict[str, Any]] = queue.Queue()
        self._kept: list[dict[str, Any]] = []
        self._next_id = 0
        self.log = log
        with open(log or os.devnull, "ab") as stderr:
            self.process = subprocess.Popen(
                [str(python), str(HERE / f"stock_{role}.py"), "--config", str(config), "--kv-layout", str(layout)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=environment | (env or {}),
                cwd=HERE,
            )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            answer = json.loads(line)
            (self._events if "event" in answer else self._answers).put(answer)
        self._events.put({"event": "ended"})
        self._answers.put({"error": "the process ended"})

    def wait_ready(self) -> dict[str, Any]:
        """Waits for the ready line. Apart from starting, so that several can start at once."""
        return self.event("ready", START_TIMEOUT_S)

    def event(self, name: str, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
        """The next event of this name. Others are kept: a callback may come before its put has returned, or after."""
        deadline = time.monotonic() + timeout_s
        for index, kept in enumerate(self._kept):
            if kept["event"] == name:
                return self._kept.pop(index)
        while True:
            try:
                event = self._events.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise TimeoutError(f"no {name} within {timeout_s} s, but {self._kept}, from {self.describe()}") from None
            if event["event"] == name:
                return event
            if event["event"] == "ended":
                raise RuntimeError(f"ended before any {name}: {self.describe()}")
            self._kept.append(event)

    def describe(self) -> str:
        tail = self.log.read_text(errors="replace")[-3000:] if self.log else "(no log kept)"
        return f"{self.process.args[1:]}, exit code {self.process.poll()}; its log ends:\n{tail}"

    def ask(self, op: str, timeout_s: float = TIMEOUT_S, **arguments: Any) -> dict[str, Any]:
        """Sends a command and waits for its answer; an error there is an error here."""
        self._next_id += 1
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"id": self._next_id, "op": op, **arguments}) + "\n")
        self.process.stdin.flush()
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                answer = self._answers.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise TimeoutError(f"{op} not answered within {timeout_s} s by {self.describe()}") from None
            if "error" in answer:
                raise RuntimeError(f"{op}: {answer['error']} ({self.describe()})")
            if answer["id"] == self._next_id:
                return answer

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)

    def __enter__(self) -> StockProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def missing() -> str | None:
    """Why the stock side cannot run here, in one line; None where it can."""
    if (ENVIRONMENT / ".stamp").is_file():
        return None
    return "LMCache is not installed in .deps/interop: run `make interop`, or scripts/setup-interop first"


def start_daemon(
    role: str, config: Path, layout: Path, sets: Sequence[str] = (), env: dict[str, str] | None = None
) -> Daemon:
    """A pd-sender or pd-receiver with an lmcache.yaml."""
    arguments = ["--config", str(config), "--kv-layout", str(layout)]
    for key in sets:
        arguments += ["--set", key]
    built = next((build for build in ("debug", "release") if (TOP / "target" / build / f"pd-{role}").is_file()), "debug")
    directory = os.environ.get("PD_BIN_DIR") or TOP / "target" / built
    # As the stock side has it: nothing but loopback.
    environment = {"UCX_NET_DEVICES": "lo", "UCX_LOG_LEVEL": "error"} | (env or {})
    return Daemon(find_binary(f"pd-{role}", directory), arguments, env=environment)
