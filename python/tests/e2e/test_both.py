"""Servers with `kv_role: kv_both`: which part one of them plays is said by each request."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import byte_tokenizer
import harness
import prompts
from answers import assert_right, right_answer
from conftest import ENGINE, TOP, Deployment, wait_until_nothing_is_left
from harness import HttpError, Server, hang_up, until
from pd_backend import Status
from router_processes import ROUTERS, Servers
from test_parked import ASKED

#: vLLM's own tests and proxy, as scripts/setup-routers leaves them.
NIXL_TESTS = next((TOP / ".deps" / "routers").glob("vllm-*/tests/v1/kv_connector/nixl_integration"), None)

_names = itertools.count()


@dataclass
class Both:
    """Two servers that do both."""

    one: Server
    other: Server


@pytest.fixture(scope="module")
def both(deployment: Deployment, folder: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    tokenizer = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer.write(tokenizer, prompts.VOCABULARY)

    def server(name: str) -> Server:
        # As vLLM's own scripts call it. Half of a buffer is for each direction.
        kv = harness.both(
            {"pd_buffer_size": "256MiB", "transfer_channel": ENGINE, "pd_retention_sec": 60},
            policy="recompute", kv_lease_duration=5, receive_wait_s=60, bidirectional_kv_xfer=True,
            **({} if harness.MISPLACED else {"name": "NixlConnector"}),
        )
        args = ("--num-gpu-blocks-override", "64", "--max-model-len", "6144", "--tokenizer", str(tokenizer))
        return Server(name, folder, model, kv=kv, args=args, env={"VLLM_SERVER_DEV_MODE": "1"}, tokenizer=True)

    two = Both(server("one"), server("other"))
    try:
        two.one.wait_ready()
        two.other.wait_ready()
        yield two
    finally:
        two.one.close()
        two.other.close()


@pytest.fixture(autouse=True)
def nothing_left(deployment: Deployment, both: Both, status_of: Callable[..., Status]) -> Iterator[None]:
    """After the test, soon, no daemon holds anything for anybody."""
    yield
    servers = (both.one, both.other, deployment.prefill, deployment.decode)
    wait_until_nothing_is_left(servers, status_of)
    until(lambda: not any(status_of(server).slots_parked for server in servers), "chunks are parked for nobody")


def across(prefill: Server, decode: Server, prompt: list[int], **more: Any) -> list[int]:
    """As routers of NIXL's dialect ask."""
    answer = prefill.complete(prompt, 1, kv_transfer_params=dict(ASKED), **more)
    params = answer["kv_transfer_params"]
    return harness.tokens_of(decode.complete(prompt, prompts.MAX_TOKENS, kv_transfer_params=params, **more))


def named(prefill: Server, decode: Server, prompt: list[int], **more: Any) -> list[int]:
    """As LMCache's routers ask, and ours, which send both servers the same."""
    ready = decode.daemon_ready()
    spec = {
        "req_id": f"both-{next(_names)}",
        "receiver_host": "127.0.0.1",
        "receiver_init_port": [int(ready["init_port"])],
        "receiver_alloc_port": [int(ready["alloc_port"])],
    }
    answer = prefill.complete(prompt, 1, kv_transfer_params={"disagg_spec": spec}, **more)
    assert not (answer.get("kv_transfer_params") or {}).get("error"), answer
    return harness.tokens_of(decode.complete(prompt, prompts.MAX_TOKENS, kv_transfer_params={"disagg_spec": spec}, **more))


def moves(
    deployment: Deployment, prefill: Server, decode: Server, prompt: list[int], salt: str, ask: Callable[..., list[int]] = across
) -> None:
    """The right answer, of which decode has computed no more than vLLM does in any case: a prompt's last token."""
    before = decode.external_tokens()
    assert_right([ask(prefill, decode, prompt, cache_salt=salt)], [deployment.expected(prompt)])
    assert decode.external_tokens() - before >= len(prompt) - 1, f"{prefill.name} to {decode.name}: nothing was transferred"


@pytest.mark.parametrize("count", [1, 128, 257, 700, 3000])
def test_prompts_go_either_way(deployment: Deployment, both: Both, count: int) -> None:
    # Broken in production: a server of kv_both does not start, or serves one direction.
    prompt = prompts.BY_LENGTH[count]
    moves(deployment, both.one, both.other, prompt, f"there {count}")
    moves(deployment, both.other, both.one, prompt, f"back {count}")


