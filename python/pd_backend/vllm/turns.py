"""The worker's side of a conversation's next turn: prefill asks other servers for the chunks of the turn before.

Who may have them: the server that the router names, and the receivers that this worker's daemon is connected to, as far as they
park chunks themselves. Whatever none of them has in time is computed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from ..client import Pending
from ..errors import ClientClosed, DaemonLost, Kind, PdError, RequestRefused, Unreadable
from ..messages import SourceAddress, Status
from ..node_client import NodeClient
from ..receiver_client import Lease
from .attachment import Attachment
from .spec import own_name
from .step import TurnPlan

logger = logging.getLogger("vllm.pd_backend")

#: How long chunks may be on their way, to be had for less than they take to compute.
_WAIT_S = 5.0
#: A server that did not answer is not asked again for so long, so that one that is down costs one request in that time.
_PAUSE_S = 30.0
#: Most servers that are asked for one request.
_ASKED_MAX = 8
#: Most that are remembered for not having answered.
_SILENT_MAX = 256


@dataclass
class _Asked:
    """One server, for one request."""

    source: SourceAddress
    name: str
    arriving: Pending[Lease]
    lease: Lease | None = None
    over: bool = False


@dataclass
class _Turn:
    plan: TurnPlan
    client: NodeClient
    #: Says whom the daemon knows.
    status: Pending[Status] | None
    asked: list[_Asked] = field(default_factory=list)
    #: Whether the scheduler was told that nothing more comes.
    told: bool = False


class Turns:
    """Chunks that are asked for. For the thread in which the worker steps."""

    def __init__(
        self, daemon: Attachment[NodeClient], keys: Callable[[Iterable[str]], list[str]], tp_rank: int
    ) -> None:
        self._daemon = daemon
        self._keys = keys
        self._tp_rank = tp_rank
        self._turns: dict[str, _Turn] = {}
        #: Of requests that could not be asked for at all.
        self._through: list[str] = []
        #: Until when a server that did not answer is left alone.
        self._silent_until: dict[SourceAddress, float] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._turns)

    def begin(self, plan: TurnPlan) -> None:
        """Asks for the chunks of one request."""
        try:
            client = self._daemon.attach()
            self._turns[plan.request_id] = _Turn(plan, client, client.start_status())
        except PdError:
            self._through.append(plan.request_id)

    def through(self) -> list[str]:
        """Requests of which nothing more comes, once each. What has come of them is kept until `end`."""
        through, self._through = self._through, []
        for turn in self._turns.values():
            if not turn.told and self._is_through(turn):
                turn.told = True
                through.append(turn.plan.request_id)
        return through

    def end(self, request_id: str) -> None:
        """What has come of this request is held otherwise now, or not wanted, and what has not is not."""
        turn = self._turns.pop(request_id, None)
        if turn is None:
            return
        for asked in turn.asked:
            if not asked.over:
                asked.arriving.abandon()
                turn.client.give_up(asked.name)
            elif asked.lease is not None:
                try:
                    asked.lease.start_release()
                except PdError:
                    pass  # It goes back with the client.

    def lost(self, client: NodeClient) -> None:
        """Nothing more is heard through this client: what it has brought went with it."""
        for turn in self._turns.values():
            if turn.client is client:
                turn.status, turn.asked = None, []

    def _is_through(self, turn: _Turn) -> bool:
        try:
            if turn.status is not None:
                if not turn.status.done():
                    return False
                status, turn.status = turn.status.result(), None
                self._ask(turn, status.sources)
            for asked in turn.asked:
                if not asked.over and asked.arriving.done():
                    asked.over = True
                    asked.lease = self._answer(asked)
        except (DaemonLost, ClientClosed, Unreadable) as lost:
            self._daemon.let_go(lost)
            return True
        except PdError as error:
            logger.warning("request %s: nothing more is asked for of the turn before: %s", turn.plan.request_id, error)
            return True
        return all(asked.over for asked in turn.asked)

    def _ask(self, turn: _Turn, known: Iterable[SourceAddress]) -> None:
        named = turn.plan.remote
        sources = dict.fromkeys(([] if named is None else [named.source(self._tp_rank)]) + list(known))
        now, keys = time.monotonic(), self._keys(turn.plan.hashes)
        for source in [source for source in sources if self._silent_until.get(source, now) <= now][:_ASKED_MAX]:
            name = own_name(f"turn {len(turn.asked)}", turn.plan.request_id)
            ids = named.ids if named is not None and source == named.source(self._tp_rank) else ()
            arriving = turn.client.start_fetch(name, source, keys, ids=ids, wait_s=_WAIT_S)
            turn.asked.append(_Asked(source, name, arriving))

    def _answer(self, asked: _Asked) -> Lease | None:
        try:
            return asked.arriving.result()
        except RequestRefused as refused:
            if refused.kind != Kind.UNKNOWN:
                logger.warning("%s has nothing for %s: %s", f"{asked.source.host}:{asked.source.port}", asked.name, refused)
                if len(self._silent_until) >= _SILENT_MAX:
                    self._silent_until.clear()
                self._silent_until[asked.source] = time.monotonic() + _PAUSE_S
            return None
