"""What vLLM's `/metrics` show of transfers: observed by workers, merged over ranks and steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from pd_backend.errors import PdError
from pd_backend.vllm.observations import DaemonFigures, Observations, empty, merge
from pd_backend.vllm.step import ChunkBlocks, ProducerStep
from vllm_pair import Pair, load, pair
from waiting import eventually


def test_a_transfer_is_seen_at_both_ends(pair: Callable[..., Pair]) -> None:
    # Broken in production: an operator sees neither that KV moves nor how long it takes.
    seen = Observations(0)
    both = pair(observations=seen)
    tokens = list(range(37))
    chunks = [ChunkBlocks("a", 0, [3, 1]), ChunkBlocks("a", 1, [7, 0]), ChunkBlocks("a", 2, [5])]
    both.produce(ProducerStep(plans=[both.plan("a", tokens)], chunks=chunks, finishing=["a"]))
    assert both.ended("a") is None
    both.consume(load("a", tokens, [9, 2, 4, 11, 6]), "a")
    sent = seen.take()
    assert sent is not None and seen.take() is None
    assert (sent["requests"], sent["tokens"], sent["failures"]) == ({"sent": 1}, {"sent": 37}, {})
    assert {phase: len(seconds) for phase, seconds in sent["seconds"].items()} == {"alloc": 1, "transfer": 1, "commit": 1}
    received = both.consumer._observations.take()
    assert received is not None
    # Five blocks of four layers, of 64 bytes each.
    assert (received["tokens"], received["bytes"]) == ({"received": 37}, {"received": 5 * 4 * 64})
    assert received["seconds"].keys() == {"wait", "load"}
    # What the daemon counts.
    figures = DaemonFigures(seen)

    def data() -> Any:
        figures.look(both.sender.client(), both.sender.metrics_port)
        return seen.take()

    daemon = eventually(data, 0.001)
    assert daemon["bytes"] == {"sent": 5 * 4 * 64}
    assert daemon["daemons"]["0"]["up"] == 1 and daemon["daemons"]["0"]["slots"]["available"] == 8
    assert daemon["daemons"]["0"]["metrics_port"] == both.sender.metrics_port is not None
    figures.look(None, None)
    assert (seen.take() or {})["daemons"] == {"0": {"up": 0}}
    figures.look(None, None)
    assert seen.take() is None, "it is no news twice"


def test_failures_are_counted_by_kind(pair: Callable[..., Pair]) -> None:
    # Broken in production: requests fail for want of slots, and nothing but the log says so.
    seen = Observations(0)
    both = pair(receiver_slots=2, slot_wait_s=0.2, observations=seen)
    both.produce(ProducerStep(plans=[both.plan("big", list(range(16 * 5)))]))
    assert both.ended("big") is not None
    data = seen.take()
    assert data is not None and data["failures"] == {"sent too_large": 1} and not data["tokens"]


def test_ranks_are_merged() -> None:
    # Broken in production: two ranks of one server show twice the tokens, or one of them hides the other's daemon.
    total, ranks = empty(), [Observations(0), Observations(1)]
    for rank, seen in enumerate(ranks):
        seen.moved("received", 700, 100)
        seen.took("load", 0.5 + rank)
        seen.failed("received", PdError("deadline", "late") if rank else ValueError("another length"))
        seen.daemon({"up": 1})
        # It goes through vLLM's messages.
        merge(total, json.loads(json.dumps(seen.take())))
    assert total == {
        "tokens": {"received": 700},
        "bytes": {"received": 200},
        "requests": {"received": 1},
        "failures": {"received load": 1, "received deadline": 1},
        "seconds": {"load": [0.5, 1.5]},
        "daemons": {"0": {"up": 1}, "1": {"up": 1}},
    }


class TestWithPrometheus:
    """The real classes of vLLM and Prometheus, where they are."""

    def test_they_are_shown_with_vllms_labels(self) -> None:
        # Broken in production: the server's /metrics fail, or say nothing of the transfer.
        client = pytest.importorskip("prometheus_client", reason="no prometheus_client: run scripts/setup-e2e")
        pytest.importorskip("vllm", reason="no vLLM: run scripts/setup-e2e")
        from pd_backend.vllm.metrics import PdPromMetrics, PdStats

        config = type("Config", (), {"kv_transfer_config": None})()
        types = {getattr(client, name): getattr(client, name) for name in ("Counter", "Gauge", "Histogram")}
        shown = PdPromMetrics(config, types, ["model_name", "engine"], {0: ["tiny", "0"], 1: ["tiny", "1"]})
        seen = Observations(0)
        seen.moved("sent", 700, 1000)
        seen.took("alloc", 0.003)
        seen.failed("received", "no_slots: receiver is full")
        seen.daemon({"up": 1, "metrics_port": 9400, "waiting": 3, "slots": {"reserved": 2}})
        stats = PdStats(seen.take())
        assert not stats.is_empty() and PdStats().is_empty()
        assert stats.reduce() == {
            "requests sent": 1, "tokens sent": 700, "MiB sent": 0.001, "mean alloc (ms)": 3.0,
            "failures (received no_slots)": 1,
        }
        for _ in range(2):
            shown.observe(stats.to_dict(), 1)
        text = client.generate_latest().decode()
        of_engine = 'engine="1",model_name="tiny"'
        for line in (
            f'vllm:pd_tokens_total{{direction="sent",{of_engine}}} 1400.0',
            f'vllm:pd_bytes_total{{direction="sent",{of_engine}}} 2000.0',
            f'vllm:pd_requests_total{{direction="sent",{of_engine}}} 2.0',
            'vllm:pd_tokens_total{direction="sent",engine="0",model_name="tiny"} 0.0',
            f'vllm:pd_failures_total{{direction="received",{of_engine},kind="no_slots"}} 2.0',
            f'vllm:pd_slots{{{of_engine},rank="0",state="reserved"}} 2.0',
            f'vllm:pd_waiting{{{of_engine},rank="0"}} 3.0',
            f'vllm:pd_daemon_metrics_port{{{of_engine},rank="0"}} 9400.0',
            f'vllm:pd_daemon_up{{{of_engine},rank="0"}} 1.0',
            f'vllm:pd_phase_seconds_count{{{of_engine},phase="alloc"}} 2.0',
        ):
            labels = line.split("{")[1].split("}")[0].split(",")
            name, value = line.split("{")[0], line.rsplit(" ", 1)[1]
            matching = [
                other for other in text.splitlines()
                if other.startswith(name + "{") and other.endswith(" " + value) and all(label in other for label in labels)
            ]
            assert len(matching) == 1, (line, text)
