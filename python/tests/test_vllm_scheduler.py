"""The scheduler's sides of the connector, with vLLM's objects played: which chunk is told when, and what ends how."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from types import SimpleNamespace as Fake
from typing import Any

import pytest

from pd_backend.vllm.keys import chunk_hashes
from pd_backend.vllm.naming import Naming
from pd_backend.vllm.consumer_scheduler import ConsumerScheduler
from pd_backend.vllm.groups import Groups
from pd_backend.vllm.producer_scheduler import ProducerScheduler
from pd_backend.vllm.spec import ParkSpec, RemoteSpec, Rendezvous, parked_answer
from pd_backend.vllm.step import SendOutcomes

CHUNK, BLOCK = 256, 128
#: What prefill answers of a request that it has computed, and sends.
SENT = {"remote_prefill_cached_tokens": 0}
SPEC = {"req_id": "router-1", "receiver_host": "h", "receiver_init_port": [1, 2], "receiver_alloc_port": [3, 4]}


def request(
    tokens: int, params: dict[str, Any] | None = None, request_id: str = "a", output: Sequence[int] = ()
) -> Any:
    prompt = list(range(tokens))
    return Fake(
        request_id=request_id,
        prompt_token_ids=prompt,
        all_token_ids=[*prompt, *output],
        output_token_ids=list(output),
        num_prompt_tokens=tokens,
        num_tokens=tokens + len(output),
        max_tokens=1,
        kv_transfer_params={"disagg_spec": SPEC} if params is None else params,
        status=Fake(name="FINISHED_LENGTH_CAPPED"),
        lora_request=None,
        mm_features=[],
        cache_salt=None,
    )


def output(
    *,
    new: Sequence[tuple[str, list[int], int, int]] = (),
    cached: Sequence[tuple[str, list[int] | None, int, int]] = (),
    resumed: Sequence[str] = (),
    preempted: Sequence[str] = (),
) -> Any:
    """`(request, new blocks, tokens computed before, tokens scheduled)`."""
    return Fake(
        scheduled_new_reqs=[Fake(req_id=r, block_ids=(b,), num_computed_tokens=c) for r, b, c, _ in new],
        scheduled_cached_reqs=Fake(
            req_ids=[r for r, *_ in cached],
            resumed_req_ids=set(resumed),
            new_block_ids=[None if b is None else (b,) for _, b, _, _ in cached],
            num_computed_tokens=[c for *_, c, _ in cached],
        ),
        num_scheduled_tokens={r: n for r, _, _, n in [*new, *cached]},
        total_num_scheduled_tokens=sum(n for *_, n in [*new, *cached]),
        preempted_req_ids=set(preempted),
    )


def told(step: Any) -> list[tuple[int, list[int]]]:
    return [(chunk.chunk, chunk.block_ids) for chunk in step.chunks]


class TestProducer:
    def scheduler(self, tp_size: int = 1) -> ProducerScheduler:
        return ProducerScheduler(Groups.plain(CHUNK, BLOCK), tp_size, Naming())

    def test_chunks_are_told_as_soon_as_they_are_computed(self) -> None:
        # Broken in production: with chunked prefill, nothing crosses before the whole prompt is computed.
        scheduler = self.scheduler()
        scheduler.allocated(request(700))
        first = scheduler.build(output(new=[("a", [10, 11, 12], 0, 300)]))
        assert [plan.spec.req_id for plan in first.plans] == ["router-1"]
        assert first.plans[0].hashes == chunk_hashes(list(range(700)), CHUNK)
        assert told(first) == [(0, [10, 11])]
        assert told(scheduler.build(output(cached=[("a", [13], 300, 211)]))) == []
        third = scheduler.build(output(cached=[("a", [14, 15], 511, 189)]))
        assert (third.plans, told(third)) == ([], [(1, [12, 13]), (2, [14, 15])])

    def test_prefix_cached_chunks_are_told_at_once(self) -> None:
        # Broken in production: a prompt whose beginning is in prefill's own cache is never sent whole.
        scheduler = self.scheduler()
        scheduler.allocated(request(600))
        assert told(scheduler.build(output(new=[("a", [1, 2, 3, 4, 5], 512, 88)]))) == [
            (0, [1, 2]), (1, [3, 4]), (2, [5])
        ]

    def test_a_preempted_request_is_told_again_from_its_new_blocks(self) -> None:
        # Broken in production: after a preemption the old blocks, which are somebody else's by now, are sent.
        scheduler = self.scheduler()
        scheduler.allocated(request(512))
        assert told(scheduler.build(output(new=[("a", [1, 2, 3], 0, 300)]))) == [(0, [1, 2])]
        assert scheduler.build(output(preempted=["a"])).preempted == ["a"]
        scheduler.allocated(request(512))
        resumed = scheduler.build(output(cached=[("a", [7, 8, 9, 5], 0, 512)], resumed=["a"]))
        assert (resumed.plans, told(resumed)) == ([], [(0, [7, 8]), (1, [9, 5])])
        # Preempted and resumed within one step, which vLLM tells as the second alone.
        again = scheduler.build(output(cached=[("a", [1, 2, 3, 4], 0, 512)], resumed=["a"]))
        assert told(again) == [(0, [1, 2]), (1, [3, 4])]

    def test_blocks_are_kept_until_every_rank_has_copied_them(self) -> None:
        # Broken in production: blocks are freed, and overwritten, while their chunks wait for slots.
        scheduler = self.scheduler(tp_size=2)
        one = request(100, output=[7])
        scheduler.allocated(one)
        scheduler.build(output(new=[("a", [1], 0, 100)]))
        assert not scheduler.pending()
        assert scheduler.finished(one) == (True, SENT)
        assert scheduler.pending()
        assert scheduler.build(output()).finishing == ["a"]
        # The engine goes on stepping until both ranks have said how it ended.
        scheduler.update(SendOutcomes({"a": [None]}))
        assert scheduler.pending()
        scheduler.update(SendOutcomes({"a": [None]}))
        assert not scheduler.pending()

    def test_what_is_in_the_queue_is_expected_until_it_is_computed(self) -> None:
        # Broken in production: decode is asked together with prefill, and gives up what stands in prefill's queue for ten seconds.
        scheduler = self.scheduler()
        nixl = {"do_remote_decode": True, "do_remote_prefill": False}
        computed, aborted = request(100, output=[7]), request(100, output=[7])
        for each, name in ((computed, "cmpl-r1-0-0123abcd"), (aborted, "cmpl-r2-0-0123abcd")):
            each.request_id, each.kv_transfer_params = name, nixl
            scheduler.arrived(each)
        step = scheduler.build(output())
        assert [(name, ids[0]) for name, ids in step.expected] == [
            (f"parked {each.request_id}", each.request_id) for each in (computed, aborted)
        ]
        scheduler.allocated(computed)
        step = scheduler.build(output(new=[("cmpl-r1-0-0123abcd", [1], 0, 100)]))
        assert [plan.spec.req_id for plan in step.plans] == ["parked cmpl-r1-0-0123abcd"] and not step.expected
        scheduler.finished(computed)
        aborted.status = Fake(name="FINISHED_ABORTED")
        scheduler.finished(aborted)
        assert scheduler.pending(), "whoever waits for it is told"
        assert scheduler.build(output()).unexpected == ["parked cmpl-r2-0-0123abcd"]
        # Other routers' requests are announced by other means.
        scheduler.arrived(request(100))
        assert scheduler.build(output()).expected == []

    def test_ranks_ask_for_slots_one_after_the_other(self) -> None:
        # Broken in production: each rank's receiver grants slots to another one of two large prompts, and both wait for ever.
        scheduler = self.scheduler(tp_size=3)
        spec = {"disagg_spec": SPEC | {"receiver_init_port": [1, 2, 3], "receiver_alloc_port": [4, 5, 6]}}
        one = request(100, spec, output=[7])
        scheduler.allocated(one)
        assert scheduler.build(output(new=[("a", [1], 0, 100)])).turns == []
        scheduler.finished(one)
        scheduler.build(output())
        for rank in (0, 1):
            scheduler.update(SendOutcomes(granted=[("a", rank)]))
            # Its blocks are kept meanwhile, and the engine has to step for the next rank to hear.
            assert scheduler.pending()
            assert scheduler.build(output()).turns == [("a", rank + 1)]
        scheduler.update(SendOutcomes(granted=[("gone", 0)]))
        assert scheduler.build(output()).turns == []
        scheduler.update(SendOutcomes({"a": [None, None, None]}))
        assert not scheduler.pending()

    def test_ranks_that_wait_for_their_turn_end_with_one_that_fails(self) -> None:
        # Broken in production: the first rank gets no slots, and the others wait for their turn with the prompt's blocks, for ever.
        scheduler = self.scheduler(tp_size=2)
        one = request(100, output=[7])
        scheduler.allocated(one)
        scheduler.build(output(new=[("a", [1], 0, 100)]))
        scheduler.update(SendOutcomes({"a": ["no_slots: none"]}))
        assert scheduler.pending()
        assert scheduler.build(output()).given_up == ["a"]
        scheduler.update(SendOutcomes({"a": [None]}))
        assert scheduler.finished(one) == (False, {"error": "no_slots: none"})

    def test_an_aborted_request_is_dropped(self) -> None:
        # Broken in production: an aborted prompt keeps its slots at both ends.
        scheduler = self.scheduler()
        one = request(700)
        scheduler.allocated(one)
        scheduler.build(output(new=[("a", [1, 2, 3], 0, 300)]))
        one.status = Fake(name="FINISHED_ABORTED")
        assert scheduler.finished(one) == (False, None)
        assert scheduler.pending()
        assert scheduler.build(output()).dropped == ["a"]
        assert not scheduler.pending()

    def test_an_abort_before_the_first_step_leaves_nothing(self) -> None:
        # Broken in production: a request that was never computed is cancelled at a daemon that has not heard of it.
        scheduler = self.scheduler()
        one = request(700)
        scheduler.allocated(one)
        one.status = Fake(name="FINISHED_ABORTED")
        assert scheduler.finished(one) == (False, None)
        step = scheduler.build(output())
        assert (step.dropped, step.plans, step.finishing) == ([], [], [])

    def test_a_failure_known_in_time_is_in_the_response(self) -> None:
        # Broken in production: the proxy waits for a notification that cannot come.
        scheduler = self.scheduler()
        one = request(700, output=[9])
        scheduler.allocated(one)
        scheduler.build(output(new=[("a", [1, 2, 3], 0, 300)]))
        scheduler.update(SendOutcomes({"a": ["no_slots: the receiver is full"]}))
        scheduler.build(output(cached=[("a", [4, 5, 6], 300, 400)]))
        assert scheduler.finished(one) == (False, {"error": "no_slots: the receiver is full"})
        assert scheduler.build(output()).dropped == ["a"]

    def test_what_lmcaches_proxies_ask_for(self) -> None:
        # Broken in production: LMCache's proxy finds no first token in the response, and ends with a KeyError.
        scheduler = self.scheduler()
        one = request(10, {"disagg_spec": SPEC, "ret_first_tok": True}, output=[42])
        scheduler.allocated(one)
        scheduler.build(output(new=[("a", [1], 0, 10)]))
        assert scheduler.finished(one) == (True, {"first_tok": 42, **SENT})

    def test_how_many_tokens_were_cached(self) -> None:
        # Broken in production: clients are billed for cached tokens that prefill has computed, or the reverse: decode knows only
        # that all of them came from elsewhere.
        scheduler = self.scheduler()
        one = request(700)
        scheduler.allocated(one)
        scheduler.build(output(new=[("a", [1, 2, 3, 4], 256, 200)]))
        scheduler.build(output(cached=[("a", [5, 6], 456, 244)]))
        assert scheduler.finished(one) == (True, {"remote_prefill_cached_tokens": 256})

    def test_a_bad_spec_fails_nobody_else(self) -> None:
        # Broken in production: one malformed request ends the engine.
        scheduler = self.scheduler()
        bad = request(10, {"disagg_spec": SPEC | {"receiver_init_port": "x"}})
        scheduler.allocated(bad)
        assert scheduler.build(output(new=[("a", [1], 0, 10)])).plans == []
        keep, response = scheduler.finished(bad)
        assert not keep and "receiver_init_port = 'x'" in response["error"]

    def test_samples_of_one_request_are_sent_once(self) -> None:
        # Broken in production: with n = 2, the second sample ends the first one's transfer, or its request.
        scheduler = self.scheduler()
        one, two = request(100), request(100, request_id="b")
        other = request(101, request_id="c")
        for each in (one, two, other):
            scheduler.allocated(each)
        step = scheduler.build(output(new=[("a", [1], 0, 100), ("b", [2], 0, 100), ("c", [3], 0, 101)]))
        assert [plan.request_id for plan in step.plans] == ["a"] and told(step) == [(0, [1])]
        assert scheduler.finished(two) == (False, None)
        keep, response = scheduler.finished(other)
        assert not keep and "is that of another prompt under way" in response["error"]
        assert scheduler.finished(one) == (True, SENT)
        scheduler.update(SendOutcomes({"a": [None]}))
        # Once that has ended, the name is free.
        again = request(101, request_id="d")
        scheduler.allocated(again)
        assert len(scheduler.build(output(new=[("d", [3], 0, 101)])).plans) == 1

    def test_decode_keeps_the_whole_chunks_of_what_it_has_answered(self) -> None:
        # Broken in production: the next turn computes the answer again; or is given KV of a token that was not computed.
        at = Rendezvous("h", (1,), "me", "pull")
        scheduler = ProducerScheduler(Groups.plain(CHUNK, BLOCK), 1, Naming(), lambda: at)
        one = request(500, {}, output=range(13))
        one.num_computed_tokens = 512
        keep, params = scheduler.keep(one, [1, 2, 3, 4, 5])
        assert keep and params is not None and params["remote_num_tokens"] == 512 and params["remote_host"] == "h"
        step = scheduler.build(output())
        assert (told(step), step.finishing) == ([(0, [1, 2]), (1, [3, 4])], ["a"])
        assert step.plans[0].hashes == chunk_hashes([*range(500), *range(12)], CHUNK)
        assert step.plans[0].kept == RemoteSpec("h", (1,), step.plans[0].spec.ids, True)
        assert scheduler.pending()
        scheduler.update(SendOutcomes({"a": [None]}))
        assert not scheduler.pending()
        # Too short, not computed, aborted, or nobody knows where to ask.
        short, aborted = request(255, {}, output=[1]), request(600, {}, output=[1])
        short.num_computed_tokens, aborted.num_computed_tokens = 255, 600
        aborted.status = Fake(name="FINISHED_ABORTED")
        for each in (short, aborted):
            assert scheduler.keep(each, [1, 2, 3, 4, 5]) == (False, None)
        nowhere = self.scheduler()
        assert nowhere.keep(one, [1, 2, 3, 4, 5]) == (False, None)
        # Blocks outside of a window are none.
        assert scheduler.keep(one, [0, 2, 3, 4, 5]) == (False, None)

    def test_ordinary_requests_are_nobodys_business(self) -> None:
        # Broken in production: a prefill server cannot answer requests of its own.
        scheduler = self.scheduler()
        one = request(700, {})
        scheduler.allocated(one)
        step = scheduler.build(output(new=[("a", [1, 2, 3, 4, 5, 6], 0, 700)]))
        assert (step.plans, step.chunks) == ([], [])
        assert scheduler.finished(one) == (False, None)


    def test_a_router_that_says_nothing_gets_its_prompt_pushed(self) -> None:
        # Broken in production: behind such routers every prompt is computed twice, or prefill's answers have parameters that the
        # router hands to decode.
        for params in ({}, None):
            scheduler = self.unsolicited()
            one = request(300, params if params is None else {})
            one.kv_transfer_params = params
            scheduler.allocated(one)
            step = scheduler.build(output(new=[("a", [1, 2, 3], 0, 300)]))
            (plan,) = step.plans
            assert isinstance(plan.spec, ParkSpec) and plan.spec.unsolicited and plan.spec.ids == ()
            assert told(step) == [(0, [1, 2]), (1, [3])]
            assert scheduler.finished(one) == (True, None)
            assert scheduler.build(output()).finishing == ["a"]
            scheduler.update(SendOutcomes({"a": [None]}))
            assert not scheduler.pending()

    def test_what_is_no_prefill_is_not_pushed(self) -> None:
        # Broken in production: a prefill server that is asked by itself copies and sends each of its prompts.
        for unlike in ({"max_tokens": 2}, {"kv_transfer_params": {"ret_first_tok": True}}, {"pooling_params": object()}):
            scheduler, one = self.unsolicited(), request(300, {})
            vars(one).update(unlike)
            scheduler.allocated(one)
            assert scheduler.build(output(new=[("a", [1, 2, 3], 0, 300)])).plans == [], unlike
        scheduler, one = self.scheduler(), request(300, {})
        scheduler.allocated(one)
        assert scheduler.build(output(new=[("a", [1, 2, 3], 0, 300)])).plans == []

    def test_a_push_that_is_not_taken_is_no_ones_error(self) -> None:
        # Broken in production: a router that says nothing is told of an error that concerns nobody.
        scheduler, one = self.unsolicited(), request(300, {})
        scheduler.allocated(one)
        scheduler.build(output(new=[("a", [1, 2, 3], 0, 300)]))
        scheduler.update(SendOutcomes({"a": ["peer_unreachable: no receiver"]}))
        assert scheduler.finished(one) == (False, None)
        assert scheduler.build(output()).dropped == ["a"]

    def unsolicited(self) -> ProducerScheduler:
        return ProducerScheduler(Groups.plain(CHUNK, BLOCK), 1, Naming(), unsolicited=True)


class Shelf:
    """Chunks that are ready at a receiver that is played."""

    def __init__(self, *prompts: Sequence[int]) -> None:
        self.ready = {name for prompt in prompts for name in chunk_hashes(list(prompt), CHUNK)}
        self.held: set[str] = set()
        self.coming: set[str] = set()
        self.asked = 0

    def find(self, request_id: str, hashes: Sequence[str]) -> tuple[int, bool]:
        self.asked += 1
        self.held.add(request_id)
        found = next((i for i, name in enumerate(hashes) if name not in self.ready), len(hashes))
        return found, found < len(hashes) and hashes[found] in self.coming

    def forget(self, request_id: str) -> None:
        self.held.discard(request_id)


class TestConsumer:
    def scheduler(self, shelf: Shelf | None = None, tp_size: int = 1, num_blocks: int = 1000) -> ConsumerScheduler:
        return ConsumerScheduler(Groups.plain(CHUNK, BLOCK), num_blocks, tp_size, shelf, Naming())

    def test_a_step_that_computes_nothing_says_so(self) -> None:
        # Broken in production: workers wait for chunks while they should compute, or never wait and load a step later.
        for scheduler in (self.scheduler(), ProducerScheduler(Groups.plain(CHUNK, BLOCK), 1, Naming())):
            assert scheduler.build(output()).idle
            assert not scheduler.build(output(new=[("z", [1], 0, 10)])).idle

    def test_a_named_request_is_waited_for_and_loaded(self) -> None:
        # Broken in production: decode computes the prompt itself.
        scheduler = self.scheduler()
        one = request(700)
        scheduler.arrived(one)
        assert scheduler.build(output()).announced == [("a", "router-1")]
        assert scheduler.matched(one, 0) == scheduler.matched(one, 0) == (700, True)
        scheduler.allocated(one, ([4, 5, 6, 7, 8, 9],), 700)
        (load,) = scheduler.build(output()).loads
        assert (load.req_id, load.tokens, load.first_block, load.block_ids) == ("router-1", 700, 0, [4, 5, 6, 7, 8, 9])
        # vLLM calls again once it is loaded, with nothing external.
        scheduler.received(["a"], ())
        scheduler.allocated(one, ([4, 5, 6, 7, 8, 9],), 0)
        assert scheduler.build(output()).unneeded == []
        scheduler.finished(one)
        assert not scheduler.pending() and scheduler.build(output()).dropped == []

    @pytest.mark.parametrize("known", [True, False])
    def test_a_request_of_another_engine_is_looked_up(self, known: bool) -> None:
        # Broken in production: a data-parallel rank waits for chunks that its router has sent to another rank, or takes
        # what another rank would be sent for its own.
        shelf = Shelf(range(512))
        scheduler = ConsumerScheduler(
            Groups.plain(CHUNK, BLOCK), 1000, 1, shelf, Naming(), own_ports=lambda: [9] if known else None
        )
        one = request(700)
        scheduler.arrived(one)
        # As long as its own receivers are not known, anything may be for them.
        assert scheduler.build(output()).announced == ([] if known else [("a", "router-1")])
        assert scheduler.matched(one, 0) == ((512, True) if known else (700, True))
        scheduler.finished(one)
        assert scheduler.pending() != known

    def test_what_a_router_knows_is_not_waited_for(self) -> None:
        # Broken in production: a prompt that prefill could not send is waited for by everybody, or holds up the blocks of others; what was
        # lost after it had been sent is waited for until receive_wait_s.
        scheduler = self.scheduler(tp_size=2, num_blocks=8)
        why = {"disagg_spec": SPEC, "error": "too_large: 5 chunks"}
        for request_id in "ab":  # More blocks than may wait for chunks.
            one = request(512, why, request_id)
            scheduler.arrived(one)
            assert scheduler.matched(one, 0) == (512, True)
            scheduler.allocated(one, ([0, 1, 2, 3],), 512)
            step = scheduler.build(output())
            assert (step.announced, [load.not_sent for load in step.loads]) == ([], ["too_large: 5 chunks"])
        # It cannot be loaded, and the engine computes it.
        scheduler.received(["a"], [0, 1, 2, 3])
        assert scheduler.matched(one, 0)[0] is not None
        for sent in (True, False):
            one = request(512, {"disagg_spec": SPEC, "sent": sent}, f"sent {sent}")
            scheduler.arrived(one)
            step = scheduler.build(output())
            assert (step.announced, step.sent) == ([(one.request_id, "router-1")], [one.request_id] if sent else [])

    def test_few_blocks_wait_for_chunks(self) -> None:
        # Broken in production: requests that hold all blocks wait for slots, those that hold the slots wait for blocks,
        # and all of them run into their deadlines.
        scheduler = self.scheduler(tp_size=2, num_blocks=16)
        first, second, third = (request(256, request_id=name) for name in "abc")
        assert scheduler.matched(first, 0) == (256, True)
        scheduler.allocated(first, ([0, 1],), 256)
        # Two of four: there is room for one more.
        assert scheduler.matched(second, 0) == (256, True)
        scheduler.allocated(second, ([2, 3],), 256)
        assert scheduler.matched(third, 0) == (None, False)
        assert [plan.request_id for plan in scheduler.build(output()).loads] == ["a", "b"]
        # What is cached here needs no blocks, and no waiting.
        assert scheduler.matched(third, 256) == (0, False)
        # Its own chunks are here, at every worker.
        scheduler.here(["c"])
        assert scheduler.matched(third, 0) == (None, False)
        scheduler.here(["c"])
        assert scheduler.matched(third, 0) == (256, True)
        scheduler.allocated(third, ([4, 5],), 256)
        assert [plan.request_id for plan in scheduler.build(output()).loads] == ["c"]
        fourth, fifth, sixth = (request(256, request_id=name) for name in "def")
        assert scheduler.matched(fourth, 0) == (None, False)
        # Loaded, or given up: its place is another's.
        scheduler.received(["a"], ())
        assert scheduler.matched(fourth, 0) == (256, True)
        scheduler.allocated(fourth, ([6, 7],), 256)
        assert scheduler.matched(fifth, 0) == (None, False)
        scheduler.finished(second)
        assert scheduler.matched(fifth, 0) == (256, True)
        # One that lost its blocks waits for nobody: it is looked up, or computed.
        scheduler.allocated(fifth, ([8, 9],), 256)
        scheduler.received(["e"], ())
        scheduler.build(output(preempted=["e"]))
        assert scheduler.matched(fifth, 0) == (0, False)
        assert scheduler.matched(sixth, 0) == (256, True)

    def test_what_is_on_its_way_is_waited_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # Broken in production: decode is asked a millisecond before the last chunk is there, and computes the prompt; or it waits
        # for ever for a push that hangs.
        shelf = Shelf(range(256))
        shelf.coming = set(chunk_hashes(list(range(700)), CHUNK)) - shelf.ready
        scheduler, one = self.scheduler(shelf), request(700, {})
        assert scheduler.matched(one, 0) == (None, False)
        assert scheduler.matched(one, 0) == (None, False)
        shelf.ready |= shelf.coming
        assert scheduler.matched(one, 0) == (700, True)
        other = request(700, {}, request_id="b")
        shelf.ready = set(chunk_hashes(list(range(256)), CHUNK))
        assert scheduler.matched(other, 0) == (None, False)
        monkeypatch.setattr("pd_backend.vllm.consumer_scheduler._COMING_WAIT_S", 0.0)
        assert scheduler.matched(other, 0) == (256, True)
        third = request(700, {}, request_id="c")
        monkeypatch.setattr("pd_backend.vllm.consumer_scheduler._COMING_WAIT_S", 10.0)
        assert scheduler.matched(third, 0) == (None, False)
        shelf.coming = set()
        assert scheduler.matched(third, 0) == (256, True)
        scheduler.finished(third)
        assert shelf.held == {"a", "b"}

    def test_a_prompt_of_one_token_is_loaded_once(self) -> None:
        # Broken in production: vLLM counts nothing of it as computed, asks again, and it is loaded for ever.
        scheduler = self.scheduler(Shelf(range(1)))
        one = request(1)
        assert scheduler.matched(one, 0) == (1, True)
        scheduler.allocated(one, ([4],), 1)
        scheduler.build(output())
        scheduler.received(["a"], ())
        assert scheduler.matched(one, 0) == (0, False)
        scheduler.allocated(one, ([4],), 0)
        assert (scheduler.build(output()).loads, scheduler.pending()) == ([], False)

    def test_prompts_of_one_list_are_each_asked_for(self) -> None:
        # Broken in production: of a list of prompts, which share one map of parameters where the engine runs in the
        # server's own process, those that come after the first one has its blocks are computed here.
        params = {"do_remote_prefill": True, "remote_host": "h", "remote_port": 5600, "remote_request_id": "cmpl-1"}
        scheduler = self.scheduler(Shelf(), 1)
        for name in ("a", "b"):
            asked = request(300, params, request_id=name)
            assert scheduler.matched(asked, 0) == (300, True)
            scheduler.allocated(asked, ([1, 2, 3],), 300)
            (plan,) = scheduler.build(output()).loads
            assert plan.remote is not None and plan.remote.ids == ("cmpl-1",)
            # vLLM itself reads this.
            assert asked.kv_transfer_params["do_remote_prefill"] is False

    def test_what_is_cached_here_is_not_loaded(self) -> None:
        # Broken in production: blocks that other requests read are overwritten while they read them.
        scheduler = self.scheduler()
        one = request(700)
        assert scheduler.matched(one, 384) == (316, True)
        scheduler.allocated(one, ([1, 2, 3, 7, 8, 9],), 316)
        (load,) = scheduler.build(output()).loads
        assert (load.first_block, load.block_ids) == (3, [1, 2, 3, 7, 8, 9])

    def test_chunks_nobody_needs_are_given_back(self) -> None:
        # Broken in production: the chunks of a request that was wholly cached stay in the receiver until they expire.
        scheduler = self.scheduler()
        one = request(256)
        scheduler.arrived(one)
        assert scheduler.matched(one, 256) == (0, False)
        scheduler.allocated(one, ([1, 2],), 0)
        assert scheduler.pending()
        assert scheduler.build(output()).unneeded == ["a"]
        scheduler.finished(one)
        assert scheduler.build(output()).dropped == []

    def test_the_engine_goes_on_until_every_rank_has_given_them_back(self) -> None:
        # Broken in production: an engine that has nothing else to do sleeps on chunks that nobody needs.
        scheduler = self.scheduler(tp_size=2)
        one = request(256)
        scheduler.arrived(one)
        scheduler.allocated(one, ([1, 2],), 0)
        scheduler.build(output())
        scheduler.finished(one)
        for _ in range(2):
            assert scheduler.pending()
            scheduler.returned(["a"])
        assert not scheduler.pending()

    def test_an_abort_while_loading_or_before_is_told(self) -> None:
        # Broken in production: an aborted request's lease, or its blocks, are never given back.
        for loading in (False, True):
            scheduler = self.scheduler()
            one = request(700)
            scheduler.arrived(one)
            scheduler.matched(one, 0)
            if loading:
                scheduler.allocated(one, ([4, 5, 6, 7, 8, 9],), 700)
            scheduler.build(output())
            scheduler.finished(one)
            assert scheduler.pending()
            assert scheduler.build(output()).dropped == ["a"]

    def test_without_a_name_chunks_are_looked_up(self) -> None:
        # Broken in production: LMCache's proxy, which names nothing to decode, gets no benefit from prefill.
        shelf = Shelf(range(600))
        scheduler = self.scheduler(shelf)
        one = request(600, {})
        assert scheduler.matched(one, 0) == scheduler.matched(one, 0) == (600, True)
        assert shelf.asked == 1 and shelf.held == {"a"}
        scheduler.allocated(one, ([1, 2, 3, 4, 5],), 600)
        (load,) = scheduler.build(output()).loads
        assert (load.req_id, load.hashes) == (None, chunk_hashes(list(range(600)), CHUNK))
        scheduler.received(["a"], ())
        assert shelf.held == set()

    def test_what_was_found_before_a_reset_is_looked_up_again(self) -> None:
        # Broken in production: tokens are claimed whose chunks a reset has dropped, and the request fails.
        shelf = Shelf(range(600))
        scheduler = self.scheduler(shelf)
        one, named = request(600, {}), request(600, request_id="b")
        assert scheduler.matched(one, 0) == scheduler.matched(named, 0) == (600, True)
        shelf.ready.clear()
        scheduler.reset()
        assert shelf.held == set()
        assert scheduler.matched(one, 0) == (0, False)
        # What a sender is to bring is waited for all the same.
        assert scheduler.matched(named, 0) == (600, True)

    def test_a_first_token_that_the_router_added_does_not_hide_the_last_chunk(self) -> None:
        # Broken in production: LMCache's proxy appends prefill's token, and the short last chunk is computed anew.
        scheduler = self.scheduler(Shelf(range(600)))
        assert scheduler.matched(request(601, {}), 0) == (600, True)

    def test_the_longest_ready_beginning_counts(self) -> None:
        # Broken in production: tokens are claimed that nobody has.
        shelf = Shelf(range(512))
        scheduler = self.scheduler(shelf)
        assert scheduler.matched(request(700, {}), 0) == (512, True)
        assert scheduler.matched(request(700, {}, "b"), 512) == (0, False)
        assert shelf.held == {"a"}
        assert self.scheduler(Shelf()).matched(request(700, {}), 0) == (0, False)
        assert self.scheduler(None).matched(request(700, {}), 0) == (0, False)

    def test_after_a_preemption_the_request_is_looked_up(self) -> None:
        # Broken in production: a request is waited for that was handed out before, until the deadline.
        shelf = Shelf()
        scheduler = self.scheduler(shelf)
        one = request(512)
        scheduler.matched(one, 0)
        scheduler.allocated(one, ([1, 2, 3, 4],), 512)
        scheduler.build(output())
        scheduler.received(["a"], ())
        scheduler.build(output(preempted=["a"]))
        again = request(512, output=[3, 4, 5])
        assert scheduler.matched(again, 0) == (0, False)
        shelf.ready = Shelf(range(512)).ready
        scheduler.build(output(preempted=["a"]))
        assert scheduler.matched(again, 0) == (512, True)

    @pytest.mark.parametrize("news", [[(["a"], {3, 4})], [([], {3, 4}), (["a"], ())]])
    def test_what_failed_once_is_computed(self, news: list[tuple[list[str], Collection[int]]]) -> None:
        # Broken in production: a chunk that cannot be loaded is loaded again and again, for ever. With several ranks the
        # last one to be through hides that another one has failed before.
        shelf = Shelf(range(512))
        scheduler = self.scheduler(shelf)
        one = request(512)
        scheduler.matched(one, 0)
        scheduler.allocated(one, ([1, 2, 3, 4],), 512)
        scheduler.build(output())
        for request_ids, failed_blocks in news:
            scheduler.received(request_ids, failed_blocks)
        assert scheduler.matched(one, 0) == (0, False)
        scheduler.build(output(preempted=["a"]))
        assert scheduler.matched(one, 0) == (0, False)
        assert shelf.asked == 0

    def test_what_this_very_server_has_prefilled_is_looked_up_and_released_at_the_end(self) -> None:
        # Broken in production: a router chooses one server of kv_both for both parts, and it waits for itself to send.
        shelf, at = Shelf(range(600)), Rendezvous("h", (1,), "me", "pull")
        scheduler = ConsumerScheduler(Groups.plain(CHUNK, BLOCK), 1000, 1, shelf, Naming(), lambda: at)
        params = parked_answer("cmpl-1", at, [7], 600)
        one, other = request(600, dict(params)), request(600, params | {"remote_engine_id": "pd1:you:1"}, "b")
        for each in (one, other):
            scheduler.arrived(each)
        assert [hold.request_id for hold in scheduler.build(output()).holds] == ["b"]
        assert scheduler.matched(one, 0) == (600, True) and shelf.asked == 1
        scheduler.allocated(one, ([1, 2, 3, 4, 5],), 600)
        step = scheduler.build(output())
        assert (step.loads[0].req_id, step.loads[0].remote, step.released) == (None, None, [])
        # As vLLM wants it of a request that has had its transfer.
        assert not one.kv_transfer_params["do_remote_prefill"]
        scheduler.received(["a"], ())
        scheduler.finished(one)
        (release,) = scheduler.build(output()).released
        assert (release.request_id, release.remote.ids, release.last_hash) == ("a", ("cmpl-1",), chunk_hashes(list(range(600)), CHUNK)[-1])

    def test_the_turn_before_is_asked_for_if_enough_is_missing(self) -> None:
        # Broken in production: prefill computes what decode has, or waits for chunks that it computes sooner.
        shelf = Shelf(range(768))
        scheduler = ConsumerScheduler(Groups.plain(CHUNK, BLOCK), 1000, 2, shelf, Naming(), next_turn_tokens=512)
        asked = {"do_remote_decode": True, "do_remote_prefill": False}
        long, cached, short = (request(tokens, asked, name) for tokens, name in ((1000, "a"), (1000, "b"), (500, "c")))
        for each in (long, cached, short):
            scheduler.arrived_to_be_prefilled(each)
            assert scheduler.knows(each.request_id)
        assert scheduler.matched(cached, 300) == (None, False)
        assert scheduler.matched(short, 0) == (0, False)
        assert scheduler.matched(long, 0) == scheduler.matched(long, 0) == (None, False)
        step = scheduler.build(output())
        hashes = chunk_hashes(list(range(1000)), CHUNK)
        # Whole chunks alone: decode keeps no others.
        assert [(turn.request_id, turn.hashes) for turn in step.turns] == [("b", hashes[1:3]), ("a", hashes[:3])]
        assert shelf.asked == 0
        scheduler.here(["a"])
        assert scheduler.matched(long, 0) == (None, False)
        scheduler.here(["a", "b", "b"])
        # What the engine has need not be in the daemon's buffer as well, as long as the engine has it.
        shelf.ready.remove(hashes[0])
        assert scheduler.matched(cached, 300) == scheduler.matched(cached, 300) == (468, True) and shelf.asked == 2
        assert scheduler.matched(cached, 128) == (0, False)
        shelf.ready.add(hashes[0])
        assert scheduler.matched(long, 0) == scheduler.matched(long, 0) == (768, True)
        assert scheduler.build(output()).turns_over == ["b", "a"] and shelf.held == {"a"}
        scheduler.allocated(long, ([1, 2, 3, 4, 5, 6, 7, 8],), 768)
        (load,) = scheduler.build(output()).loads
        assert (load.req_id, load.remote, load.hashes) == (None, None, hashes[:3])
        scheduler.received(["a"], ())
        assert not scheduler.finished(long)
        # Given up while it is asked for.
        late = request(1000, asked, "d")
        scheduler.arrived_to_be_prefilled(late)
        assert scheduler.matched(late, 0) == (None, False)
        assert not scheduler.finished(late) and scheduler.pending()
        assert scheduler.build(output()).turns_over == ["d"] and not scheduler.pending()

    def test_who_asks_for_no_turn_is_not_known(self) -> None:
        # Broken in production: a prefill server looks chunks up that it was told to compute.
        for scheduler in (self.scheduler(Shelf()), ConsumerScheduler(Groups.plain(CHUNK, BLOCK), 9, 1, None, Naming(), next_turn_tokens=1)):
            scheduler.arrived_to_be_prefilled(request(1000, {"do_remote_decode": True}))
            assert not scheduler.knows("a")

    def test_embeddings_have_no_names(self) -> None:
        # Broken in production: a prompt of embeddings ends the engine.
        one = request(10)
        one.prompt_token_ids = None
        scheduler = self.scheduler(Shelf())
        scheduler.arrived(one)
        assert scheduler.matched(one, 0) == (0, False)
        assert scheduler.build(output()).announced == []
