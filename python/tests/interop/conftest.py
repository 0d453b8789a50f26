"""Fixtures of the interop tests. They need scripts/setup-interop's environment, and say so where it is not there."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from harness import LAYOUT, Addresses, Proxy, StockProcess, missing, start_daemon, wait_listening, write_config
from free_ports import free_ports
from pd_backend import Daemon, ReceiverClient


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without LMCache every test here is skipped, with what to run; `make interop` has it installed by then."""
    if (reason := missing()) is not None:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


@dataclass
class StockPair:
    """Stock senders and a stock receiver, with the proxy that the senders notify."""

    receiver: StockProcess
    at: Addresses
    senders: list[StockProcess]
    proxy: Proxy
    stack: ExitStack = field(repr=False)

    @property
    def sender(self) -> StockProcess:
        return self.senders[0]


@pytest.fixture
def start_stock_pair(tmp_path: Path) -> Iterator[Callable[..., StockPair]]:
    """Starts a stock receiver and stock senders, of the given modes, and ends them after the test."""
    with ExitStack() as stack:

        def start(
            sender_mode: str, receiver_mode: str, *, pages: int = 80, senders: int = 1, query: bool = False
        ) -> StockPair:
            layout = tmp_path / "layout.json"
            layout.write_text(json.dumps(LAYOUT))
            proxy = Proxy()
            stack.callback(proxy.close)
            init, alloc, query_port = free_ports(3)
            at = Addresses(init, alloc, query_port if query else None)

            def process(role: str, name: str, config: Path) -> StockProcess:
                return stack.enter_context(StockProcess(role, config, layout, log=tmp_path / f"{name}.log"))

            receiver_yaml = write_config(tmp_path / "receiver.yaml", "receiver", mode=receiver_mode, pages=pages, at=at)
            sender_yaml = write_config(
                tmp_path / "sender.yaml", "sender", mode=sender_mode, pages=pages, proxy_port=proxy.port
            )
            pair = StockPair(
                process("receiver", "receiver", receiver_yaml),
                at,
                [process("sender", f"sender{index}", sender_yaml) for index in range(senders)],
                proxy,
                stack,
            )
            for one in (pair.receiver, *pair.senders):
                one.wait_ready()
            wait_listening(at)
            return pair

        yield start


@dataclass
class OurReceiver:
    """A pd-receiver with its client, stock senders, and the proxy that they notify."""

    daemon: Daemon
    client: ReceiverClient
    at: Addresses
    senders: list[StockProcess]
    proxy: Proxy

    @property
    def sender(self) -> StockProcess:
        return self.senders[0]


@pytest.fixture
def start_our_receiver(tmp_path: Path) -> Iterator[Callable[..., OurReceiver]]:
    """Starts a pd-receiver and stock senders of the given mode, and ends them after the test."""
    with ExitStack() as stack:

        def start(
            mode: str,
            *,
            pages: int = 80,
            senders: int = 1,
            query: bool = False,
            sets: Sequence[str] = (),
            theirs: dict[str, Any] | None = None,
        ) -> OurReceiver:
            layout, their_layout = tmp_path / "layout.json", tmp_path / "their-layout.json"
            layout.write_text(json.dumps(LAYOUT))
            their_layout.write_text(json.dumps(LAYOUT | (theirs or {})))
            proxy = Proxy()
            stack.callback(proxy.close)
            sender_yaml = write_config(
                tmp_path / "sender.yaml",
                "sender",
                mode=mode,
                pages=pages,
                proxy_port=proxy.port,
                layout=LAYOUT | (theirs or {}),
            )
            stock = [
                stack.enter_context(StockProcess("sender", sender_yaml, their_layout, log=tmp_path / f"sender{index}.log"))
                for index in range(senders)
            ]
            init, alloc, query_port = free_ports(3)
            at = Addresses(init, alloc, query_port if query else None)
            receiver_yaml = write_config(tmp_path / "receiver.yaml", "receiver", mode=mode, pages=pages, at=at)
            daemon = stack.enter_context(start_daemon("receiver", receiver_yaml, layout, sets))
            client = stack.enter_context(ReceiverClient(daemon.ready.connector))
            for one in stock:
                one.wait_ready()
            return OurReceiver(daemon, client, at, stock, proxy)

        yield start
