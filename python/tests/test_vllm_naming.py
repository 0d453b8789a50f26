"""Which requests have names, and that a name says all that KV depends on. vLLM's objects are played."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace as Fake
from typing import Any

import pytest

from pd_backend.vllm.adapters import Adapters, LoadedAdapters
from pd_backend.vllm.keys import chunk_hashes
from pd_backend.vllm.naming import NULL_BLOCK, Naming, Unnamed
from pd_backend.vllm.consumer_scheduler import ConsumerScheduler
from pd_backend.vllm.groups import Groups
from pd_backend.vllm.producer_scheduler import ProducerScheduler
from test_vllm_scheduler import BLOCK, CHUNK, SPEC, Shelf, output, request, told



def producer(naming: Naming) -> ProducerScheduler:
    return ProducerScheduler(Groups.plain(CHUNK, BLOCK), 1, naming)


def consumer(naming: Naming, shelf: Shelf | None = None) -> ConsumerScheduler:
    return ConsumerScheduler(Groups.plain(CHUNK, BLOCK), 1000, 1, shelf, naming)


class TestSkippedBlocks:
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
        assert not keep and response is not None and "its blocks are skipped" in response["not_sent"]

    def test_null_blocks_after_a_preemption_end_what_was_begun(self) -> None:
        # Broken in production: a resumed request, whose first blocks are skipped now, is sent with them.
        prefill = producer(Naming())
        prefill.allocated(request(700))
        assert told(prefill.build(output(new=[("a", [1, 2, 3], 0, 300)]))) == [(0, [1, 2])]
        prefill.build(output(preempted=["a"]))
        step = prefill.build(output(cached=[("a", [0, 0, 8, 9, 5, 6], 512, 188)], resumed=["a"]))
        assert (told(step), step.dropped) == ([], ["a"])


@pytest.fixture
def ad(tmp_path: Path) -> Path:
    """An adapter's files."""
    return adapter_in(tmp_path / "ad", b"one")


