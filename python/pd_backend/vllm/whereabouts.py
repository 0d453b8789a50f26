"""Where the daemons beside the workers are: what workers tell the scheduler, and how it resets all of them."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..client import Client
from ..daemon import ReadyLine
from ..errors import PdError
from .supervisor import Supervisor
from .weights import Weights

logger = logging.getLogger("vllm.pd_backend")

# The scheduler waits for these answers, and so does whoever asked it for a reset.
_REPLY_S = 2.0


@dataclass(frozen=True)
class DaemonAt:
    """Where the daemon of one rank is, and what the weights of that rank's model are."""

    rank: int
    connector: str
    host: str
    weights: str
    #: Where what it has parked is asked for, if anything is.
    rendezvous_port: int | None = None
    #: Where others announce what they send to it, and where they ask for room, if it receives.
    init_port: int | None = None
    alloc_port: int | None = None

    @classmethod
    def here(cls, rank: int, ready: ReadyLine, weights: str) -> DaemonAt:
        """Of a worker, as it tells the scheduler."""
        ports = (ready.rendezvous_port, ready.init_port, ready.alloc_port)
        return cls(rank, ready.connector, platform.node(), weights, *ports)


class Whereabouts:
    """What a worker has to tell the scheduler of its daemon, and when. Its weights are those of the last look at them."""

    def __init__(self, rank: int, supervisor: Supervisor[Any], weights: Weights) -> None:
        self._rank = rank
        self._supervisor = supervisor
        self._weights = weights
        self._told: DaemonAt | None = None

    def news(self) -> DaemonAt | None:
        """Where it is, after each start of it, and once the weights are others; None for no news.

        Nobody may have asked the daemon anything since: where the scheduler finds no chunks, no worker hears of a request.
        """
        try:
            at = DaemonAt.here(self._rank, self._supervisor.ready, self._weights.last)
        except PdError:
            return None
        if at == self._told:
            return None
        self._told = at
        return at


class Daemons:
    """The daemons of all ranks, for the scheduler."""

    def __init__(self, tp_size: int, client_type: type[Client]) -> None:
        self._tp_size = tp_size
        self._client_type = client_type
        self._at: dict[int, DaemonAt] = {}

    def attach(self, at: DaemonAt) -> None:
        """Where one of them is: at first, and whenever it was started again."""
        self._at[at.rank] = at

    def rendezvous_ports(self) -> list[int] | None:
        """Of all ranks, in their order; None while one of them is not known, or has none."""
        return self._ports(lambda at: at.rendezvous_port)

    def init_ports(self) -> list[int] | None:
        """As `rendezvous_ports`."""
        return self._ports(lambda at: at.init_port)

    def alloc_ports(self) -> list[int] | None:
        """As `rendezvous_ports`."""
        return self._ports(lambda at: at.alloc_port)

    def _ports(self, port_of: Callable[[DaemonAt], int | None]) -> list[int] | None:
        daemons = map(self._at.get, range(self._tp_size))
        ports = [port for at in daemons if at is not None and (port := port_of(at)) is not None]
        return ports if len(ports) == self._tp_size else None

    def reset(self) -> bool:
        """Has all of them drop what was computed before. False where one of them has not said that it did."""
        done = [self._reset(rank) for rank in range(self._tp_size)]
        return all(done)

    def _reset(self, rank: int) -> bool:
        at = self._at.get(rank)
        if at is None or at.host != platform.node():
            where = "is not known yet" if at is None else f"is on {at.host}"
            logger.error("the cache is not reset: the daemon of rank %d %s", rank, where)
            return False
        try:
            client = self._client_type(
                at.connector, name="vllm scheduler, for a reset", map_buffer=False, reply_timeout_s=_REPLY_S
            )
            with client:
                client.reset()
        except PdError as error:
            logger.error("the cache is not reset, try again: the daemon of rank %d: %s", rank, error)
            return False
        return True
