"""LMCache against LMCache: what shows that the harness is right before it is pointed at this project's daemons."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest
from conftest import StockPair
from harness import LAYOUT, keys_of, pattern, spec, token_bytes

TOKEN_BYTES = token_bytes(LAYOUT)
CHUNK_TOKENS = int(LAYOUT["chunk_tokens"])
LAST_TOKENS = 100


def put(pair: StockPair, req_id: str, keys: list[str], *, last_tokens: int = LAST_TOKENS, seed: str = "") -> None:
    """Submits a request whose chunks hold the patterns of `seed` and its key, and waits for what the engine would see."""
    seeds = [seed + key for key in keys]
    pair.sender.ask("put", keys=keys, seeds=seeds, last_tokens=last_tokens, spec=spec(pair.at, req_id, len(keys)), callbacks=True)
    assert pair.sender.event("submitted")["req_id"] == req_id


def expected(keys: list[str], *, last_tokens: int = LAST_TOKENS, seed: str = "") -> list[tuple[str, int]]:
    """Checksum and length of each chunk as it was put."""
    tokens = [CHUNK_TOKENS] * (len(keys) - 1) + [last_tokens]
    return [
        (hashlib.sha256(pattern(seed + key, count * TOKEN_BYTES)).hexdigest(), count * TOKEN_BYTES)
        for key, count in zip(keys, tokens, strict=True)
    ]


def held(pair: StockPair, keys: list[str]) -> list[tuple[str, int]]:
    """Checksum and length of each chunk as the receiver has it."""
    return [(chunk["sha256"], chunk["len_bytes"]) for chunk in pair.receiver.ask("read", keys=keys)["chunks"]]


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_every_byte_arrives_and_the_proxy_is_told(start_stock_pair: Callable[..., StockPair], mode: str) -> None:
    # The harness would call a peer broken that is not, or pass one that is.
    pair = start_stock_pair(mode, mode)
    for count in (1, 8, 64):
        req_id, keys = f"request-{count}", keys_of(LAYOUT, f"{mode}-{count}", count)
        assert pair.receiver.ask("contains", keys=keys)["contains"] == [False] * count
        put(pair, req_id, keys)
        assert pair.proxy.next()[0] == req_id
        assert held(pair, keys) == expected(keys)
        assert {pair.sender.event("callback")["key"] for _ in keys} == set(keys)
        if mode == "sync":
            assert pair.sender.event("future")["written"] == count
        assert pair.receiver.ask("free", keys=keys)["pages_free"] == 80
        assert pair.receiver.ask("contains", keys=keys)["contains"] == [False] * count


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_keys_that_are_there_are_not_sent_again(start_stock_pair: Callable[..., StockPair], mode: str) -> None:
    # A harness that cannot tell old bytes from new ones could not tell whether a repeated key was sent.
    pair = start_stock_pair(mode, mode)
    keys = keys_of(LAYOUT, mode, 4)
    put(pair, "first", keys, seed="first")
    assert pair.proxy.next()[0] == "first"
    more = keys + keys_of(LAYOUT, f"{mode}-more", 1)
    # The last chunk of the first request is short; among the second's it would be a whole one, so leave it the last.
    again = [*more[:3], more[4]]
    for _ in keys:
        pair.sender.event("callback")
    if mode == "sync":
        pair.sender.event("future")
    put(pair, "second", again, seed="second")
    assert pair.proxy.next()[0] == "second"
    assert held(pair, again) == expected(keys, seed="first")[:3] + expected(again, seed="second")[3:]
    counts = [chunk["ref_count"] for chunk in pair.receiver.ask("read", keys=again)["chunks"]]
    assert counts == [2, 2, 2, 1]


def test_two_senders_fill_one_receiver(start_stock_pair: Callable[..., StockPair]) -> None:
    # Senders that share an identity would take each other's answers.
    pair = start_stock_pair("async", "async", senders=2)
    keys = [keys_of(LAYOUT, f"sender-{index}", 8) for index in range(2)]
    for index, sender in enumerate(pair.senders):
        sender.ask(
            "put", keys=keys[index], seeds=keys[index], last_tokens=LAST_TOKENS, spec=spec(pair.at, f"request-{index}", 8)
        )
    assert {pair.proxy.next()[0], pair.proxy.next()[0]} == {"request-0", "request-1"}
    for some in keys:
        assert held(pair, some) == expected(some)


def test_a_cancelled_request_gives_its_pages_back(start_stock_pair: Callable[..., StockPair]) -> None:
    # A cancel that the harness swallows would pass for one that works.
    pair = start_stock_pair("async", "async")
    keys = keys_of(LAYOUT, "cancelled", 4)
    half = spec(pair.at, "cancelled", 8, last=False)
    pair.sender.ask("put", keys=keys, seeds=keys, last_tokens=CHUNK_TOKENS, spec=half, callbacks=True)
    pair.sender.event("submitted")
    for _ in keys:
        pair.sender.event("callback")
    assert pair.receiver.ask("status")["pages_free"] == 76
    pair.sender.ask("cancel", req_id="cancelled")
    # Whatever is asked next on the same alloc socket is answered after the cancel.
    put(pair, "after", keys_of(LAYOUT, "after", 1))
    assert pair.proxy.next()[0] == "after"
    assert pair.receiver.ask("contains", keys=keys)["contains"] == [False] * 4
    assert pair.receiver.ask("status")["pages_free"] == 79


def test_a_synchronous_sender_reads_what_the_receiver_has(start_stock_pair: Callable[..., StockPair]) -> None:
    # The harness's cache query would find nothing where there is something.
    pair = start_stock_pair("sync", "sync", query=True)
    keys = keys_of(LAYOUT, "query", 3)
    put(pair, "put", keys, last_tokens=CHUNK_TOKENS)
    assert pair.proxy.next()[0] == "put"
    absent = keys_of(LAYOUT, "absent", 1)
    answer = pair.sender.ask("query", keys=[*keys, *absent], spec=spec(pair.at, "query", 4))
    assert answer["read"] == 3
    assert answer["sha256"][:3] == [digest for digest, _ in expected(keys, last_tokens=CHUNK_TOKENS)]
