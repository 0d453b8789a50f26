#!/usr/bin/env python3
"""Time to the first token of a conversation's fifth turn, with and without the KV that decode has of the turns before.

    make bench-turns [BENCH='--conversations 20 --json turns.json']

Two pairs of servers with `kv_role: kv_both` hold the same conversations by turns. One pair asks for the turn before
(`kv_recompute_threshold` at its default), the other never does (0). Each conversation is held twice: in the first,
prefill has its own KV of the turn before and lacks decode's answer and the new question; in the second, prefill's
cache was emptied before the fifth turn, as when a router sends the turn to another prefill server.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOP = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(TOP / "python"), str(TOP / "examples"), str(Path(__file__).resolve().parent)]

import harness
from bench import NIXL_ASKS, VOCABULARY
from harness import Server, post
from make_tiny_model import make

TURNS = 5
#: Tokens of the first prompt, of each answer, and of each question after it.
FIRST, ANSWER, QUESTION = 512, 256, 64
#: Of a prompt of the last turn.
LONGEST = FIRST + TURNS * (ANSWER + QUESTION)


def drawn(dice: random.Random, count: int) -> list[int]:
    """So many tokens."""
    return [dice.randrange(3, VOCABULARY) for _ in range(count)]


@dataclass
class Pair:
    """Two servers, and the times in seconds of prefill's and decode's part, with prefill's cache kept and emptied."""

    name: str
    prefill: Server
    decode: Server
    asks: bool
    times: dict[bool, list[tuple[float, float]]] = field(default_factory=lambda: {False: [], True: []})

    def turn(self, history: Sequence[int], tokens: int, **more: Any) -> tuple[float, float]:
        """One turn, with an answer of so many tokens: how long prefill and decode took."""
        began = time.perf_counter()
        answer = self.prefill.complete(history, 1, kv_transfer_params=NIXL_ASKS)
        prefilled = time.perf_counter()
        self.decode.complete(history, tokens, kv_transfer_params=answer["kv_transfer_params"], **more)
        return prefilled - began, time.perf_counter() - prefilled

    def converse(self, dice: random.Random, emptied: bool) -> tuple[float, float]:
        """The parts of the fifth turn."""
        history = drawn(dice, FIRST)
        for turn in range(TURNS - 1):
            before = self._kept()
            self.turn(history, ANSWER, allowed_token_ids=[100 + turn])
            if self.asks:
                harness.until(lambda: self._kept() > before, f"{self.decode.name} keeps nothing")
            history += [100 + turn] * ANSWER + drawn(dice, QUESTION)
        if emptied:
            post(f"{self.prefill.url}/reset_prefix_cache", {})
        return self.turn(history, 1)

    def _kept(self) -> float:
        return harness.metric(self.decode.daemon_ready()["metrics"], "pd_requests_parked_total")


def start(stack: ExitStack, folder: Path, model: Path, name: str, threshold: int | None) -> Pair:
    def server(part: str) -> Server:
        option = {} if threshold is None else {"kv_recompute_threshold": threshold}
        kv = harness.both({"pd_buffer_size": "512MiB", "transfer_channel": "local"}, **option)
        args = ("--num-gpu-blocks-override", "128", "--max-model-len", str(-(-LONGEST // 128) * 128 + 128))
        env = {"VLLM_SERVER_DEV_MODE": "1"}
        started = Server(f"{name}-{part}", folder, model, kv=kv, args=args, env=env, dtype="bfloat16")
        stack.callback(started.close)
        return started

    return Pair(name, server("prefill"), server("decode"), asks=threshold is None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=12)
    parser.add_argument("--json", type=Path, help="where the numbers go as well")
    given = parser.parse_args()
    dice = random.Random(os.urandom(8))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pd-bench-turns-")))
        model = folder / "tiny"
        make(model, layers=8, vocabulary=VOCABULARY, dtype="bfloat16", max_tokens=16384, seed=1)
        pairs = [start(stack, folder, model, "asked", None), start(stack, folder, model, "computed", 0)]
        for pair in pairs:
            pair.prefill.wait_ready(600)
            pair.decode.wait_ready(600)
        for number in range(given.conversations + 1):
            for emptied in (False, True):
                for pair in dice.sample(pairs, len(pairs)):
                    times = pair.converse(dice, emptied)
                    if number > 0:  # The first one shakes hands and warms up.
                        pair.times[emptied].append(times)
            print(f"conversation {number + 1} of {given.conversations + 1}", file=sys.stderr, flush=True)
    result: dict[str, Any] = {}
    for emptied in (False, True):
        case = "prefill's cache is empty" if emptied else "prefill has its own turn before"
        medians = []
        for pair in pairs:
            prefill, decode = ([1000 * part for part in parts] for parts in zip(*pair.times[emptied]))
            whole = [first + second for first, second in zip(prefill, decode)]
            medians.append(statistics.median(whole))
            print(
                f"{case}; {pair.name}: first token of turn {TURNS} after {medians[-1]:.1f} ms (median of {len(whole)}, "
                f"{min(whole):.1f} to {max(whole):.1f}), prefill's part {statistics.median(prefill):.1f}, "
                f"decode's {statistics.median(decode):.1f}"
            )
        print(f"{case}; asked / computed: {medians[0] / medians[1]:.2f}")
        result[case] = {"asked_ms": medians[0], "computed_ms": medians[1], "ratio": medians[0] / medians[1]}
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
