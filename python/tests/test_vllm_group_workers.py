"""Workers whose layers keep KV by groups, beside real daemons; the engine's memory is numpy arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from pd_backend.paged_groups import PagedGroup
from pd_backend.vllm.groups import Group, Groups
from pd_backend.vllm.layout import EngineLayout, GroupBytes
from pd_backend.vllm.spec import DisaggSpec, ParkSpec, RemoteSpec
from pd_backend.vllm.step import ChunkBlocks, ConsumerStep, ProducerStep, ReceivePlan, SendPlan
from vllm_pair import BLOCK, BLOCK_BYTES, CHUNK, LAYERS, Memory, Pair, pair  # noqa: F401

GROUPS = Groups(
    [
        Group(BLOCK, (0,), name="full"),
        Group(BLOCK, (1, 2), window_tokens=12, name="window12"),
        Group(2 * BLOCK, (3,), window_tokens=2, name="window2"),
    ],
    CHUNK,
)
#: Of a block in all layers of one member.
BYTES = LAYERS * BLOCK_BYTES
LAYOUT = EngineLayout(
    "tests/groups", CHUNK, BLOCK, BLOCK_BYTES, LAYERS, engine={"vllm": "test"}, several=GROUPS,
    group_bytes=tuple(GroupBytes(f"{LAYERS}x{BLOCK_BYTES}", size * BYTES) for size in (CHUNK // BLOCK, 2, 1)),
)


class Several:
    """What `PagedGroups` is to the workers: a memory for each block table."""

    def __init__(self, seed: int) -> None:
        self.members = [Memory(10 * seed + member) for member in range(4)]
        self.groups = tuple(
            PagedGroup([(at, self.members[member]) for at, member in enumerate(group.members)], len(group.members))  # type: ignore
            for group in GROUPS
        )
        self.layers = 1

    @staticmethod
    def memory(array: np.ndarray) -> np.ndarray:
        return array


#: 41 tokens, of which 40 are sent: of blocks of 8, five; behind 40 tokens 29 and later ones are seen.
TOKENS = list(range(41))
SOURCE = ([1, 2, 3, 4, 5], [0, 0, 0, 6, 7], [0, 0, 0, 8, 9], [0, 0, 3])
TARGET = ([5, 4, 3, 2, 1], [0, 0, 0, 11, 12], [0, 0, 0, 13, 14], [0, 0, 7])
#: Bytes of what is needed: full blocks, two blocks of two members, and a longer one.
NEEDED = 5 * BYTES + 2 * 2 * BYTES + BYTES


def plan(both: Pair, request_id: str, tokens: Sequence[int], spec: Any = None) -> SendPlan:
    ready = both.receiver.ready
    sent = GROUPS.sent_tokens(len(tokens))
    pieces = GROUPS.pieces(sent)
    spec = spec or DisaggSpec(f"router-{request_id}", "127.0.0.1", (ready.init_port,), (ready.alloc_port,))
    names = GROUPS.names(tokens[:sent], pieces)
    return SendPlan(request_id, spec, names, sent, groups=tuple(piece.group for piece in pieces))


def told(request_id: str, tokens: Sequence[int], tables: Sequence[list[int]]) -> list[ChunkBlocks]:
    pieces = enumerate(GROUPS.pieces(GROUPS.sent_tokens(len(tokens))))
    return [ChunkBlocks(request_id, chunk, GROUPS.block_ids(piece, tables), piece.group) for chunk, piece in pieces]


def loading(
    request_id: str, tokens: Sequence[int], tables: Sequence[list[int]], req_id: str | None, computed: int = 0, remote: Any = None
) -> ReceivePlan:
    sent = GROUPS.sent_tokens(len(tokens))
    names = GROUPS.names(tokens[:sent], GROUPS.pieces(sent))
    return ReceivePlan(
        request_id, req_id, names, sent, computed // BLOCK, tables[0], remote=remote, more_block_ids=tuple(tables[1:])
    )


def check(both: Pair, computed: int = 0, target: Sequence[list[int]] = TARGET) -> None:
    """What is needed is there, and nothing else was touched."""
    fresh = Several(2)
    for group in GROUPS:
        for member in group.members:
            expected = fresh.members[member].kv
            for at in group.needed(40):
                if at >= computed // group.block_tokens:
                    expected[:, target[member][at]] = both.source.members[member].kv[:, SOURCE[member][at]]
            assert np.array_equal(both.target.members[member].kv, expected), f"block table {member}"


@pytest.fixture
def groups(pair: Callable[..., Pair]) -> Callable[..., Pair]:  # noqa: F811
    return lambda **options: pair(layout=LAYOUT, memory=Several, **options)


def test_each_group_arrives_where_it_belongs(groups: Callable[..., Pair]) -> None:
    # Broken in production: a window's blocks are loaded as another layer's, or blocks that vLLM has skipped are overwritten.
    both = groups()
    step = ConsumerStep(announced=[("a", "router-a")], loads=[loading("a", TOKENS, TARGET, "router-a")])
    both.consumer.begin_step(step)
    both.produce(ProducerStep(plans=[plan(both, "a", TOKENS)], chunks=told("a", TOKENS, SOURCE), finishing=["a"]))
    assert both.ended("a") is None
    assert both.consume(ConsumerStep(), "a") == set() and both.consumer.failed_requests() == set()
    check(both)
    assert both.receiver.client().status().bytes == NEEDED
    both.nothing_left()


def test_blocks_that_are_here_are_not_loaded_again(groups: Callable[..., Pair]) -> None:
    # Broken in production: blocks that other requests share are overwritten while they are read.
    both = groups()
    both.produce(ProducerStep(plans=[plan(both, "a", TOKENS)], chunks=told("a", TOKENS, SOURCE), finishing=["a"]))
    assert both.ended("a") is None
    # Found by key, behind a hit of 32 tokens.
    assert both.consume(ConsumerStep(loads=[loading("b", TOKENS, TARGET, None, 32)]), "b") == set()
    check(both, 32)
    assert both.consumer.failed_requests() == set()


def test_only_what_is_missing_is_fetched(groups: Callable[..., Pair]) -> None:
    # Broken in production: parked chunks of windows are never asked for, or all of a prompt is although decode has most of it.
    both = groups(told=True)
    spec = ParkSpec("parked a", ("a",))
    both.produce(ProducerStep(plans=[plan(both, "a", TOKENS, spec)], chunks=told("a", TOKENS, SOURCE), finishing=["a"]))
    assert both.ended("a") is None
    remote = RemoteSpec("127.0.0.1", (both.sender.ready.rendezvous_port,), ("a",), in_turn=True)
    load = loading("b", TOKENS, TARGET, "b", 32, remote)
    assert both.consume(ConsumerStep(loads=[load]), "b") == set() and both.consumer.failed_requests() == set()
    check(both, 32)


def test_a_request_that_fails_is_named(groups: Callable[..., Pair]) -> None:
    # Broken in production: vLLM is told of blocks, takes them for another group's, and stops the engine.
    both = groups()
    load = loading("a", TOKENS, TARGET, None)
    assert both.consume(ConsumerStep(loads=[load]), "a") == set()
    assert both.consumer.failed_requests() == {"a"} and both.consumer.failed_requests() == set()
    # Nor are blocks taken that vLLM has skipped.
    both.produce(ProducerStep(plans=[plan(both, "b", TOKENS)], chunks=told("b", TOKENS, SOURCE), finishing=["b"]))
    assert both.ended("b") is None
    skipped = (TARGET[0], [0, 0, 0, 0, 12], *TARGET[2:])
    assert both.consume(ConsumerStep(loads=[loading("c", TOKENS, skipped, "router-b")]), "c") == set()
    assert both.consumer.failed_requests() == {"c"}
