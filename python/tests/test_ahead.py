"""Parked requests that are pushed to a receiver before it asks: looked up there, asked for all the same, and guessed wrong."""

import os
import signal

import pytest
from pd_backend import PeerAddress, ReceiverClient

from conftest import PATIENTLY
from free_ports import free_ports
from test_end_to_end import ENGINES, content, keys_of, refused
from test_metrics import Scrape
from test_parked import RENDEZVOUS, begin, check, finish, park, source
from waiting import PATIENCE_S, eventually

pytestmark = pytest.mark.parametrize("engine", ENGINES)


@pytest.fixture
def pair(start_pair, engine):
    """A sender that was told of one receiver, and is connected to it."""
    pair = start_pair(engine, sender_sets=[RENDEZVOUS], told=True)
    connected(pair)
    return pair


def connected(pair):
    eventually(lambda: [receiver.state for receiver in pair.sender.status().receivers] == ["connected"])


def found(pair, keys, client=None):
    """All of these chunks, once they are there."""
    lease = (client or pair.receiver).lookup(keys)
    if None not in lease.chunks:
        return lease
    lease.release()
    return None


def pushes(pair, result):
    return Scrape(pair.prefill)("pd_pushes_ahead_total", result=result)


def test_what_is_pushed_ahead_is_looked_up_and_sent_once(pair):
    # Broken in production: decode waits for what could be there already, or every byte goes over the network twice.
    data, keys = content(1, 3, 5), keys_of("r", 3)
    park(pair, "r", data, ids=["cmpl-r"])
    check(eventually(lambda: found(pair, keys)), data, keys)
    sent = sum(len(chunk) for chunk in data)
    eventually(lambda: pushes(pair, "sent") == 1)
    assert pair.sender.status().bytes == pair.receiver.status().bytes == sent
    assert pair.sender.status().requests_done == 0
    # A router that says where to ask: it is there.
    for name in ("f", "g"):
        check(pair.receiver.fetch(name, source(pair), keys, ids=["cmpl-r"], wait_s=PATIENCE_S), data, keys)
    eventually(lambda: pair.sender.status().requests_done == 2)
    assert pair.sender.status().bytes == pair.receiver.status().bytes == sent
    eventually(lambda: pair.sender.status().slots_parked == 0)
    assert Scrape(pair.prefill)("pd_wrong_guesses_total") == 0


def test_chunks_that_are_asked_for_on_their_way_are_sent_once(pair):
    # Broken in production: decode asks a moment before all of it is there, and all of it is sent again.
    data, keys = content(2, 3, 5), keys_of("r", 3)
    slots = begin(pair, "r", data)
    pair.sender.view(slots[0])[:] = data[0]
    pair.sender.send("r", slots[:1], last=False)
    eventually(lambda: pair.receiver.status().slots_reserved == 3)
    lease = pair.receiver.lookup(keys)
    assert (lease.chunks, lease.coming) == ((None,) * 3, (0, 1, 2))
    asked = pair.receiver.start_fetch("f", source(pair), keys, wait_s=PATIENCE_S)
    eventually(lambda: pair.sender.status().requests_active == 3)
    assert pair.receiver.status().slots_reserved == 3
    finish(pair, "r", data, slots[1:])
    check(asked.result(PATIENCE_S), data, keys)
    assert pair.sender.status().bytes == sum(len(chunk) for chunk in data)


def test_of_what_nobody_is_told_nothing_is_kept(pair):
    # Broken in production: behind a router that says nothing, prefill's buffer is full of what decode has.
    for number in range(12):
        name, data = f"r{number}", content(number, 2, 5)
        keys = keys_of(name, 2)
        slots = pair.sender.park(name, keys, last_chunk_tokens=5, unsolicited=True, wait_s=PATIENCE_S).slots
        finish(pair, name, data, slots)
        check(eventually(lambda: found(pair, keys)), data, keys)
        eventually(lambda: pair.sender.status().slots_parked == 0)


