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
from pd_backend.vllm.keys import chunk_hashes
from pd_backend.vllm.producer import ProducerWorker
from pd_backend.vllm.spec import RemoteSpec, kept_spec
from pd_backend.vllm.step import ChunkBlocks, ConsumerStep, ProducerStep, ReceivePlan, SendPlan, TurnPlan
from pd_backend.vllm.supervisor import Supervisor
from test_vllm_lost import TOKENS, Given, grants, outcomes, plan, sent_before
from vllm_pair import BLOCK, CHUNK, LAYOUT, Memory, Pair, load, restarted
from waiting import DEADLINES, PATIENCE_S, eventually


class Node:
    """The worker of a server with both halves."""

    def __init__(self, stack: ExitStack, seed: int) -> None:
        init_port, alloc_port = free_ports(2)
        arguments = []
        for key in (
            "pd_role=both", "transfer_channel=local", f"pd_buffer_size={16 * LAYOUT.chunk_bytes}", *DEADLINES,
            f"pd_peer_init_port={init_port}", f"pd_peer_alloc_port={alloc_port}", "pd_rendezvous_port=0",
        ):
            arguments += ["--set", key]
        self.supervisor = Supervisor(
            binary("pd-sender"), arguments, LAYOUT.json(), NodeClient, echo_log=False, restarts_max=2,
            restart_window_s=3600,
        )
        stack.callback(self.supervisor.close)
        self.memory = Memory(seed)
        #: Requests of whose turn before nothing more comes.
        self.through: set[str] = set()
        self.daemon = Attachment(self.supervisor, self.memory)  # type: ignore[arg-type]
        self.producer = ProducerWorker(self.daemon, LAYOUT, "uint8")
        self.consumer = ConsumerWorker(self.daemon, LAYOUT, "uint8", receive_wait_s=PATIENCE_S)


    def at(self, *ids: str) -> RemoteSpec:
        """Where it is asked for what it has parked."""
        return RemoteSpec("127.0.0.1", (self.supervisor.ready.rendezvous_port,), ids, in_turn=True)


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


CONVERSATION = list(range(100, 148))


def keep(way: Way, decode: Node, request_id: str, tokens: list[int]) -> None:
    """What decode does with a request that has ended: its blocks from the first one on are kept."""
    spec, hashes = kept_spec(request_id), chunk_hashes(tokens, CHUNK)
    plan = SendPlan(request_id, spec, hashes, len(tokens), cached=True, kept=decode.at(*spec.ids))
    chunks = [ChunkBlocks(request_id, chunk, [2 * chunk, 2 * chunk + 1]) for chunk in range(len(hashes))]
    way.produce(ProducerStep(plans=[plan], chunks=chunks, finishing=[request_id]))
    assert way.ended(request_id) is None


def turn_is_through(prefill: Node, request_id: str) -> None:
    def is_through() -> bool:
        prefill.consumer.begin_step(ConsumerStep(idle=True))
        assert prefill.consumer.progress() == (set(), set())
        prefill.through.update(prefill.consumer.here())
        return request_id in prefill.through

    eventually(is_through, 0.001)


def turn_is_loaded(
    way: Way, request_id: str, tokens: list[int], blocks: list[int], first_chunk: int = 0
) -> set[int]:
    """As prefill does once it has looked up what came."""
    first_block = first_chunk * CHUNK // BLOCK
    plan = ReceivePlan(
        request_id, None, chunk_hashes(tokens, CHUNK), len(tokens), first_block, blocks, first_chunk=first_chunk
    )
    return way.consume(ConsumerStep(loads=[plan], turns_over=[request_id]), request_id)


