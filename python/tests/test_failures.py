"""What goes wrong between two daemons is said on the side that can act on it, and disturbs nothing else."""

import os
import resource
import signal

import msgspec
import pytest
import zmq

from pd_backend import PeerAddress, RequestRefused
from test_end_to_end import ENGINES, check_arrived, content, eventually, fill, open_request, ship
from waiting import PATIENCE_S

pytestmark = pytest.mark.parametrize("engine", ENGINES)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"dtype": "float16"}, ["dtype", "float16", "bfloat16"]),
        ({"model": "another/model"}, ["model", "another/model", "tests/tiny"]),
        ({"tp_size": 2}, ["tp_size", "2", "1"]),
    ],
)
def test_a_peer_with_another_layout_is_refused_naming_both(start_pair, engine, changed, named):
    # Broken in production: a decode worker reads bytes that mean something else to it.
    pair = start_pair(engine, receiver_layout=changed)
    with pytest.raises(RequestRefused) as caught:
        open_request(pair, "mismatch", 1)
    assert caught.value.kind == "layout_mismatch"
    assert all(word in caught.value.text for word in named), caught.value.text
    assert pair.receiver.status().peers == 0


def test_a_receiver_that_is_not_there_is_said_at_once(start_pair, engine):
    # Broken in production: a prefill worker waits for ever for a decode worker that is gone.
    pair = start_pair(engine)
    with zmq.Context() as context, context.socket(zmq.REP) as socket:
        free = socket.bind_to_random_port("tcp://127.0.0.1")
        socket.unbind(f"tcp://127.0.0.1:{free}")
        nobody = PeerAddress(host="127.0.0.1", init_port=free, alloc_port=free)
        with pytest.raises(RequestRefused) as caught:
            pair.sender.open("nobody", ["k"], last_chunk_tokens=1, receiver=nobody)
        # Of the handshake's deadline it would say that, and the kind would be `deadline`.
        assert caught.value.kind == "peer_unreachable" and str(free) in caught.value.text
    ship(pair, "after", content(1, 2, 7))
    check_arrived(pair, "after", content(1, 2, 7))


def open_files(daemon):
    return len(os.listdir(f"/proc/{daemon.pid}/fd"))


def test_losses_that_both_survive_leave_nothing_open(start_pair, engine):
    # Broken in production: each short stop or partition costs both daemons a file, until they refuse every peer.
    losses = 4
    # As long as a busy machine may need to answer, and no longer: it is waited for once a loss.
    deadlines = ["pd_heartbeat_interval_sec=0.2", "pd_peer_timeout_sec=2"]
    pair = start_pair(engine, sender_sets=deadlines, receiver_sets=deadlines)
    ship(pair, "first", content(1, 2, 7))
    check_arrived(pair, "first", content(1, 2, 7))
    before = [open_files(daemon) for daemon in (pair.prefill, pair.decode)]
    for loss in range(losses):
        os.kill(pair.decode.pid, signal.SIGSTOP)
        try:
            eventually(lambda: pair.sender.status().peers == 0)
        finally:
            os.kill(pair.decode.pid, signal.SIGCONT)
        data = content(2 + loss, 2, 7)
        ship(pair, f"after-{loss}", data)
        check_arrived(pair, f"after-{loss}", data)
    eventually(
        lambda: all(
            open_files(daemon) <= count + losses // 3 for daemon, count in zip((pair.prefill, pair.decode), before)
        )
    )


def test_the_limit_of_open_files_is_raised(start_pair, engine):
    # Broken in production: the usual limit of 1024, made for programs that call `select`, is how many peers a daemon has.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, hard), hard))
    try:
        pair = start_pair(engine)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for daemon in (pair.prefill, pair.decode):
        assert resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE) == (hard, hard)


