"""A client of a router. Its prompts and answers are words, tN for token N, because some routers hand nothing else on."""

from __future__ import annotations

import http.client
import itertools
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import harness
import prompts
from harness import HttpError, Server, until
from router_processes import Router


_numbers = itertools.count()


class NoAnswer(Exception):
    """What came was an error, or broke off."""


def words(tokens: list[int]) -> str:
    return " ".join(f"t{token}" for token in tokens)


def tokens_in(text: str) -> list[int]:
    return [int(word) for word in re.findall(r"t(\d+)", text)]


@dataclass
class Running:
    """A router that serves."""

    router: Router
    url: str

    def salt(self, more: str = "") -> str:
        """Of a request whose KV no other one has; it also says what prefill is to answer."""
        return f"{self.router.mode} {self.router.name} {next(_numbers)} {more}"

    def body(self, prompt: list[int], **more: Any) -> dict[str, Any]:
        body = {"model": harness.MODEL_NAME, "prompt": words(prompt), "max_tokens": prompts.MAX_TOKENS}
        return body | {"temperature": 0.0, "ignore_eos": True, "cache_salt": self.salt()} | more

    def ask(self, prompt: list[int], **more: Any) -> list[int]:
        """The answer to a completion."""
        (answer,) = self.answers("/v1/completions", self.body(prompt, **more))
        return answer

    def answers(self, path: str, body: dict[str, Any]) -> list[list[int]]:
        """Those to all prompts and samples of a request, whether they come whole or in pieces. Raises `NoAnswer`."""
        try:
            return answers_in(harness.post_text(self.url + path, body))
        except (HttpError, OSError, http.client.HTTPException, ValueError, LookupError) as error:
            raise NoAnswer(str(error)) from error


def answers_in(text: str) -> list[list[int]]:
    """By prompt and sample. Raises `ValueError` where there is none."""
    lines = text.split("\n") if text.startswith("data:") else [f"data: {text}"]
    said: defaultdict[int, str] = defaultdict(str)
    for line in lines:
        if line.startswith("data: {"):
            for choice in json.loads(line[6:])["choices"]:
                message = choice.get("message") or choice.get("delta") or {}
                said[choice["index"]] += choice.get("text") or message.get("content") or ""
    if not said:
        raise ValueError(text)
    return [tokens_in(said[index]) for index in sorted(said)]


@contextmanager
def transferred(decode: Server, *asked: list[int]) -> Iterator[None]:
    """What runs in it has these prompts transferred, as vLLM counts it; of each it computes a token in any case."""
    before, expected = decode.external_tokens(), sum(map(len, asked)) - len(asked)
    yield
    until(lambda: decode.external_tokens() - before >= expected, f"not {expected} tokens came from prefill", 10)
