"""vLLM's `/metrics` show the transfer: what workers have observed, as vLLM's hooks for connectors want it.

Workers hand `PdStats` to the scheduler, which vLLM gives to the process that serves `/metrics`, `PdPromMetrics` there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from .observations import empty, merge

if TYPE_CHECKING:
    from vllm.config import VllmConfig

#: In seconds. The same as those of the daemons' own `pd_phase_seconds`, as far as a request's phases reach.
_BUCKETS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0]


class PdStats(KVConnectorStats):
    """What workers have observed since the step before."""

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        super().__init__(data or empty())

    def reset(self) -> None:
        self.data = empty()

    def is_empty(self) -> bool:
        return not any(self.data.values())

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        merge(self.data, other.data)
        return self

    def reduce(self) -> dict[str, int | float]:
        """For vLLM's log of the last interval."""
        line: dict[str, int | float] = {}
        for direction, count in self.data["requests"].items():
            line[f"requests {direction}"] = count
        for direction, count in self.data["tokens"].items():
            line[f"tokens {direction}"] = count
        for direction, count in self.data["bytes"].items():
            line[f"MiB {direction}"] = round(count / 2**20, 3)
        for phase, seconds in self.data["seconds"].items():
            line[f"mean {phase} (ms)"] = round(1000 * sum(seconds) / len(seconds), 3)
        for what, count in self.data["failures"].items():
            line[f"failures ({what})"] = count
        return line


class PdPromMetrics(KVConnectorPromMetrics):
    """The same as metrics, with vLLM's labels and a few of ours."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)

        def counter(name: str, text: str, *labels: str) -> Any:
            return self._counter_cls(name=f"vllm:pd_{name}", documentation=text, labelnames=[*labelnames, *labels])

        def gauge(name: str, text: str, *labels: str) -> Any:
            return self._gauge_cls(
                name=f"vllm:pd_{name}",
                documentation=text,
                labelnames=[*labelnames, *labels],
                multiprocess_mode="mostrecent",
            )

        self._requests = counter("requests", "Requests whose KV was sent or received.", "direction")
        self._tokens = counter("tokens", "Tokens whose KV was sent or received.", "direction")
        self._bytes = counter("bytes", "Bytes of KV that were sent or received.", "direction")
        self._failures = counter(
            "failures", "Requests whose KV was not sent or not received, by the kind of failure.", "direction", "kind"
        )
        self._seconds = self._histogram_cls(
            name="vllm:pd_phase_seconds",
            documentation="How long each phase of a request's transfer took.",
            buckets=_BUCKETS,
            labelnames=[*labelnames, "phase"],
        )
        self._waiting = gauge("waiting", "What waits at the daemon of a rank: for slots, or for chunks.", "rank")
        self._slots = gauge("slots", "Slots of the daemon of a rank, by state.", "rank", "state")
        self._up = gauge("daemon_up", "Whether the daemon of a rank runs, and is attached to.", "rank")
        self._port = gauge("daemon_metrics_port", "The port at which the daemon of a rank serves its own metrics.", "rank")
        # A rate needs the 0 before the 1.
        for values in per_engine_labelvalues.values():
            for direction in ("sent", "received"):
                for metric in (self._requests, self._tokens, self._bytes):
                    metric.labels(*values, direction)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        values, data = self.per_engine_labelvalues[engine_idx], transfer_stats_data
        for metric, what in ((self._requests, "requests"), (self._tokens, "tokens"), (self._bytes, "bytes")):
            for direction, count in data[what].items():
                metric.labels(*values, direction).inc(count)
        for what, count in data["failures"].items():
            self._failures.labels(*values, *what.split(" ", 1)).inc(count)
        for phase, durations in data["seconds"].items():
            for seconds in durations:
                self._seconds.labels(*values, phase).observe(seconds)
        for rank, figures in data["daemons"].items():
            self._up.labels(*values, rank).set(figures["up"])
            if figures.get("metrics_port") is not None:
                self._port.labels(*values, rank).set(figures["metrics_port"])
            if "waiting" in figures:
                self._waiting.labels(*values, rank).set(figures["waiting"])
            for state, count in figures.get("slots", {}).items():
                self._slots.labels(*values, rank, state).set(count)
