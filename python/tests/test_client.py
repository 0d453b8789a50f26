"""The clients against a daemon that does as the test says."""

import gc
import os
import subprocess
import sys
import threading
import time

import msgspec
import numpy as np
import pytest

from fake_daemon import CHUNK_BYTES
from pd_backend import (
    ClientClosed,
    ClientMisuse,
    DaemonGone,
    DaemonLost,
    DaemonSilent,
    MappingError,
    PeerAddress,
    ProtocolError,
    ReceiverClient,
    ReplyTimeout,
    RequestFailed,
    RequestRefused,
    SendPart,
    SenderClient,
    Sent,
)
from pd_backend import messages as m
from pd_backend._silence import Silence
from waiting import PATIENCE_S, eventually

TO = PeerAddress(host="127.0.0.1", init_port=1, alloc_port=2)
TIMINGS = m.Timings(alloc_us=1, transfer_us=2, commit_us=3)


def sender_script(request):
    """One request at a time that goes well."""
    if isinstance(request, m.Open):
        yield m.Opened(id=request.id, req_id=request.req_id, already_sent=[1])
    elif isinstance(request, m.Stage):
        slots = [
            m.StagedSlot(chunk=chunk, slot=3 - at, offset_bytes=(3 - at) * CHUNK_BYTES, len_bytes=CHUNK_BYTES)
            for at, chunk in enumerate(request.chunks)
        ]
        yield m.Staged(id=request.id, slots=slots)
    elif isinstance(request, m.Send):
        yield m.Accepted(id=request.id)
        if request.last:
            yield m.Sent(req_id=request.req_id, chunks=2, bytes=8192, timings=TIMINGS)
    elif isinstance(request, m.Cancel):
        yield m.Cancelled(id=request.id, req_id=request.req_id)


def test_a_sender_opens_stages_fills_and_sends(fake):
    # Broken in production: the conversation that every prefill has.
    daemon = fake("sender", sender_script)
    with SenderClient(daemon.endpoint) as client:
        assert client.attached.layout == [("model", "tests/tiny")]
        opened = client.open("r", ["a", "b", "c"], last_chunk_tokens=5, receiver=TO, wait_s=1.5)
        assert opened.already_sent == [1]
        slots = client.stage("r", (0, 2))
        assert [slot.chunk for slot in slots] == [0, 2]
        client.view(slots[0])[:] = 7
        client.send("r", [SendPart(slot=3, offset_bytes=0, len_bytes=10)], last=False)
        client.send("r", slots, last=True)
        sent = client.wait_sent("r")
        assert (sent.chunks, sent.bytes, sent.timings) == (2, 8192, TIMINGS)
        assert client.poll_events() == []
    assert os.pread(daemon.fd, 2, 3 * CHUNK_BYTES) == b"\x07\x07"
    assert daemon.seen_of(m.Open)[0].wait_ms == 1500
    assert daemon.seen_of(m.Stage)[0].wait_ms is None
    last = daemon.seen_of(m.Send)[1]
    assert last.parts == [SendPart(slot=3), SendPart(slot=2)]
    assert isinstance(daemon.seen[-1], m.Detach)


def receiver_script(request):
    ready = m.ReadyChunk(key="a", group=0, slot=1, offset_bytes=CHUNK_BYTES, len_bytes=100)
    if isinstance(request, m.Wait):
        yield m.Ready(id=request.id, req_id=request.req_id, lease=11, chunks=[ready])
    elif isinstance(request, m.Lookup):
        found = [ready if key == "a" else None for key in request.keys]
        yield m.Found(id=request.id, chunks=found, lease=12 if "a" in request.keys else None)
    elif isinstance(request, m.Release):
        yield m.Released(id=request.id)


