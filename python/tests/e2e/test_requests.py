"""Whatever request one vLLM server answers, the pair answers the same, or refuses it as that one does, and keeps nothing of it.
docs/vllm.md has the table.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import harness
import prompts
from answers import MARGIN_MIN
from conftest import Deployment
from harness import HttpError
from router_client import Running, words
from router_processes import ROUTERS, Router, Servers

pytestmark = pytest.mark.usefixtures("nothing_left")

#: One chunk, and less than a step: vLLM's servers on the CPU end where a prompt with a seed takes two.
PROMPT = prompts.tokens("request parameters", 200)
TEXT = words(PROMPT)
LONG = words(prompts.tokens("a long request", 700))
SAMPLED = {"temperature": 1.0, "seed": 11}
CHAT = {"prompt": None, "messages": [{"role": "user", "content": TEXT}]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}

#: Requests whose KV is moved.
MOVED: dict[str, dict[str, Any]] = {
    "greedy": {},
    "token ids": {"prompt": PROMPT},
    "several steps of prefill": {"prompt": LONG},
    "n": {**SAMPLED, "n": 3},
    "temperature, top_p, top_k, min_p": {**SAMPLED, "temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
    "penalties": {"presence_penalty": 1.5, "frequency_penalty": 1.5, "repetition_penalty": 1.3},
    "logit_bias": {"logit_bias": {"7": 100.0}},
    "allowed_token_ids": {"allowed_token_ids": [5, 6, 7, 8]},
    "bad_words": {"bad_words": ["t7", "t8"]},
    "logprobs": {"logprobs": 3},
    "logprob_token_ids": {"logprobs": 1, "logprob_token_ids": [5, 6]},
    "echo": {"echo": True},
    "stop": {"stop": ["t1"]},
    "stop, included": {"stop": ["t1"], "include_stop_str_in_output": True},
    "stop_token_ids": {"stop_token_ids": list(range(3, 200)), "ignore_eos": False},
    "eos": {"ignore_eos": False, "max_tokens": 200},
    "min_tokens": {"ignore_eos": False, "min_tokens": 5, "stop_token_ids": list(range(3, 500))},
    "max_tokens of one": {"max_tokens": 1},
    "max_tokens left out": {"max_tokens": None, "stop": ["t1"]},
    "truncate_prompt_tokens": {"truncate_prompt_tokens": 130},
    "truncate_prompt_tokens, from the right": {"truncate_prompt_tokens": 130, "truncation_side": "right"},
    "truncate_prompt_tokens to what fits": {"truncate_prompt_tokens": -1},
    "structured_outputs": {"structured_outputs": {"regex": "t[5-7]( t[5-7])*"}},
    "return_token_ids": {"return_token_ids": True, "return_tokens_as_token_ids": True, "logprobs": 1},
    "detokenize": {"skip_special_tokens": False, "spaces_between_special_tokens": False},
    "repetition_detection": {"repetition_detection": {"max_pattern_size": 4, "min_count": 2}, "allowed_token_ids": [5]},
    "stream": {"stream": True},
    "stream, with usage": {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    "stream of samples": {**SAMPLED, "n": 2, "stream": True},
    "stream_interval": {"stream": True, "stream_interval": 4},
    "user, session_id, vllm_xargs": {"user": "u", "session_id": "s", "vllm_xargs": {"a": 1}},
    "request_id": {"request_id": "the same each time"},
    "priority": {"priority": 3},
    "chat": CHAT,
    "chat, max_completion_tokens": {**CHAT, "max_tokens": None, "max_completion_tokens": 5},
    "chat, logprobs": {**CHAT, "logprobs": True, "top_logprobs": 2},
    "chat, n": {**CHAT, **SAMPLED, "n": 2},
    "chat, turns": {**CHAT, "messages": [*CHAT["messages"], {"role": "assistant", "content": "t9"}, {"role": "user", "content": "t10"}]},
    "chat, continue_final_message": {
        **CHAT, "messages": [*CHAT["messages"], {"role": "assistant", "content": "t9"}], "add_generation_prompt": False,
        "continue_final_message": True,
    },
    "chat, tools not chosen": {**CHAT, "tools": [TOOL], "tool_choice": "none"},
    "chat, stream with usage": {**CHAT, "stream": True, "stream_options": {"include_usage": True}},
}

#: Requests that decode computes: their prompt is needed, or they have no name.
COMPUTED: dict[str, dict[str, Any]] = {
    "prompt_logprobs": {"prompt_logprobs": 1},
    "echo with logprobs": {"echo": True, "logprobs": 1},
    "echo of a prompt alone": {"echo": True, "max_tokens": 0, "logprobs": 1},
    "beam search": {"use_beam_search": True, "n": 2, "max_tokens": 4},
    "chat, echo": {**CHAT, "echo": True},
    "chat, prompt_logprobs": {**CHAT, "prompt_logprobs": 1},
    "chat, beam search": {**CHAT, "use_beam_search": True, "n": 2, "max_tokens": 4},
}

#: Requests that one server refuses.
REFUSED: dict[str, dict[str, Any]] = {
    "n of none": {"n": 0},
    "negative max_tokens": {"max_tokens": -1},
    "max_tokens of a million": {"max_tokens": 1_000_000},
    "temperature": {"temperature": -1.0},
    "top_p": {"top_p": 7.0},
    "logprobs of all": {"logprobs": 100_000},
    "n without temperature": {"n": 2},
    "min_tokens over max_tokens": {"min_tokens": 50},
    "stream_options of no stream": {"stream_options": {"include_usage": True}},
    "stream of a beam search": {"use_beam_search": True, "n": 2, "stream": True},
    "suffix": {"suffix": "t3"},
    "adapter": {"model": "no such adapter"},
    "prompt_embeds": {"prompt": None, "prompt_embeds": "bm8gdGVuc29y"},
    "no prompt": {"prompt": None},
    "empty prompt": {"prompt": []},
    "token out of range": {"prompt": [3, 100_000]},
    "too long": {"prompt": words([3] * 7000)},
    "no allowed_token_ids": {"allowed_token_ids": []},
    "cache_salt": {"cache_salt": ""},
    "grammar": {"structured_outputs": {"regex": "("}},
    "chat, chat_template": {**CHAT, "chat_template": "{% for m in messages %}{{ m['content'] }} t3{% endfor %}"},
    "chat without messages": {**CHAT, "messages": []},
    "chat, tool_choice without tools": {**CHAT, "tool_choice": "required"},
}


#: One in each dialect.
UNDER_TEST = ("proxy.py, pull", "proxy.py, LMCache's dialect")


@pytest.fixture(scope="module", params=[router for router in ROUTERS if router.name in UNDER_TEST], ids=lambda router: router.name)
def running(request: pytest.FixtureRequest, deployment: Deployment, folder: Path, model: Path) -> Iterator[Running]:
    router: Router = request.param
    sender, receiver = deployment.prefill.daemon_ready(), deployment.decode.daemon_ready()
    servers = Servers(
        deployment.prefill.url, deployment.decode.url, int(sender["rendezvous_port"]), int(receiver["init_port"]),
        int(receiver["alloc_port"]), deployment.notify_port, model, deployment.bootstrap_port,
    )
    process, url = router.start(servers, folder)
    yield Running(router, url)
    process.close()


def asked(url: str, salt: str, more: dict[str, Any]) -> Any:
    """What is answered, without what is true of one request alone; the status of a refusal."""
    body = {"model": harness.MODEL_NAME, "prompt": TEXT, "max_tokens": 12, "temperature": 0.0, "ignore_eos": True, "cache_salt": salt}
    body = {option: value for option, value in (body | more).items() if value is not None}
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    try:
        text = harness.post_text(url + path, body)
    except HttpError as error:
        return error.status
    lines = text.split("\n") if body.get("stream") else [f"data: {text}"]
    pieces = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert pieces, text
    return _merged(pieces) if body.get("stream") else _without_names(pieces[0])


def _without_names(piece: dict[str, Any]) -> dict[str, Any]:
    """Rounded as two servers may round differently."""
    of_one = ("id", "created", "kv_transfer_params", "system_fingerprint")
    kept = {name: value for name, value in piece.items() if name not in of_one}
    if kept.get("usage"):
        kept["usage"] = {name: count for name, count in kept["usage"].items() if name != "prompt_tokens_details"}
    return kept


def _merged(pieces: list[dict[str, Any]]) -> dict[str, Any]:
    """A stream as a whole: how it is cut depends on the moment."""
    said: dict[int, str] = {}
    ends: dict[int, Any] = {}
    usage = None
    for piece in pieces:
        assert "choices" in piece, piece
        for choice in piece["choices"]:
            text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
            said[choice["index"]] = said.get(choice["index"], "") + text
            ends[choice["index"]] = choice.get("finish_reason") or ends.get(choice["index"])
        usage = piece.get("usage") or usage
    return _without_names({"said": said, "ends": ends, "usage": usage})


def differences(one: Any, other: Any, at: str = "") -> list[str]:
    """Where these are not alike. Numbers are within what rounding moves them by."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [found for key in one for found in differences(one[key], other[key], f"{at}/{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [found for key, pair in enumerate(zip(one, other)) for found in differences(*pair, f"{at}/{key}")]
    if isinstance(one, float) and isinstance(other, (int, float)):
        return [] if one == pytest.approx(other, abs=MARGIN_MIN) else [f"{at}: {one}, not {other}"]
    return [] if one == other else [f"{at}: {one!r}, not {other!r}"]


@pytest.fixture(scope="module")
def alone(deployment: Deployment) -> dict[str, Any]:
    """What one server has answered to each, when it was asked first."""
    return {}


def expected(deployment: Deployment, alone: dict[str, Any], name: str, more: dict[str, Any]) -> Any:
    if name not in alone:
        # Without parameters it is a server as any.
        alone[name] = asked(deployment.prefill.url, f"alone {name}", more)
    return alone[name]


@pytest.mark.parametrize("name", MOVED)
def test_a_request_is_answered_as_by_one_server(deployment: Deployment, running: Running, alone: dict[str, Any], name: str) -> None:
    # Broken in production: an option that clients use means something else behind two servers, or its requests are computed twice.
    before = deployment.decode.external_tokens()
    answer, right = asked(running.url, running.salt(), MOVED[name]), expected(deployment, alone, name, MOVED[name])
    assert isinstance(right, dict), right
    if harness.MISPLACED:
        return
    assert differences(answer, right) == []
    assert deployment.decode.external_tokens() > before, "nothing was transferred"


@pytest.mark.parametrize("name", COMPUTED)
def test_a_request_that_decode_computes(deployment: Deployment, running: Running, alone: dict[str, Any], name: str) -> None:
    # Broken in production: what these requests need beside KV is missing in the answer, or they wait for KV that does not come.
    answer, right = asked(running.url, running.salt(), COMPUTED[name]), expected(deployment, alone, name, COMPUTED[name])
    assert isinstance(right, dict) and differences(answer, right) == []


@pytest.mark.parametrize("name", REFUSED)
def test_a_request_is_refused_as_by_one_server(deployment: Deployment, running: Running, alone: dict[str, Any], name: str) -> None:
    # Broken in production: a client's mistake is answered with 200 or with a server's error, or its KV is kept (`nothing_left`).
    answer, right = asked(running.url, running.salt(), REFUSED[name]), expected(deployment, alone, name, REFUSED[name])
    assert isinstance(right, int) and 400 <= right < 500 and answer == right, (answer, right)
