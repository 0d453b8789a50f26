"""Daemons with both halves (`pd_role: both`): each sends and receives over one buffer."""

import os
import signal
from contextlib import ExitStack
from dataclasses import dataclass

import pytest
from pd_backend import ClientMisuse, Daemon, NodeClient, PdError, PeerAddress, ReceiverClient, SenderClient

from conftest import CHUNK_BYTES, PATIENTLY, TOKEN_BYTES, TOP, binary
from free_ports import free_ports
from test_end_to_end import ENGINES, check_arrived, content, fill, open_request, refused, ship
from waiting import DEADLINES, PATIENCE_S, eventually

pytestmark = pytest.mark.parametrize("engine", ENGINES)


@dataclass
class Node:
    daemon: Daemon
    client: NodeClient
    address: PeerAddress


@dataclass
class Way:
    """From one node to another, as the helpers of other tests want it."""

    sender: NodeClient
    receiver: NodeClient
    address: PeerAddress


def way(source, target):
    return Way(source.client, target.client, target.address)


@pytest.fixture
def start_node(layout_file):
    """Starts nodes, each by another of the two binaries, and ends them after the test."""
    with ExitStack() as stack:

        def start(engine, slots=8, *sets, program="pd-sender", at=None):
            init_port, alloc_port = (at.init_port, at.alloc_port) if at else free_ports(2)
            ports = [f"pd_peer_init_port={init_port}", f"pd_peer_alloc_port={alloc_port}"]
            arguments = ["--config", str(TOP / "configs" / "loopback.yaml"), "--kv-layout", str(layout_file)]
            size = f"pd_buffer_size={slots * CHUNK_BYTES}"
            for key in ("pd_role=both", f"transfer_channel={engine}", size, *ports, *DEADLINES, *sets):
                arguments += ["--set", key]
            daemon = stack.enter_context(Daemon(binary(program), arguments, ready_timeout_s=PATIENCE_S))
            client = stack.enter_context(NodeClient(daemon.ready.connector, **PATIENTLY))
            return Node(daemon, client, PeerAddress(host="127.0.0.1", init_port=init_port, alloc_port=alloc_port))

        yield start


@pytest.fixture
def two(start_node, engine):
    return start_node(engine), start_node(engine, program="pd-receiver")