def adapter_in(folder: Path, weights: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in (("adapter_config.json", b"{}"), ("adapter_model.safetensors", weights)):
        # As tools replace files: by another one of the same name.
        (folder / "new").write_bytes(content)
        (folder / "new").replace(folder / name)
    return folder


def with_adapter(folder: Path, number: int = 1, tokens: int = 300, request_id: str = "a") -> Any:
    one = request(tokens, request_id=request_id, output=[7])
    one.lora_request = Fake(lora_name="ad", lora_int_id=number, lora_path=str(folder))
    return one


def naming_adapters() -> Naming:
    return Naming(adapters=Adapters(lambda path: path))


class TestAdapters:
    def test_an_adapter_is_its_bytes(self, ad: Path, tmp_path: Path) -> None:
        # Broken in production: an adapter that is loaded anew under its old name is answered with the old one's KV, and
        # servers that load the same adapter from two places share nothing.
        here, there = naming_adapters(), naming_adapters()
        first = here.name(with_adapter(ad), 300).context
        copy = adapter_in(tmp_path / "elsewhere", b"one")
        assert there.name(with_adapter(copy, number=7), 300).context == first
        adapter_in(ad, b"two")
        second = here.name(with_adapter(ad, number=2), 300).context
        assert second != first and there.name(with_adapter(ad), 300).context == second
        assert first != Naming().name(request(300), 300).context

    def test_files_that_cannot_be_read_have_no_name(self, ad: Path) -> None:
        # Broken in production: an adapter whose files are gone ends the engine, or has the key of another.
        (ad / "adapter_model.safetensors").unlink()
        for naming, text in ((naming_adapters(), "cannot be read"), (Naming(), "not known when this vLLM loads")):
            with pytest.raises(Unnamed, match=text):
                naming.name(with_adapter(ad), 300)

    def test_files_that_changed_since_the_load_have_no_name(self, ad: Path) -> None:
        # Broken in production: prefill computes with what it loaded an hour ago, and calls it what is on the disk now.
        loaded, naming = LoadedAdapters(), naming_adapters()
        assert loaded.load(1, lambda: str(ad), lambda: "model") == "model"
        before = naming.name(with_adapter(ad), 300).adapter
        adapter_in(ad, b"two")
        changed = naming.name(with_adapter(ad), 300).adapter
        assert loaded.may_be(before) and not loaded.may_be(changed) and loaded.may_be(None)
        # The scheduler learns of it with the next step.
        naming.adapters_loaded(loaded.news())
        with pytest.raises(Unnamed, match="have changed since it was loaded"):
            naming.name(with_adapter(ad), 300)
        assert loaded.news() == {}
        # Loaded anew, under a number of its own or in place.
        loaded.load(1, lambda: str(ad), lambda: "model")
        naming.adapters_loaded(loaded.news())
        assert loaded.may_be(naming.name(with_adapter(ad), 300).adapter)

    def test_files_that_change_during_the_load_have_no_name(self, ad: Path) -> None:
        # Broken in production: half of the old and half of the new weights go by the name of the new ones.
        loaded, naming = LoadedAdapters(), naming_adapters()
        loaded.load(1, lambda: str(ad), lambda: adapter_in(ad, b"two"))
        assert not loaded.may_be(naming.name(with_adapter(ad), 300).adapter)

    def test_what_vllms_own_cache_has_of_a_replaced_adapter_is_not_sent(self, ad: Path) -> None:
        # Broken in production: vLLM's cache goes by name and path, and hits the old adapter's KV after a load in place.
        naming = naming_adapters()
        prefill = producer(naming)
        prefill.allocated(with_adapter(ad))
        assert prefill.build(output(new=[("a", [1, 2, 3], 128, 172)])).plans != []
        adapter_in(ad, b"two")
        for name, computed, sent in (("b", 0, True), ("c", 128, False)):
            one = with_adapter(ad, request_id=name)
            one.kv_transfer_params = {"disagg_spec": SPEC | {"req_id": name}}
            prefill.allocated(one)
            assert bool(prefill.build(output(new=[(name, [1, 2, 3], computed, 300 - computed)])).plans) == sent
            assert prefill.finished(one)[0] == sent
        naming.cache_reset()
        one = with_adapter(ad, request_id="d")
        one.kv_transfer_params = {"disagg_spec": SPEC | {"req_id": "d"}}
        prefill.allocated(one)
        assert prefill.build(output(new=[("d", [1, 2, 3], 128, 172)])).plans != []

    def test_decode_asks_by_the_adapter_too(self, ad: Path) -> None:
        # Broken in production: decode loads what prefill computed with another adapter.
        decode = consumer(naming_adapters())
        assert decode.matched(with_adapter(ad), 0) == (300, True)
        decode.allocated(with_adapter(ad), ([1, 2, 3],), 300)
        (plan,) = decode.build(output()).loads
        assert plan.hashes == chunk_hashes(list(range(300)), CHUNK, naming_adapters().name(with_adapter(ad), 300).context)
        assert plan.adapter is not None and plan.adapter.lora_id == 1
        # Its files go between the arrival and the plan: what was announced is given back.
        late = with_adapter(ad, request_id="b")
        decode.arrived(late)
        (ad / "adapter_config.json").unlink()
        assert decode.matched(late, 0) == (0, False)
        decode.allocated(late, ([4, 5, 6],), 0)
        assert decode.build(output()).unneeded == ["b"]


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
    assert Naming(images_by_count=True).name(request(300), 300) == Naming().name(request(300), 300)
    assert Naming().name(one, 300).context.items[0].offset == 3


def test_each_reason_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    # Broken in production: nobody learns why decode computes prompts, or a line for each request fills the disk.
    naming = Naming(last_is_computed=True)

    def refused(one: Any) -> str:
        with pytest.raises(Unnamed) as unnamed:
            naming.name(one, one.num_prompt_tokens)
        return str(unnamed.value)

    embeddings = request(10)
    embeddings.prompt_embeds = object()
    with caplog.at_level(logging.WARNING, "vllm.pd_backend"):
        for _ in range(2):
            assert "this one has no other" in refused(request(1))
            assert "embeddings" in refused(embeddings)
    assert len(caplog.records) == 2
    assert all("computed where it arrived" in record.getMessage() for record in caplog.records)
