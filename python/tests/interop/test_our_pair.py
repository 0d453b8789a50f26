"""pd-sender and pd-receiver started with an lmcache.yaml each, as LMCache's own processes are: the pairing without LMCache."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from harness import LAYOUT, Addresses, Proxy, keys_of, pattern, start_daemon, token_bytes, write_config
from pd_backend import PeerAddress, ReceiverClient, SenderClient
from waiting import eventually

TOKEN_BYTES = token_bytes(LAYOUT)
CHUNK_TOKENS = int(LAYOUT["chunk_tokens"])
PAGES = 80


class OurPair:
    """A pd-receiver, two pd-senders and the proxy, from YAML that has LMCache's keys alone."""

    def __init__(self, mode: str, folder: Path, stack: ExitStack) -> None:
        layout = folder / "layout.json"
        layout.write_text(json.dumps(LAYOUT))
        self.proxy = Proxy()
        stack.callback(self.proxy.close)
        receiver = write_config(folder / "receiver.yaml", "receiver", mode=mode, pages=PAGES, at=Addresses(0, 0))
        sender = write_config(folder / "sender.yaml", "sender", mode=mode, pages=PAGES, proxy_port=self.proxy.port)
        ready = stack.enter_context(start_daemon("receiver", receiver, layout)).ready
        assert ready.init_port and ready.alloc_port
        self.at = PeerAddress(host="127.0.0.1", init_port=ready.init_port, alloc_port=ready.alloc_port)
        self.receiver = stack.enter_context(ReceiverClient(ready.connector))
        self.senders = [
            stack.enter_context(SenderClient(stack.enter_context(start_daemon("sender", sender, layout)).ready.connector))
            for _ in range(2)
        ]

    def start(self, req_id: str, keys: list[str], last_tokens: int, sender: int = 0, seed: str = "") -> list[int]:
        """Opens, fills and sends a request: which of its chunks were there already."""
        client = self.senders[sender]
        opened = client.open(req_id, keys, last_chunk_tokens=last_tokens, receiver=self.at)
        missing = [index for index in range(len(keys)) if index not in opened.already_sent]
        slots = client.stage(req_id, missing) if missing else []
        for slot in slots:
            client.view(slot)[:] = np.frombuffer(pattern(seed + keys[slot.chunk], slot.len_bytes), dtype=np.uint8)
        client.send(req_id, slots, last=True)
        return list(opened.already_sent)

    def check(self, req_id: str, keys: list[str], last_tokens: int, seed: str = "") -> None:
        """Reads the request as a decode worker that heard from the proxy does, and compares every byte."""
        tokens = [CHUNK_TOKENS] * (len(keys) - 1) + [last_tokens]
        with self.receiver.wait(req_id, uncommitted=True) as lease:
            assert [chunk.key for chunk in lease.chunks if chunk] == keys
            for index, (key, count) in enumerate(zip(keys, tokens, strict=True)):
                assert bytes(lease.view(index)) == pattern(seed + key, count * TOKEN_BYTES), f"chunk {index}"


@pytest.fixture(params=["sync", "async"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OurPair]:
    with ExitStack() as stack:
        yield OurPair(request.param, tmp_path, stack)


def test_every_byte_arrives_and_the_proxy_is_told(pair: OurPair) -> None:
    # Broken in production: whoever replaced one side is stuck with LMCache at the other.
    for count, last_tokens in [(1, CHUNK_TOKENS), (8, CHUNK_TOKENS), (64, CHUNK_TOKENS), (5, 100), (1, 1)]:
        name = f"request-{count}-{last_tokens}"
        keys = keys_of(LAYOUT, name, count)
        assert pair.start(name, keys, last_tokens) == []
        assert pair.proxy.next()[0] == name
        pair.check(name, keys, last_tokens)
    assert pair.proxy.quiet(0.2)


def test_chunks_that_are_there_are_not_sent_again(pair: OurPair) -> None:
    # Broken in production: a shared prefix is moved again for each request, or its slots are written while they are read.
    shared = keys_of(LAYOUT, "shared", 4)
    pair.start("first", shared, CHUNK_TOKENS)
    assert pair.proxy.next()[0] == "first"
    assert pair.start("second", shared, CHUNK_TOKENS, sender=1, seed="other") == [0, 1, 2, 3]
    assert pair.proxy.next()[0] == "second"
    pair.check("second", shared, CHUNK_TOKENS)


def test_two_senders_with_the_same_keys_at_once_both_deliver(pair: OurPair) -> None:
    # Broken in production: the second is told 'already sent' and notifies before the first has written.
    keys = keys_of(LAYOUT, "same", 16)
    first, second = pair.senders
    pending = [
        client.start_open(f"request-{index}", keys, last_chunk_tokens=CHUNK_TOKENS, receiver=pair.at)
        for index, client in enumerate((first, second))
    ]
    # Neither has sent anything, so nobody is told that anything is there. Each is granted, or waits for the other's commit.
    eventually(lambda: sum(one.done() for one in pending) + pair.receiver.status().requests_waiting == 2)
    granted = [index for index, one in enumerate(pending) if one.done() and not one.result().already_sent]
    assert granted
    for index in granted:
        client = pair.senders[index]
        slots = client.stage(f"request-{index}", range(16))
        for slot in slots:
            client.view(slot)[:] = np.frombuffer(pattern(keys[slot.chunk], slot.len_bytes), dtype=np.uint8)
        client.send(f"request-{index}", slots, last=True)
    for index in {0, 1} - set(granted):
        assert list(pending[index].result().already_sent) == list(range(16)), "all of it was committed meanwhile"
        pair.senders[index].send(f"request-{index}", [], last=True)
    assert {pair.proxy.next()[0] for _ in pending} == {"request-0", "request-1"}
    for index in range(2):
        pair.check(f"request-{index}", keys, CHUNK_TOKENS)


def test_a_cancel_gives_every_slot_back(pair: OurPair) -> None:
    # Broken in production: the buffer shrinks with every aborted prompt.
    keys = keys_of(LAYOUT, "cancelled", PAGES)
    for _ in range(3):
        pair.senders[0].open("cancelled", keys, last_chunk_tokens=CHUNK_TOKENS, receiver=pair.at)
        pair.senders[0].cancel("cancelled")
        assert pair.proxy.next()[0] == "cancelled", "the router does not wait for it"
    assert pair.start("whole", keys, CHUNK_TOKENS) == []
    assert pair.proxy.next()[0] == "whole"
    pair.check("whole", keys, CHUNK_TOKENS)
