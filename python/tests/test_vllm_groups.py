"""Which blocks are sent of models whose layers keep their KV by groups, against a mask of attention."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from pd_backend.vllm.consumer_scheduler import ConsumerScheduler
from pd_backend.vllm.groups import Group, Groups, LayoutMismatch
from pd_backend.vllm.keys import Context, Item, chunk_hashes
from pd_backend.vllm.naming import Naming
from pd_backend.vllm.pins import BlockPins
from pd_backend.vllm.producer_scheduler import ProducerScheduler
from pd_backend.vllm.step import SendOutcomes
from test_vllm_scheduler import Shelf, output, request

#: As vLLM has Gemma 3: full, and two of sliding layers that need the same.
GEMMA = Groups([Group(128, (0,), name="full"), Group(128, (1, 2), window_tokens=256, name="window256")], 256)


def sees(group: Group, token: int, other: int) -> bool:
    """Whether a token attends to another one: the mask."""
    if other > token:
        return False
    if group.window_tokens is not None:
        return token - other < group.window_tokens
    if group.stretch_tokens is not None:
        return token // group.stretch_tokens == other // group.stretch_tokens
    return True


@pytest.mark.parametrize("seed", range(200))
def test_blocks_that_any_later_token_sees_are_needed_and_no_others(seed: int) -> None:
    # Broken in production: decode attends to a block that was not sent; or skipped blocks are sent, which are other requests'.
    dice = random.Random(seed)
    block = dice.choice([1, 2, 4, 16, 128])
    reach: dict[str, Any] = dice.choice([
        {}, {"window_tokens": dice.randint(1, 4 * block + 3)}, {"stretch_tokens": block * dice.randint(1, 4)},
    ])
    group = Group(block, **reach)
    for computed in {1, dice.randint(1, 6 * block), dice.randint(1, 20 * block), block * dice.randint(1, 9)}:
        later = range(computed, computed + 5 * block + 5)
        seen = {other // block for token in later for other in range(computed) if sees(group, token, other)}
        assert set(group.needed(computed)) == seen


@pytest.mark.parametrize("seed", range(100))
def test_every_needed_block_is_in_one_piece(seed: int) -> None:
    # Broken in production: a block is sent twice, or never; a piece has a name before its tokens are computed.
    dice = random.Random(seed)
    blocks = [dice.choice([16, 32, 64, 128]) for _ in range(3)]
    groups = Groups([
        Group(blocks[0], (1,), name="full"),
        Group(blocks[1], (0, 3), window_tokens=dice.randint(1, 700), name="window"),
        Group(blocks[2], (2,), stretch_tokens=blocks[2] * dice.randint(1, 6), name="local"),
    ], 256)
    tokens = dice.randint(2, 3000)
    sent = groups.sent_tokens(tokens)
    assert sent == tokens - 1
    pieces = groups.pieces(sent)
    for position, group in enumerate(groups):
        own = [piece for piece in pieces if piece.group == position]
        assert [at for piece in own for at in piece.blocks] == list(group.needed(sent))
        assert all(piece.end == min(piece.blocks.stop * group.block_tokens, sent) for piece in own)
    assert [piece.end for piece in pieces] == sorted(piece.end for piece in pieces)
    names = groups.names(range(sent), pieces)
    assert len(set(names)) == len(pieces)
    # A block's name does not depend on what follows it, unless it is cut there.
    longer = groups.names(range(sent + 500), groups.pieces(sent + 500))
    shared = set(groups.pieces(sent)) & set(groups.pieces(sent + 500))
    assert {names[pieces.index(piece)] for piece in shared} <= set(longer)


def test_one_group_that_keeps_all_is_cut_and_named_as_ever() -> None:
    # Broken in production: a new release finds none of the chunks that the one at the other end has sent.
    groups = Groups.plain(256, 128)
    assert groups.is_plain and groups.sent_tokens(700) == 700
    assert [(piece.group, piece.blocks, piece.end) for piece in groups.pieces(700)] == [
        (0, range(0, 2), 256), (0, range(2, 4), 512), (0, range(4, 6), 700),
    ]
    assert [piece.blocks for piece in groups.pieces(1)] == [range(0, 1)]
    context = Context("a", "b", (Item(3, "i"),))
    assert groups.names(range(700), groups.pieces(700), context) == chunk_hashes(range(700), 256, context)


def test_names_tell_groups_prompts_and_images_apart() -> None:
    # Broken in production: KV of one group, or of another picture, is loaded as that of another.
    pieces = GEMMA.pieces(699)
    plain = GEMMA.names(range(699), pieces)
    for other in (
        GEMMA.names([1, *range(1, 699)], pieces),
        GEMMA.names(range(699), pieces, Context(salt="s")),
        GEMMA.names(range(699), pieces, Context(items=(Item(0, "i"),))),
        Groups.plain(256, 128).names(range(699), ()),
    ):
        assert not set(plain) & set(other)
    late = GEMMA.names(range(699), pieces, Context(items=(Item(600, "i"),)))
    assert [a == b for a, b in zip(plain, late)] == [piece.end <= 600 for piece in pieces]


def test_chunks_that_blocks_do_not_fit_into_are_refused() -> None:
    # Broken in production: a chunk begins within a block.
    with pytest.raises(LayoutMismatch, match="no multiple of the engine's block of 96 tokens; set chunk_size to 288"):
        Groups([Group(96, (0,)), Group(32, (1,))], 256)
    # A window's blocks are chunks of their own.
    Groups([Group(96, (0,), window_tokens=100)], 256)


def spec(req_id: str = "router-1") -> dict[str, Any]:
    return {"disagg_spec": {"req_id": req_id, "receiver_host": "h", "receiver_init_port": 1, "receiver_alloc_port": 2}}


def new(name: str, tables: list[list[int]], computed: int, scheduled: int, **more: Any) -> Any:
    """A step of an engine with several groups that begins a request."""
    out = output(new=[(name, [], computed, scheduled)], **more)
    out.scheduled_new_reqs[0].block_ids = tuple(tables)
    return out


def continued(name: str, added: list[list[int]], computed: int, scheduled: int) -> Any:
    out = output(cached=[(name, [], computed, scheduled)])
    out.scheduled_cached_reqs.new_block_ids[0] = tuple(added)
    return out


class Pool:
    """vLLM's pool, as far as blocks are counted."""

    def __init__(self) -> None:
        self.blocks = list(range(100))
        self.held: list[int] = []

    def touch(self, blocks: list[int]) -> None:
        self.held += blocks

    def free_blocks(self, blocks: list[int]) -> None:
        for block in blocks:
            self.held.remove(block)


