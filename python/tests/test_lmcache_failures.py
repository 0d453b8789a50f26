"""How LMCache's PD backend was seen to fail, row by row, and what happens here instead.

Every test is one of those failures, between real daemons, over both engines.
"""

import os
import pickle
import signal
import threading
from contextlib import closing
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import zmq

from conftest import CHUNK_BYTES
from pd_backend import Kind, PeerAddress, RequestFailed, RequestRefused, SenderClient
from test_end_to_end import ENGINES, check_arrived, content, eventually, fill, keys_of, open_request, refused, ship
from waiting import PATIENCE_S

pytestmark = pytest.mark.parametrize("engine", ENGINES)


def second_sender(pair):
    """Another pd-sender with its client, for the same receiver."""
    daemon = pair.start_sender()
    client = pair.stack.enter_context(SenderClient(daemon.ready.connector))
    return replace(pair, prefill=daemon, sender=client)


def everything_is_free(pair):
    """Whether no slot of either daemon is taken, kept for reuse or in quarantine."""
    return all(
        (status.slots_free, status.buffer.used_bytes) == (status.slot_count, 0)
        for status in (pair.sender.status(), pair.receiver.status())
    )


def test_receiver_dead_then_a_put(start_pair, engine):
    # LMCache: the caller is blocked until a restart, or never hears of it again.
    # Broken in production: a prefill worker hangs, or is told that its engine is broken, when a decode worker has died.
    pair = start_pair(engine)
    data = content(1, 3, 9)
    receiver = f"{pair.address.host}:{pair.address.init_port}"
    for attempt in range(4):
        # Killed under the write: whether the engine or the side channel notices first is chance, and says the same.
        name = f"killed-{attempt}"
        open_request(pair, name, 3, 9)
        slots = fill(pair, name, data)
        os.kill(pair.decode.pid, signal.SIGKILL)
        sending = pair.sender.start_send(name, slots, last=True)
        with pytest.raises(RequestFailed) as caught:
            pair.sender.wait_sent(name, 30)
        assert caught.value.kind == Kind.PEER_LOST, str(caught.value)
        assert receiver in caught.value.peer and receiver in caught.value.text
        sending.abandon()
        pair.decode.kill()
        pair.restart_receiver()
    ship(pair, "between", data)
    pair.decode.kill()
    # And one of which it is known already.
    eventually(lambda: pair.sender.status().peers == 0)
    with pytest.raises(RequestRefused) as caught:
        open_request(pair, "later", 3, 9)
    assert caught.value.kind == Kind.PEER_UNREACHABLE and receiver in caught.value.peer
    eventually(lambda: pair.sender.status().slots_free == pair.sender.status().slot_count)


def test_receiver_restarted_on_the_same_ports(start_pair, engine):
    # LMCache: every later put fails, the sender never shakes hands again, and keys that were not written leak pages.
    # Broken in production: after a decode worker's restart all its prefill workers have to be restarted too.
    pair = start_pair(engine)
    for life in range(3):
        for number in range(3):
            data = content(10 * life + number, 3, 5)
            ship(pair, f"{life}-{number}", data)
            check_arrived(pair, f"{life}-{number}", data)
        # While a request is open, and half of it is staged.
        open_request(pair, f"{life}-lost", 2)
        pair.sender.stage(f"{life}-lost", [0])
        pair.decode.kill()
        with pytest.raises(RequestFailed) as caught:
            pair.sender.wait_sent(f"{life}-lost", 30)
        assert caught.value.kind == Kind.PEER_LOST
        pair.restart_receiver()
    eventually(lambda: pair.sender.status().slots_free == pair.sender.status().slot_count)


