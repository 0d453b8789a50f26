"""Pairs that must not talk, and servers that die: the last tests, for they end the prefill server."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import harness
import prompts
from conftest import Deployment
from harness import HttpError, Server
from pd_backend import Daemon, Status, find_binary

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("model", "another/model", "the layouts differ in model: {model} here, another/model at the peer"),
        ("vllm", "0.33.0", "the layouts differ in engine.vllm: 0.32.0 here, 0.33.0 at the peer"),
        ("attention", "FLASH_ATTN", "the layouts differ in engine.attention: CPU_ATTN here, FLASH_ATTN at the peer"),
    ],
)
def test_another_engine_is_refused(
    deployment: Deployment, tmp_path: Path, model: Path, field: str, value: str, text: str
) -> None:
    # Broken in production: KV of one model, release or attention backend is read as that of another.
    import json
    import re

    said = re.search(r"EngineLayout\(.*engine=\{.*?\}\)", deployment.prefill.log())
    assert said is not None
    from pd_backend.vllm.layout import EngineLayout

    layout = eval(said.group(0), {"EngineLayout": EngineLayout}).json()
    (layout if field == "model" else layout["engine"])[field] = value
    file = tmp_path / "layout.json"
    file.write_text(json.dumps(layout))
    arguments = ["--kv-layout", str(file)]
    for key in ("transfer_channel=local", "pd_buffer_size=16MiB", "pd_peer_init_port=0", "pd_peer_alloc_port=0"):
        arguments += ["--set", key]
    with Daemon(find_binary("pd-receiver"), arguments) as receiver:
        spec = deployment.spec(deployment.decode)
        spec["disagg_spec"]["receiver_init_port"] = [receiver.ready.init_port]
        spec["disagg_spec"]["receiver_alloc_port"] = [receiver.ready.alloc_port]
        answer = deployment.prefill.complete(prompts.BY_LENGTH[1500], 1, kv_transfer_params=spec)
    assert text.format(model=model) in answer["kv_transfer_params"]["error"]


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
    deadline = time.monotonic() + 60
    # Both are under way, and nothing of them has been committed.
    while status_of(deployment.prefill).requests_active < 2:
        assert time.monotonic() < deadline, "prefill has not begun"
        time.sleep(0.01)
    sender = int(deployment.prefill.daemon_ready()["pid"])
    for pid in reversed(descendants(deployment.prefill.pid)):
        if pid != sender:
            os.kill(pid, signal.SIGKILL)
    deployment.prefill.kill()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert outcomes == {
        deployment.decode.name: 500, deployment.small_decode.name: deployment.expected(prompts.KILLED_PREFILL[1])
    }
    while Path(f"/proc/{sender}").exists() and "\nState:\tZ" not in Path(f"/proc/{sender}/status").read_text():
        assert time.monotonic() < deadline + 30, "pd-sender has outlived its engine"
        time.sleep(0.05)


def descendants(pid: int) -> list[int]:
    """Processes that this one has started, and those that they have."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *descendants(int(child))]
    return found
