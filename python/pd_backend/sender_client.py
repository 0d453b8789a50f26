"""The client beside a prefill worker."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from . import messages as m
from .client import Client, Pending, itself, milliseconds, nothing
from .errors import ReplyTimeout, RequestFailed


class SenderClient(Client):
    """Beside a prefill worker: open a request, stage slots, fill them, send them."""

    role = "sender"
    writes = True

    def open(
        self,
        req_id: str,
        keys: Sequence[str],
        *,
        last_chunk_tokens: int,
        receiver: m.PeerAddress,
        groups: Sequence[int] = (),
        wait_s: float | None = None,
        stage: bool = False,
    ) -> m.Opened:
        """Asks the receiver for room for all these chunks; returns once it is granted.

        `groups` names the group of layers of each chunk, by its position in `attached.groups`; without it all are of
        the first. The last chunk of each group has `last_chunk_tokens` tokens. `already_sent` of the result lists
        positions in `keys` that are neither staged nor sent. `wait_s` bounds the
        wait for slots; the daemon's configuration does when it is left out. With `stage` the result's `slots` are those
        of all other chunks, which saves the call of that name: none are there when too few were free, and then that
        call waits for them. Raises `RequestRefused`.
        """
        return self.start_open(
            req_id,
            keys,
            last_chunk_tokens=last_chunk_tokens,
            receiver=receiver,
            groups=groups,
            wait_s=wait_s,
            stage=stage,
        ).result()

    def start_open(
        self,
        req_id: str,
        keys: Sequence[str],
        *,
        last_chunk_tokens: int,
        receiver: m.PeerAddress,
        groups: Sequence[int] = (),
        wait_s: float | None = None,
        stage: bool = False,
    ) -> Pending[m.Opened]:
        """As `open`, without waiting."""
        return self._start(
            lambda id: m.Open(
                id=id,
                req_id=req_id,
                keys=list(keys),
                last_chunk_tokens=last_chunk_tokens,
                receiver=receiver,
                groups=list(groups),
                wait_ms=milliseconds(wait_s),
                stage=stage,
            ),
            m.Opened,
            itself,
            self._wait_of(wait_s),
        )

    def park(
        self,
        req_id: str,
        keys: Sequence[str],
        *,
        last_chunk_tokens: int,
        ids: Sequence[str] = (),
        groups: Sequence[int] = (),
        wait_s: float | None = None,
        unsolicited: bool = False,
        stays: bool = False,
    ) -> m.Opened:
        """As `open`, for a receiver that is not known: the chunks are kept for whoever asks for them.

        `ids` are what those call the request who will ask. The result's `slots` are for every chunk but those in
        `already_sent`, which are kept here already; `send` says that they are filled, and the event `parked` follows the call
        with `last`. Raises `RequestRefused`, of kind `no_slots` when the wait for slots was in vain.

        `unsolicited` says that nobody is told where they are kept: they are only pushed to a receiver that the daemon guesses, and
        kept until that has ended. Without such a receiver this is refused, as `peer_unreachable`. With `stays` they are not pushed.
        """
        return self.start_park(
            req_id,
            keys,
            last_chunk_tokens=last_chunk_tokens,
            ids=ids,
            groups=groups,
            wait_s=wait_s,
            unsolicited=unsolicited,
            stays=stays,
        ).result()

    def start_park(
        self,
        req_id: str,
        keys: Sequence[str],
        *,
        last_chunk_tokens: int,
        ids: Sequence[str] = (),
        groups: Sequence[int] = (),
        wait_s: float | None = None,
        unsolicited: bool = False,
        stays: bool = False,
    ) -> Pending[m.Opened]:
        """As `park`, without waiting."""
        return self._start(
            lambda id: m.Park(
                id=id,
                req_id=req_id,
                keys=list(keys),
                last_chunk_tokens=last_chunk_tokens,
                ids=list(ids),
                groups=list(groups),
                wait_ms=milliseconds(wait_s),
                unsolicited=unsolicited,
                stays=stays,
            ),
            m.Opened,
            itself,
            self._wait_of(wait_s),
        )

    def start_expect(self, req_id: str, ids: Sequence[str]) -> Pending[None]:
        """The serving engine has a request that it will park as `req_id`: receivers that ask for it by one of `ids` wait until
        then, or until `cancel` or `give_up` says that it does not come. Does not wait for the answer."""
        return self._start(lambda id: m.Expect(id=id, req_id=req_id, ids=list(ids)), m.Accepted, nothing)

    def stage(self, req_id: str, chunks: Iterable[int], *, wait_s: float | None = None) -> list[m.StagedSlot]:
        """Local slots for these positions in the request's keys, all at once; waits while there are too few.

        Raises `RequestRefused`: of kind `no_slots` when the wait was in vain.
        """
        return self.start_stage(req_id, chunks, wait_s=wait_s).result()

    def start_stage(
        self, req_id: str, chunks: Iterable[int], *, wait_s: float | None = None
    ) -> Pending[list[m.StagedSlot]]:
        """As `stage`, without waiting."""
        positions = list(chunks)
        return self._start(
            lambda id: m.Stage(id=id, req_id=req_id, chunks=positions, wait_ms=milliseconds(wait_s)),
            m.Staged,
            lambda reply: reply.slots,
            self._wait_of(wait_s),
        )

    def send(
        self, req_id: str, parts: Iterable[m.SendPart | m.StagedSlot], *, last: bool, stream: int | None = None
    ) -> None:
        """Says that these bytes are final. A staged slot stands for the whole of its chunk.

        With a buffer in GPU memory they are final once `stream` (see `order_by`) has done what is on it now; nothing
        here waits for that, the daemon does.

        The event `sent` or `failed` follows once for the whole request, after the call with `last`. Raises
        `RequestRefused`; nothing of a refused call is written.
        """
        self.start_send(req_id, parts, last=last, stream=stream).result()

    def start_send(
        self, req_id: str, parts: Iterable[m.SendPart | m.StagedSlot], *, last: bool, stream: int | None = None
    ) -> Pending[None]:
        """As `send`, without waiting for the daemon's acceptance."""
        ranges = [m.SendPart(slot=part.slot) if isinstance(part, m.StagedSlot) else part for part in parts]
        after = self._after(stream) if ranges else None
        return self._start(
            lambda id: m.Send(id=id, req_id=req_id, parts=ranges, last=last, after=after), m.Accepted, nothing
        )

    def wait_sent(self, req_id: str, timeout_s: float | None = None) -> m.Sent | m.Parked:
        """The event `sent`, or `parked`, of this request; those of other requests stay for `poll_events`.

        Raises `RequestFailed` for the event `failed`, and `ReplyTimeout`.
        """
        limit_s = self._wait_timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + limit_s
        while True:
            event = self._take_event(req_id)
            if isinstance(event, m.Failed):
                raise RequestFailed(event.req_id, event.kind, event.text, event.peer)
            if event is not None:
                return event
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise ReplyTimeout(f"request {req_id} was neither sent nor failed within {limit_s} s")
            self._pump(left_s)

    def _take_event(self, req_id: str) -> m.Event | None:
        for index, event in enumerate(self._events):
            if event.req_id == req_id:
                del self._events[index]
                self._acknowledge(event)
                return event
        return None
