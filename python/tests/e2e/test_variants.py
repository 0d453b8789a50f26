"""A pair of servers that computes otherwise than the shared ones: in bfloat16, with a model that torch has compiled.

bfloat16 has ties, so a right answer has to come from the same steps. Asked once more, a prefill server has the prompt in
its prefix cache as far as its blocks are full. Of a prompt with one token more than that, it computes that token and what
follows: as decode does of any prompt that it has loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import harness
import prompts
from answers import assert_right
from conftest import StatusOf, wait_until_nothing_is_left
from harness import BLOCK_TOKENS, Server

#: Of a block of all layers: 8 layers, K and V, four heads of 64 elements of two bytes.
BLOCK_BYTES = BLOCK_TOKENS * 8 * 2 * 4 * 64 * 2


@pytest.fixture(scope="module")
def servers(folder: Path, model: Path) -> Iterator[tuple[Server, Server]]:
    """Prefill and decode, with a daemon each."""
    shared = {"pd_buffer_size": "64MiB", "transfer_channel": "local", "pd_retention_sec": 60}
    receiver = shared | {"pd_peer_host": "127.0.0.1", "pd_peer_init_port": 0, "pd_peer_alloc_port": 0}
    arguments = ("--num-gpu-blocks-override", "64", "--max-model-len", "6144", "--max-num-batched-tokens", "512")
    with ExitStack() as stack:

        def start(half: str, kv: dict[str, object]) -> Server:
            server = Server(f"compiled_{half}", folder, model, kv=kv, args=arguments, eager=False, dtype="bfloat16")
            stack.callback(server.close)
            return server

        both = start("prefill", harness.producer(shared)), start("decode", harness.consumer(receiver))
        for server in both:
            server.wait_ready()
            assert "Warming up model for the compilation" in server.log(), "vLLM has compiled nothing"
        yield both


@pytest.mark.parametrize("full_blocks", [1, 2, 12], ids=["129", "257", "1537"])
def test_the_tokens_of_the_same_steps(servers: tuple[Server, Server], status_of: StatusOf, full_blocks: int) -> None:
    # Broken in production: blocks of another element size are cut at the wrong byte; within a compiled model layers are
    # taken before they are computed, or are never sent.
    prefill, decode = servers
    prompt = prompts.tokens(f"compiled {full_blocks}", full_blocks * BLOCK_TOKENS + 1)
    right = [prefill.complete(prompt, prompts.MAX_TOKENS, cache_salt="by itself") for _ in range(2)][1]
    ready, received = decode.daemon_ready(), status_of(decode).bytes
    spec = {
        "req_id": f"compiled-{full_blocks}",
        "receiver_host": "127.0.0.1",
        "receiver_init_port": [int(ready["init_port"])],
        "receiver_alloc_port": [int(ready["alloc_port"])],
    }
    params = {"kv_transfer_params": {"disagg_spec": spec}}
    assert not (prefill.complete(prompt, 1, **params).get("kv_transfer_params") or {}).get("error")
    answer = decode.complete(prompt, prompts.MAX_TOKENS, **params)
    assert_right([harness.tokens_of(answer)], [harness.tokens_of(right)])
    assert status_of(decode).bytes - received == (full_blocks + 1) * BLOCK_BYTES
    wait_until_nothing_is_left(servers, status_of)
