"""Daemons that fall silent, end, or say what cannot be read, beside workers that go on."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from fake_daemon import FakeDaemon
from pd_backend import Client, PdError, ReceiverClient, RequestRefused, SenderClient
from pd_backend import messages as m
from pd_backend._silence import Silence
from pd_backend.vllm.attachment import Attachment
from pd_backend.vllm.consumer import ConsumerWorker
from pd_backend.vllm.groups import Groups
from pd_backend.vllm.keys import chunk_hashes
from pd_backend.vllm.naming import Naming
from pd_backend.vllm.producer import ProducerWorker, requests_of
from pd_backend.vllm.producer_scheduler import ProducerScheduler
from pd_backend.vllm.spec import DisaggSpec
from pd_backend.vllm.step import ChunkBlocks, ConsumerStep, ProducerStep, ReceivePlan, SendPlan
from test_vllm_scheduler import output, request
from vllm_pair import BLOCK, CHUNK, LAYOUT, Memory, Pair, load, pair

TOKENS = list(range(16))
TIMINGS = m.Timings(alloc_us=1, transfer_us=2, commit_us=3)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process stands still."""
    os.kill(pid, signal.SIGSTOP)
    try:
        while open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] != "T":
            time.sleep(0.001)
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def impatient(client: Client) -> None:
    """It takes its daemon for lost soon; those that are attached after it do not."""
    client._silence = Silence(0.3)


