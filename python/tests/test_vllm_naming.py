"""Which requests have names, and that a name says all that KV depends on. vLLM's objects are played."""

from __future__ import annotations

import logging
from types import SimpleNamespace as Fake
from typing import Any

import pytest

from pd_backend.vllm.naming import NULL_BLOCK, Naming, Unnamed
from pd_backend.vllm.scheduler import ConsumerScheduler, ProducerScheduler
from test_vllm_scheduler import BLOCK, CHUNK, Shelf, output, request, told

WINDOW = 512


def producer(naming: Naming) -> ProducerScheduler:
    return ProducerScheduler(CHUNK, BLOCK, 1, naming)


def consumer(naming: Naming, shelf: Shelf | None = None) -> ConsumerScheduler:
    return ConsumerScheduler(CHUNK, BLOCK, 1000, 1, shelf, naming)


class TestWindows:
    def test_a_prompt_as_long_as_the_window_is_computed_at_decode(self) -> None:
        # Broken in production: blocks behind the window are freed, and another request's KV is sent in their place.
        for tokens, sent in ((WINDOW - 1, True), (WINDOW, False), (3 * WINDOW, False)):
            one = request(tokens, output=[7])
            shelf = Shelf(range(9999))
            prefill, decode = producer(Naming(window_tokens=WINDOW)), consumer(Naming(window_tokens=WINDOW), shelf)
            prefill.allocated(one)
            blocks = list(range(1, 1 + -(-tokens // BLOCK)))
            step = prefill.build(output(new=[("a", blocks, 0, tokens)]))
            assert bool(step.plans) == bool(step.chunks) == sent
            keep, response = prefill.finished(one)
            assert keep == sent and ("not_sent" in (response or {})) == (not sent)
            decode.arrived(one)
            assert decode.matched(one, 0) == ((tokens, True) if sent else (0, False))
            assert bool(decode.build(output()).announced) == sent
            decode.allocated(one, blocks, tokens if sent else 0)
            assert decode.build(output()).unneeded == []

    def test_an_answer_that_leaves_the_window_frees_blocks_too(self) -> None:
        # Broken in production: prefill that answers many tokens frees blocks whose chunks wait for slots.
        one = request(WINDOW - 1)
        one.max_tokens = 2
        prefill = producer(Naming(window_tokens=WINDOW))
        prefill.allocated(one)
        assert prefill.build(output(new=[("a", [1, 2, 3, 4], 0, WINDOW - 1)])).plans == []

    def test_a_request_that_has_grown_out_of_the_window_is_not_looked_up(self) -> None:
        # Broken in production: after a preemption, chunks are loaded into blocks that vLLM has left out.
        naming, shelf = Naming(window_tokens=WINDOW), Shelf(range(WINDOW - 1), range(WINDOW), range(300), range(9999))
        assert consumer(naming, shelf).matched(request(WINDOW - 1, {}), 0) == (WINDOW - 1, True)
        decode = consumer(naming, shelf)
        # Its prompt alone is inside.
        grown = request(300, {}, output=list(range(300, 300 + WINDOW)))
        assert decode.matched(grown, 0) == (300, True)
        assert decode.matched(request(WINDOW, {}, "b"), 0) == (0, False)

    @pytest.mark.parametrize("blocks", [[0, 1, 2, 3, 4, 5], [1, 2, 0, 3, 4, 5]])
    def test_a_null_block_is_never_put_under_a_key(self, blocks: list[int]) -> None:
        # Broken in production: a block that the engine has skipped is sent as the KV of real tokens.
        assert NULL_BLOCK == 0
        prefill = producer(Naming())
        one = request(700, output=[7])
        prefill.allocated(one)
        step = prefill.build(output(new=[("a", blocks, 512, 188)]))
        assert (step.plans, [chunk for chunk, _ in told(step) if chunk == blocks.index(0) // 2], step.dropped) == ([], [], [])
        keep, response = prefill.finished(one)
        assert not keep and response is not None and "its blocks are skipped" in response["error"]

    def test_null_blocks_after_a_preemption_end_what_was_begun(self) -> None:
        # Broken in production: a resumed request, whose first blocks are skipped now, is sent with them.
        prefill = producer(Naming())
        prefill.allocated(request(700))
        assert told(prefill.build(output(new=[("a", [1, 2, 3], 0, 300)]))) == [(0, [1, 2])]
        prefill.build(output(preempted=["a"]))
        step = prefill.build(output(cached=[("a", [0, 0, 8, 9, 5, 6], 512, 188)], resumed=["a"]))
        assert (told(step), step.dropped) == ([], ["a"])


def test_images_that_are_counted_are_computed_at_decode() -> None:
    # Broken in production: two servers agree by luck on a counter's names, and one image is answered with another's KV.
    one = request(300, output=[7])
    one.mm_features = [Fake(mm_position=Fake(offset=3), identifier="renderer0-mm-1-image-0")]
    prefill, decode = producer(Naming(images_by_count=True)), consumer(Naming(images_by_count=True), Shelf())
    prefill.allocated(one)
    assert prefill.build(output(new=[("a", [1, 2, 3], 0, 300)])).plans == []
    assert "by a counter" in prefill.finished(one)[1]["not_sent"]
    decode.arrived(one)
    assert decode.matched(one, 0) == (0, False) and decode.build(output()).announced == []
    # Text alone has names.
    assert Naming(images_by_count=True).context(request(300), 300) == Naming().context(request(300), 300)
    assert Naming().context(one, 300).items[0].offset == 3


def test_each_reason_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    # Broken in production: nobody learns why decode computes prompts, or a line for each request fills the disk.
    naming = Naming(window_tokens=WINDOW)

    def refused(one: Any) -> str:
        with pytest.raises(Unnamed) as unnamed:
            naming.context(one, one.num_prompt_tokens)
        return str(unnamed.value)

    embeddings = request(10)
    embeddings.prompt_embeds = object()
    with caplog.at_level(logging.WARNING, "vllm.pd_backend"):
        for _ in range(2):
            assert "600 tokens are not all inside the window of 512" in refused(request(600))
            assert "embeddings" in refused(embeddings)
    assert len(caplog.records) == 2
    assert all("computed where it arrived" in record.getMessage() for record in caplog.records)