class TestProducer:
    def test_only_what_the_window_still_touches_is_told(self) -> None:
        # Broken in production: blocks that vLLM has freed are sent, or one that decode needs is not.
        pool = Pool()
        scheduler = ProducerScheduler(GEMMA, 1, Naming(), pins=BlockPins(lambda: pool))
        one = request(700, spec(), output=[7])
        scheduler.allocated(one)
        # Of 699 tokens the window's last 255 are needed behind them: from token 444 on, in block 3.
        step = scheduler.build(new("a", [[1, 2, 3, 4], [11, 12, 13, 14], [21, 22, 23, 24]], 0, 512))
        assert step.plans[0].tokens == 699 and len(step.plans[0].hashes) == 3 + 3
        assert [(chunk.group, chunk.block_ids) for chunk in step.chunks] == [
            (0, [1, 2]), (0, [3, 4]), (1, [14, 24]),
        ]
        step = scheduler.build(continued("a", [[5, 6], [15, 16], [25, 26]], 512, 188))
        assert [(chunk.group, chunk.block_ids) for chunk in step.chunks] == [
            (1, [15, 25]), (0, [5, 6]), (1, [16, 26]),
        ]
        assert sorted(pool.held) == [14, 15, 16, 24, 25, 26]
        assert scheduler.finished(one)[0]
        # Kept until the worker has copied them: vLLM frees what its window has left by then.
        assert pool.held
        scheduler.update(SendOutcomes(ended={"a": [None]}))
        assert pool.held == []

    def test_a_preempted_request_lets_go_of_its_blocks(self) -> None:
        # Broken in production: each preemption takes blocks from the engine until none are left.
        pool = Pool()
        scheduler = ProducerScheduler(GEMMA, 1, Naming(), pins=BlockPins(lambda: pool))
        one = request(300, spec(), output=[7])
        scheduler.allocated(one)
        scheduler.build(new("a", [[1, 2, 3], [11, 12, 13], [21, 22, 23]], 0, 300))
        assert sorted(pool.held) == [11, 12, 13, 21, 22, 23]
        scheduler.build(output(preempted=["a"]))
        assert pool.held == []
        again = continued("a", [[4, 5, 6], [14, 15, 16], [24, 25, 26]], 0, 300)
        again.scheduled_cached_reqs.resumed_req_ids = {"a"}
        step = scheduler.build(again)
        assert [chunk.block_ids for chunk in step.chunks if chunk.group == 1] == [[14, 24], [15, 25], [16, 26]]
        scheduler.finished(SimpleNamespace(**vars(one) | {"status": "FINISHED_ABORTED"}))
        assert pool.held == []

    def test_a_prefix_hit_begins_with_blocks_that_are_not_needed(self) -> None:
        # Broken in production: the null blocks of a hit are sent; or a request with one is never sent.
        scheduler = ProducerScheduler(GEMMA, 1, Naming())
        one = request(700, spec(), output=[7])
        scheduler.allocated(one)
        tables = [[1, 2, 3, 4, 5, 6], [0, 0, 13, 14, 15, 16], [0, 0, 23, 24, 25, 26]]
        step = scheduler.build(new("a", tables, 512, 188))
        assert step.plans[0].cached
        assert [chunk.block_ids for chunk in step.chunks] == [[1, 2], [3, 4], [14, 24], [15, 25], [5, 6], [16, 26]]

    def test_a_prompt_of_one_token_is_computed_at_decode(self) -> None:
        # Broken in production: a request without chunks is opened, and both sides wait for it.
        scheduler = ProducerScheduler(GEMMA, 1, Naming(last_is_computed=True))
        one = request(1, spec(), output=[7])
        one.max_tokens = 5
        scheduler.allocated(one)
        assert scheduler.build(new("a", [[1], [2], [3]], 0, 1)).plans == []
        assert "not_sent" in scheduler.finished(one)[1]