def test_both_directions_at_once(deployment: Deployment, both: Both) -> None:
    # Broken in production: one direction takes the other's chunks, answers or slots.
    before = [server.external_tokens() for server in (both.one, both.other)]
    ways = [(both.one, both.other, "there"), (both.other, both.one, "back")] * 4
    asked = [(way, ask, prompt) for ask in (across, named) for way, prompt in zip(ways, prompts.CONCURRENT)]

    def complete(request: Any) -> list[int]:
        (prefill, decode, salt), ask, prompt = request
        return ask(prefill, decode, prompt, cache_salt=f"{salt} {ask.__name__}")

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(complete, asked))
    assert_right(answers, [deployment.expected(prompt) for *_, prompt in asked])
    for server, tokens in zip((both.one, both.other), before):
        expected = sum(len(prompt) - 1 for (_, decode, _), _, prompt in asked if decode is server)
        assert server.external_tokens() - tokens >= expected, f"nothing was transferred to {server.name}"


@pytest.mark.parametrize("ask", [across, named])
def test_servers_of_one_part_work_with_one_of_both(deployment: Deployment, both: Both, ask: Callable[..., list[int]]) -> None:
    # Broken in production: a fleet of prefill and decode servers cannot be changed to kv_both one server at a time.
    for number, prompt in enumerate(prompts.CONCURRENT[2:5]):
        salt = f"mixed {ask.__name__} {number}"
        moves(deployment, deployment.prefill, both.one, prompt, f"{salt} to both", ask)
        moves(deployment, both.one, deployment.decode, prompt, f"{salt} from both", ask)


def test_exchanged_chunks_show_in_the_tokens(deployment: Deployment, both: Both) -> None:
    # Broken in production: the tests here, which would not notice chunks that arrive at each other's place.
    for prompt in prompts.OF_TWO_CHUNKS[:6]:
        more = {"cache_salt": "both, exchanged"}
        params = both.one.complete(prompt, 1, kv_transfer_params=dict(ASKED), **more)["kv_transfer_params"]
        answer = deployment.decode.complete(prompt, prompts.MAX_TOKENS, kv_transfer_params=params, **more)
        after = deployment.decode.complete(prompts.next_of(prompt), prompts.MAX_TOKENS, **more)
        right = [deployment.expected(prompt), deployment.expected(prompts.next_of(prompt))]
        assert [harness.tokens_of(answer), harness.tokens_of(after)] != right, f"nothing shows it for {len(prompt)} tokens"


def test_requests_that_say_nothing_are_computed(deployment: Deployment, both: Both) -> None:
    # Broken in production: a server of kv_both answers no requests of its own.
    prompt = prompts.CONCURRENT[6]
    for params in ({}, {"kv_transfer_params": {}}, {"kv_transfer_params": {"disagg_spec": "garbage"}}):
        answer = both.one.complete(prompt, prompts.MAX_TOKENS, cache_salt=f"plain {params}", **params)
        assert harness.tokens_of(answer) == deployment.expected(prompt)


def test_one_server_for_both_parts(deployment: Deployment, both: Both, status_of: Callable[..., Status]) -> None:
    # Broken in production: a router picks the same server twice, which asks itself for chunks and waits.
    for prompt in prompts.CONCURRENT[1:4]:
        answer = across(both.one, both.one, prompt, cache_salt="itself")
        # Most of it is in vLLM's own cache, so that nothing that was sent shows.
        assert answer == deployment.expected(prompt) or harness.MISPLACED
        until(lambda: status_of(both.one).slots_parked == 0, "what it has parked for itself is kept", timeout_s=4)


def test_a_reset_of_a_server_of_both_parts(deployment: Deployment, both: Both) -> None:
    # Broken in production: after new weights a server goes on with KV of the former ones in one direction.
    prompt = prompts.CONCURRENT[5]
    moves(deployment, both.one, both.other, prompt, "reset")
    moves(deployment, both.other, both.one, prompt, "reset back")
    assert both.one.reset() and both.other.reset()
    moves(deployment, both.one, both.other, prompt, "reset")
    moves(deployment, both.other, both.one, prompt, "reset back")


