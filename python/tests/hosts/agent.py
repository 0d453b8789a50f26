"""Runs on a host of its own: starts daemons there, and does with them what the test asks through a pipe."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import numpy as np

from conftest import TOP, binary
from network import Failed
from pd_backend import Daemon, NodeClient, PeerAddress, ReceiverClient, SenderClient, SourceAddress
from waiting import PATIENCE_S, eventually

_CLIENTS = {"sender": SenderClient, "receiver": ReceiverClient, "both": NodeClient}


def content(seed: int, count: int, len_bytes: int) -> list[np.ndarray]:
    """The bytes of a request's chunks, the same on every host."""
    dice = np.random.default_rng(seed)
    return [dice.integers(0, 256, len_bytes, dtype=np.uint8) for _ in range(count)]


@dataclass
class Running:
    """A daemon and its only client."""

    daemon: Daemon
    client: Any


class Agent:
    """What a test can ask for, by name. Of each role a host has one daemon."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._running: dict[str, Running] = {}

    def start(self, role: str, layout: dict[str, Any], sets: Sequence[str]) -> dict[str, Any]:
        """Starts a `sender`, a `receiver`, or a node that is `both`; its ready line."""
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="pd-hosts-")))
        (folder / "layout.json").write_text(json.dumps(layout), encoding="utf-8")
        arguments = ["--config", str(TOP / "configs" / "loopback.yaml"), "--kv-layout", str(folder / "layout.json")]
        for key in (*sets, *(["pd_role=both"] if role == "both" else [])):
            arguments += ["--set", key]
        program = binary("pd-receiver" if role == "receiver" else "pd-sender")
        daemon = Daemon(program, arguments, ready_timeout_s=PATIENCE_S)
        client = _CLIENTS[role](daemon.ready.connector, reply_timeout_s=PATIENCE_S)
        self._running[role] = Running(daemon, client)
        return {field: getattr(daemon.ready, field) for field in daemon.ready.__struct_fields__}

    def stop(self, role: str, kill: bool = False) -> None:
        """Ends a daemon, as an operator does or without a word."""
        running = self._running.pop(role)
        if kill:
            os.kill(running.daemon.ready.pid, signal.SIGKILL)
        running.client.close()
        running.daemon.close()

    def ship(self, role: str, request: str, keys: Sequence[str], seed: int, receiver: tuple[str, int, int]) -> int:
        """A request from `open` to `sent`; how many bytes were written."""
        self.fill(role, request, keys, seed, receiver)
        return self.sent(role, request)

    def fill(self, role: str, request: str, keys: Sequence[str], seed: int, receiver: tuple[str, int, int]) -> None:
        """A request up to its last `send`."""
        client = self._running[role].client
        chunk_tokens = client.attached.chunk_tokens
        opened = client.open(request, list(keys), last_chunk_tokens=chunk_tokens, receiver=PeerAddress(*receiver))
        missing = [index for index in range(len(keys)) if index not in opened.already_sent]
        self._send(client, request, client.stage(request, missing) if missing else [], len(keys), seed)

    def sent(self, role: str, request: str) -> int:
        """Waits until it is sent."""
        return self._running[role].client.wait_sent(request, PATIENCE_S).bytes

    def park(self, role: str, request: str, keys: Sequence[str], seed: int) -> None:
        """Chunks for a receiver that is not known."""
        client = self._running[role].client
        opened = client.park(request, list(keys), last_chunk_tokens=client.attached.chunk_tokens)
        self._send(client, request, opened.slots, len(keys), seed)
        client.wait_sent(request, PATIENCE_S)

    def receive(self, role: str, request: str, count: int, seed: int) -> None:
        """Waits for a request, and compares every byte."""
        self._check(role, self._running[role].client.wait(request, wait_s=PATIENCE_S), count, seed)

    def fetch(self, role: str, request: str, keys: Sequence[str], seed: int, source: tuple[str, int]) -> None:
        """Asks for parked chunks, and compares every byte."""
        lease = self._running[role].client.fetch(request, SourceAddress(*source), list(keys), wait_s=PATIENCE_S)
        self._check(role, lease, len(keys), seed)

    def settled(self, role: str) -> None:
        """Waits until no request is under way, and no slot is taken or quarantined."""
        client = self._running[role].client

        def taken() -> dict[str, int]:
            status = client.status()
            return {name: getattr(status, name) for name in ("slots_reserved", "slots_quarantined", "slots_held", "requests_active")}

        eventually(lambda: not any(taken().values()), left=taken)

    def get(self, url: str) -> tuple[int, str]:
        """Status and body of an answer; 0 where nobody answers."""
        try:
            with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError as error:
            return 0, str(error)

    def post(self, url: str, body: dict[str, Any]) -> dict[str, Any]:
        """The JSON that comes back."""
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{error.code}: {error.read().decode()}") from None

    def usage(self, role: str) -> tuple[int, int]:
        """Descriptors that a daemon has open, and bytes of memory that are its own."""
        process = Path(f"/proc/{self._running[role].daemon.ready.pid}")
        pages = int((process / "statm").read_text().split()[1]) - int((process / "statm").read_text().split()[2])
        return len(list((process / "fd").iterdir())), pages * os.sysconf("SC_PAGE_SIZE")

    @staticmethod
    def _send(client: Any, request: str, slots: Sequence[Any], count: int, seed: int) -> None:
        data = content(seed, count, client.attached.chunk_bytes)
        for slot in slots:
            client.view(slot)[:] = data[slot.chunk]
        client.send(request, slots, last=True)

    def _check(self, role: str, lease: Any, count: int, seed: int) -> None:
        data = content(seed, count, self._running[role].client.attached.chunk_bytes)
        with lease:
            assert len(lease.chunks) == count, f"{len(lease.chunks)} chunks came, expected {count}"
            for index, expected in enumerate(data):
                assert np.array_equal(lease.view(index), expected), f"chunk {index} differs"

    def serve(self, pipe: Connection) -> None:
        """Does what is asked, until nobody asks any more."""
        while True:
            try:
                name, arguments, named = pipe.recv()
            except EOFError:
                return
            try:
                pipe.send((True, getattr(self, name)(*arguments, **named)))
            except Exception as error:  # The test is told, whatever it is.
                pipe.send((False, Failed(f"{type(error).__name__}: {error}", str(getattr(error, "kind", "")))))


if __name__ == "__main__":
    # The first process of a host has no handler for the signal that ends it, and Linux then ignores it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    Agent().serve(Connection(int(sys.argv[1])))
