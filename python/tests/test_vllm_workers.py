"""The workers' sides of the connector against real daemons."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pd_backend import ReceiverClient
from pd_backend.vllm.attachment import Attachment
from pd_backend.vllm.keys import chunk_hashes
from pd_backend.vllm.producer import ProducerWorker
from pd_backend.vllm.spec import DisaggSpec, RemoteSpec
from pd_backend.vllm.step import ChunkBlocks, ConsumerStep, HoldPlan, ProducerStep, ReceivePlan, ReleasePlan, SendPlan
from vllm_pair import BLOCKS, CHUNK, LAYERS, LAYOUT, Memory, NAMES, Pair, load, pair, restarted
from waiting import PATIENCE_S, eventually


def test_chunks_go_from_blocks_to_blocks(pair: Callable[..., Pair]) -> None:
    # Broken in production: a chunk's blocks arrive in other blocks than those that decode reads.
    both = pair(layer_pushes=4)
    tokens = list(range(37))
    # 3 chunks of 2, 2 and 1 blocks, over two steps.
    both.produce(ProducerStep(plans=[both.plan("a", tokens)], chunks=[ChunkBlocks("a", 0, [3, 1])]))
    second = ProducerStep(chunks=[ChunkBlocks("a", 1, [7, 0]), ChunkBlocks("a", 2, [5])], finishing=["a"])
    both.produce(second)
    assert both.ended("a") is None
    before = both.target.kv.copy()
    assert both.consume(load("a", tokens, [9, 2, 4, 11, 6]), "a") == set()
    assert (both.target.kv[:, [9, 2, 4, 11, 6]] == both.source.kv[:, [3, 1, 7, 0, 5]]).all()
    others = [block for block in range(BLOCKS) if block not in (9, 2, 4, 11, 6)]
    assert (both.target.kv[:, others] == before[:, others]).all()
    both.nothing_left()


def test_a_chunk_is_across_before_the_next_one_is_computed(pair: Callable[..., Pair]) -> None:
    # Broken in production: with chunked prefill, nothing crosses before the whole prompt is computed.
    both = pair()
    tokens = list(range(32))
    both.produce(ProducerStep(plans=[both.plan("a", tokens)], chunks=[ChunkBlocks("a", 0, [3, 1])]))
    status = both.sender.client().status
    # Its slot is free again, which it is once it was written to the receiver.
    both.stepped_until(lambda: both.source.gathered != [] and status().slots_free == status().slot_count)
    assert status().requests_active == 1 and both.receiver.client().status().slots_reserved == 2
    both.produce(ProducerStep(chunks=[ChunkBlocks("a", 1, [7, 0])], finishing=["a"]))
    assert both.ended("a") is None


def test_layers_are_pushed_as_they_are_computed(pair: Callable[..., Pair]) -> None:
    # Broken in production: nothing of a prompt crosses before its last layer is computed.
    both = pair(layer_pushes=2)
    tokens = list(range(16))
    both.producer.begin_step(ProducerStep(plans=[both.plan("a", tokens)], chunks=[ChunkBlocks("a", 0, [3, 1])]))
    both.polled_until(lambda: has_slot(both.producer))
    # A layer whose predecessors were not seen counts for nothing.
    both.producer.layer_computed(NAMES[1])
    both.producer.layer_computed("a layer without KV")
    both.producer.layer_computed(NAMES[0])
    assert both.source.gathered == []
    for name in NAMES[1:3]:
        both.producer.layer_computed(name)
    # The layer that is not computed yet changes; those that are pushed do not any more.
    both.source.kv[3] += 1
    assert both.source.gathered == [range(0, 2)]
    both.producer.layer_computed(NAMES[3])
    both.producer.end_step()
    assert both.source.gathered == [range(0, 2), range(2, 4)]
    both.produce(ProducerStep(finishing=["a"]))
    assert both.ended("a") is None
    assert both.consume(load("a", tokens, [0, 1]), "a") == set()
    assert (both.target.kv[:, :2] == both.source.kv[:, [3, 1]]).all()


def test_an_engine_that_skips_its_layers_hooks(pair: Callable[..., Pair]) -> None:
    # Broken in production: within full CUDA graphs no hook is called, and nothing is sent.
    both = pair(layer_pushes=4)
    tokens = list(range(16))
    chunks = [ChunkBlocks("a", 0, [3, 1])]
    both.produce(ProducerStep(plans=[both.plan("a", tokens)], chunks=chunks, finishing=["a"]), layers=False)
    assert both.ended("a") is None
    assert both.consume(load("a", tokens, [0, 1]), "a") == set()
    assert (both.target.kv[:, :2] == both.source.kv[:, [3, 1]]).all()


def test_blocks_are_given_back_once_they_are_copied(pair: Callable[..., Pair]) -> None:
    # Broken in production: blocks are freed while their chunk waits for a slot, or never.
    both = pair(sender_slots=1)
    tokens = list(range(64))
    chunks = [ChunkBlocks("a", i, [2 * i, 2 * i + 1]) for i in range(4)]
    done = both.produce(ProducerStep(plans=[both.plan("a", tokens)], chunks=chunks, finishing=["a"]))
    # Four chunks through one slot: the engine steps on, and is told once.
    eventually(lambda: "a" in done or done.update(both.produce(ProducerStep())), 0)
    both.source.kv[:] = 0
    both.produce(ProducerStep())
    assert both.ended("a") is None
    expected = Memory(1).kv
    assert both.consume(load("a", tokens, list(range(8))), "a") == set()
    assert (both.target.kv[:, :8] == expected[:, :8]).all()
    both.nothing_left()


def test_a_preempted_chunk_is_taken_from_its_new_blocks(pair: Callable[..., Pair]) -> None:
    # Broken in production: what was preempted before it was copied is sent from blocks of another request.
    both = pair(layer_pushes=1)
    tokens = list(range(32))
    # Not opened yet when the step ends, so nothing is copied: then the blocks are lost.
    both.producer.begin_step(ProducerStep(plans=[both.plan("a", tokens)], chunks=[ChunkBlocks("a", 0, [3, 1])]))
    both.producer.begin_step(ProducerStep(preempted=["a"]))
    both.source.kv[:, [3, 1]] = 0
    both.stepped_until(lambda: is_opened(both.producer))
    resumed = [ChunkBlocks("a", 0, [8, 9]), ChunkBlocks("a", 1, [10, 11])]
    both.produce(ProducerStep(chunks=resumed, finishing=["a"]))
    assert both.ended("a") is None
    assert both.consume(load("a", tokens, [0, 1, 2, 3]), "a") == set()
    assert (both.target.kv[:, :4] == both.source.kv[:, 8:12]).all()
    both.nothing_left()


def is_opened(producer: ProducerWorker) -> bool:
    return any(request.opened for request in producer._requests.values())


def has_slot(producer: ProducerWorker) -> bool:
    return any(chunk.slot for request in producer._requests.values() for chunk in request.chunks.values())


def test_dropped_requests_leave_nothing(pair: Callable[..., Pair]) -> None:
    # Broken in production: every aborted prompt costs slots at both ends.
    both = pair()
    tokens = list(range(32))
    for number in range(12):
        request_id = f"a{number}"
        chunks = [ChunkBlocks(request_id, 0, [3, 1])] if number % 2 else []
        # At once, when it is opened, or when its chunk, if it has one, was copied.
        both.source.gathered.clear()
        both.produce(ProducerStep(plans=[both.plan(request_id, tokens)], chunks=chunks))
        request = both.producer._requests[request_id]
        stages = [lambda: True, lambda: request.opened, lambda: both.source.gathered or not chunks]
        both.stepped_until(stages[number // 2 % 3])
        assert both.produce(ProducerStep(dropped=[request_id])) == set()
    both.nothing_left()


def test_a_rank_asks_for_slots_once_the_rank_before_it_has_its_own(pair: Callable[..., Pair]) -> None:
    # Broken in production: ranks whose receivers decide each for itself take slots that another prompt waits for, for ever.
    both = pair()
    ready = both.receiver.ready
    ports = (ready.init_port,) * 2, (ready.alloc_port,) * 2
    ranks = [
        ProducerWorker(Attachment(both.sender, both.source), replace(LAYOUT, tp_rank=rank, tp_size=2), "uint8")
        for rank in (0, 1)
    ]

    def step(rank: int, **told: Any) -> set[str]:
        ranks[rank].begin_step(ProducerStep(**told))
        ranks[rank].end_step()
        return ranks[rank].finished_sending()

    def plan(name: str, rank: int) -> SendPlan:
        # Two ranks have a daemon each; here one serves both, by two names.
        spec = DisaggSpec(f"{name}-{rank}", "127.0.0.1", *ports)
        return SendPlan(name, spec, chunk_hashes(list(range(16)), CHUNK), 16)

    chunks = [ChunkBlocks("a", 0, [3, 1])]
    done: set[str] = set()
    for rank in (1, 0):
        done |= step(rank, plans=[plan("a", rank)], chunks=chunks, finishing=["a"])
    eventually(lambda: done.update(step(0)) or "a" in done)
    outcomes = ranks[0].outcomes()
    assert outcomes is not None and outcomes.granted == [("a", 0)], "the scheduler is told that the next one may ask"
    for turns in ([], [("a", 0)], [("b", 1)]):
        assert step(1, turns=turns) == set()
    assert [request.client for request in ranks[1]._requests.values()] == [None], "it has asked for nothing"
    assert step(1, turns=[("a", 1)]) in (set(), {"a"})
    eventually(lambda: not ranks[1]._requests or "a" in step(1))
    outcomes = ranks[1].outcomes()
    assert outcomes is None or outcomes.granted == [], "it is the last"
    # Where another rank cannot send, it does not ask any more, and gives the blocks back.
    step(1, plans=[plan("c", 1)], chunks=[ChunkBlocks("c", 0, [3, 1])], finishing=["c"])
    assert step(1, given_up=["c"]) == {"c"}
    ended = ranks[1].outcomes()
    assert ended is not None and ended.ended["c"] == [None]


def test_a_second_request_of_a_name_is_refused_and_leaves_the_first(pair: Callable[..., Pair]) -> None:
    # Broken in production: the daemon refuses the second, which is taken for the end of both; or what is sent of the first is taken for
    # the second's, whose blocks are given back before they are copied.
    both = pair()
    tokens = list(range(16))
    first = both.plan("a", tokens)
    second = replace(both.plan("b", list(range(50, 66))), spec=first.spec)
    both.produce(ProducerStep(plans=[first, second], chunks=[ChunkBlocks("b", 0, [2, 3])], finishing=["b"]))
    assert both.ended("b") == "another request of this name is under way"
    both.produce(ProducerStep(chunks=[ChunkBlocks("a", 0, [0, 1])], finishing=["a"]))
    assert both.ended("a") is None
    assert both.consume(load("a", tokens, [5, 6]), "a") == set()
    assert (both.target.kv[:, 5:7] == both.source.kv[:, :2]).all()
    # It is free again.
    both.produce(ProducerStep(plans=[second], chunks=[ChunkBlocks("b", 0, [2, 3])], finishing=["b"]))
    assert both.ended("b") is None
    both.consumer.begin_step(ConsumerStep(announced=[("b", first.spec.req_id)], unneeded=["b"]))
    both.nothing_left()


def test_a_receiver_that_is_full_fails_the_request_alone(pair: Callable[..., Pair]) -> None:
    # Broken in production: one request without room takes the engine, or its neighbours, with it.
    both = pair(receiver_slots=2, slot_wait_s=0.2)
    big, small = list(range(16 * 5)), list(range(100, 116))
    both.produce(ProducerStep(plans=[both.plan("big", big)]))
    error = both.ended("big")
    assert error is not None and error.startswith("too_large:")
    # Deferred though it has failed: the engine waits for the report, and gets it.
    assert both.produce(ProducerStep(finishing=["big"])) == {"big"}
    chunks = [ChunkBlocks("small", 0, [3, 1])]
    both.produce(ProducerStep(plans=[both.plan("small", small)], chunks=chunks, finishing=["small"]))
    assert both.ended("small") is None
    assert both.consume(load("small", small, [0, 1]), "small") == set()
    both.nothing_left()


def test_why_a_request_failed_is_told_and_not_that_it_has_ended(
    pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Broken in production: the operator reads that a request is unknown, and not that its receiver has gone.
    both = pair()
    both.produce(ProducerStep(plans=[both.plan("a", list(range(16)))]))
    request, client = both.producer._requests["a"], both.sender.client()
    both.polled_until(lambda: request.opened)
    os.kill(both.receiver.ready.pid, signal.SIGKILL)
    eventually(lambda: client.status().requests_failed)
    # It comes between the look at the events and the one at the answers.
    polled, events = [], client.poll_events
    monkeypatch.setattr(client, "poll_events", lambda: events() if polled else polled.append(True) or [])
    request.staging = client.start_stage("router-a", [0])
    eventually(lambda: request.staging.done())
    error = both.ended("a")
    assert error is not None and error.startswith("peer_lost"), error


def test_only_what_is_missing_is_loaded(pair: Callable[..., Pair]) -> None:
    # Broken in production: blocks of decode's own prefix cache, which others read, are written again.
    both = pair()
    tokens = list(range(40))
    chunks = [ChunkBlocks("a", 0, [0, 1]), ChunkBlocks("a", 1, [2, 3]), ChunkBlocks("a", 2, [4])]
    both.produce(ProducerStep(plans=[both.plan("a", tokens)], chunks=chunks, finishing=["a"]))
    assert both.ended("a") is None
    before = both.target.kv.copy()
    assert both.consume(load("a", tokens, [8, 9, 10, 11, 12], first_block=3), "a") == set()
    assert (both.target.kv[:, :11] == before[:, :11]).all()
    assert (both.target.kv[:, 11:13] == both.source.kv[:, 3:5]).all()
    # The same again by key, for whoever comes later.
    assert both.consume(load("b", tokens, [1, 2, 3, 4, 5], named=False), "b") == set()
    assert (both.target.kv[:, 1:6] == both.source.kv[:, 0:5]).all()
    both.nothing_left()


def test_an_idle_step_waits_for_an_answer_that_is_on_its_way(pair: Callable[..., Pair]) -> None:
    # Broken in production: every load takes the engine one more idle step, which is a millisecond of the time to first
    # token.
    both = pair()
    tokens = list(range(16))
    waited: list[float] = []

    def arrives_meanwhile(timeout_s: float) -> None:
        waited.append(timeout_s)
        both.produce(ProducerStep(plans=[both.plan("a", tokens)], chunks=[ChunkBlocks("a", 0, [0, 1])], finishing=["a"]))
        assert both.ended("a") is None
        client._pump(PATIENCE_S)

    step = load("a", tokens, [5, 6])
    both.consumer.begin_step(step)
    # Not while there is something to compute.
    client = both.receiver.client()
    client.wait_for_news = arrives_meanwhile
    assert both.consumer.progress() == (set(), set())
    assert waited == []
    both.consumer.begin_step(ConsumerStep(idle=True))
    assert both.consumer.progress() == ({"a"}, set())
    assert len(waited) == 1


def test_what_is_released_in_the_step_of_its_hold_is_not_held(pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    # Broken in production: a prompt whose log probabilities are asked for, or a client that leaves at once, has prefill keep its
    # chunks for ever.
    both, said = pair(), []
    remote = RemoteSpec("127.0.0.1", (1,), (), True)
    monkeypatch.setattr(both.consumer, "_hold", lambda hold: said.append(f"hold {hold.request_id}"))
    monkeypatch.setattr(both.consumer, "_release", lambda release: said.append(f"release {release.request_id}"))
    holds = [HoldPlan(name, remote, ["00"]) for name in ("a", "b")]
    both.consumer.begin_step(ConsumerStep(holds=holds, released=[ReleasePlan("a", remote, None)]))
    assert said == ["release a", "hold b"]


def test_idle_steps_become_fewer_while_nothing_comes(pair: Callable[..., Pair]) -> None:
    # Broken in production: a decode server burns half a core for as long as it waits for a long prefill.
    both = pair(receive_wait_s=10)
    both.consumer.begin_step(load("a", list(range(16)), [5, 6]))
    client = both.receiver.client()
    waited: list[float] = []
    client.wait_for_news = waited.append
    (request,) = both.consumer._requests.values()
    for _ in range(3):
        both.consumer.begin_step(ConsumerStep(idle=True))
        assert both.consumer.progress() == (set(), set())
        request.began -= 0.03
    request.began -= 60
    both.consumer.begin_step(ConsumerStep(idle=True))
    assert both.consumer.progress() == (set(), set())
    assert 0.001 <= waited[0] < waited[1] < waited[2] <= waited[3] == 0.005
    # Nor for as long as the chunks of one that needs them no more have not come.
    both.consumer.begin_step(ConsumerStep(unneeded=["a"], idle=True))
    assert both.consumer.progress() == (set(), set())
    assert waited[4:] == [0.005]
    del client.wait_for_news
    client.cancel("router-a")

    def returned() -> list[str]:
        both.consumer.progress()
        return both.consumer.returned()

    assert eventually(returned) == ["a"]
    both.nothing_left()


def test_the_scheduler_is_told_of_chunks_that_are_here(pair: Callable[..., Pair]) -> None:
    # Broken in production: a request that was given no blocks yet never gets any.
    both = pair()
    tokens = list(range(16))
    both.consumer.begin_step(ConsumerStep(announced=[("a", "router-a"), ("b", "router-b")]))
    assert both.consumer.progress() == (set(), set())
    assert both.consumer.here() == []
    plan = both.plan("a", tokens)
    both.produce(ProducerStep(plans=[plan], chunks=[ChunkBlocks("a", 0, [0, 1])], finishing=["a"]))
    assert both.ended("a") is None
    here: list[str] = []

    def is_here(request_id: str) -> bool:
        # The idle steps of an engine that has nothing else to do.
        both.consumer.begin_step(ConsumerStep(idle=True))
        assert both.consumer.progress() == (set(), set())
        here.extend(both.consumer.here())
        return request_id in here

    eventually(lambda: is_here("a"), 0)
    # Once.
    both.consumer.begin_step(ConsumerStep(idle=True))
    both.consumer.progress()
    assert "a" not in both.consumer.here()
    assert both.consume(ConsumerStep(loads=[ReceivePlan("a", "router-a", plan.hashes, 16, 0, [5, 6])]), "a") == set()
    assert (both.target.kv[:, 5:7] == both.source.kv[:, 0:2]).all()
    # One whose chunks are not going to come is told of as well: it can fail only once it has blocks.
    both.receiver.client().cancel("router-b")
    eventually(lambda: is_here("b"), 0)
    plan = ReceivePlan("b", "router-b", both.plan("b", tokens).hashes, 16, 0, [7, 8])
    assert both.consume(ConsumerStep(loads=[plan]), "b") == {7, 8}
    both.nothing_left()


def test_another_prompt_is_not_loaded(pair: Callable[..., Pair]) -> None:
    # Broken in production: a router that confuses two requests gets tokens of the wrong one.
    both = pair()
    sent, asked = list(range(16)), list(range(1, 17))
    both.produce(ProducerStep(plans=[both.plan("a", sent)], chunks=[ChunkBlocks("a", 0, [0, 1])], finishing=["a"]))
    assert both.ended("a") is None
    before = both.target.kv.copy()
    assert both.consume(load("a", asked, [5, 6]), "a") == {5, 6}
    assert (both.target.kv == before).all()
    assert both.consume(load("b", asked, [5, 6], named=False), "b") == {5, 6}
    both.nothing_left()


def test_samples_of_one_request_are_all_loaded(pair: Callable[..., Pair]) -> None:
    # Broken in production: with n = 2 the request is handed out once, and its second sample fails.
    both = pair()
    tokens = list(range(20))
    chunks = [ChunkBlocks("a", 0, [0, 1]), ChunkBlocks("a", 1, [2])]
    both.produce(ProducerStep(plans=[both.plan("a", tokens)], chunks=chunks, finishing=["a"]))
    assert both.ended("a") is None
    step = ConsumerStep()
    for request_id, blocks in (("x", [4, 5, 6]), ("y", [7, 8, 9])):
        step.announced.append((request_id, "router-a"))
        step.loads.append(ReceivePlan(request_id, "router-a", chunk_hashes(tokens, CHUNK), len(tokens), 0, blocks))
    both.consumer.begin_step(step)
    through: set[str] = set()

    def are_through() -> bool:
        finished, failed = both.consumer.progress()
        assert not failed
        through.update(finished)
        return through == {"x", "y"}

    eventually(are_through)
    assert (both.target.kv[:, 4:7] == both.source.kv[:, :3]).all()
    assert (both.target.kv[:, 7:10] == both.source.kv[:, :3]).all()
    both.nothing_left()


def test_one_of_two_samples_that_is_given_up_leaves_the_other(pair: Callable[..., Pair]) -> None:
    # Broken in production: a client that hangs up takes the KV from another one that asked under the same name.
    both = pair()
    tokens = list(range(16))
    both.consumer.begin_step(ConsumerStep(announced=[("x", "router-a"), ("y", "router-a")]))
    both.consumer.begin_step(ConsumerStep(dropped=["x"]))
    both.produce(ProducerStep(plans=[both.plan("a", tokens)], chunks=[ChunkBlocks("a", 0, [0, 1])], finishing=["a"]))
    assert both.ended("a") is None
    plan = ReceivePlan("y", "router-a", chunk_hashes(tokens, CHUNK), len(tokens), 0, [5, 6])
    assert both.consume(ConsumerStep(loads=[plan]), "y") == set()
    assert (both.target.kv[:, 5:7] == both.source.kv[:, :2]).all()
    both.nothing_left()


def test_samples_of_one_request_fail_together(pair: Callable[..., Pair]) -> None:
    # Broken in production: with n = 2 the first sample is told why nothing comes, and the second one waits for receive_wait_s.
    both = pair(receive_wait_s=3600.0)
    hashes = chunk_hashes(list(range(16)), CHUNK)
    # It has failed before decode asks, which is told once.
    both.produce(ProducerStep(plans=[both.plan("a", list(range(16)))]))
    eventually(lambda: both.receiver.client().status().requests_active == 1)
    both.produce(ProducerStep(dropped=["a"]))
    eventually(lambda: both.receiver.client().status().requests_active == 0)
    step = ConsumerStep(announced=[("x", "router-a"), ("y", "router-a")])
    step.loads += [ReceivePlan("x", "router-a", hashes, 16, 0, [4, 5]), ReceivePlan("y", "router-a", hashes, 16, 0, [7, 8])]
    both.consumer.begin_step(step)
    through, failed = set[str](), set[int]()

    def are_through() -> bool:
        finished, blocks = both.consumer.progress()
        through.update(finished)
        failed.update(blocks)
        return through == {"x", "y"}

    eventually(are_through)
    assert failed == {4, 5, 7, 8}
    # The receiver keeps the second question for a next attempt of that name, until receive_wait_s is over.
    both.receiver.client().give_up("router-a")
    both.nothing_left()


def test_what_was_reported_across_is_here_or_has_gone(pair: Callable[..., Pair]) -> None:
    # Broken in production: after a crash of its receiver decode waits for receive_wait_s for what was sent to the one before.
    both = pair(receive_wait_s=3600.0)
    tokens = list(range(16))

    def sent(request_id: str, blocks: list[int]) -> ConsumerStep:
        step = load(request_id, tokens, blocks)
        step.sent = [request_id]
        return step

    for request_id in "abc":
        chunks = [ChunkBlocks(request_id, 0, [0, 1])]
        both.produce(ProducerStep(plans=[both.plan(request_id, tokens)], chunks=chunks, finishing=[request_id]))
        assert both.ended(request_id) is None
    assert both.consume(sent("a", [5, 6]), "a") == set()
    assert (both.target.kv[:, 5:7] == both.source.kv[:, 0:2]).all()
    pid = both.receiver.ready.pid
    os.kill(pid, signal.SIGKILL)
    # At once, and when it is there again.
    assert both.consume(sent("b", [7, 8]), "b") == {7, 8}
    restarted(both.receiver, pid)
    assert both.consume(sent("c", [9, 10]), "c") == {9, 10}
    both.nothing_left()


def test_what_prefill_has_not_sent_is_not_waited_for(pair: Callable[..., Pair]) -> None:
    # Broken in production: decode waits for a prompt of which its router knows that it does not come.
    both = pair(receive_wait_s=3600.0)
    # Its router asked decode before it knew, and asks again.
    both.consumer.begin_step(ConsumerStep(announced=[("before", "router-a")]))
    plan = ReceivePlan("a", "router-a", chunk_hashes(list(range(16)), CHUNK), 16, 0, [5, 6], not_sent="too_large: 5 chunks")
    both.consumer.begin_step(ConsumerStep(loads=[plan]))
    assert both.consume(ConsumerStep(dropped=["before"]), "a") == {5, 6}
    both.nothing_left()


def test_what_comes_after_its_deadline_is_not_kept(pair: Callable[..., Pair]) -> None:
    # Broken in production: a prompt that decode has waited for in vain comes after all, and holds slots for pd_retention_sec.
    both = pair(receive_wait_s=0.05)
    tokens = list(range(16))
    assert both.consume(load("a", tokens, [5, 6]), "a") == {5, 6}
    both.produce(ProducerStep(plans=[both.plan("a", tokens)], chunks=[ChunkBlocks("a", 0, [0, 1])], finishing=["a"]))
    assert "cancelled" in str(both.ended("a"))
    both.nothing_left()


def test_nothing_is_sent_before_the_step_has_ended(pair: Callable[..., Pair]) -> None:
    # Broken in production: with speculative decoding, the draft's layers are sent before they are computed.
    both = pair(layer_pushes=1)
    tokens = list(range(16))
    both.produce(ProducerStep(plans=[both.plan("a", tokens)]))
    both.stepped_until(lambda: is_opened(both.producer))
    both.producer.begin_step(ProducerStep(chunks=[ChunkBlocks("a", 0, [0, 1])], finishing=["a"]))
    both.polled_until(lambda: has_slot(both.producer))
    assert both.producer.finished_sending() == set()
    assert both.source.gathered == []
    both.producer.end_step()
    assert both.source.gathered == [range(0, LAYERS)]
    assert both.producer.finished_sending() == {"a"}
    assert both.ended("a") is None
    assert both.consume(load("a", tokens, [0, 1]), "a") == set()


def test_dropped_and_unneeded_loads_leave_nothing(pair: Callable[..., Pair]) -> None:
    # Broken in production: a client that hangs up while decode loads keeps a lease, or blocks the engine never frees.
    both = pair()
    tokens = list(range(16))
    # Given up while it waits: its blocks are reported, for the engine keeps them until then.
    both.consumer.begin_step(load("a", tokens, [5, 6]))
    assert both.consumer.progress() == (set(), set())
    both.consumer.begin_step(ConsumerStep(dropped=["a"]))
    assert both.consumer.progress() == ({"a"}, set())
    # Given up before it had blocks: nothing to report.
    both.consumer.begin_step(ConsumerStep(announced=[("b", "router-b")]))
    both.consumer.begin_step(ConsumerStep(dropped=["b"]))
    assert both.consumer.progress() == (set(), set())
    # Given up when its chunks have just come.
    both.produce(ProducerStep(plans=[both.plan("d", tokens)], chunks=[ChunkBlocks("d", 0, [0, 1])], finishing=["d"]))
    assert both.ended("d") is None
    both.consumer.begin_step(ConsumerStep(announced=[("d", "router-d")]))
    arriving = both.consumer._requests["d"].arriving
    eventually(arriving.done)
    both.consumer.begin_step(ConsumerStep(dropped=["d"]))
    # Not needed, but sent.
    both.consumer.begin_step(ConsumerStep(announced=[("c", "router-c")]))
    both.consumer.begin_step(ConsumerStep(unneeded=["c"]))
    both.produce(ProducerStep(plans=[both.plan("c", tokens)], chunks=[ChunkBlocks("c", 0, [0, 1])], finishing=["c"]))
    assert both.ended("c") is None
    both.nothing_left()


def test_unneeded_chunks_go_back_though_nothing_else_is_asked(pair: Callable[..., Pair]) -> None:
    # Broken in production: the chunks of a prompt that was wholly cached fill the receiver until the next request, and
    # that one never comes, for prefill gets no slots for it.
    both = pair()
    tokens = list(range(16))
    both.consumer.begin_step(ConsumerStep(announced=[("a", "router-a")], unneeded=["a"]))
    both.consumer.progress()
    assert both.consumer.returned() == []
    both.produce(ProducerStep(plans=[both.plan("a", tokens)], chunks=[ChunkBlocks("a", 0, [0, 1])], finishing=["a"]))
    assert both.ended("a") is None
    with ReceiverClient(both.receiver.ready.connector, name="test", map_buffer=False) as observer:

        def is_returned() -> bool:
            both.consumer.begin_step(ConsumerStep(idle=True))
            both.consumer.progress()
            return bool(both.consumer.returned())

        eventually(is_returned, 0)
        eventually(lambda: not observer.status().leases and not observer.status().slots_held)
    # Of what nobody asked for there is nothing to wait for, nor of what was asked of a daemon that has gone.
    both.consumer.begin_step(ConsumerStep(announced=[("c", "router-c")], unneeded=["c"], dropped=["b"]))
    assert both.consumer.returned() == ["b"]
    pid = both.receiver.ready.pid
    os.kill(pid, signal.SIGKILL)
    restarted(both.receiver, pid)
    both.consumer.begin_step(ConsumerStep(announced=[("d", "router-d")], dropped=["d"]))
    both.consumer.progress()
    assert "c" in both.consumer.returned()
    both.nothing_left()