def test_retry_of_the_same_keys_after_that_failure(start_pair, engine):
    # LMCache: reported sent, the proxy notified, every page wrong.
    # Broken in production: silent corruption.
    with zmq.Context() as context, context.socket(zmq.PULL) as proxy:
        port = proxy.bind_to_random_port("tcp://127.0.0.1")
        pair = start_pair(engine, sender_sets=["pd_proxy_host=127.0.0.1", f"pd_proxy_port={port}"])
        keys, data = keys_of("retried", 3), content(2, 3, 9)
        # What lies in the buffer of the next life is something else.
        open_request(pair, "lost", 3, 9, keys)
        slots = fill(pair, "lost", data)
        pair.sender.send("lost", slots[:2], last=False)
        pair.decode.kill()
        with pytest.raises(RequestFailed) as caught:
            pair.sender.wait_sent("lost", 30)
        assert caught.value.kind == Kind.PEER_LOST
        pair.restart_receiver()
        ship(pair, "other", content(3, 8, 16))
        check_arrived(pair, "other", content(3, 8, 16))
        assert open_request(pair, "lost", 3, 9, keys).already_sent == []
        pair.sender.send("lost", fill(pair, "lost", data), last=True)
        assert pair.sender.wait_sent("lost", 30).chunks == 3
        check_arrived(pair, "lost", data)
        ship(pair, "next", content(4, 1, 1))
        told = [msgspec.msgpack.decode(proxy.recv()) for _ in range(4) if proxy.poll(PATIENCE_S * 1000)]
        ends = [(one["req_id"], one.get("pd", {}).get("failure", {}).get("kind")) for one in told]
        assert ends == [("lost", "peer_lost"), ("other", None), ("lost", None), ("next", None)]


def test_two_senders_with_the_same_keys_at_once(start_pair, engine):
    # LMCache: the second is told "already sent", and notifies, before the data has landed.
    # Broken in production: a decode worker reads pages that nobody has written yet.
    pair = start_pair(engine)
    other = second_sender(pair)
    keys, data = keys_of("same", 3), content(4, 3, 7)
    assert open_request(pair, "first", 3, 7, keys).already_sent == []
    slots = fill(pair, "first", data)
    pair.sender.send("first", slots, last=False)
    # Everything of the first is written, or about to be, and nothing is committed.
    second = other.sender.start_open("second", keys, last_chunk_tokens=7, receiver=pair.address, wait_s=30)
    with pair.receiver.lookup(keys) as found:
        assert list(found.chunks) == [None] * 3
    opened = second.result() if second.done() else None
    pair.sender.send("first", [], last=True)
    pair.sender.wait_sent("first", 30)
    opened = opened or second.result(30)
    missing = [index for index in range(3) if index not in opened.already_sent]
    other.sender.send("second", fill(other, "second", data, missing) if missing else [], last=True)
    other.sender.wait_sent("second", 30)
    check_arrived(pair, "second", data)
    check_arrived(pair, "first", data)
    # After the commit it is said to everybody.
    assert open_request(other, "third", 3, 7, keys).already_sent == [0, 1, 2]
    other.sender.send("third", [], last=True)
    assert other.sender.wait_sent("third", 30).bytes == 0
    check_arrived(pair, "third", data)


def test_buffer_full(start_pair, engine):
    # LMCache: the receiver's thread sleeps and tries again for ever, and every other sender is stuck behind it.
    # Broken in production: one prefill worker that asks for too much stops all others.
    pair = start_pair(engine, receiver_slots=4)
    keys, data = keys_of("there already", 1), content(5, 1, 16)
    ship(pair, "kept", data, keys)
    with pair.receiver.wait("kept", wait_s=30):
        open_request(pair, "holder", 2)
        waiting = pair.sender.start_open(
            "too much now", keys_of("much", 3), last_chunk_tokens=16, receiver=pair.address, wait_s=60
        )
        eventually(lambda: pair.receiver.status().requests_waiting == 1)
        # One that was never seen before: it shakes hands, is told what is there, and gets the slot that is free.
        other = second_sender(pair)
        assert open_request(other, "known", 1, keys=keys).already_sent == [0]
        other.sender.send("known", [], last=True)
        other.sender.wait_sent("known", 30)
        small = content(6, 1, 9)
        ship(other, "small", small)
        check_arrived(pair, "small", small)
        refused(Kind.NO_SLOTS, lambda: open_request(other, "large", 3, wait_s=0.2))
        assert not waiting.done()
        check_arrived(pair, "known", data)
    # And who waited is served when there is room.
    pair.sender.cancel("holder")
    assert waiting.result(30).already_sent == []
    data = content(7, 3, 16)
    pair.sender.send("too much now", fill(pair, "too much now", data), last=True)
    pair.sender.wait_sent("too much now", 30)
    check_arrived(pair, "too much now", data)


