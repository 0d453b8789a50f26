"""Daemons on hosts of their own, over TCP: what arrives is what was sent, whatever happens to the link."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from conftest import CHUNK_BYTES, OVER_TCP
from network import Failed, Host, Network
from waiting import PATIENCE_S

#: A peer that is cut off is noticed soon. It is connected again when what was written to it before has ended, and TCP may take as long
#: for that as the link was down.
NOTICED_SOON = ("pd_heartbeat_interval_sec=1", "pd_peer_timeout_sec=3", "pd_commit_timeout_sec=3", f"pd_handshake_timeout_sec={PATIENCE_S:.0f}")

Start = Callable[..., dict[str, Any]]


def keys(name: str, count: int) -> list[str]:
    return [f"tests/hosts@1@0@{name}-{index}@bfloat16" for index in range(count)]


def receiver_at(host: Host, ready: dict[str, Any]) -> tuple[str, int, int]:
    return host.address, ready["init_port"], ready["alloc_port"]


@pytest.fixture(params=["IPv4", "IPv6 alone"])
def hosts(request: pytest.FixtureRequest, network: Network) -> tuple[Host, Host]:
    """One for prefill, one for decode."""
    only = request.param == "IPv6 alone"
    return network.host("prefill", ipv6_only=only, env=OVER_TCP), network.host("decode", ipv6_only=only, env=OVER_TCP)


def test_what_is_sent_and_what_is_parked_arrives(hosts: tuple[Host, Host], start: Start) -> None:
    # Broken in production: a pair that works on one host moves nothing, or wrong bytes, between two.
    prefill, decode = hosts
    rendezvous = start(prefill, "sender")["rendezvous_port"]
    receiver = receiver_at(decode, start(decode, "receiver"))
    before = prefill.traffic()
    for number, count in enumerate((1, 5)):
        sent = prefill.call("ship", "sender", f"r{number}", keys(f"r{number}", count), number, receiver)
        assert sent == count * CHUNK_BYTES
        decode.call("receive", "receiver", f"r{number}", count, number)
    # It went over the link, and not from memory to memory in the kernel that these hosts share.
    assert prefill.traffic().sent - before.sent >= 6 * CHUNK_BYTES
    prefill.call("park", "sender", "parked", keys("parked", 3), 7)
    decode.call("fetch", "receiver", "fetched", keys("parked", 3), 7, (prefill.address, rendezvous))
    assert prefill.traffic().sent - before.sent >= 9 * CHUNK_BYTES
    decode.call("settled", "receiver")


def test_nodes_of_both_parts_send_to_each_other(network: Network, start: Start) -> None:
    # Broken in production: servers of both parts on two hosts reach each other in one direction alone.
    one, other = (network.host(name, env=OVER_TCP) for name in ("one", "other"))
    at = {host.name: receiver_at(host, start(host, "both")) for host in (one, other)}
    for host, peer in ((one, other), (other, one)):
        host.call("fill", "both", f"to-{peer.name}", keys(f"to {peer.name}", 4), 3, at[peer.name])
    for host, peer in ((one, other), (other, one)):
        assert host.call("sent", "both", f"to-{peer.name}") == 4 * CHUNK_BYTES
        peer.call("receive", "both", f"to-{peer.name}", 4, 3)


def test_a_link_that_is_cut_under_a_transfer(network: Network, start: Start) -> None:
    # Broken in production: a cable that is pulled leaves a request that never ends, or a pair that never talks again.
    prefill, decode = (network.host(name, env=OVER_TCP) for name in ("prefill", "decode"))
    start(prefill, "sender", *NOTICED_SOON)
    receiver = receiver_at(decode, start(decode, "receiver", *NOTICED_SOON))
    prefill.call("ship", "sender", "before", keys("before", 2), 1, receiver)
    decode.call("receive", "receiver", "before", 2, 1)
    # 32 MiB take more than two seconds at this rate.
    decode.limit("100mbit")
    prefill.call("fill", "sender", "cut", keys("cut", 8), 2, receiver)
    decode.link("down")
    with pytest.raises(Failed) as failed:
        prefill.call("sent", "sender", "cut")
    assert failed.value.kind in ("peer_lost", "transfer_failed", "deadline"), failed.value
    decode.limit(None)
    decode.link("up")
    prefill.call("ship", "sender", "after", keys("after", 8), 3, receiver)
    decode.call("receive", "receiver", "after", 8, 3)
    decode.call("settled", "receiver")
    prefill.call("settled", "sender")


def test_a_decode_host_that_is_gone_without_a_word(network: Network, start: Start) -> None:
    # Broken in production: a decode host that loses power keeps prefill's slots, or cannot be used when it is back.
    prefill, decode = (network.host(name, env=OVER_TCP) for name in ("prefill", "decode"))
    start(prefill, "sender", *NOTICED_SOON)
    ready = start(decode, "receiver", *NOTICED_SOON)
    prefill.call("ship", "sender", "before", keys("before", 2), 1, receiver_at(decode, ready))
    decode.limit("100mbit")
    prefill.call("fill", "sender", "lost", keys("lost", 8), 2, receiver_at(decode, ready))
    decode.crash()
    with pytest.raises(Failed) as failed:
        prefill.call("sent", "sender", "lost")
    assert failed.value.kind in ("peer_lost", "transfer_failed", "deadline"), failed.value
    decode.limit(None)
    decode.link("up")
    decode.boot()
    ports = (f"pd_peer_init_port={ready['init_port']}", f"pd_peer_alloc_port={ready['alloc_port']}")
    receiver = receiver_at(decode, start(decode, "receiver", *NOTICED_SOON, *ports))
    prefill.call("ship", "sender", "after", keys("after", 8), 3, receiver)
    decode.call("receive", "receiver", "after", 8, 3)
    prefill.call("settled", "sender")


@pytest.mark.parametrize("role", ["sender", "receiver"])
def test_a_daemon_that_is_started_again_and_again(network: Network, start: Start, role: str) -> None:
    # Broken in production: each restart of a peer on another host costs a daemon descriptors or memory, until it has none.
    prefill, decode = (network.host(name, env=OVER_TCP) for name in ("prefill", "decode"))
    start(prefill, "sender", *NOTICED_SOON)
    ready = start(decode, "receiver", *NOTICED_SOON)
    restarted, other = (prefill, decode) if role == "sender" else (decode, prefill)
    usage = []
    for number in range(20):
        request, receiver = f"r{number}", receiver_at(decode, ready)
        prefill.call("ship", "sender", request, keys(request, 2), number, receiver)
        decode.call("receive", "receiver", request, 2, number)
        usage.append(other.call("usage", "receiver" if role == "sender" else "sender"))
        restarted.call("stop", role, kill=number % 2 == 0)
        ports = (f"pd_peer_init_port={ready['init_port']}", f"pd_peer_alloc_port={ready['alloc_port']}")
        started = start(restarted, role, *NOTICED_SOON, *(ports if role == "receiver" else ()))
        ready = started if role == "receiver" else ready
    (files, memory), (files_after, memory_after) = usage[4], usage[-1]
    assert files_after <= files + 4, usage
    assert memory_after <= memory + (8 << 20), usage


def test_the_engine_of_one_host_is_refused_between_two(network: Network, start: Start) -> None:
    # Broken in production: `local` between two hosts waits for something that can never be there.
    prefill, decode = (network.host(name) for name in ("prefill", "decode"))
    start(prefill, "sender", engine="local")
    receiver = receiver_at(decode, start(decode, "receiver", engine="local"))
    with pytest.raises(Failed) as failed:
        prefill.call("ship", "sender", "r", keys("r", 1), 1, receiver)
    assert failed.value.kind in ("handshake_refused", "peer_lost"), failed.value
    assert "use transfer_channel: nixl" in str(failed.value), failed.value