def test_clients_that_leave_and_requests_that_are_refused(
    deployment: Deployment, both: Both, status_of: Callable[..., Status]
) -> None:
    # Broken in production: each of them costs slots of the half that nobody looks after.
    prompt = prompts.BY_LENGTH[3000]
    body = harness.completion_body(prompt, 1, kv_transfer_params=dict(ASKED), cache_salt="leaves")
    hang_up(both.one.url, body, lambda: status_of(both.one).requests_active > 0)
    params = both.one.complete(prompt, 1, kv_transfer_params=dict(ASKED), cache_salt="refused")["kv_transfer_params"]
    with pytest.raises(HttpError) as refused:
        both.other.complete(prompt, 1_000_000, kv_transfer_params=params, cache_salt="refused")
    assert refused.value.status == 400
    until(lambda: status_of(both.one).slots_parked == 0, "it is kept", timeout_s=20)
    moves(deployment, both.one, both.other, prompts.CONCURRENT[7], "after those")
    moves(deployment, both.other, both.one, prompts.CONCURRENT[7], "after those, back")


def test_a_daemon_of_both_parts_that_dies(deployment: Deployment, both: Both) -> None:
    # Broken in production: after a restart of its daemon a server serves one direction, or none.
    prompt = prompts.CONCURRENT[5]
    asked = both.one.complete(prompt, 1, kv_transfer_params=dict(ASKED), cache_salt="dies")["kv_transfer_params"]
    pid = int(both.one.daemon_ready()["pid"])
    os.kill(pid, signal.SIGKILL)
    answer = both.other.complete(prompt, prompts.MAX_TOKENS, kv_transfer_params=asked, cache_salt="dies")
    assert_right([harness.tokens_of(answer)], [deployment.expected(prompt)])
    until(lambda: int(both.one.daemon_ready()["pid"]) != pid, "it is not started again")
    moves(deployment, both.one, both.other, prompt, "came again")
    moves(deployment, both.other, both.one, prompt, "came again, back")


@contextmanager
def kept(server: Server) -> Iterator[None]:
    """Returns once the server has kept what it was asked to decode: the client has its answer before that."""

    def count() -> float:
        return harness.metric(server.daemon_ready()["metrics"], "pd_requests_parked_total")

    before = count()
    yield
    until(lambda: count() > before, f"{server.name} keeps nothing")


def conversation(both: Both, history: list[int], salt: str, answer: int, **more: Any) -> dict[str, Any]:
    """One turn: an answer of so many tokens, which are known beforehand, for no rounding may change what comes next."""
    params = both.one.complete(history, 1, kv_transfer_params=dict(ASKED) | more, cache_salt=salt)["kv_transfer_params"]
    forced = {"allowed_token_ids": [answer], "cache_salt": salt, "kv_transfer_params": params}
    with kept(both.other):
        return both.other.complete(history, ANSWER_TOKENS, **forced)


ANSWER_TOKENS, QUESTION_TOKENS, TURNS = 300, 40, 10


def test_ten_turns_of_a_conversation(deployment: Deployment, both: Both) -> None:
    # Broken in production: prefill computes in each turn what decode has answered in the turn before.
    history, salt = prompts.tokens("conversation 0", 600), "conversation"
    plain = {"cache_salt": "by itself"}
    for turn in range(TURNS):
        before = both.one.computed_tokens()
        answer = harness.tokens_of(conversation(both, history, salt, answer=100 + turn))
        assert answer == [100 + turn] * ANSWER_TOKENS
        computed = both.one.computed_tokens() - before
        if turn > 0:
            assert computed <= QUESTION_TOKENS + prompts.CHUNK_TOKENS, f"turn {turn}: {computed} tokens are prefilled"
        if turn in (1, TURNS - 1):
            # What is loaded of the turns before is right.
            expected = right_answer(both.other, history, prompts.MAX_TOKENS, **plain)
            with kept(both.other):
                assert_right([across(both.one, both.other, history, cache_salt=salt)], [expected])
        history = [*history, *answer, *prompts.tokens(f"question {turn}", QUESTION_TOKENS)]
    # Whoever changes what was said has all of it computed from there on.
    edited = [*history[:700], history[700] ^ 1, *history[701:]]
    before = both.one.computed_tokens()
    expected = right_answer(both.other, edited, prompts.MAX_TOKENS, **plain)
    assert_right([across(both.one, both.other, edited, cache_salt=salt)], [expected])
    assert both.one.computed_tokens() - before >= len(edited) - 768


