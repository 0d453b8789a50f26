"""What a worker has seen of transfers since it was last asked: plain numbers, which go by way of vLLM to its `/metrics`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ..client import Client, Pending
from ..errors import PdError
from ..messages import Status

#: How far apart a daemon is asked for its counters.
_STATUS_EVERY_S = 1.0
#: Durations of one phase that are kept between two questions; later ones are left out.
_DURATIONS_MAX = 4096


def empty() -> dict[str, Any]:
    """What nothing was seen in. Every value can be serialized, and two of these can be merged."""
    return {"tokens": {}, "bytes": {}, "requests": {}, "failures": {}, "seconds": {}, "daemons": {}}


def merge(into: dict[str, Any], other: Mapping[str, Any]) -> None:
    """Adds what another worker, or the same one later, has seen."""
    for what in ("tokens", "bytes", "requests", "failures"):
        for name, count in other[what].items():
            into[what][name] = into[what].get(name, 0) + count
    for phase, seconds in other["seconds"].items():
        into["seconds"].setdefault(phase, []).extend(seconds)
    # Of each rank's daemon the latest.
    into["daemons"].update(other["daemons"])


class Observations:
    """Of one worker, of the half that sends and of the one that receives. For the thread in which it steps."""

    def __init__(self, rank: int = 0) -> None:
        self._rank = rank
        self._data = empty()

    def moved(self, direction: str, tokens: int, len_bytes: int | None = None) -> None:
        """A request's KV was `sent` or `received`. Each rank moves a part of the bytes of the same tokens."""
        self._add("requests", direction, int(self._rank == 0))
        self._add("tokens", direction, tokens if self._rank == 0 else 0)
        if len_bytes is not None:
            self._add("bytes", direction, len_bytes)

    def took(self, phase: str, seconds: float) -> None:
        """A phase of a request."""
        durations = self._data["seconds"].setdefault(phase, [])
        if len(durations) < _DURATIONS_MAX:
            durations.append(seconds)

    def failed(self, direction: str, error: Exception | str) -> None:
        """A request's KV was not `sent`, or not `received`. A text begins with its kind."""
        kind = error.kind if isinstance(error, PdError) else str(error).split(":")[0] if isinstance(error, str) else "load"
        self._add("failures", f"{direction} {kind if kind.isidentifier() else 'other'}", 1)

    def daemon(self, figures: Mapping[str, Any]) -> None:
        """How this rank's daemon is now."""
        self._data["daemons"][str(self._rank)] = dict(figures)

    def bytes_counted(self, direction: str, len_bytes: int) -> None:
        """Of the daemon's own count, which has what it sends of parked chunks as well."""
        self._add("bytes", direction, len_bytes)

    def take(self) -> dict[str, Any] | None:
        """What was seen since the last call; None for nothing."""
        if not any(self._data.values()):
            return None
        data, self._data = self._data, empty()
        return data

    def _add(self, what: str, name: str, count: int) -> None:
        if count:
            self._data[what][name] = self._data[what].get(name, 0) + count


class DaemonFigures:
    """Asks a worker's daemon for its counters now and then, and never waits for them."""

    def __init__(self, observations: Observations) -> None:
        self._observations = observations
        self._asked: tuple[Client, Pending[Status]] | None = None
        self._asked_at = float("-inf")
        #: Whose count was seen last, and what it was.
        self._counted: tuple[Client, int] | None = None
        self._up: bool | None = None

    def look(self, client: Client | None, metrics_port: int | None) -> None:
        """After a step. `client` is that of the daemon that runs, None while there is none; `metrics_port` is the daemon's."""
        if client is None:
            self._asked = None
            if self._up is not False:
                self._up = False
                self._observations.daemon({"up": 0})
            return
        now = time.monotonic()
        try:
            if self._asked is not None and self._asked[0] is client:
                if self._asked[1].done():
                    status, self._asked = self._asked[1].result(), None
                    self._see(client, status, metrics_port)
            elif now - self._asked_at >= _STATUS_EVERY_S:
                self._asked, self._asked_at = (client, client.start_status()), now
        except PdError:
            self._asked = None  # Whoever uses the client next finds out why.

    def _see(self, client: Client, status: Status, metrics_port: int | None) -> None:
        self._up = True
        self._observations.daemon(
            {
                "up": 1,
                "metrics_port": metrics_port,
                "waiting": status.requests_waiting + status.waits,
                "slots": {
                    "available": status.slots_free,
                    "reserved": status.slots_reserved,
                    "ready_held": status.slots_held,
                    "ready_idle": status.slots_ready - status.slots_held,
                    "quarantined": status.slots_quarantined,
                },
            }
        )
        if client.role != "receiver":
            before = self._counted[1] if self._counted is not None and self._counted[0] is client else 0
            # A daemon with both halves counts both directions together.
            direction = "sent" if client.role == "sender" else "moved"
            self._observations.bytes_counted(direction, max(0, status.bytes - before))
            self._counted = client, status.bytes
