"""Fixtures of the interop tests. They need scripts/setup-interop's environment, and say so where it is not there."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from harness import LAYOUT, Addresses, Proxy, StockProcess, free_ports, missing, write_config


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
            return pair

        yield start