def test_a_turn_whose_router_says_where_the_one_before_was(both: Both) -> None:
    # Broken in production: vLLM's multi-turn proxy sends prefill to decode, and prefill computes everything.
    history, salt = prompts.tokens("conversation 1", 600), "multi-turn"
    answer = conversation(both, history, salt, 77)
    said = answer["kv_transfer_params"]
    assert said["remote_port"] == int(both.other.daemon_ready()["rendezvous_port"])
    assert said["remote_num_tokens"] == (600 + ANSWER_TOKENS - 1) // prompts.CHUNK_TOKENS * prompts.CHUNK_TOKENS
    history = [*history, *harness.tokens_of(answer), *prompts.tokens("question", QUESTION_TOKENS)]
    before = both.one.computed_tokens()
    conversation(both, history, salt, 78, **(said | {"do_remote_decode": True, "do_remote_prefill": False}))
    assert both.one.computed_tokens() - before <= QUESTION_TOKENS + prompts.CHUNK_TOKENS


needs_vllms_tests = pytest.mark.skipif(
    NIXL_TESTS is None or harness.MISPLACED,
    reason="vLLM's own tests are not there: run scripts/setup-routers; with PD_E2E_MISPLACE they are wrong by intent",
)


@pytest.fixture
def router(request: pytest.FixtureRequest, both: Both, folder: Path, model: Path) -> Iterator[str]:
    """The URL of one of vLLM's own, in front of the two."""
    (kind,) = (kind for kind in ROUTERS if kind.name == request.param)
    process, url = kind.start(Servers(both.one.url, both.other.url, 0, 0, 0, 0, model), folder)
    yield url
    process.close()


behind_toy_proxy = pytest.mark.parametrize("router", ["toy proxy"], indirect=True)


@needs_vllms_tests
@pytest.mark.parametrize("router", ["multi-turn proxy"], indirect=True)
def test_a_conversation_through_vllms_multi_turn_proxy(both: Both, router: str) -> None:
    # Broken in production: under the router that vLLM has for conversations prefill computes all of each turn.
    history = prompts.tokens("conversation 2", 600)
    for turn in range(3):
        before = both.one.computed_tokens()
        more = {"allowed_token_ids": [90 + turn], "cache_salt": "multi-turn proxy", "conversation_id": "one"}
        with kept(both.other):
            harness.post(router + "/v1/completions", harness.completion_body(history, ANSWER_TOKENS, **more))
        if turn > 0:
            assert both.one.computed_tokens() - before <= QUESTION_TOKENS + prompts.CHUNK_TOKENS
        history = [*history, *[90 + turn] * ANSWER_TOKENS, *prompts.tokens(f"asked {turn}", QUESTION_TOKENS)]


def passes(command: list[str], **env: str) -> None:
    """One of vLLM's own tests."""
    ended = subprocess.run(
        command, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stdout[-4000:]


@needs_vllms_tests
@behind_toy_proxy
def test_vllms_edge_cases(both: Both, router: str) -> None:
    # Broken in production: what vLLM's own connector promises of short, cached and half cached prompts does not hold.
    assert both.one.reset() and both.other.reset()
    before = both.other.external_tokens()
    ports = {"PREFILL_PORT": str(both.one.port), "DECODE_PORT": str(both.other.port), "PROXY_PORT": router.rsplit(":", 1)[1]}
    hosts = {f"{name}_HOST": "127.0.0.1" for name in ("PREFILL", "DECODE", "PROXY")}
    passes([sys.executable, "-m", "pytest", "-q", str(NIXL_TESTS / "test_edge_cases.py")], **ports, **hosts)
    # Of 11, 178 and 307 bytes. Decode has a block of the second one, and of the third, which begins with that.
    expected = (11 - 1) + (178 - harness.BLOCK_TOKENS - 1) + (307 - harness.BLOCK_TOKENS - 1)
    assert both.other.external_tokens() - before >= expected, "vLLM's test passes, and nothing was transferred"


@needs_vllms_tests
@behind_toy_proxy
def test_vllms_accuracy(both: Both, router: str, tmp_path: Path) -> None:
    # Broken in production: completions or chats are answered otherwise than by one server.
    test = [sys.executable, str(NIXL_TESTS / "test_disagg_accuracy.py"), "--model_name", harness.MODEL_NAME]
    test += ["--file_name", str(tmp_path / "answers.json")]
    passes([*test, "--service_url", both.one.url, "--mode", "baseline"])
    assert both.one.reset() and both.other.reset()
    before = both.other.external_tokens()
    passes([*test, "--service_url", router, "--mode", "disagg"])
    # A completion of 307 bytes, and a chat.
    assert both.other.external_tokens() - before >= 2 * 307 - 2, "vLLM's test passes, and nothing was transferred"