def test_a_receiver_waits_reads_and_releases_once(fake):
    # Broken in production: leases that are never given back fill the receiver's buffer for good.
    daemon = fake("receiver", receiver_script)
    os.pwrite(daemon.fd, bytes(range(100)), CHUNK_BYTES)
    with ReceiverClient(daemon.endpoint) as client:
        with client.wait("r") as lease:
            assert lease.view(0).tobytes() == bytes(range(100))
            assert np.shares_memory(lease.view(0), client.buffer.range(CHUNK_BYTES, CHUNK_BYTES))
            lease.release()
        with pytest.raises(MappingError, match="released"):
            lease.view(0)
        with client.lookup(["x", "a"]) as lease:
            assert lease.chunks[0] is None
            assert lease.chunks[1].key == "a"
            with pytest.raises(KeyError):
                lease.view(0)
        with client.lookup(["x"]) as lease:
            assert lease.chunks == (None,)
    assert [release.lease for release in daemon.seen_of(m.Release)] == [11, 12]


def test_an_error_is_raised_with_its_kind_text_and_peer(fake):
    # Broken in production: the engine cannot tell "wait and retry" from "never possible".
    def script(request):
        yield m.Error(id=request.id, kind="too_large", text="9 chunks, 4 slots", peer="127.0.0.1:1/2")

    with SenderClient(fake("sender", script).endpoint) as client:
        with pytest.raises(RequestRefused) as caught:
            client.open("r", ["a"], last_chunk_tokens=1, receiver=TO)
    assert (caught.value.kind, caught.value.text) == ("too_large", "9 chunks, 4 slots")
    assert str(caught.value) == "too_large: 9 chunks, 4 slots (peer 127.0.0.1:1/2)"


def test_a_failed_request_is_raised_and_other_events_stay(fake):
    # Broken in production: one request's failure is reported for another, or swallows its end.
    def script(request):
        if isinstance(request, m.StatusQuery):
            yield m.Sent(req_id="other", chunks=1, bytes=1, timings=TIMINGS)
            yield m.Failed(req_id="r", kind="peer_lost", text="gone", peer="127.0.0.1:1/2")
            yield m.Error(id=request.id, kind="internal", text="x")

    with SenderClient(fake("sender", script).endpoint) as client:
        with pytest.raises(RequestRefused):
            client.status()
        with pytest.raises(RequestFailed) as caught:
            client.wait_sent("r")
        assert (caught.value.req_id, caught.value.kind) == ("r", "peer_lost")
        assert [event.req_id for event in client.poll_events()] == ["other"]
        with pytest.raises(ReplyTimeout, match="neither sent nor failed"):
            client.wait_sent("r", timeout_s=0.05)


def test_replies_out_of_order_find_their_requests(fake):
    # Broken in production: two requests of one engine get each other's slots.
    held = []

    def script(request):
        held.append(request)
        if len(held) == 2:
            for old in reversed(held):
                yield m.Opened(id=old.id, req_id=old.req_id, already_sent=[])

    with SenderClient(fake("sender", script).endpoint) as client:
        first = client.start_open("first", ["a"], last_chunk_tokens=1, receiver=TO)
        assert not first.done()
        second = client.start_open("second", ["b"], last_chunk_tokens=1, receiver=TO)
        assert first.result().req_id == "first"
        assert second.done()
        assert second.result().req_id == "second"


def test_a_silent_daemon_is_waited_for_no_longer_than_said_and_late_grants_go_back(fake):
    # Broken in production: the engine hangs with its daemon, or slots granted too late are lost for good.
    late = []

    def script(request):
        if isinstance(request, (m.Open, m.Wait)):
            late.append(request)
        elif isinstance(request, m.StatusQuery):
            for old in late:
                if isinstance(old, m.Open):
                    yield m.Opened(id=old.id, req_id=old.req_id, already_sent=[])
                else:
                    yield m.Ready(id=old.id, req_id=old.req_id, lease=5, chunks=[])
            yield m.Error(id=request.id, kind="internal", text="x")
        elif isinstance(request, m.Release):
            yield m.Released(id=request.id)
        elif isinstance(request, m.Cancel):
            yield m.Cancelled(id=request.id, req_id=request.req_id)

    daemon = fake("sender", script)
    with SenderClient(daemon.endpoint) as client:
        pending = client.start_open("r", ["a"], last_chunk_tokens=1, receiver=TO)
        with pytest.raises(ReplyTimeout, match="no reply to open"):
            pending.result(timeout_s=0.05)
        with pytest.raises(RequestRefused):
            client.status()
    assert [cancel.req_id for cancel in daemon.seen_of(m.Cancel)] == ["r"]
    late.clear()
    daemon = fake("receiver", script)
    with ReceiverClient(daemon.endpoint) as client:
        client.start_wait("r").abandon()
        with pytest.raises(RequestRefused):
            client.status()
    assert [release.lease for release in daemon.seen_of(m.Release)] == [5]