class TestConsumer:
    def test_all_but_the_last_token_are_taken_as_computed(self) -> None:
        # Broken in production: vLLM skips the block with the first token that the last one sees.
        scheduler = ConsumerScheduler(GEMMA, 1000, 1, None, Naming())
        one = request(513, spec())
        scheduler.arrived(one)
        assert scheduler.matched(one, 0) == (512, True)
        tables = ([1, 2, 3, 4], [0, 0, 13, 14], [0, 0, 23, 24])
        scheduler.allocated(one, tables, 512)
        (load,) = scheduler.build(output()).loads
        assert (load.tokens, load.first_block, load.block_ids) == (512, 0, [1, 2, 3, 4])
        assert load.more_block_ids == ([0, 0, 13, 14], [0, 0, 23, 24])
        # A hit that leaves one token: nothing is loaded.
        other = request(513, spec("router-2"), "b")
        scheduler.arrived(other)
        assert scheduler.matched(other, 512) == (0, False)

    @pytest.mark.parametrize("missing", [0, 2, 5])
    def test_a_look_up_finds_everything_or_nothing(self, missing: int) -> None:
        # Broken in production: a beginning is loaded whose windows were never sent.
        shelf = Shelf()
        names = GEMMA.names(range(699), GEMMA.pieces(699))
        assert len(names) == 6
        shelf.ready = set(names) - {names[missing]}
        scheduler = ConsumerScheduler(GEMMA, 1000, 1, shelf, Naming())
        assert scheduler.matched(request(700, {}), 0) == (0, False)
        shelf.ready = set(names)
        assert scheduler.matched(request(700, {}, "b"), 0) == (699, True)
        assert scheduler.matched(request(700, {}, "c"), 512) == (187, True)

    def test_a_request_that_could_not_be_loaded_is_computed(self) -> None:
        # Broken in production: vLLM asks again for what has failed, and it fails again, for ever.
        shelf = Shelf()
        shelf.ready = set(GEMMA.names(range(299), GEMMA.pieces(299)))
        scheduler = ConsumerScheduler(GEMMA, 1000, 1, shelf, Naming())
        one = request(300, {})
        assert scheduler.matched(one, 0) == (299, True)
        scheduler.allocated(one, ([1, 2, 3], [11, 12, 13], [21, 22, 23]), 299)
        scheduler.received({"a"}, (), {"a"})
        assert scheduler.matched(one, 0) == (0, False)
