"""Pairs that must not talk, and servers that die: the last tests, for they end the prefill server."""

from __future__ import annotations

import ast
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import harness
import prompts
from conftest import ENGINE, Deployment
from harness import HttpError, Server, runs, until
from pd_backend import Daemon, Status, find_binary
from pd_backend.vllm.layout import EngineLayout

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.mark.parametrize(
    ("number", "field", "ours", "theirs"),
    [
        (0, "model", None, "another/model"),
        (1, "engine.vllm", "0.32.0", "0.33.0"),
        (2, "engine.attention", "CPU_ATTN", "FLASH_ATTN"),
    ],
)
def test_another_engine_is_refused(
    deployment: Deployment, tmp_path: Path, model: Path, number: int, field: str, ours: str | None, theirs: str
) -> None:
    # Broken in production: KV of one model, release or attention backend is read as that of another.
    said = re.search(r"EngineLayout\((.*)engine=(\{.*?\})\)", deployment.prefill.log())
    assert said is not None
    given = dict(pair.split("=") for pair in said.group(1).strip(", ").split(", "))
    numbers = {name: int(value) for name, value in given.items() if name != "model"}
    facts = ast.literal_eval(said.group(2))
    layout = EngineLayout(model=str(model), engine=facts, **numbers).json()
    (layout if field == "model" else layout["engine"])[field.removeprefix("engine.")] = theirs
    file = tmp_path / "layout.json"
    file.write_text(json.dumps(layout))
    arguments = ["--kv-layout", str(file)]
    for key in (f"transfer_channel={ENGINE}", "pd_buffer_size=16MiB", "pd_peer_init_port=0", "pd_peer_alloc_port=0"):
        arguments += ["--set", key]
    with Daemon(find_binary("pd-receiver"), arguments) as receiver:
        spec = deployment.spec(deployment.decode)
        spec["disagg_spec"]["receiver_init_port"] = [receiver.ready.init_port]
        spec["disagg_spec"]["receiver_alloc_port"] = [receiver.ready.alloc_port]
        answer = deployment.prefill.complete(prompts.REFUSED[number], 1, kv_transfer_params=spec)
    error = answer["kv_transfer_params"]["error"]
    assert re.search(rf"layout_mismatch: receiver \S+: {field} is {ours or model} at \S+ and {theirs} at ", error), error


def test_a_prefill_server_that_names_a_receiver_of_another_engine_does_not_start(
    tmp_path: Path, folder: Path, model: Path
) -> None:
    # Broken in production: two servers that cannot work together both report that they serve, and every request fails.
    layout = EngineLayout("another/model", chunk_tokens=256, block_tokens=128, block_bytes=4096, layers=8)
    file = tmp_path / "layout.json"
    file.write_text(json.dumps(layout.json()))
    arguments = ["--kv-layout", str(file)]
    for key in ("transfer_channel=local", "pd_buffer_size=16MiB", "pd_peer_init_port=0", "pd_peer_alloc_port=0"):
        arguments += ["--set", key]
    with Daemon(find_binary("pd-receiver"), arguments) as receiver:
        named = f"127.0.0.1:{receiver.ready.init_port}:{receiver.ready.alloc_port}"
        sets = {"pd_buffer_size": "64MiB", "transfer_channel": "local", "pd_receivers": [named]}
        blocks = ("--num-gpu-blocks-override", "64", "--max-model-len", "6144")
        prefill = Server("misled-prefill", folder, model, kv=harness.producer(sets), args=blocks)
        try:
            with pytest.raises(RuntimeError, match="misled-prefill has ended"):
                prefill.wait_ready()
        finally:
            prefill.close()
    said = rf"layout_mismatch: receiver \S+:{receiver.ready.init_port}/\d+: model is {model} at \S+ and another/model at "
    assert re.search(said, prefill.log()), prefill.log()[-4000:]


def test_a_prefill_server_that_dies_fails_its_requests_or_has_them_computed(
    deployment: Deployment, status_of: Callable[[Server], Status]
) -> None:
    # Broken in production: decode waits for a prefill server that has gone, and its slots are lost.
    outcomes: dict[str, object] = {}
    threads = []
    for number, decode in enumerate((deployment.decode, deployment.small_decode)):
        prompt, spec = prompts.KILLED_PREFILL[number], deployment.spec(decode)

        def ask(decode: Server = decode, prompt: list[int] = prompt, spec: dict[str, object] = spec) -> None:
            try:
                answer = decode.complete(prompt, prompts.MAX_TOKENS, kv_transfer_params=spec)
                outcomes[decode.name] = harness.tokens_of(answer)
            except HttpError as error:
                outcomes[decode.name] = error.status

        def prefill(prompt: list[int] = prompt, spec: dict[str, object] = spec) -> None:
            try:
                deployment.prefill.complete(prompt, 1, kv_transfer_params=spec)
            except OSError:
                pass

        threads += [threading.Thread(target=ask), threading.Thread(target=prefill)]
    for thread in threads:
        thread.start()
    # Both are under way, and nothing of them has been committed.
    until(lambda: status_of(deployment.prefill).requests_active == 2, "prefill has not begun")
    (sender,) = deployment.prefill.kill_engine()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert outcomes == {
        deployment.decode.name: 500, deployment.small_decode.name: deployment.expected(prompts.KILLED_PREFILL[1])
    }
    until(lambda: not runs(sender), "pd-sender has outlived its engine")