def test_a_daemon_that_is_stopped_does_not_hold_its_clients_for_ever(fake):
    # Broken in production: an engine that asks `done()` between its steps waits for ever for a daemon under SIGSTOP.
    daemon = fake("receiver", lambda request: [])
    with ReceiverClient(daemon.endpoint, wait_timeout_s=600.0) as client:
        # Not before it is attached, which may take a busy machine longer.
        client._reply_timeout_s = 0.2
        left_to_the_daemon, pending = client.start_wait("long"), client.start_wait("r", wait_s=0.1)
        assert not pending.done()
        eventually(pending.done)
        with pytest.raises(ReplyTimeout, match="no reply to wait"):
            pending.result()
        assert not left_to_the_daemon.done()


def status_of(role):
    """A daemon that counts nothing."""
    usage = m.BufferUsage(0, 0, 0, 0, 0, 0, [])
    return m.Status(role, "local", 4, 4, 0, 0, 0, 0, 0, 0, 0, 0, 1, usage)


def test_a_daemon_that_answers_nothing_is_lost(fake):
    # Broken in production: an engine waits for ever for the end of what a daemon under SIGSTOP was given to send.
    daemon = fake("sender", lambda request: [m.Accepted(id=request.id)] if isinstance(request, m.Send) else [])
    with SenderClient(daemon.endpoint, reply_timeout_s=600.0, silence_timeout_s=0.2) as client:
        client.send("r", [], last=True)
        for wait in (lambda: client.wait_sent("r", timeout_s=600.0), client.status, client.poll_events):
            with pytest.raises(DaemonSilent, match="has answered nothing for 0.2 s"):
                wait()
        with pytest.raises(DaemonSilent):
            client.start_cancel("r")
    assert daemon.seen_of(m.StatusQuery) and not daemon.seen_of(m.Detach)


def test_a_daemon_that_answers_when_asked_may_take_its_time(fake):
    # Broken in production: requests fail because a receiver takes longer to grant slots than a daemon may be silent.
    waiting = []

    def script(request):
        if isinstance(request, m.Open):
            waiting.append(request)
        elif isinstance(request, m.StatusQuery):
            yield m.StatusReply(id=request.id, status=status_of("sender"))
            if len(daemon.seen_of(m.StatusQuery)) == 5:
                yield m.Opened(id=waiting[0].id, req_id="r", already_sent=[])

    daemon = fake("sender", script)
    # It is asked after each quarter of that time, and so waited for longer than it may be silent.
    with SenderClient(daemon.endpoint, silence_timeout_s=2.0) as client:
        assert client.open("r", ["a"], last_chunk_tokens=1, receiver=TO).req_id == "r"


def test_an_engine_that_does_not_listen_takes_no_daemon_for_silent(monkeypatch):
    # Broken in production: after a step of a minute, or a pause of the whole engine, its daemon is taken for lost.
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    silence = Silence(8.0)
    for _ in range(3):
        clock[0] += 60.0
        silence.looked()
    assert silence.wants_ping() and not silence.over
    clock[0] += 60.0
    silence.looked()
    assert not silence.over
    # Four quarters of the time from the question on.
    for _ in range(3):
        assert not silence.wants_ping() and not silence.over
        clock[0] += 60.0
        silence.looked()
    assert silence.over
    silence.heard()
    assert not silence.over