def test_requests_go_both_ways_at_once(two):
    # Broken in production: the second direction disconnects the first, or writes into the slots that the first sends from.
    one, other = two
    assert one.daemon.ready.role == other.client.attached.role == "both"
    ways = [way(one, other), way(other, one)]
    for turn in range(5):
        name = f"turn-{turn}"
        data = [content(2 * turn, 3, 5), content(2 * turn + 1, 2, 9)]
        keys = [[f"{name}-{number}-{chunk}" for chunk in range(len(chunks))] for number, chunks in enumerate(data)]
        for there, chunks, names in zip(ways, data, keys):
            open_request(there, name, len(chunks), len(chunks[-1]) // TOKEN_BYTES, names)
        slots = [fill(there, name, chunks) for there, chunks in zip(ways, data)]
        for there, filled in zip(ways, slots):
            there.sender.send(name, filled, last=True)
        for there, chunks in zip(ways, data):
            assert there.sender.wait_sent(name, PATIENCE_S).chunks == len(chunks)
            check_arrived(there, name, chunks)
    for node in two:
        assert eventually(lambda: node.client.status().peers == 2)
        status = node.client.status()
        assert (status.role, status.requests_done, status.requests_failed) == ("both", 10, 0)
        assert (status.slots_reserved, status.slots_quarantined, status.leases) == (0, 0, 0)


def test_a_chunk_that_came_is_not_written_to_by_its_reader(two):
    # Broken in production: an engine's stray write changes a chunk that others read, since the buffer is writable.
    one, other = two
    data = content(1, 1, 4)
    ship(way(one, other), "r", data)
    with other.client.wait("r", wait_s=PATIENCE_S) as lease, pytest.raises(ValueError, match="read-only"):
        lease.view(0)[:] = 0


def test_clients_of_one_half_find_theirs(two):
    # Broken in production: a worker that only prefills cannot use a daemon that does both.
    one, other = two
    with SenderClient(one.daemon.ready.connector, **PATIENTLY) as sender:
        with ReceiverClient(other.daemon.ready.connector, **PATIENTLY) as receiver:
            there = Way(sender, receiver, other.address)
            ship(there, "r", content(1, 2, 4))
            check_arrived(there, "r", content(1, 2, 4))


def test_a_daemon_of_one_half_is_refused(start_pair, engine):
    # Broken in production: a worker that prefills and decodes learns from its first request that its daemon only sends.
    pair = start_pair(engine)
    with pytest.raises(ClientMisuse, match="pd-sender, expected a daemon with both halves; start it with pd_role: both"):
        NodeClient(pair.prefill.ready.connector)
    text = refused("bad_request", lambda: ReceiverClient.start_lookup(pair.sender, ["k"]).result())
    assert "sends only" in text and "pd_role: both" in text


def test_a_node_does_not_send_to_itself(start_node, engine):
    # Broken in production: a router sends prefill and decode of a request to one worker, and it waits for a time-out.
    node = start_node(engine)
    with pytest.raises(PdError, match="itself"):
        ship(way(node, node), "r", content(1, 1, 4))


def test_neither_direction_takes_the_whole_buffer(two):
    # Broken in production: two nodes whose buffers are full of what they send wait for each other's room for ever.
    one, other = two
    there, back = way(one, other), way(other, one)
    data = content(1, 4, 16)
    # Half of eight slots is granted to the other; as much is left to send with, at once.
    for pair in (there, back):
        open_request(pair, "all", 4, keys=[f"all-{id(pair)}-{chunk}" for chunk in range(4)])
    for pair in (there, back):
        pair.sender.send("all", fill(pair, "all", data), last=True)
    for pair in (there, back):
        pair.sender.wait_sent("all", PATIENCE_S)
        check_arrived(pair, "all", data)
    text = refused("too_large", lambda: open_request(there, "more", 5))
    assert "4 slots" in text and "for one direction" in text


def test_two_nodes_that_ask_for_all_they_may_get_it(two):
    # Broken in production: each node has granted the other what it needs itself to send, and both wait for a time-out.
    one, other = two
    ways = {"there": way(one, other), "back": way(other, one)}
    for chunks in (1, 3, 4):
        data = content(chunks, chunks, 16)
        names = [f"{chunks}-{number}" for number in range(3)]
        # Three requests each way are asked for at once, and there is room for one or two.
        opens = {}
        for direction, pair in ways.items():
            for name in names:
                keys = [f"{direction}-{name}-{chunk}" for chunk in range(chunks)]
                start = pair.sender.start_open(name, keys, last_chunk_tokens=16, receiver=pair.address)
                opens[direction, name] = start
        while opens:
            key = next((key for key, opened in opens.items() if opened.done()), None)
            if key is None:
                one.client.wait_for_news(0.01)
                other.client.wait_for_news(0.01)
                continue
            opens.pop(key).result()
            pair, name = ways[key[0]], key[1]
            pair.sender.send(name, fill(pair, name, data), last=True)
            pair.sender.wait_sent(name, PATIENCE_S)
            check_arrived(pair, name, data)


def test_a_reset_ends_both_directions_and_a_cancel_the_one_that_is_named(two):
    # Broken in production: after an update of the weights one half goes on with what was computed before.
    one, other = two
    there, back = way(one, other), way(other, one)
    ship(back, "came", content(1, 1, 16))
    open_request(there, "goes", 1)
    one.client.cancel("goes")
    check_arrived(back, "came", content(1, 1, 16))
    ship(back, "came", content(2, 1, 16), keys=["another"])
    open_request(there, "goes", 1)
    one.client.reset()
    with pytest.raises(PdError, match="reset its cache"):
        one.client.wait_sent("goes", PATIENCE_S)
    refused("cancelled", lambda: one.client.wait("came", wait_s=1))
    assert eventually(lambda: one.client.status().slots_ready == 0)


def test_a_node_that_comes_again_is_served_both_ways(start_node, engine):
    # Broken in production: after a restart of one worker the other serves one direction only.
    one, other = start_node(engine), start_node(engine)
    for source, target in ((one, other), (other, one)):
        ship(way(source, target), "before", content(1, 2, 4))
        check_arrived(way(source, target), "before", content(1, 2, 4))
    os.kill(other.daemon.pid, signal.SIGKILL)
    other.daemon.wait()
    other = start_node(engine, at=other.address)

    def again(source, target, name):
        try:
            ship(way(source, target), name, content(2, 2, 4), keys=[f"{name}-0", f"{name}-1"])
        except PdError:
            return False  # The loss of the one before may be seen by this request.
        return True

    for number, (source, target) in enumerate(((one, other), (other, one))):
        names = iter(f"after-{number}-{attempt}" for attempt in range(10_000))
        sent = []

        def goes():
            sent.append(next(names))
            return again(source, target, sent[-1])

        assert eventually(goes)
        check_arrived(way(source, target), sent[-1], content(2, 2, 4))


def test_keys_of_one_half_are_named(start_node, engine):
    # Broken in production: an operator sets a key and does not learn which direction it is for.
    node = start_node(engine, 8, "pd_retention_sec=60", "pd_commit_timeout_sec=30")
    for key, words in (
        ("pd_retention_sec", "used by the incoming half, ignored by the outgoing half"),
        ("pd_commit_timeout_sec", "used by the outgoing half, ignored by the incoming half"),
    ):
        # A thread of the daemon's writes its log.
        said = lambda: any(key in line and words in line for line in node.daemon.stderr().splitlines())  # noqa: E731
        assert eventually(said, left=node.daemon.stderr)