def eventually(seen: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 30
    while not (value := seen()):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return value


def attached(both: Pair) -> bool:
    """Whether there are clients of both daemons."""
    try:
        return bool(both.sender.client() and both.receiver.client())
    except PdError:
        return False


def test_a_sender_that_is_stopped_fails_what_it_had_accepted_and_serves_again(pair: Callable[..., Pair]) -> None:
    # Broken in production: prefill's scheduler steps for ever for a request whose daemon was stopped, and the router can
    # use its name no more.
    both = pair()
    pid = both.sender.ready.pid
    scheduler = ProducerScheduler(Groups.plain(CHUNK, BLOCK), 1, Naming())
    ready = both.receiver.ready
    params = {
        "disagg_spec": {
            "req_id": "router-a",
            "receiver_host": "127.0.0.1",
            "receiver_init_port": [ready.init_port],
            "receiver_alloc_port": [ready.alloc_port],
        }
    }
    asked = request(16, params)
    scheduler.allocated(asked)
    both.producer.begin_step(scheduler.build(output(new=[("a", [1, 2], 0, 16)])))
    eventually(lambda: both.producer._poll() or both.producer._requests["a"].opened)
    # Its receiver does not answer, so that it is not sent before its sender is stopped.
    with stopped(ready.pid):
        eventually(lambda: both.producer.end_step() or both.producer._requests["a"].complete)
        eventually(lambda: both.producer._poll() or not both.producer._requests["a"].replies)
        with stopped(pid):
            impatient(both.sender.client())
            assert scheduler.finished(asked)[0]
            assert both.produce(scheduler.build(output())) == {"a"}
            assert scheduler.pending()
            told: list[str | None] = []

            def no_more_pending() -> bool:
                both.produce(scheduler.build(output()))
                said = both.producer.outcomes()
                if said is not None:
                    told.extend(said.ended["a"])
                    scheduler.update(said)
                return not scheduler.pending()

            eventually(no_more_pending)
            (error,) = told
            assert error is not None and "daemon_silent" in error and "has answered nothing for 0.3 s" in error
            # Told at once, for as long as it stands still.
            both.produce(ProducerStep(plans=[both.plan("b", TOKENS)]))
            said = both.producer.outcomes()
            assert said is not None and "daemon_silent" in str(said.ended["b"])
            assert both.produce(ProducerStep(finishing=["b"])) == {"b"}
    eventually(lambda: attached(both))
    assert both.sender.ready.pid == pid
    both.source.kv += 1
    # By the name that it had, which the scheduler takes again.
    scheduler.allocated(request(16, params, "c"))
    step = scheduler.build(output(new=[("c", [1, 2], 0, 16)]))
    assert [plan.spec.req_id for plan in step.plans] == ["router-a"]
    plan = SendPlan("a", step.plans[0].spec, step.plans[0].hashes, 16)
    both.produce(ProducerStep(plans=[plan], chunks=[ChunkBlocks("a", 0, [1, 2])], finishing=["a"]))
    assert both.ended("a") is None
    assert both.consume(load("a", TOKENS, [5, 6]), "a") == set()
    both.nothing_left()


def test_a_receiver_that_is_stopped_fails_those_who_wait_and_serves_again(pair: Callable[..., Pair]) -> None:
    # Broken in production: decode waits two minutes for chunks of a receiver that was stopped.
    both = pair()
    both.consumer._receive_wait_s = 600.0
    wanted = both.plan("d", TOKENS)
    both.consumer.begin_step(ConsumerStep(announced=[("b", "router-b"), ("c", "router-c")]))
    with stopped(both.receiver.ready.pid):
        impatient(both.receiver.client())
        assert both.consume(load("a", TOKENS, [5, 6]), "a") == {5, 6}
        # Nor is anything kept of those that have no blocks yet, or need none.
        both.consumer.begin_step(ConsumerStep(unneeded=["c"]))
        both.consumer.progress()
        assert ("b" in both.consumer.here(), both.consumer.returned()) == (True, ["c"])
        plan = ReceivePlan("b", "router-b", chunk_hashes(TOKENS, CHUNK), 16, 0, [7, 8])
        assert both.consume(ConsumerStep(loads=[plan]), "b") == {7, 8}
        # One that comes meanwhile waits for it.
        both.consumer.begin_step(load("d", TOKENS, [1, 2]))
        assert both.consumer.progress() == (set(), set())
    eventually(lambda: both.consumer.progress() and both.consumer._requests["d"].arriving)
    both.produce(ProducerStep(plans=[wanted], chunks=[ChunkBlocks("d", 0, [0, 1])], finishing=["d"]))
    error = both.ended("d")
    if error is not None:
        # The sender takes a receiver for lost that has stood still for longer than it may.
        both.produce(ProducerStep(plans=[wanted], chunks=[ChunkBlocks("d", 0, [0, 1])], finishing=["d"]))
        assert both.ended("d") is None
    assert both.consume(ConsumerStep(), "d") == set()
    both.nothing_left()


class Given:
    """The part of a supervisor: one client, and whatever is said of it."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self.losses: list[PdError] = []

    def client(self) -> Any:
        return self._client

    def lost(self, client: Any, why: PdError) -> None:
        assert client is self._client
        self.losses.append(why)


def plan(request_id: str) -> SendPlan:
    return SendPlan(request_id, DisaggSpec(request_id, "h", (1,), (2,)), chunk_hashes(TOKENS, CHUNK), len(TOKENS))


def grants(asked: m.Request) -> Iterator[m.Reply | bytes]:
    """A sender that goes along with everything, and never says that anything was sent."""
    if isinstance(asked, m.Open):
        yield m.Opened(id=asked.id, req_id=asked.req_id, already_sent=[])
    elif isinstance(asked, m.Stage):
        yield m.Staged(id=asked.id, slots=[m.StagedSlot(chunk, chunk, 0, LAYOUT.chunk_bytes) for chunk in asked.chunks])
    elif isinstance(asked, m.Send):
        yield m.Accepted(id=asked.id)
    elif isinstance(asked, m.Cancel):
        yield m.Cancelled(id=asked.id, req_id=asked.req_id)


def outcomes(producer: ProducerWorker, *request_ids: str) -> list[str | None]:
    """How these requests ended, once they have."""
    ended: dict[str, list[str | None]] = {}

    def all_known() -> bool:
        said = producer.outcomes()
        ended.update({} if said is None else said.ended)
        return ended.keys() >= set(request_ids)

    eventually(all_known)
    return [ended[request_id][0] for request_id in request_ids]


def sent_before(producer: ProducerWorker, *request_ids: str) -> None:
    """Steps until everything of these was given to the daemon."""
    chunks = [ChunkBlocks(request_id, 0, [0, 1]) for request_id in request_ids]
    producer.begin_step(ProducerStep(plans=[plan(request_id) for request_id in request_ids], chunks=chunks))
    producer.end_step()
    for request_id in request_ids:
        eventually(lambda: producer.end_step() or producer._by_req_id[request_id].complete)
        eventually(lambda: producer._poll() or not producer._by_req_id[request_id].replies)


@pytest.mark.parametrize("restarted", [False, True])
def test_what_a_daemon_said_before_it_ended_counts(fake: Callable[..., FakeDaemon], restarted: bool) -> None:
    # Broken in production: a request that was sent is reported as failed, computed again and sent again.
    dropped: list[m.Open] = []
    go = threading.Event()

    def script(asked: m.Request) -> Iterator[m.Reply | bytes]:
        if isinstance(asked, m.Open) and asked.req_id == "a":
            dropped.append(asked)
        elif isinstance(asked, m.Cancel):
            go.wait(60)
            yield m.Opened(id=dropped[0].id, req_id="a", already_sent=[])
            yield m.Sent(req_id="b", chunks=1, bytes=1, timings=TIMINGS)
            process.kill()
            process.wait()
        else:
            yield from grants(asked)

    daemon = fake("sender", script)
    process = subprocess.Popen(["sleep", "600"], pass_fds=[daemon.fd])
    daemon.pid = process.pid
    client = SenderClient(daemon.endpoint)
    supervisor = Given(client)
    producer = ProducerWorker(Attachment(supervisor, Memory(1)), LAYOUT, "uint8")  # type: ignore[arg-type]
    producer.begin_step(ProducerStep(plans=[plan("a")]))
    sent_before(producer, "b", "c")
    poll = client._channel._poller.poll

    def after_the_end(timeout_ms: int) -> Any:
        go.set()
        process.wait()
        return poll(timeout_ms)

    if restarted:
        # It is not looked at again before another one is there.
        producer.begin_step(ProducerStep(dropped=["a"]))
        go.set()
        process.wait()
        with SenderClient(fake("sender", grants).endpoint) as other:
            supervisor.client = lambda: other  # type: ignore[method-assign]
            producer.begin_step(ProducerStep(plans=[plan("d")]))
            assert outcomes(producer, "b") == [None]
    else:
        client._channel._poller.poll = after_the_end
        producer.begin_step(ProducerStep(dropped=["a"]))
        sent, error = outcomes(producer, "b", "c")
        assert sent is None and error is not None and "daemon_gone" in error
    assert [type(why).__name__ for why in supervisor.losses] == ["DaemonGone"]
    client.close()


class Fault(PdError):
    """Of a kind that nobody has thought of."""


@pytest.mark.parametrize("fault", ["garbage", "another answer", "of one request", "of nobody's request"])
def test_an_error_leaves_the_client_and_gives_the_request_up(fake: Callable[..., FakeDaemon], fault: str) -> None:
    # Broken in production: the daemon keeps slots for requests that the engine has given up, here and at their receivers,
    # and the engine attaches anew in the middle of a step.
    def script(asked: m.Request) -> Iterator[m.Reply | bytes]:
        if isinstance(asked, m.Open) and asked.req_id == "odd":
            if fault == "garbage":
                yield b"\xc1"
            elif fault == "another answer":
                yield m.Accepted(id=asked.id)
        else:
            yield from grants(asked)

    daemon = fake("sender", script)
    with SenderClient(daemon.endpoint) as client:
        producer = ProducerWorker(Attachment(Given(client), Memory(1)), LAYOUT, "uint8")  # type: ignore[arg-type]
        sent_before(producer, "a")
        producer.begin_step(ProducerStep(plans=[plan("odd")]))
        odd = producer._requests["odd"]
        if fault == "of one request":
            odd.opening.done = lambda: True
            odd.opening.result = lambda: (_ for _ in ()).throw(Fault("odd", "of one request"))
        elif fault == "of nobody's request":
            poll = client.poll_events

            def once() -> Any:
                client.poll_events = poll
                raise Fault("odd", "of nobody's request")

            client.poll_events = once
        assert outcomes(producer, "odd") != [None]
        eventually(lambda: "odd" in [cancel.req_id for cancel in daemon.seen_of(m.Cancel)])
        everybody = fault in ("garbage", "of nobody's request")
        assert ("a" in [cancel.req_id for cancel in daemon.seen_of(m.Cancel)]) == everybody
        # What comes after it goes the same way as before.
        sent_before(producer, "b")
        assert len(daemon.seen_of(m.Attach)) == 1
        assert set(requests_of(producer)) >= {"b"}


def test_a_request_is_given_up_once_the_stream_lets_it_be_said(
    fake: Callable[..., FakeDaemon], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Broken in production: a GPU that lags behind makes the worker lose events, and keep slots at the daemon for good.
    def script(asked: m.Request) -> Iterator[m.Reply | bytes]:
        if isinstance(asked, m.Open) and asked.req_id == "b":
            yield m.Failed(req_id="a", kind="peer_lost", text="gone", peer="p")
            yield m.Sent(req_id="c", chunks=1, bytes=1, timings=TIMINGS)
        else:
            yield from grants(asked)

    daemon = fake("sender", script)
    with SenderClient(daemon.endpoint) as client:
        producer = ProducerWorker(Attachment(Given(client), Memory(1)), LAYOUT, "uint8")  # type: ignore[arg-type]
        sent_before(producer, "a", "c")

        def behind(_stream: int | None) -> str | None:
            raise RequestRefused("limit", "4096 messages wait for the engine's stream")

        with monkeypatch.context() as patched:
            patched.setattr(client, "_after", behind)
            producer.begin_step(ProducerStep(plans=[plan("b")]))
            sent, error = outcomes(producer, "c", "a")
            assert sent is None and error is not None and "peer_lost" in error
            assert not daemon.seen_of(m.Cancel)
        eventually(lambda: producer.outcomes() or daemon.seen_of(m.Cancel))
        assert [(cancel.req_id, cancel.acknowledges) for cancel in daemon.seen_of(m.Cancel)] == [("a", True)]


def test_chunks_of_an_answer_that_cannot_be_read_go_back_with_the_client(fake: Callable[..., FakeDaemon]) -> None:
    # Broken in production: a lease that nobody has heard of keeps its chunks for as long as the engine runs.
    def script(asked: m.Request) -> Iterator[m.Reply | bytes]:
        if isinstance(asked, m.Wait):
            yield b"\xc1"

    with ReceiverClient(fake("receiver", script).endpoint) as client:
        supervisor = Given(client)
        consumer = ConsumerWorker(Attachment(supervisor, Memory(2)), LAYOUT, "uint8")  # type: ignore[arg-type]
        consumer.begin_step(load("a", TOKENS, [5, 6]))
        assert eventually(lambda: (said := consumer.progress())[0] and said) == ({"a"}, {5, 6})
        assert [type(why).__name__ for why in supervisor.losses] == ["Unreadable"]