def test_request_larger_than_the_buffer(start_pair, engine):
    # LMCache: waits for ever.
    # Broken in production: a prompt that can never fit holds its prefill worker until somebody kills it.
    pair = start_pair(engine, sender_slots=16, receiver_slots=4)
    waiting = pair.sender.start_open(
        "larger", keys_of("larger", 5), last_chunk_tokens=1, receiver=pair.address, wait_s=3600
    )
    with pytest.raises(RequestRefused) as caught:
        waiting.result(30)
    assert caught.value.kind == Kind.TOO_LARGE, str(caught.value)
    data = content(8, 4, 16)
    ship(pair, "fits", data)
    check_arrived(pair, "fits", data)


MALFORMED = [
    b"",
    b"\xc1",
    b"\xff" * 64,
    b"not msgpack at all",
    b"\x81",
    b"\x81\xa4type",
    b"\x81\xa4type\xacAllocRequest",
    b"\x82\xa4type\xacAllocRequest\xa4keys\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\x91" * 5000,
    b"\x81\xa4type\xa7NoSuch!",
    b"\x82\xa4type\xafNixlInitRequest\xb0local_meta_bytes\xc6\xff\xff\xff\xff",
    b"\x82\xa4type\xafNixlInitRequest\xb0local_meta_bytes\x01",
]


@pytest.mark.parametrize("port", ["init", "alloc"])
def test_malformed_msgpack(start_pair, engine, port):
    # LMCache: the socket is dead for good, and new senders hang.
    # Broken in production: one bad packet, from anywhere, takes a decode worker out of service.
    pair = start_pair(engine)
    ship(pair, "before", content(9, 1, 1))
    endpoint = f"tcp://127.0.0.1:{getattr(pair.address, f'{port}_port')}"
    with zmq.Context() as context:
        for kind, frames in ((zmq.REQ, []), (zmq.DEALER, []), (zmq.DEALER, [b""]), (zmq.DEALER, [b"x", b"y"])):
            for payload in MALFORMED:
                with context.socket(kind) as stranger:
                    stranger.linger = 1000
                    stranger.connect(endpoint)
                    stranger.send_multipart([*frames, payload])
    # Whoever was connected goes on, and whoever comes is served.
    for number, sender in enumerate((pair, second_sender(pair))):
        data = content(20 + number, 3, 3)
        ship(sender, f"after-{number}", data)
        check_arrived(pair, f"after-{number}", data)
    assert pair.decode.exit_code() is None and "panicked" not in pair.decode.stderr()


class Touch:
    """Pickled, it is a program: whoever loads it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


class PretendedReceiver:
    """Two ports that answer a sender's handshake as a real receiver does, with other bytes in some places."""

    def __init__(self, real, replaced):
        self.real, self.replaced = real, replaced
        self.context = zmq.Context()
        self.sockets = [self.context.socket(zmq.ROUTER) for _ in range(2)]
        ports = [socket.bind_to_random_port("tcp://127.0.0.1") for socket in self.sockets]
        self.address = PeerAddress(host="127.0.0.1", init_port=ports[0], alloc_port=ports[1])
        #: What senders asked, by type.
        self.asked = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self):
        with self.context.socket(zmq.DEALER) as up:
            up.linger = 0
            up.connect(f"tcp://127.0.0.1:{self.real.init_port}")
            while not self._stop.is_set():
                if not self.sockets[0].poll(50):
                    continue
                *route, payload = self.sockets[0].recv_multipart()
                asked = msgspec.msgpack.decode(payload)
                self.asked[asked["type"]] = asked
                up.send_multipart([*route[1:], payload])
                if not up.poll(PATIENCE_S * 1000):
                    continue
                answer = msgspec.msgpack.decode(up.recv_multipart()[-1])
                self.replaced(answer)
                self.sockets[0].send_multipart([*route, msgspec.msgpack.encode(answer)])

    def close(self):
        self._stop.set()
        self._thread.join(30)
        self.context.destroy(linger=0)


