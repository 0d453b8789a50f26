"""pd-sender against LMCache's receivers, unmodified, in both modes, over real NIXL: every byte is compared there."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import StockPair
from harness import LAYOUT, TOP, StockProcess, keys_of, pattern, token_bytes, wait_listening, write_config

sys.path.insert(0, str(TOP / "python"))

from pd_backend import Daemon, Kind, PdError, PeerAddress, RequestRefused, SenderClient, find_binary
from waiting import eventually

TOKEN_BYTES = token_bytes(LAYOUT)
CHUNK_TOKENS = int(LAYOUT["chunk_tokens"])
LAST_TOKENS = 100

both_modes = pytest.mark.parametrize("mode", ["sync", "async"])


@dataclass
class Ours:
    """A pd-sender with its client, and the stock receiver that it sends to."""

    client: SenderClient
    stock: StockPair
    tmp_path: Path
    mode: str

    @property
    def address(self) -> PeerAddress:
        at = self.stock.at
        return PeerAddress(host="127.0.0.1", init_port=at.init_port, alloc_port=at.alloc_port)

    def open(self, name: str, keys: list[str], last_tokens: int = LAST_TOKENS, **more: Any) -> list[int]:
        opened = self.client.open(name, keys, last_chunk_tokens=last_tokens, receiver=self.address, **more)
        return list(opened.already_sent)

    def start_send(self, name: str, keys: list[str], there: list[int], seed: str = "") -> None:
        """Fills and sends the chunks that are not there."""
        missing = [index for index in range(len(keys)) if index not in there]
        slots = self.client.stage(name, missing) if missing else []
        for slot in slots:
            content = pattern(seed + keys[slot.chunk], slot.len_bytes)
            self.client.view(slot)[:] = np.frombuffer(content, dtype=np.uint8)
        self.client.send(name, slots, last=True)

    def deliver(self, name: str, keys: list[str], last_tokens: int = LAST_TOKENS, seed: str = "") -> list[int]:
        """A whole request: which of its chunks were there already."""
        there = self.open(name, keys, last_tokens)
        self.start_send(name, keys, there, seed)
        self.client.wait_sent(name, 30)
        assert self.stock.proxy.next()[0] == name
        return there

    def held(self, keys: list[str]) -> list[dict[str, Any]]:
        return list(self.stock.receiver.ask("read", keys=keys)["chunks"])

    def check(self, keys: list[str], last_tokens: int = LAST_TOKENS, seed: str = "") -> None:
        """Compares every chunk at the receiver with what was sent."""
        tokens = [CHUNK_TOKENS] * (len(keys) - 1) + [last_tokens]
        sent = [pattern(seed + key, count * TOKEN_BYTES) for key, count in zip(keys, tokens, strict=True)]
        expected = [(hashlib.sha256(chunk).hexdigest(), len(chunk)) for chunk in sent]
        assert [(chunk["sha256"], chunk["len_bytes"]) for chunk in self.held(keys)] == expected

    def pages_free(self) -> int:
        return int(self.stock.receiver.ask("status")["pages_free"])

    def restart_receiver(self) -> None:
        """Another process on the same ports."""
        self.stock.receiver.close()
        receiver = StockProcess(
            "receiver", self.tmp_path / "receiver.yaml", self.tmp_path / "layout.json", log=self.tmp_path / "again.log"
        )
        self.stock.receiver = self.stock.stack.enter_context(receiver)
        receiver.wait_ready()
        wait_listening(self.stock.at)


def start_sender(stock: StockPair, tmp_path: Path, mode: str, layout: dict[str, Any], **settings: Any) -> Ours:
    """A pd-sender for this receiver; its end comes with the receiver's."""
    ours = tmp_path / "ours.json"
    ours.write_text(json.dumps(LAYOUT | layout))
    config = write_config(tmp_path / "ours.yaml", "sender", mode=mode, pages=80, proxy_port=stock.proxy.port, **settings)
    directory = os.environ.get("PD_BIN_DIR") or TOP / "target" / "debug"
    arguments = ["--config", str(config), "--kv-layout", str(ours)]
    daemon = Daemon(find_binary("pd-sender", directory), arguments, env={"UCX_NET_DEVICES": "lo"})
    client = stock.stack.enter_context(SenderClient(stock.stack.enter_context(daemon).ready.connector))
    return Ours(client, stock, tmp_path, mode)


@pytest.fixture
def start_ours(start_stock_pair: Callable[..., StockPair], tmp_path: Path) -> Callable[..., Ours]:
    """Starts a stock receiver and a pd-sender, which end after the test."""

    def start(mode: str, *, pages: int = 80, layout: dict[str, Any] | None = None, **settings: Any) -> Ours:
        stock = start_stock_pair(mode, mode, pages=pages, senders=0)
        return start_sender(stock, tmp_path, mode, layout or {}, **settings)

    return start