def test_nothing_waits_to_be_sent_to_a_daemon_that_reads_nothing(fake):
    # Broken in production: each message of a step waits ten seconds, once a thousand are queued for a stopped daemon.
    read_on = threading.Event()
    daemon = fake("sender", lambda request: [] if read_on.wait(60) else [])
    with SenderClient(daemon.endpoint) as client:
        with pytest.raises(DaemonSilent, match="messages unread"):
            for _ in range(200_000):
                client.start_cancel("r").abandon()
        # What was not said is not missing: nothing more is said either, and the connection ends.
        with pytest.raises(DaemonSilent):
            client.status()
    read_on.set()


def test_a_daemon_that_gives_its_client_up_is_noticed(fake):
    # Broken in production: libzmq connects anew in silence, and every request is answered with "not attached" for good.
    daemon = fake("sender")
    with SenderClient(daemon.endpoint, silence_timeout_s=600.0) as client:
        pending = client.start_open("r", ["a"], last_chunk_tokens=1, receiver=TO)
        daemon.hang_up()
        with pytest.raises(DaemonLost, match="has closed the connection"):
            pending.result(timeout_s=60)


def test_what_came_before_the_end_counts(fake):
    # Broken in production: a request that was sent is reported as failed, and computed and sent again, because the
    # daemon ended right after it had said so.
    process = subprocess.Popen(["sleep", "600"])
    go = threading.Event()

    def script(request):
        if isinstance(request, m.Send):
            go.wait(60)
            yield m.Opened(id=opening.result_id, req_id="a", already_sent=[])
            yield m.Sent(req_id="b", chunks=1, bytes=1, timings=TIMINGS)
            process.kill()
            process.wait()

    client = SenderClient(fake("sender", script, pid=process.pid).endpoint, map_buffer=False)
    opening = client.start_open("a", ["k"], last_chunk_tokens=1, receiver=TO)
    opening.result_id = opening._request.id
    opening.abandon()
    client.start_send("b", [], last=True).abandon()
    # All of it is there when it is looked at.
    poll = client._channel._poller.poll

    def after_the_end(timeout_ms):
        go.set()
        process.wait()
        return poll(timeout_ms)

    client._channel._poller.poll = after_the_end
    assert client.wait_sent("b", timeout_s=60).req_id == "b"
    with pytest.raises(DaemonGone):
        client.poll_events()
    client.close()


def test_what_came_before_something_that_cannot_be_read_counts(fake):
    # Broken in production: one message of another version takes the end of another request with it.
    def script(request):
        if isinstance(request, m.StatusQuery):
            yield m.Sent(req_id="b", chunks=1, bytes=1, timings=TIMINGS)
            yield b"\xc1"
            yield m.StatusReply(id=request.id, status=status_of("sender"))

    with SenderClient(fake("sender", script).endpoint) as client:
        asked = client._start(lambda id: m.StatusQuery(id=id), m.StatusReply, lambda reply: reply.status)
        assert client.wait_sent("b", timeout_s=60).req_id == "b"
        with pytest.raises(ProtocolError, match="does not understand"):
            asked.result()
        assert asked.result().role == "sender"


def test_a_daemon_that_ends_before_it_has_answered_is_gone_at_once():
    # Broken in production: an engine stands still for ten seconds, because its daemon died right after its ready line.
    with subprocess.Popen(["sleep", "0.3"]) as daemon:
        with pytest.raises(DaemonGone, match=f"pid {daemon.pid}"):
            SenderClient("ipc://@pd-backend/nobody", reply_timeout_s=600.0, pid=daemon.pid)