def test_without_a_receiver_to_guess_nothing_is_parked_for_nobody(start_pair, engine):
    # Broken in production: chunks are copied and kept that nobody will ever ask for.
    pair = start_pair(engine, sender_sets=[RENDEZVOUS])
    call = lambda: pair.sender.park("r", keys_of("r", 1), last_chunk_tokens=5, unsolicited=True)  # noqa: E731
    assert "no receiver is connected that could be guessed" in refused("peer_unreachable", call)
    # One that has asked is guessed from then on.
    data, keys = content(3, 1, 5), keys_of("a", 1)
    park(pair, "a", data)
    assert pushes(pair, "sent") == 0
    check(pair.receiver.fetch("f", source(pair), keys, wait_s=PATIENCE_S), data, keys)
    eventually(lambda: pair.sender.status().requests_done == 1)
    data = content(4, 1, 5)
    finish(pair, "r", data, call().slots)
    check(eventually(lambda: found(pair, keys_of("r", 1))), data, keys_of("r", 1))


def test_a_wrong_guess_costs_bytes_and_is_counted(pair):
    # Broken in production: with a second decode server requests fail, or nobody sees that the network carries them twice.
    address = PeerAddress("127.0.0.1", *free_ports(2))
    other = pair.start_receiver(address)
    with ReceiverClient(other.ready.connector, **PATIENTLY) as client:
        data, keys = content(5, 2, 5), keys_of("r", 2)
        park(pair, "r", data)
        check(eventually(lambda: found(pair, keys)), data, keys)
        check(client.fetch("f", source(pair), keys, wait_s=PATIENCE_S), data, keys)
        eventually(lambda: Scrape(pair.prefill)("pd_wrong_guesses_total") == 1)
        # From now on the other is guessed.
        data, keys = content(6, 2, 5), keys_of("s", 2)
        park(pair, "s", data)
        check(eventually(lambda: found(pair, keys, client)), data, keys)
        assert Scrape(pair.prefill)("pd_wrong_guesses_total") == 1


def test_a_receiver_that_is_full_or_gone_harms_nobody(start_pair, engine):
    # Broken in production: a guess fails prefill's requests, or takes the room of what was asked for.
    pair = start_pair(engine, sender_slots=16, receiver_slots=4, sender_sets=[RENDEZVOUS], told=True)
    connected(pair)
    leases = []
    for number in range(2):
        name, data = f"r{number}", content(number, 2, 16)
        park(pair, name, data)
        leases.append(eventually(lambda: found(pair, keys_of(name, 2))))
    # All of it is being read.
    data, keys = content(7, 2, 16), keys_of("full", 2)
    park(pair, "full", data)
    eventually(lambda: pushes(pair, "dropped") == 1)
    asked = pair.receiver.start_fetch("f", source(pair), keys, wait_s=PATIENCE_S)
    leases.pop().release()
    check(asked.result(PATIENCE_S), data, keys)
    # What is asked for takes the room of what is only guessed.
    leases.pop().release()
    begin(pair, "guess", content(8, 2, 16))
    eventually(lambda: pair.receiver.status().slots_reserved == 2)
    data, keys = content(9, 4, 16), keys_of("large", 4)
    slots = begin(pair, "large", data)
    asked = pair.receiver.start_fetch("g", source(pair), keys, wait_s=PATIENCE_S)
    finish(pair, "large", data, slots)
    check(asked.result(PATIENCE_S), data, keys)
    # And where nobody is, nothing waits.
    os.kill(pair.decode.pid, signal.SIGKILL)
    park(pair, "gone", content(10, 2, 16))
    assert pair.sender.status().requests_failed == 0


def test_it_can_be_turned_off(start_pair, engine):
    # Broken in production: an operator whose network is full has no way to stop it.
    pair = start_pair(engine, sender_sets=[RENDEZVOUS, "pd_push_ahead=false"], told=True)
    connected(pair)
    data, keys = content(11, 2, 5), keys_of("r", 2)
    park(pair, "r", data)
    check(pair.receiver.fetch("f", source(pair), keys, wait_s=PATIENCE_S), data, keys)
    assert pushes(pair, "sent") == pushes(pair, "dropped") == 0
    assert pair.sender.status().bytes == sum(len(chunk) for chunk in data)