@pytest.mark.parametrize("named", [True, False], ids=["by its router", "by the receivers it knows"])
def test_prefill_loads_what_decode_has_kept_of_the_turn_before(two: tuple[Node, Node], named: bool) -> None:
    # Broken in production: each turn of a conversation computes the answer of the one before again.
    prefill, decode = two
    there, back = Way(prefill, decode), Way(decode, prefill)
    if not named:
        there.produce(ProducerStep(plans=[there.plan("a", TOKENS)], chunks=[ChunkBlocks("a", 0, [0, 1])], finishing=["a"]))
        assert there.ended("a") is None
        assert there.consume(load("a", TOKENS, [14, 15]), "a") == set()
    keep(back, decode, "kept", CONVERSATION)
    # It is in nobody's way: the first who needs the slots has them.
    eventually(lambda: decode.supervisor.client().status().slots_parked == 0)
    hashes = chunk_hashes(CONVERSATION, CHUNK)
    # Prefill has the first chunk itself, and what is asked for beyond the kept ones is a miss.
    wanted = TurnPlan("next", hashes[1:] + ["c0ffee"], decode.at() if named else None)
    prefill.consumer.begin_step(ConsumerStep(turns=[wanted]))
    turn_is_through(prefill, "next")
    assert turn_is_loaded(back, "next", CONVERSATION, [8, 9, 10, 11, 12, 13], first_chunk=1) == set()
    assert (prefill.memory.kv[:, 10:14] == decode.memory.kv[:, 2:6]).all()
    prefill.consumer.begin_step(ConsumerStep(turns=[TurnPlan("first", hashes[:1], decode.at())]))
    turn_is_through(prefill, "first")
    assert turn_is_loaded(back, "first", CONVERSATION, [8, 9, 10, 11, 12, 13]) == set()
    assert (prefill.memory.kv[:, 8:14] == decode.memory.kv[:, 0:6]).all()
    there.nothing_left()
    back.nothing_left()


def test_a_turn_that_nobody_has_is_through_and_one_that_is_given_up_leaves_nothing(two: tuple[Node, Node]) -> None:
    # Broken in production: prompts wait for servers that know nothing, or are not there.
    prefill, decode = two
    there, back = Way(prefill, decode), Way(decode, prefill)
    hashes = chunk_hashes(CONVERSATION, CHUNK)
    prefill.consumer.begin_step(ConsumerStep(turns=[TurnPlan("nobody", hashes, None), TurnPlan("unknown", hashes, decode.at())]))
    turn_is_through(prefill, "nobody")
    turn_is_through(prefill, "unknown")
    (port,) = free_ports(1)
    gone = RemoteSpec("127.0.0.1", (port,), (), in_turn=True)
    for name in ("gone", "left alone"):
        prefill.consumer.begin_step(ConsumerStep(turns=[TurnPlan(name, hashes, gone)]))
        turn_is_through(prefill, name)
    asked = [turn.asked for turn in prefill.consumer._turns._turns.values()]
    assert [len(sources) for sources in asked] == [0, 1, 1, 0], "one that did not answer is asked again at once"
    # Given up while it is asked for, and when it has come.
    keep(back, decode, "kept", CONVERSATION)
    prefill.consumer.begin_step(ConsumerStep(turns=[TurnPlan(name, hashes, decode.at()) for name in ("early", "late")]))
    prefill.consumer.begin_step(ConsumerStep(turns_over=["early"]))
    turn_is_through(prefill, "late")
    prefill.consumer.begin_step(ConsumerStep(turns_over=["nobody", "unknown", "gone", "left alone", "late"]))
    there.nothing_left()
    back.nothing_left()


def test_a_daemon_that_dies_ends_what_it_was_asked_of_a_turn(two: tuple[Node, Node]) -> None:
    # Broken in production: prompts wait for ever for what a daemon that has gone was asked for.
    prefill, decode = two
    hashes = chunk_hashes(CONVERSATION, CHUNK)
    prefill.consumer.begin_step(ConsumerStep(turns=[TurnPlan("a", hashes, decode.at())]))
    pid = prefill.supervisor.ready.pid
    os.kill(pid, signal.SIGKILL)
    turn_is_through(prefill, "a")
    restarted(prefill.supervisor, pid)
    prefill.consumer.begin_step(ConsumerStep(turns_over=["a"]))
    Way(decode, prefill).nothing_left()
