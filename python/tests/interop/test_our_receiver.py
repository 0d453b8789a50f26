"""A stock LMCache sender, in either mode, and our pd-receiver: bytes, order, and what happens when something ends."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conftest import OurReceiver
from harness import LAYOUT, StockProcess, keys_of, pattern, spec, token_bytes
from waiting import eventually

MODES = pytest.mark.parametrize("mode", ["sync", "async"])
TOKEN_BYTES = token_bytes(LAYOUT)
CHUNK_TOKENS = int(LAYOUT["chunk_tokens"])
LAST_TOKENS = 100
Start = Callable[..., OurReceiver]


def put(
    pair: OurReceiver,
    req_id: str,
    keys: list[str],
    *,
    sender: StockProcess | None = None,
    total: int | None = None,
    last: bool = True,
    last_tokens: int = LAST_TOKENS,
    seed: str = "",
) -> None:
    (sender or pair.sender).ask(
        "put",
        keys=keys,
        seeds=[seed + key for key in keys],
        last_tokens=last_tokens,
        spec=spec(pair.at, req_id, total or len(keys), last),
        callbacks=True,
    )


def expected(keys: list[str], *, last_tokens: int = LAST_TOKENS, seed: str = "") -> list[bytes]:
    tokens = [CHUNK_TOKENS] * (len(keys) - 1) + [last_tokens]
    return [pattern(seed + key, count * TOKEN_BYTES) for key, count in zip(keys, tokens, strict=True)]


def fetch(pair: OurReceiver, keys: list[str]) -> list[bytes]:
    """What a decode worker reads that has heard from the proxy."""
    with pair.client.lookup(keys, uncommitted=True) as lease:
        return [bytes(lease.view(index)) for index in range(len(keys))]


def until(done: Callable[[], bool], what: str) -> None:
    eventually(done, left=lambda: what)


def slots(pair: OurReceiver) -> tuple[int, int]:
    """Written or granted, and quarantined."""
    status = pair.client.status()
    return status.slots_reserved, status.slots_quarantined


@MODES
def test_every_byte_arrives_and_the_proxy_is_told(start_our_receiver: Start, mode: str) -> None:
    # A user who replaces the decode side alone gets wrong bytes, or none.
    pair = start_our_receiver(mode)
    for count in (1, 8, 64):
        req_id, keys = f"request-{count}", keys_of(LAYOUT, f"{mode}-{count}", count)
        put(pair, req_id, keys)
        assert pair.proxy.next()[0] == req_id
        # Nobody has told the receiver that anything is written.
        unvouched = pair.client.lookup(keys)
        assert unvouched.chunks == (None,) * count and unvouched.granted == tuple(range(count))
        if mode == "async":
            with pair.client.wait(req_id, uncommitted=True) as lease:
                assert [bytes(lease.view(index)) for index in range(count)] == expected(keys)
        assert fetch(pair, keys) == expected(keys)
        assert {pair.sender.event("callback")["key"] for _ in keys} == set(keys)
    assert slots(pair) == (0, 0)


@MODES
def test_keys_that_are_there_are_not_sent_again(start_our_receiver: Start, mode: str) -> None:
    # A shared prefix is moved again for each request, or old bytes are taken for new ones.
    pair = start_our_receiver(mode)
    keys = keys_of(LAYOUT, mode, 4)
    put(pair, "first", keys, last_tokens=CHUNK_TOKENS, seed="first")
    assert pair.proxy.next()[0] == "first"
    assert fetch(pair, keys) == expected(keys, last_tokens=CHUNK_TOKENS, seed="first")
    again = [*keys[:3], *keys_of(LAYOUT, f"{mode}-more", 1)]
    put(pair, "second", again, seed="second")
    assert pair.proxy.next()[0] == "second"
    assert fetch(pair, again) == expected(again, seed="first")[:3] + expected(again, seed="second")[3:]


@MODES
def test_two_senders_with_the_same_keys_at_once_both_deliver(start_our_receiver: Start, mode: str) -> None:
    # The second is told 'already sent' while the first still writes.
    pair = start_our_receiver(mode, senders=2)
    keys = keys_of(LAYOUT, mode, 16)
    for index, sender in enumerate(pair.senders):
        put(pair, f"request-{index}", keys, sender=sender)
    for _ in pair.senders:
        # Without a name a request is found by its keys, so of two with the same keys the second waits for the first's reader.
        req_id = pair.proxy.next()[0]
        if mode == "async":
            with pair.client.wait(req_id, uncommitted=True) as lease:
                assert [bytes(lease.view(index)) for index in range(16)] == expected(keys)
        assert fetch(pair, keys) == expected(keys)
    more = keys_of(LAYOUT, f"{mode}-more", 8)
    put(pair, "more", more, sender=pair.senders[1])
    assert pair.proxy.next()[0] == "more"
    assert fetch(pair, more) == expected(more)


def test_a_prefill_in_batches_is_one_request(start_our_receiver: Start) -> None:
    # Chunked prefill: the decode worker gets the first batch alone, or in the wrong order.
    pair = start_our_receiver("async")
    keys = keys_of(LAYOUT, "batches", 12)
    put(pair, "batches", keys[:8], total=12, last=False, last_tokens=CHUNK_TOKENS)
    for _ in keys[:8]:
        pair.sender.event("callback")
    assert slots(pair) == (12, 0)
    put(pair, "batches", keys[8:], total=12)
    assert pair.proxy.next()[0] == "batches"
    with pair.client.wait("batches", uncommitted=True) as lease:
        assert [chunk.key for chunk in lease.chunks if chunk] == keys
        assert [bytes(lease.view(index)) for index in range(12)] == expected(keys)
    put(pair, "next", keys_of(LAYOUT, "next", 1))
    assert pair.proxy.next()[0] == "next", "the proxy was told twice"


def test_a_cancel_frees_its_pages_once_the_sender_has_gone(start_our_receiver: Start) -> None:
    # An aborted prefill's late write lands in another request's chunk, or its pages are lost for good.
    pair = start_our_receiver("async", pages=8, sets=["pd_peer_timeout_sec=2"])
    keys = keys_of(LAYOUT, "cancelled", 4)
    put(pair, "cancelled", keys, total=8, last=False, last_tokens=CHUNK_TOKENS)
    for _ in keys:
        pair.sender.event("callback")
    assert slots(pair) == (8, 0)
    pair.sender.ask("cancel", req_id="cancelled")
    until(lambda: slots(pair) == (0, 4), "what it may have written is quarantined, the rest is free")
    after = keys_of(LAYOUT, "after", 4)
    put(pair, "after", after)
    assert pair.proxy.next()[0] == "after"
    assert fetch(pair, after) == expected(after)
    pair.sender.close()
    until(lambda: slots(pair) == (0, 0), "the sender's end frees them")


@MODES
def test_a_full_receiver_says_no_in_time_and_serves_others_meanwhile(start_our_receiver: Start, mode: str) -> None:
    # LMCache's own receiver sleeps and retries for ever, with every other sender stuck behind it.
    pair = start_our_receiver(mode, pages=80, senders=2, sets=["pd_buffer_size=524288", "pd_allocation_timeout_sec=2"])
    first = keys_of(LAYOUT, "first", 6)
    put(pair, "first", first)
    assert pair.proxy.next()[0] == "first"
    put(pair, "too-much", keys_of(LAYOUT, "too-much", 4))
    small = keys_of(LAYOUT, "small", 2)
    put(pair, "small", small, sender=pair.senders[1])
    assert pair.proxy.next()[0] == "small"
    assert fetch(pair, small) == expected(small)
    put(pair, "larger-than-the-buffer", keys_of(LAYOUT, "larger", 9), sender=pair.senders[1])
    # Both are told no, neither is told to the proxy, and both go on.
    for kind in ("too_large", "no_slots"):
        until(lambda kind=kind: f"kind={kind}" in pair.daemon.stderr(), f"a request that is refused for {kind}")
    assert fetch(pair, first) == expected(first)
    for sender, name in zip(pair.senders, ("after", "last"), strict=True):
        put(pair, name, keys_of(LAYOUT, name, 2), sender=sender)
        assert pair.proxy.next()[0] == name


@MODES
def test_another_layout_is_refused_by_name(start_our_receiver: Start, mode: str) -> None:
    # Pages of one length are written where pages of another are read.
    pair = start_our_receiver(mode, theirs={"layers": 4})
    put(pair, "other", keys_of(LAYOUT | {"layers": 4}, "other", 2))
    until(lambda: "its chunks have 131072 bytes and this receiver's 65536" in pair.daemon.stderr(), "the log names both")
    # This sender has nothing else to say that could be waited for.
    assert pair.proxy.quiet(0.5) and slots(pair) == (0, 0)


@MODES
def test_a_sender_that_is_killed_leaves_nothing_and_another_goes_on(start_our_receiver: Start, mode: str) -> None:
    # Pages of a dead prefill worker are lost until the decode side is restarted.
    pair = start_our_receiver(mode, pages=80, senders=2, sets=["pd_retention_sec=3"])
    keys = keys_of(LAYOUT, "lost", 16)
    put(pair, "lost", keys)
    assert pair.proxy.next()[0] == "lost"
    pair.sender.close()
    until(lambda: slots(pair) == (0, 0), "granted, never fetched, its writer dead")
    put(pair, "other", keys, sender=pair.senders[1], seed="other")
    assert pair.proxy.next()[0] == "other"
    assert fetch(pair, keys) == expected(keys, seed="other")


def test_a_synchronous_sender_reads_what_the_receiver_has(start_our_receiver: Start) -> None:
    # Bidirectional LMCache reads other pages than those it asked for.
    pair = start_our_receiver("sync", query=True)
    keys = keys_of(LAYOUT, "query", 3)
    put(pair, "put", keys, last_tokens=CHUNK_TOKENS)
    assert pair.proxy.next()[0] == "put"
    assert fetch(pair, list(reversed(keys)))[0] == expected(keys, last_tokens=CHUNK_TOKENS)[2]
    absent = keys_of(LAYOUT, "absent", 1)
    answer = pair.sender.ask("query", keys=[*absent, *keys[1:]], spec=spec(pair.at, "query", 3))
    assert answer["read"] == 2