def ask(port, message, wait_s=PATIENCE_S):
    """What the port answers, or None."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.connect(f"tcp://127.0.0.1:{port}")
        socket.send(msgspec.msgpack.encode(message))
        return msgspec.msgpack.decode(socket.recv_multipart()[-1]) if socket.poll(wait_s * 1000) else None


def test_pickled_descriptors_are_refused_and_never_run(start_pair, engine, tmp_path):
    # LMCache: `pickle.loads` on bytes from the network, so whoever reaches the init port runs code.
    # Broken in production: the same.
    made = tmp_path / "made"
    harm = pickle.dumps(Touch(made), protocol=4)
    pickle.loads(harm).close()
    assert made.exists(), "it does what it is for"
    made.unlink()
    pair = start_pair(engine)

    # A receiver that sends it to a sender: as metadata, then as descriptors.
    def as_metadata(answer):
        if answer["type"] == "NixlInitResponse":
            answer["remote_meta_bytes"] = harm

    def as_descriptors(answer):
        if answer["type"] == "NixlMemRegResponse":
            answer["remote_xfer_dlist_bytes"] = harm
            answer["pd"]["descriptors"] = harm

    asked = {}
    for replaced, what in ((as_metadata, "metadata"), (as_descriptors, "descriptors")):
        with closing(PretendedReceiver(pair.address, replaced)) as pretended:
            with pytest.raises(RequestRefused) as caught:
                pair.sender.open("harmed", ["k"], last_chunk_tokens=1, receiver=pretended.address, wait_s=20)
            assert caught.value.kind in (Kind.HANDSHAKE_REFUSED, Kind.PEER_UNREACHABLE)
            assert what in caught.value.text and "cannot be used" in caught.value.text
            asked |= pretended.asked
    # A sender that sends it to a receiver, in every field that takes bytes, as a peer of ours and as a stock one.
    introduction, registration = asked["NixlInitRequest"], asked["NixlMemRegRequest"]
    introduction["local_meta_bytes"] = harm
    introduction["pd"]["hello"]["instance"] = "somebody-else"
    introduction["pd"]["agent_name"] = "somebody-else"
    answer = ask(pair.address.init_port, introduction)
    assert answer and "cannot be used" in answer["pd"]["refusal"]["text"], answer
    registration["local_xfer_dlist_bytes"] = harm
    # Not all of these are answered. Whatever comes of them has come when the next request is through.
    ask(pair.address.init_port, registration, wait_s=1)
    for message in (introduction, registration):
        del message["pd"]
        ask(pair.address.init_port, message, wait_s=1)
    assert not made.exists()
    data = content(12, 2, 3)
    ship(pair, "after", data)
    check_arrived(pair, "after", data)
    assert not made.exists()


# Long enough that a copy of all slots takes a while.
LONG = {"head_size": 8 * 1024}
LONG_CHUNK_BYTES = CHUNK_BYTES * 1024


def long_pair(start_pair, engine, slots, *sets):
    size = f"pd_buffer_size={slots * LONG_CHUNK_BYTES}"
    return start_pair(engine, layout=LONG, sender_sets=[size, *sets], receiver_sets=[size, *sets])


def fill_with(pair, name, count, byte):
    slots = pair.sender.stage(name, range(count))
    for slot in slots:
        pair.sender.view(slot)[:] = byte
    return slots


def all_are(lease, byte):
    return all(np.all(lease.view(index) == byte) for index in range(len(lease.chunks)))


def test_abort_while_the_write_is_in_flight(start_pair, engine):
    # LMCache: pages are freed at once, and can be handed out under the late write.
    # Broken in production: a request that was aborted writes over the KV of one that came after it.
    count = 16
    pair = long_pair(start_pair, engine, count)
    other = second_sender(pair)
    for attempt in range(8):
        aborted, after = f"aborted-{attempt}", f"after-{attempt}"
        open_request(pair, aborted, count)
        pair.sender.send(aborted, fill_with(pair, aborted, count, 0xAA), last=False)
        # Every slot of the receiver is wanted by another sender, which waits for them.
        waiting = other.sender.start_open(
            after, keys_of(after, count), last_chunk_tokens=16, receiver=pair.address, wait_s=30
        )
        pair.sender.cancel(aborted)
        waiting.result(30)
        other.sender.send(after, fill_with(other, after, count, attempt), last=True)
        other.sender.wait_sent(after, 30)
        with pair.receiver.wait(after, wait_s=30) as lease:
            assert all_are(lease, attempt)
            eventually(lambda: pair.sender.status().transfers_in_flight == 0)
            assert all_are(lease, attempt), "written over while it was read"
    eventually(lambda: pair.receiver.status().slots_quarantined == 0)


def test_pages_of_a_writer_that_stands_still_are_not_handed_out(start_pair, engine):
    # The same abort, by a deadline, while nobody can say whether the writer will go on.
    # Broken in production: a prefill worker that was paused wakes up and writes over the KV of somebody else.
    count = 8
    deadlines = ["pd_heartbeat_interval_sec=0.2", "pd_peer_timeout_sec=3"]
    pair = long_pair(start_pair, engine, count, *deadlines)
    other = second_sender(pair)
    open_request(pair, "paused", count)
    pair.sender.send("paused", fill_with(pair, "paused", count, 0xAA), last=False)
    os.kill(pair.prefill.pid, signal.SIGSTOP)
    try:
        eventually(lambda: pair.receiver.status().slots_quarantined == count)
        refused(Kind.NO_SLOTS, lambda: open_request(other, "early", 1, wait_s=0.5))
    finally:
        os.kill(pair.prefill.pid, signal.SIGCONT)
    # Its own word frees them.
    open_request(other, "after", count, wait_s=30)
    other.sender.send("after", fill_with(other, "after", count, 0x55), last=True)
    other.sender.wait_sent("after", 30)
    with pair.receiver.wait("after", wait_s=30) as lease:
        assert all_are(lease, 0x55)
    with pytest.raises(RequestFailed):
        pair.sender.wait_sent("paused", 30)


def test_same_keys_sent_again(start_pair, engine):
    # LMCache: skipped, and the receiver's reference count grows by one on every repeat.
    # Broken in production: popular prefixes are never freed, until the buffer holds nothing else.
    pair = start_pair(engine, receiver_slots=4, receiver_sets=["pd_retention_sec=5"])
    keys, data = keys_of("again", 3), content(13, 3, 16)
    first = ship(pair, "again-0", data, keys)
    assert (first.chunks, first.bytes) == (3, 3 * CHUNK_BYTES)
    check_arrived(pair, "again-0", data)
    for number in range(1, 20):
        sent = ship(pair, f"again-{number}", data, keys)
        assert (sent.chunks, sent.bytes) == (0, 0), "skipped"
        # Some are read, some are read and given up, some are left to their time.
        if number % 3 == 0:
            check_arrived(pair, f"again-{number}", data)
        elif number % 3 == 1:
            pair.receiver.wait(f"again-{number}", wait_s=30).release()
    eventually(lambda: everything_is_free(pair))
    assert pair.receiver.status().slots_held == 0
    other = content(14, 4, 16)
    ship(pair, "all of it", other)
    check_arrived(pair, "all of it", other)
