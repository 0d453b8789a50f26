"""Workers that send and load beside one daemon with both halves, which they share."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from conftest import binary
from fake_daemon import FakeDaemon
from free_ports import free_ports
from pd_backend import NodeClient
from pd_backend import messages as m
from pd_backend.errors import PdError
from pd_backend.vllm.attachment import Attachment
from pd_backend.vllm.consumer import ConsumerWorker
from pd_backend.vllm.producer import ProducerWorker
from pd_backend.vllm.step import ChunkBlocks, ConsumerStep, ProducerStep
from pd_backend.vllm.supervisor import Supervisor
from test_vllm_lost import TOKENS, Given, grants, outcomes, plan, sent_before
from vllm_pair import LAYOUT, Memory, Pair, load, restarted
from waiting import DEADLINES, PATIENCE_S, eventually


class Node:
    """The worker of a server with both halves."""

    def __init__(self, stack: ExitStack, seed: int) -> None:
        init_port, alloc_port = free_ports(2)
        arguments = []
        for key in (
            "pd_role=both", "transfer_channel=local", f"pd_buffer_size={16 * LAYOUT.chunk_bytes}", *DEADLINES,
            f"pd_peer_init_port={init_port}", f"pd_peer_alloc_port={alloc_port}",
        ):
            arguments += ["--set", key]
        self.supervisor = Supervisor(
            binary("pd-sender"), arguments, LAYOUT.json(), NodeClient, echo_log=False, restarts_max=2,
            restart_window_s=3600,
        )
        stack.callback(self.supervisor.close)
        self.memory = Memory(seed)
        self.daemon = Attachment(self.supervisor, self.memory)  # type: ignore[arg-type]
        self.producer = ProducerWorker(self.daemon, LAYOUT, "uint8")
        self.consumer = ConsumerWorker(self.daemon, LAYOUT, "uint8", receive_wait_s=PATIENCE_S)


class Way(Pair):
    """From one server to another, as the helpers of other tests want it."""

    def __init__(self, source: Node, target: Node) -> None:
        self.sender, self.receiver = source.supervisor, target.supervisor
        self.source, self.target = source.memory, target.memory
        self.producer, self.consumer = source.producer, target.consumer


@pytest.fixture
def two() -> Iterator[tuple[Node, Node]]:
    with ExitStack() as stack:
        yield Node(stack, 1), Node(stack, 2)


def test_requests_go_both_ways_at_once(two: tuple[Node, Node]) -> None:
    # Broken in production: what one direction hears of the shared daemon is lost to the other one.
    one, other = two
    ways = {"there": Way(one, other), "back": Way(other, one)}
    tokens = {"there": list(range(16)), "back": list(range(50, 66))}
    for name, way in ways.items():
        way.consumer.begin_step(load(name, tokens[name], [8, 9]))
        way.produce(ProducerStep(plans=[way.plan(name, tokens[name])]))
    for name, way in ways.items():
        way.produce(ProducerStep(chunks=[ChunkBlocks(name, 0, [0, 1])], finishing=[name]))
    for name, way in ways.items():
        assert way.ended(name) is None
        assert way.consume(ConsumerStep(), name) == set()
        assert (way.target.kv[:, 8:10] == way.source.kv[:, 0:2]).all()
    for way in ways.values():
        way.nothing_left()


def test_a_daemon_that_dies_is_lost_to_both_halves_and_comes_back(two: tuple[Node, Node]) -> None:
    # Broken in production: one half goes on with the buffer of a daemon that has gone, or keeps the next one from both.
    one, other = two
    there, back = Way(one, other), Way(other, one)
    back.produce(ProducerStep(plans=[back.plan("sent", TOKENS)]))
    other.consumer.begin_step(load("loaded", TOKENS, [5, 6]))
    pid = other.supervisor.ready.pid
    os.kill(pid, signal.SIGKILL)
    assert "daemon_gone" in (back.ended("sent") or "")
    # It has heard of that through the other half.
    assert other.daemon.client is None
    assert there.consume(ConsumerStep(), "loaded") == {5, 6}
    back.produce(ProducerStep(finishing=["sent"]))
    restarted(other.supervisor, pid)

    def is_attached() -> bool:
        try:
            return other.daemon.attach() is not None
        except PdError:
            return False

    eventually(is_attached)
    # What the others have of the one that has gone may fail one more request each way.
    for way, name in ((there, "there"), (back, "back")):
        for attempt in range(100):
            again = f"{name} {attempt}"
            chunks = [ChunkBlocks(again, 0, [0, 1])]
            way.produce(ProducerStep(plans=[way.plan(again, TOKENS)], chunks=chunks, finishing=[again]))
            if way.ended(again) is None:
                break
        assert way.consume(load(again, TOKENS, [10, 11]), again) == set()
        assert (way.target.kv[:, 10:12] == way.source.kv[:, 0:2]).all()
    there.nothing_left()
    back.nothing_left()


def test_what_cannot_be_read_is_lost_to_both_halves(fake: Callable[..., FakeDaemon]) -> None:
    # Broken in production: prefill's half reads an answer that brought chunks to decode's, cannot, and their lease is kept
    # for as long as the engine runs.
    def script(request: m.Request) -> Iterator[m.Reply | bytes]:
        if isinstance(request, m.Open) and request.req_id == "b":
            yield b"\xc1"
        elif not isinstance(request, m.Wait):
            yield from grants(request)

    with NodeClient(fake("both", script).endpoint) as client:
        supervisor = Given(client)
        daemon = Attachment(supervisor, Memory(1))  # type: ignore[arg-type]
        producer, consumer = ProducerWorker(daemon, LAYOUT, "uint8"), ConsumerWorker(daemon, LAYOUT, "uint8")
        sent_before(producer, "a")
        consumer.begin_step(load("x", TOKENS, [5, 6]))
        producer.begin_step(ProducerStep(plans=[plan("b")]))
        assert None not in outcomes(producer, "a", "b")
        assert eventually(lambda: (said := consumer.progress())[0] and said) == ({"x"}, {5, 6})
        assert [type(why).__name__ for why in supervisor.losses] == ["Unreadable"]