def test_a_killed_sender_gives_its_slots_back_and_a_new_one_is_served(start_pair, engine):
    # Broken in production: every crash of a prefill worker costs the decode worker some of its buffer.
    pair = start_pair(engine)
    data = content(3, 3, 9)
    open_request(pair, "half", 3, 9)
    fill(pair, "half", data)
    waiting = pair.receiver.start_wait("half", wait_s=30)
    pair.prefill.kill()
    with pytest.raises(RequestRefused) as caught:
        waiting.result(30)
    assert caught.value.kind == "peer_lost"
    assert eventually(lambda: pair.receiver.status().slots_free == pair.receiver.status().slot_count)
    assert pair.receiver.status().slots_quarantined == 0
    pair.restart_sender()
    ship(pair, "half", data)
    check_arrived(pair, "half", data)


def told_next(proxy):
    """The request of the next ProxyNotif, which come in order."""
    assert proxy.poll(PATIENCE_S * 1000), "the proxy was not told"
    told = msgspec.msgpack.decode(proxy.recv())
    assert told == {"type": "ProxyNotif", "req_id": told["req_id"]}
    return told["req_id"]


def test_the_proxy_is_told_after_the_commit_once_and_never_so_for_a_failure(start_pair, engine):
    # Broken in production: a router sends a request to decode before its KV is there.
    with zmq.Context() as context, context.socket(zmq.PULL) as proxy:
        port = proxy.bind_to_random_port("tcp://127.0.0.1")
        pair = start_pair(engine, sender_sets=["pd_proxy_host=127.0.0.1", f"pd_proxy_port={port}"])
        open_request(pair, "given up", 1)
        pair.sender.cancel("given up")
        assert proxy.poll(PATIENCE_S * 1000), "the proxy was not told"
        told = msgspec.msgpack.decode(proxy.recv())
        assert (told["req_id"], told["pd"]["failure"]["kind"]) == ("given up", "cancelled")
        data = content(4, 2, 3)
        ship(pair, "told", data)
        assert told_next(proxy) == "told"
        lookup = pair.receiver.lookup([f"tests/tiny@1@0@told-{index}@bfloat16" for index in range(2)])
        assert all(lookup.chunks), "told before the chunks were ready"
        lookup.release()
        ship(pair, "next", data)
        assert told_next(proxy) == "next", "told twice, or for a request that failed"


def test_the_proxy_is_told_why_a_request_does_not_come(start_pair, engine):
    # Broken in production: what fails after prefill's answer is told to nobody, and the router's client gets 504 after half a minute.
    with zmq.Context() as context, context.socket(zmq.PULL) as proxy:
        port = proxy.bind_to_random_port("tcp://127.0.0.1")
        pair = start_pair(engine, sender_sets=["pd_proxy_host=127.0.0.1", f"pd_proxy_port={port}"])
        with pytest.raises(RequestRefused) as refused:
            open_request(pair, "too large", 100)
        assert proxy.poll(PATIENCE_S * 1000), "the proxy was not told"
        told = msgspec.msgpack.decode(proxy.recv())
        failure = {"kind": "too_large", "text": refused.value.text}
        assert told == {"type": "ProxyNotif", "req_id": "too large", "pd": {"failure": failure}}
        # Its receiver tells whoever asks for it, at any time.
        with pytest.raises(RequestRefused) as refused:
            pair.receiver.wait("too large", wait_s=PATIENCE_S)
        assert refused.value.kind == "too_large"


@pytest.mark.nixl
def test_nixl_and_local_do_not_talk_to_each_other(start_pair, engine):
    # Broken in production: a pair starts, and every transfer fails in a way that nobody understands.
    other = "local" if engine == "nixl" else "nixl"
    pair = start_pair(engine, receiver_engine=other)
    with pytest.raises(RequestRefused) as caught:
        open_request(pair, "mixed", 1)
    assert caught.value.kind == "handshake_refused"
    assert "transfer_channel" in caught.value.text and "nixl" in caught.value.text and "local" in caught.value.text
