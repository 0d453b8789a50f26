"""A sender that is told of its receivers meets them at start: real daemons, and not one request until it is said."""

import os
import signal
import socket
from dataclasses import replace

import pytest
from pd_backend import PdError, PeerAddress

from free_ports import free_ports
from test_end_to_end import ENGINES, check_arrived, content, eventually, ship
from waiting import PATIENCE_S

pytestmark = pytest.mark.parametrize("engine", ENGINES)


def told_of(pair):
    """The one receiver that the sender was told of, and how far it has come with it."""
    [receiver] = pair.sender.status().receivers
    assert receiver.address == pair.address
    return receiver


def state(pair):
    return told_of(pair).state


def failed(pair, state, kind):
    """Whether it is in that state, for a failure of that kind."""
    receiver = told_of(pair)
    return receiver.state == state and receiver.failure.kind == kind


def line_count(daemon, words):
    return sum(words in line for line in daemon.stderr().splitlines())


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"dtype": "float16"}, "dtype is bfloat16 at {s} and float16 at {r}"),
        ({"engine": {"vllm": "2"}}, "engine.vllm is 1 at {s} and 2 at {r}"),
    ],
)
def test_a_pair_that_cannot_talk_says_so_before_any_request(start_pair, engine, changed, named):
    # Broken in production: an operator learns from the first user that two servers were started for different things.
    pair = start_pair(engine, layout={"engine": {"vllm": "1"}}, receiver_layout=changed, told=True)
    assert eventually(lambda: failed(pair, "refused", "layout_mismatch"))
    text = told_of(pair).failure.text
    words = text.split()
    for role, key in (("receiver", "r"), ("sender", "s")):
        instance = next(word.rstrip(";") for word in words if word.startswith(f"{role}-"))
        named = named.replace(f"{{{key}}}", instance)
    assert named in text, text
    status = pair.sender.status()
    assert (status.requests_done, status.requests_failed, status.peers) == (0, 0, 0)
    # At both ends, once.
    assert eventually(lambda: line_count(pair.decode, "refused: ") == 1)
    assert eventually(lambda: line_count(pair.prefill, "receiver refused: ") == 1)
    assert "ERROR" in next(line for line in pair.prefill.stderr().splitlines() if "receiver refused: " in line)


def test_a_pair_that_can_talk_has_met_and_stays_so(start_pair, engine):
    # Broken in production: the first request waits for a handshake that could have been done.
    pair = start_pair(engine, told=True)
    assert eventually(lambda: state(pair) == "connected")
    assert pair.sender.status().peers == pair.receiver.status().peers == 1
    ship(pair, "first", content(1, 2, 7))
    check_arrived(pair, "first", content(1, 2, 7))
    assert eventually(lambda: line_count(pair.prefill, "connected") == 1)


def test_a_receiver_that_comes_later_or_again_is_met_and_served(start_pair, engine):
    # Broken in production: after a restart of decode, prefill has to be restarted as well; or waits in the log's noise.
    pair = start_pair(engine, told=True)
    assert eventually(lambda: state(pair) == "connected")
    os.kill(pair.decode.pid, signal.SIGKILL)
    pair.decode.wait()
    assert eventually(lambda: state(pair) == "unreachable")
    pair.restart_receiver()
    assert eventually(lambda: state(pair) == "connected")
    ship(pair, "after", content(2, 2, 7))
    check_arrived(pair, "after", content(2, 2, 7))
    # One that starts before its receiver does.
    os.kill(pair.decode.pid, signal.SIGKILL)
    pair.decode.wait()
    pair.restart_sender()
    assert eventually(lambda: failed(pair, "unreachable", "peer_unreachable"))
    # It tries again and again, and says so once. Somebody else listens there, and hangs up.
    with socket.create_server(("127.0.0.1", pair.address.init_port)) as somebody:
        somebody.settimeout(PATIENCE_S)
        for _ in range(4):
            somebody.accept()[0].close()
    assert eventually(lambda: line_count(pair.prefill, "receiver given up")) == 1
    pair.restart_receiver()
    assert eventually(lambda: state(pair) == "connected")
    ship(pair, "late", content(3, 2, 7))
    check_arrived(pair, "late", content(3, 2, 7))


def test_another_receiver_in_the_place_of_one_that_was_met_is_refused(start_pair, layout_file, engine):
    # Broken in production: a rolling upgrade pairs two releases, and the log says nothing until a request fails.
    pair = start_pair(engine, told=True)
    assert eventually(lambda: state(pair) == "connected")
    os.kill(pair.decode.pid, signal.SIGKILL)
    pair.decode.wait()
    theirs = layout_file.with_name("receiver.json")
    theirs.write_text(theirs.read_text().replace("bfloat16", "float16"))
    pair.restart_receiver()
    assert eventually(lambda: failed(pair, "refused", "layout_mismatch"))
    assert told_of(pair).failure.text.startswith("dtype is bfloat16 at sender-")


def test_ports_of_two_receivers_are_refused_and_nothing_is_written(start_pair, engine):
    # Broken in production: two ports of a router's list are exchanged; what one receiver grants is written into the other's
    # memory, over chunks that are being read there, and is reported as sent.
    pair = start_pair(engine)
    init_port, alloc_port = free_ports(2)
    theirs = PeerAddress(host="127.0.0.1", init_port=init_port, alloc_port=alloc_port)
    pair.start_receiver(theirs)
    # The other one knows the sender.
    ship(replace(pair, address=theirs), "theirs", content(4, 2, 7))
    mixed = PeerAddress(host="127.0.0.1", init_port=pair.address.init_port, alloc_port=alloc_port)
    with pytest.raises(PdError, match="belong to two receivers"):
        ship(replace(pair, address=mixed), "mixed", content(6, 2, 7))
    ship(pair, "ours", content(5, 2, 7))
    check_arrived(pair, "ours", content(5, 2, 7))
