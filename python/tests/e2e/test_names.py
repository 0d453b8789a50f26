"""Names of chunks: what KV depends on besides tokens changes under running servers, and no answer is of the old.

A pair of a model whose layers all have a window, with LoRA adapters, whose weights are replaced in place. What it has to
answer is what one of its servers answers by itself.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import harness
import prompts
from conftest import TOP, StatusOf, wait_until_nothing_is_left
from free_ports import free_ports
from harness import HttpError, Process, Server

WINDOW = 1024


@dataclass
class Pair:
    """A prefill and a decode server of the same model."""

    prefill: Server
    decode: Server
    folder: Path
    _numbers: Iterator[int]

    @property
    def servers(self) -> tuple[Server, Server]:
        return self.prefill, self.decode

    def by_itself(self, server: Server, prompt: list[int], **more: Any) -> list[int]:
        """What a server answers alone, from blocks that it shares with no other request."""
        salt = f"by itself {next(self._numbers)}"
        return harness.tokens_of(server.complete(prompt, prompts.MAX_TOKENS, cache_salt=salt, **more))

    def prefilled(self, prompt: list[int], **more: Any) -> dict[str, Any]:
        """Computed at prefill; what decode is asked with."""
        ready = self.decode.daemon_ready()
        spec = {
            "req_id": f"names-{next(self._numbers)}",
            "receiver_host": "127.0.0.1",
            "receiver_init_port": [int(ready["init_port"])],
            "receiver_alloc_port": [int(ready["alloc_port"])],
        }
        answer = self.prefill.complete(prompt, 1, kv_transfer_params={"disagg_spec": spec}, **more)
        answered = answer.get("kv_transfer_params") or {}
        assert "error" not in answered, answer
        return {} if "not_sent" in answered else {"kv_transfer_params": {"disagg_spec": spec}}

    def complete(self, prompt: list[int], **more: Any) -> list[int]:
        """Prefill, then decode."""
        asked = self.prefilled(prompt, **more)
        return harness.tokens_of(self.decode.complete(prompt, prompts.MAX_TOKENS, **asked, **more))

    def load_adapter(self, server: Server, path: Path, **more: Any) -> None:
        harness.post_text(server.url + "/v1/load_lora_adapter", {"lora_name": "ad", "lora_path": str(path), **more})

    def unload_adapter(self, server: Server) -> None:
        harness.post_text(server.url + "/v1/unload_lora_adapter", {"lora_name": "ad"})


def make_adapter(folder: Path, seed: int) -> Path:
    """A LoRA of rank 8 for what the tiny model's KV is made of."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "bias": "none"}
    config["target_modules"] = ["k_proj", "v_proj"]
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer, module in itertools.product(range(8), ("k_proj", "v_proj")):
        at = f"base_model.model.model.layers.{layer}.self_attn.{module}."
        tensors[at + "lora_A.weight"] = torch.randn(8, 256, generator=random) / 16
        tensors[at + "lora_B.weight"] = torch.randn(256, 8, generator=random) / 2
    # As tools replace files: by others of the same names.
    (folder / "new").write_text(json.dumps(config))
    (folder / "new").replace(folder / "adapter_config.json")
    save_file(tensors, folder / "new")
    (folder / "new").replace(folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def pair(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    sys.path.append(str(TOP / "examples"))
    from make_tiny_model import make

    models = tmp_path_factory.mktemp("names")
    for name, seed in (("first", 1), ("second", 2)):
        make(models / name, 8, prompts.VOCABULARY, "float32", 16384, seed, window=WINDOW)
    shared = {"pd_buffer_size": "64MiB", "transfer_channel": "local", "pd_retention_sec": 60}
    receiver = shared | {"pd_peer_host": "127.0.0.1", "pd_peer_init_port": 0, "pd_peer_alloc_port": 0}
    arguments = ("--num-gpu-blocks-override", "64", "--max-model-len", "6144", "--max-num-batched-tokens", "512")
    arguments += ("--dtype", "float32", "--enable-lora", "--max-lora-rank", "8")
    env = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    with ExitStack() as stack:
        servers = []
        for half, kv in (("prefill", harness.producer(shared)), ("decode", harness.consumer(receiver))):
            server = Server(f"names_{half}", folder, models / "first", kv=kv, args=arguments, env=env)
            stack.callback(server.close)
            servers.append(server)
        for server in servers:
            server.wait_ready()
        yield Pair(*servers, models, itertools.count())


@pytest.fixture(autouse=True)
def nothing_left(pair: Pair, status_of: StatusOf) -> Iterator[None]:
    yield
    wait_until_nothing_is_left(pair.servers, status_of)


class TestWindow:
    def test_blocks_that_were_skipped_are_nobodys_kv(self, pair: Pair, status_of: StatusOf) -> None:
        # Broken in production: prefill hits its cache, the first blocks of the hit are vLLM's null block, and another
        # prompt that begins alike is answered with what is in that.
        long = prompts.tokens("longer than the window", 1500)
        beginning = [*long[:256], *prompts.tokens("another end", 30)]
        pair.prefill.complete(long, 1)
        sent = [status_of(pair.decode).bytes]
        for prompt in (long, beginning):
            assert pair.complete(prompt) == pair.by_itself(pair.prefill, prompt)
            sent.append(status_of(pair.decode).bytes)
        # The window's blocks of the first, and all of the second.
        assert sent[0] < sent[1] < sent[2]

    @pytest.mark.parametrize("count", [WINDOW - 1, WINDOW, WINDOW + 1, WINDOW + 300])
    def test_prompts_around_the_window(self, pair: Pair, status_of: StatusOf, count: int) -> None:
        # Broken in production: a prompt at the edge of the window is loaded into blocks that decode has left out.
        prompt = prompts.tokens(f"window {count}", count)
        before = status_of(pair.decode).bytes
        assert pair.complete(prompt) == pair.by_itself(pair.prefill, prompt)
        assert status_of(pair.decode).bytes > before

    @pytest.mark.parametrize("option", [(), ("--overlap",)], ids=["in turn", "overlap"])
    def test_the_proxy_asks_decode_for_what_is_not_sent(self, pair: Pair, option: tuple[str, ...]) -> None:
        # Broken in production: the proxy waits for KV that nobody sends, and answers such prompts with an error.
        notify_port, port = free_ports(2)
        ready = pair.decode.daemon_ready()
        decode = f"{pair.decode.url},127.0.0.1,{ready['init_port']},{ready['alloc_port']}"
        command = [sys.executable, str(TOP / "examples" / "proxy.py"), "--port", str(port), "--dialect", "lmcache"]
        command += ["--prefill", pair.prefill.url, "--decode", decode]
        command += ["--notify-port", str(notify_port), "--notify-timeout", "5", *option]
        proxy = Process(command, pair.folder / "proxy.log", dict(os.environ))
        try:
            url = f"http://127.0.0.1:{port}"
            proxy.wait_healthy(url, 60)
            # Decode computes the last token, and this prompt has no other.
            prompt = prompts.tokens(f"through the proxy {option}", 1)
            answer = harness.post(url + "/v1/completions", harness.completion_body(prompt, prompts.MAX_TOKENS))
            assert harness.tokens_of(answer) == pair.by_itself(pair.prefill, prompt)
        finally:
            proxy.close()

    def test_the_log_says_so_once(self, pair: Pair) -> None:
        # Broken in production: nobody learns why decode computes a prompt.
        for server in pair.servers:
            assert server.log().count("this one has no other") == 1


class TestAdapters:
    def test_an_adapter_that_is_loaded_anew_under_its_name(self, pair: Pair, status_of: StatusOf) -> None:
        # Broken in production: the old adapter's KV is used for the new one's requests.
        prompt = prompts.tokens("adapters", 600)
        answers = []
        for seed in (1, 2):
            path = make_adapter(pair.folder / f"adapter {seed}", seed)
            for server in pair.servers:
                pair.load_adapter(server, path)
            before = status_of(pair.decode).bytes
            answers.append(pair.complete(prompt, model="ad"))
            assert answers[-1] == pair.by_itself(pair.decode, prompt, model="ad")
            assert status_of(pair.decode).bytes > before
            for server in pair.servers:
                pair.unload_adapter(server)
        answers.append(pair.complete(prompt))
        assert len({tuple(answer) for answer in answers}) == 3, "the adapters do not show in the tokens"

    def test_an_adapter_whose_files_are_replaced_under_the_servers(self, pair: Pair, status_of: StatusOf) -> None:
        # Broken in production: prefill computes with what it has loaded, decode loads what is on the disk now, and both
        # call it the same.
        prompt = prompts.tokens("replaced adapter", 600)
        path = make_adapter(pair.folder / "replaced", 3)
        pair.load_adapter(pair.prefill, path)
        make_adapter(path, 4)
        pair.load_adapter(pair.decode, path)
        before = status_of(pair.decode).bytes
        asked = {}
        while not asked.get("not_sent"):
            # The scheduler hears of the load with the first step of any request.
            pair.prefill.complete([5, 6, 7], 1, model="ad")
            asked = pair.prefill.complete(prompt, 1, model="ad", kv_transfer_params=spec_of(pair))["kv_transfer_params"]
        assert "have changed since it was loaded" in asked["not_sent"]
        expected = pair.by_itself(pair.decode, prompt, model="ad")
        assert harness.tokens_of(pair.decode.complete(prompt, prompts.MAX_TOKENS, model="ad")) == expected
        assert status_of(pair.decode).bytes == before
        # Loaded in place, it is what decode has.
        pair.load_adapter(pair.prefill, path, load_inplace=True)
        pair.prefill.complete([5, 6, 7], 1, model="ad")
        assert pair.complete(prompts.tokens("in place", 600), model="ad") == pair.by_itself(
            pair.decode, prompts.tokens("in place", 600), model="ad"
        )
        assert status_of(pair.decode).bytes > before
        for server in pair.servers:
            pair.unload_adapter(server)


    def test_an_adapter_that_is_unloaded_under_its_request(self, pair: Pair, status_of: StatusOf) -> None:
        # Broken in production: a request goes on with other weights than it began with, or ends the engine.
        prompt, count = prompts.tokens("unloaded adapter", 600), 200
        path = make_adapter(pair.folder / "unloaded", 5)
        for server in pair.servers:
            pair.load_adapter(server, path)
        expected = harness.tokens_of(pair.decode.complete(prompt, count, model="ad", cache_salt="alone"))
        received = status_of(pair.decode).bytes
        asked = pair.prefilled(prompt, model="ad")
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(pair.decode.complete, prompt, count, model="ad", **asked)
            deadline = time.monotonic() + 60
            while status_of(pair.decode).bytes == received or status_of(pair.decode).requests_active:
                assert time.monotonic() < deadline, "decode has not fetched it"
                time.sleep(0.005)
            for server in pair.servers:
                pair.unload_adapter(server)
            assert harness.tokens_of(answer.result()) == expected
        with pytest.raises(HttpError) as unknown:
            pair.decode.complete(prompt, 1, model="ad")
        assert unknown.value.status == 404


def spec_of(pair: Pair) -> dict[str, Any]:
    ready = pair.decode.daemon_ready()
    return {
        "disagg_spec": {
            "req_id": "names-never-sent",
            "receiver_host": "127.0.0.1",
            "receiver_init_port": [int(ready["init_port"])],
            "receiver_alloc_port": [int(ready["alloc_port"])],
        }
    }


class TestWeights:
    """Last: the servers have other weights from then on."""

    def test_weights_that_are_replaced_in_place(self, pair: Pair, status_of: StatusOf) -> None:
        # Broken in production: after an update of the weights, answers come from the former weights' KV.
        prompt, other = prompts.tokens("weights", 600), prompts.tokens("weights of one side", 600)
        before = pair.complete(prompt)
        assert before == pair.by_itself(pair.decode, prompt)
        pair.complete(other)
        # Prefill alone: decode's KV, and what prefill has sent, is of the former.
        reload(pair.prefill, pair.folder / "second")
        pair.prefill.reset()
        with pytest.raises(HttpError) as failed:
            pair.complete(other)
        assert failed.value.status == 500 and "prefill was given another prompt or has other weights" in pair.decode.log()
        received = status_of(pair.decode).bytes
        reload(pair.decode, pair.folder / "second")
        for server in pair.servers:
            assert server.reset()
        assert status_of(pair.decode).slots_ready == 0
        after = pair.complete(prompt)
        assert after == pair.by_itself(pair.decode, prompt) == pair.by_itself(pair.prefill, prompt) != before
        assert status_of(pair.decode).bytes > received, "servers that have the same weights share nothing"


def reload(server: Server, model: Path) -> None:
    harness.post_text(server.url + "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(model)}})