@both_modes
def test_every_byte_arrives_and_the_proxy_is_told(start_ours: Callable[..., Ours], mode: str) -> None:
    # Broken in production: a decode worker that runs LMCache computes on wrong bytes, or waits for ever.
    ours = start_ours(mode)
    for count, last_tokens in [(1, CHUNK_TOKENS), (8, CHUNK_TOKENS), (64, CHUNK_TOKENS), (5, LAST_TOKENS), (1, 1)]:
        name, keys = f"request-{count}-{last_tokens}", keys_of(LAYOUT, f"{mode}-{count}-{last_tokens}", count)
        assert ours.deliver(name, keys, last_tokens) == []
        ours.check(keys, last_tokens)
        assert {chunk["ref_count"] for chunk in ours.held(keys)} == {1}
        assert ours.stock.receiver.ask("free", keys=keys)["pages_free"] == 80
    assert ours.stock.proxy.quiet(0.2)


@both_modes
def test_chunks_that_are_there_are_not_sent_again(start_ours: Callable[..., Ours], mode: str) -> None:
    # Broken in production: a shared prefix is sent with every request, or its pages are written while they are read.
    ours = start_ours(mode)
    keys = keys_of(LAYOUT, "shared", 4)
    ours.deliver("first", keys, CHUNK_TOKENS)
    more = [*keys, *keys_of(LAYOUT, "more", 1)]
    assert ours.deliver("second", more, LAST_TOKENS, seed="other") == [0, 1, 2, 3]
    ours.check(keys, CHUNK_TOKENS)
    ours.check(more[4:], LAST_TOKENS, seed="other")


@both_modes
def test_two_senders_fill_one_receiver(start_ours: Callable[..., Ours], mode: str) -> None:
    # Broken in production: a second prefill worker takes the first one's name at the receiver, or its pages.
    first = start_ours(mode)
    both = [first, start_sender(first.stock, first.tmp_path, mode, {})]
    shared = keys_of(LAYOUT, "shared", 2)
    first.deliver("shared", shared, CHUNK_TOKENS)
    for turn in range(4):
        # Everything is open at once, so that neither finds the other's pages free.
        requests = [(sender, f"{turn}-{index}", keys_of(LAYOUT, f"{turn}-{index}", 8)) for index, sender in enumerate(both)]
        for sender, name, keys in requests:
            assert sender.open(name, shared + keys) == [0, 1]
        for sender, name, keys in requests:
            sender.start_send(name, shared + keys, [0, 1])
        for sender, name, _ in requests:
            sender.client.wait_sent(name, 30)
        assert sorted(first.stock.proxy.next()[0] for _ in requests) == [name for _, name, _ in requests]
        for _, _, keys in requests:
            first.check(keys)
    first.check(shared, CHUNK_TOKENS)


@both_modes
def test_a_retry_after_a_cancel_is_written(start_ours: Callable[..., Ours], mode: str) -> None:
    # Broken in production: "already sent" is believed of pages that were granted and never written.
    ours = start_ours(mode)
    keys = keys_of(LAYOUT, "retry", 6)
    assert ours.open("retry", keys) == []
    ours.client.cancel("retry")
    if mode == "async":
        eventually(lambda: ours.pages_free() == 80)
    else:
        assert ours.pages_free() == 74
    assert ours.deliver("retry", keys) == []
    ours.check(keys)
    assert ours.pages_free() == 74


@both_modes
def test_a_receiver_that_was_restarted_is_met_anew(start_ours: Callable[..., Ours], mode: str) -> None:
    # Broken in production: every later request fails until the prefill worker is restarted too.
    ours = start_ours(mode)
    keys = keys_of(LAYOUT, "restart", 8)
    ours.deliver("first", keys)
    ours.open("open", keys_of(LAYOUT, "open", 2))
    ours.restart_receiver()
    with pytest.raises(PdError, match="peer_lost"):
        ours.client.wait_sent("open", 30)
    assert ours.deliver("second", keys) == []
    ours.check(keys)


@both_modes
def test_a_full_receiver_fails_a_request_and_serves_the_next(start_ours: Callable[..., Ours], mode: str) -> None:
    # Broken in production: one request that does not fit keeps all others from that receiver, or takes their pages.
    ours = start_ours(mode, pages=8, pd_allocation_timeout_sec=1.0, pd_commit_timeout_sec=1.0)
    keys = keys_of(LAYOUT, "fits", 6)
    ours.deliver("fits", keys)
    big = keys_of(LAYOUT, "big", 4)
    with pytest.raises(RequestRefused) as refused:
        ours.open("big", big)
    # The asynchronous receiver gives up by itself, after its own pd_allocation_timeout_sec of 10 s.
    assert refused.value.kind == Kind.DEADLINE, str(refused.value)
    assert "(LMCache) has not answered the allocation" in refused.value.text
    assert ours.stock.receiver.ask("free", keys=keys)["pages_free"] >= 4
    small = keys_of(LAYOUT, "small", 2)
    ours.deliver("small", small)
    ours.check(small)
    ours.deliver("big", big)
    ours.check(big)


def test_another_model_is_refused(start_ours: Callable[..., Ours]) -> None:
    # Broken in production: pages of another length are written.
    ours = start_ours("sync", layout={"layers": 4})
    with pytest.raises(RequestRefused) as refused:
        ours.open("other", keys_of(LAYOUT, "other", 1))
    assert refused.value.kind == Kind.LAYOUT_MISMATCH
    assert "(LMCache) has 65536 bytes and a chunk of this sender has 131072" in refused.value.text