def test_nobody_at_the_endpoint_is_said_within_the_timeout():
    # Broken in production: a wrong endpoint hangs the engine's start without a word.
    with pytest.raises(ReplyTimeout, match="no daemon answered at ipc://@pd-backend/nobody"):
        SenderClient("ipc://@pd-backend/nobody", reply_timeout_s=0.1)
    with pytest.raises(ProtocolError, match="no endpoint"):
        SenderClient("nonsense")


def test_another_role_or_version_is_refused_by_name(fake):
    # Broken in production: a connector drives the wrong daemon and gets errors about something else.
    with pytest.raises(ClientMisuse, match="is a pd-receiver, expected a pd-sender"):
        SenderClient(fake("receiver").endpoint)
    with pytest.raises(ProtocolError, match="version 3, this client 2"):
        SenderClient(fake("sender", version=3).endpoint)


def test_what_is_no_message_is_an_error_not_a_hang(fake):
    # Broken in production: a newer daemon's message is dropped and its request waits for ever.
    no_text = b"\x81\xa4type\xa2\xff\xfe"
    nested = b"\x82\xa4type\xa5error\xa4more" + b"\x91" * 100_000 + b"\xc0"
    for payload in (b"\xc1", msgspec.msgpack.encode({"type": "surprise", "id": 2}), b"", no_text, nested):
        with SenderClient(fake("sender", lambda request, payload=payload: [payload]).endpoint) as client:
            with pytest.raises(ProtocolError, match="does not understand"):
                client.status()
    with SenderClient(fake("sender", lambda request: [m.Released(id=request.id)]).endpoint) as client:
        with pytest.raises(ProtocolError, match="answered StatusQuery with Released"):
            client.status()


def test_the_daemons_death_ends_every_wait_at_once(fake):
    # Broken in production: libzmq reconnects in silence, and each request of a dead daemon runs into its deadline.
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    daemon = fake("sender", lambda request: [m.Sent(req_id="r", chunks=0, bytes=0, timings=TIMINGS)], pid=process.pid)
    client = SenderClient(daemon.endpoint, map_buffer=False)
    with pytest.raises(MappingError):
        _ = client.buffer
    pending = client.start_open("r", ["a"], last_chunk_tokens=1, receiver=TO)
    assert isinstance(client.wait_sent("r"), Sent)
    process.stdin.close()
    process.wait(timeout=PATIENCE_S)
    with pytest.raises(DaemonGone, match="attach anew"):
        pending.result(timeout_s=60)
    for call in (client.status, client.poll_events, pending.done):
        with pytest.raises(DaemonGone):
            call()
    client.close()


def test_a_closed_client_says_so(fake):
    # Broken in production: use after close looks like a dead daemon.
    client = SenderClient(fake("sender").endpoint)
    client.close()
    client.close()
    with pytest.raises(ClientClosed):
        client.status()


def test_two_threads_in_one_client_are_told(fake):
    # Broken in production: libzmq's sockets are not thread-safe; frames of two messages mix.
    inside, leave = threading.Event(), threading.Event()
    with SenderClient(fake("sender").endpoint) as client:

        def hold():
            with client._channel._exclusive():
                inside.set()
                leave.wait(10)

        thread = threading.Thread(target=hold)
        thread.start()
        inside.wait(10)
        with pytest.raises(ClientMisuse, match="two threads"):
            client.poll_events()
        leave.set()
        thread.join(10)
        assert client.poll_events() == []


def test_a_forked_child_is_told_and_the_parent_goes_on(fake):
    # Broken in production: a forked worker steals its parent's replies.
    with SenderClient(fake("sender", sender_script).endpoint) as client:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                client.open("r", ["a"], last_chunk_tokens=1, receiver=TO)
            except ClientMisuse:
                client.close()
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert client.open("r", ["a"], last_chunk_tokens=1, receiver=TO).req_id == "r"


def test_a_client_that_is_dropped_without_close_does_not_hang(fake):
    # Broken in production: an engine's interpreter never exits, because nobody closed a client.
    daemon = fake("sender", sender_script)
    client = SenderClient(daemon.endpoint)
    del client
    gc.collect()
