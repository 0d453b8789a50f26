"""Looking chunks up from the scheduler's process, at real receivers that stand for those of two ranks."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import pytest

from pd_backend.vllm.finder import ReceiverFinder
from pd_backend.vllm.keys import chunk_hashes, chunk_key
from pd_backend.vllm.spec import ParkSpec
from pd_backend.vllm.step import ChunkBlocks, ProducerStep, SendPlan
from pd_backend.vllm.whereabouts import DaemonAt
from vllm_pair import CHUNK, LAYOUT, Pair, load, restarted
from waiting import eventually

TOKENS, OTHERS = list(range(40)), list(range(100, 140))
HASHES, OTHER_HASHES = chunk_hashes(TOKENS, CHUNK), chunk_hashes(OTHERS, CHUNK)


def key(rank: int, weights: str, name: str) -> str:
    # Each of the pairs is one of a single rank.
    return chunk_key(LAYOUT.model, 1, 0, weights, name, "uint8")


class Ranks:
    """Two pairs of daemons, and the finder that asks the receivers of both."""

    def __init__(self, stack: ExitStack) -> None:
        self.pairs = [Pair(stack), Pair(stack)]
        self.finder = ReceiverFinder(key)
        stack.callback(self.finder.close)
        for rank, pair in enumerate(self.pairs):
            self.finder.attach(DaemonAt.here(rank, pair.receiver.ready, ""))

    def send(self, rank: int, request_id: str, tokens: Sequence[int]) -> None:
        pair = self.pairs[rank]
        blocks = [ChunkBlocks(request_id, chunk, ids) for chunk, ids in enumerate(([0, 1], [2, 3], [4]))]
        pair.produce(ProducerStep(plans=[pair.plan(request_id, tokens)], chunks=blocks, finishing=[request_id]))
        assert pair.ended(request_id) is None


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    with ExitStack() as stack:
        yield Ranks(stack)


def test_what_one_rank_lacks_is_not_found(ranks: Ranks) -> None:
    # Broken in production: requests fail whose chunks are at the first rank's receiver alone, as after a restart.
    for rank in (0, 1):
        ranks.send(rank, "a", TOKENS)
    ranks.send(0, "b", OTHERS)
    assert ranks.finder.find("x", HASHES) == (len(HASHES), False)
    assert ranks.finder.find("y", OTHER_HASHES) == (0, False)
    # As far as both have it.
    ranks.send(1, "c", [*TOKENS[:32], *OTHERS[:8]])
    assert ranks.finder.find("z", chunk_hashes([*TOKENS[:32], *OTHERS[:8]], CHUNK)) == (2, False)
    assert [pair.receiver.client().status().leases for pair in ranks.pairs] == [3, 2]
    for request_id in ("x", "y", "z"):
        ranks.finder.forget(request_id)
    for pair in ranks.pairs:
        pair.nothing_left()


def test_a_receiver_that_has_gone_costs_a_look_up_and_nothing_else(ranks: Ranks) -> None:
    # Broken in production: the chunks that the other ranks have found are kept for good, or nothing is found again.
    for rank in (0, 1):
        ranks.send(rank, "a", TOKENS)
    assert ranks.finder.find("x", HASHES) == (len(HASHES), False)
    receiver = ranks.pairs[1].receiver
    pid = receiver.ready.pid
    os.kill(pid, signal.SIGKILL)
    restarted(receiver, pid)
    assert ranks.finder.find("y", HASHES) == (0, False)
    ranks.finder.forget("x")
    ranks.pairs[0].nothing_left()
    # Where it is now: nothing is there yet.
    ranks.finder.attach(DaemonAt.here(1, receiver.ready, ""))
    assert ranks.finder.find("y", HASHES) == (0, False)
    ranks.send(1, "b", TOKENS)
    assert ranks.finder.find("y", HASHES) == (len(HASHES), False)


def test_receivers_on_other_machines_are_not_asked(ranks: Ranks) -> None:
    # Broken in production: with ranks on two machines nothing is ever found, and steps wait for answers.
    ranks.send(0, "a", TOKENS)
    assert ranks.finder.find("x", HASHES) == (0, False)
    elsewhere = ReceiverFinder(key)
    elsewhere.attach(DaemonAt.here(0, ranks.pairs[0].receiver.ready, ""))
    elsewhere.attach(DaemonAt(1, "ipc://@pd-backend/not-here", "another machine", ""))
    try:
        assert elsewhere.find("x", HASHES) == (len(HASHES), False)
    finally:
        elsewhere.close()


def test_what_nobody_asked_for_is_pushed_and_found() -> None:
    # Broken in production: behind a router that says nothing decode computes each prompt, though it is on its way.
    with ExitStack() as stack:
        both = Pair(stack, told=True)
        eventually(lambda: [at.state for at in both.sender.client().status().receivers] == ["connected"])
        finder = ReceiverFinder(key)
        stack.callback(finder.close)
        finder.attach(DaemonAt.here(0, both.receiver.ready, ""))
        plan = SendPlan("a", ParkSpec("unsolicited a", (), unsolicited=True), HASHES, len(TOKENS))
        both.produce(ProducerStep(plans=[plan], chunks=[ChunkBlocks("a", 0, [3, 1])]))
        both.stepped_until(lambda: finder.find("x", HASHES) == (0, True))
        rest = [ChunkBlocks("a", 1, [5, 2]), ChunkBlocks("a", 2, [4])]
        both.produce(ProducerStep(chunks=rest, finishing=["a"]))
        assert both.ended("a") is None
        eventually(lambda: finder.find("x", HASHES) == (len(HASHES), False))
        assert both.consume(load("x", TOKENS, [6, 7, 8, 9, 10], named=False), "x") == set()
        assert (both.target.kv[:, [6, 7, 8, 9, 10]] == both.source.kv[:, [3, 1, 5, 2, 4]]).all()
        finder.forget("x")
        both.nothing_left()
