"""Weights that change under running workers, and resets that reach every daemon or say that they did not."""

from __future__ import annotations

import os
import platform
import signal
from collections.abc import Callable
from dataclasses import replace

from fake_daemon import FakeDaemon
from pd_backend import ReceiverClient, SenderClient
from pd_backend.vllm.step import ChunkBlocks, ConsumerStep, ProducerStep
from pd_backend.vllm.weights import Weights
from pd_backend.vllm.whereabouts import DaemonAt, Daemons
from vllm_pair import Pair, load, pair

TOKENS = list(range(32))


class Changing(Weights):
    """Weights of which the test says what they are."""

    def __init__(self, identity: str) -> None:
        super().__init__(identity, None)

    def identity(self) -> str:
        return self.last


def daemons(both: Pair) -> tuple[Daemons, Daemons]:
    """As the schedulers of both servers know them."""
    senders, receivers = Daemons(1, SenderClient), Daemons(1, ReceiverClient)
    senders.attach(DaemonAt.here(0, both.sender.ready, ""))
    receivers.attach(DaemonAt.here(0, both.receiver.ready, ""))
    return senders, receivers


def send(both: Pair, request_id: str) -> str | None:
    blocks = [ChunkBlocks(request_id, 0, [0, 1]), ChunkBlocks(request_id, 1, [2, 3])]
    both.produce(ProducerStep(plans=[both.plan(request_id, TOKENS)], chunks=blocks, finishing=[request_id]))
    return both.ended(request_id)


def test_weights_of_one_side_are_a_refusal(pair: Callable[..., Pair]) -> None:
    # Broken in production: prefill has new weights, decode the old ones, and the tokens are of neither.
    ours, theirs = Changing("a"), Changing("a")
    both = pair(weights=ours, consumer_weights=theirs)
    assert send(both, "a") is None and both.consume(load("a", TOKENS, [1, 2, 3, 4]), "a") == set()
    ours.last = "b"
    assert send(both, "b") is None
    assert both.consume(load("b", TOKENS, [1, 2, 3, 4]), "b") == {1, 2, 3, 4}
    # Looked up, the former ones' chunks are what decode has asked for; those of the new ones are not.
    assert both.consume(load("c", TOKENS, [5, 6, 7, 8], named=False), "c") == set()
    theirs.last = "b"
    assert both.consume(load("d", TOKENS, [5, 6, 7, 8], named=False), "d") == set()
    theirs.last = "c"
    assert both.consume(load("e", TOKENS, [5, 6, 7, 8], named=False), "e") == {5, 6, 7, 8}
    both.nothing_left()


def test_a_prompt_that_both_weights_computed_is_not_sent(pair: Callable[..., Pair]) -> None:
    # Broken in production: weights change between two steps of a prompt, and its later chunks have the former's names.
    weights = Changing("a")
    both = pair(weights=weights)
    first = ProducerStep(plans=[both.plan("a", TOKENS)], chunks=[ChunkBlocks("a", 0, [0, 1])])
    # Of this one everything was computed before.
    first.plans.append(both.plan("b", TOKENS[:16]))
    first.chunks.append(ChunkBlocks("b", 0, [4, 5]))
    both.produce(first)
    weights.last = "b"
    both.produce(ProducerStep(chunks=[ChunkBlocks("a", 1, [2, 3])], finishing=["b"]))
    assert "the weights were changed while it was computed" in (both.ended("a") or "")
    assert both.ended("b") is None
    both.produce(ProducerStep(finishing=["a"]))
    # Nobody comes for what has no name; the receiver hears of that from the sender.
    both.consumer.begin_step(ConsumerStep())


def test_vllms_own_cache_of_former_weights_is_not_sent(pair: Callable[..., Pair]) -> None:
    # Broken in production: weights change, vLLM's cache still has KV of the former ones, and it is sent as the new ones'.
    weights = Changing("a")
    both = pair(weights=weights)

    def sent(request_id: str, cached: bool, reset: bool = False) -> str | None:
        plan = replace(both.plan(request_id, TOKENS[:16]), cached=cached)
        step = ProducerStep(plans=[plan], chunks=[ChunkBlocks(request_id, 0, [0, 1])], finishing=[request_id])
        step.cache_reset = reset
        both.produce(step)
        return both.ended(request_id)

    assert sent("a", cached=True) is None
    weights.last = "b"
    assert sent("b", cached=False) is None
    assert "may have KV of the former weights" in (sent("c", cached=True) or "")
    assert sent("d", cached=True, reset=True) is None
    # Emptied and changed between two steps: nothing was computed in between.
    weights.last = "c"
    assert sent("e", cached=True, reset=True) is None


def test_a_reset_drops_what_was_sent_and_what_is_on_its_way(pair: Callable[..., Pair]) -> None:
    # Broken in production: after a reset decode is given what was computed before it.
    both = pair()
    senders, receivers = daemons(both)
    assert send(both, "a") is None
    both.produce(ProducerStep(plans=[both.plan("b", [*TOKENS[:16], *range(50, 66)])], chunks=[ChunkBlocks("b", 0, [0, 1])]))
    assert senders.reset() and receivers.reset()
    assert "reset its cache" in (both.ended("b") or "")
    both.produce(ProducerStep(finishing=["b"]))
    assert both.receiver.client().status().slots_ready == 0
    assert both.consume(load("a", TOKENS, [5, 6, 7, 8]), "a") == {5, 6, 7, 8}
    assert both.consume(load("c", TOKENS, [5, 6, 7, 8], named=False), "c") == {5, 6, 7, 8}
    assert send(both, "d") is None and both.consume(load("d", TOKENS, [5, 6, 7, 8]), "d") == set()
    assert (both.target.kv[:, 5:9] == both.source.kv[:, :4]).all()
    both.nothing_left()


def test_a_reset_that_could_not_be_carried_out_says_so(pair: Callable[..., Pair]) -> None:
    # Broken in production: an operator is told that the cache is empty, and one rank's daemon has all of it still.
    both = pair()
    _, receivers = daemons(both)
    two_ranks = Daemons(2, ReceiverClient)
    two_ranks.attach(DaemonAt.here(0, both.receiver.ready, ""))
    assert not two_ranks.reset(), "the other rank's is not known"
    two_ranks.attach(DaemonAt(1, both.receiver.ready.connector, "another machine", ""))
    assert not two_ranks.reset(), "the other rank's cannot be reached"
    with FakeDaemon("receiver") as silent:
        two_ranks.attach(DaemonAt(1, silent.endpoint, platform.node(), ""))
        assert not two_ranks.reset(), "the other rank's has not answered"
    assert receivers.reset()
    pid = both.receiver.ready.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        assert not receivers.reset()
    finally:
        os.kill(pid, signal.SIGCONT)
    os.kill(pid, signal.SIGKILL)
    assert not receivers.reset()
