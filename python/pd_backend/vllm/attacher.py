"""Attaches to a worker's daemon beside the engine's steps."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from ..buffer import PdBuffer
from ..client import Client
from ..daemon import ReadyLine
from ..errors import DaemonGone, DaemonSilent, Kind, PdError, ReplyTimeout

C = TypeVar("C", bound=Client)

# Before a daemon that could not be attached to is tried again.
_PAUSE_S = 0.2


class Attacher(Generic[C]):
    """A client of the daemon that runs now, made and closed by a thread of its own.

    The engine's thread does neither: a daemon answers `attach` when it likes, and to map or unmap gigabytes takes tenths
    of a second. It takes the client that is there, or is told at once why there is none.
    """

    def __init__(self, name: str, attach: Callable[[ReadyLine], C]) -> None:
        """`attach` makes a client without populating its buffer, which is done here once the client can be used."""
        self._attach = attach
        self._changed = threading.Condition()
        self._daemon: ReadyLine | None = None
        self._client: C | None = None
        #: Whether somebody has the client, and says when it is of no more use.
        self._taken = False
        self._why_none: PdError | None = None
        self._unneeded: list[C] = []
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"{name}-attacher", daemon=True)
        self._thread.start()

    def started(self, daemon: ReadyLine) -> None:
        """This daemon is to be attached to."""
        with self._changed:
            self._daemon = daemon
            self._changed.notify_all()

    def ended(self, why: PdError) -> None:
        """The daemon has ended; `why` there is no client until another one has started."""
        with self._changed:
            self._daemon, self._why_none = None, why
            if self._client is not None and not self._taken:
                self._unneeded.append(self._client)
            self._client = None
            self._changed.notify_all()

    def client(self) -> C:
        """The client of the daemon that runs, for one thread. Never waits. Raises why there is none."""
        with self._changed:
            if self._client is None:
                raise self._none()
            self._taken = True
            return self._client

    def ready(self) -> ReadyLine:
        """Of the daemon that `client` is a client of. Raises as that does."""
        with self._changed:
            if self._client is None or self._daemon is None:
                raise self._none()
            return self._daemon

    def lost(self, client: C, why: PdError) -> None:
        """Nobody uses this client any more: it is closed, and the daemon attached to anew if it still runs."""
        with self._changed:
            self._unneeded.append(client)
            if self._client is client:
                self._client, self._why_none = None, why
            self._changed.notify_all()

    def wait(self) -> None:
        """Until there is a client, or a reason why there is none."""
        with self._changed:
            self._changed.wait_for(lambda: self._client is not None or self._why_none is not None)

    def detach(self) -> None:
        """Closes the client, and makes no other."""
        with self._changed:
            self._closed = True
            client, self._client = self._client, None
            self._why_none = DaemonGone("its supervisor was closed")
            self._changed.notify_all()
        if client is not None:
            client.close()

    def join(self) -> None:
        """After `detach`, and the end of the daemon, which ends an attempt to attach to it."""
        self._thread.join()

    def _none(self) -> PdError:
        # A new one each time: one that is raised again and again grows by its tracebacks.
        return copy.copy(self._why_none) if self._why_none is not None else DaemonGone("it is being started")

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._unneeded or self._wanted())
                unneeded, self._unneeded = self._unneeded, []
                daemon = self._daemon if not self._closed and self._client is None else None
                closed = self._closed
            while unneeded:
                unneeded.pop().close()
            if closed:
                return
            if daemon is not None:
                self._attach_to(daemon)

    def _wanted(self) -> bool:
        return self._daemon is not None and self._client is None

    def _attach_to(self, daemon: ReadyLine) -> None:
        try:
            client = self._attach(daemon)
        except Exception as error:  # A thread that ends in silence would leave the engine waiting.
            with self._changed:
                if self._daemon is daemon:
                    self._why_none = _reason(error)
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._closed or self._daemon is not daemon, _PAUSE_S)
            return
        with self._changed:
            if self._closed or self._daemon is not daemon:
                self._unneeded.append(client)
                return
            self._client, self._taken, self._why_none = client, False, None
            self._changed.notify_all()
        buffer = client.buffer
        if isinstance(buffer, PdBuffer):
            buffer.populate(lambda: self._client is client)


def _reason(error: Exception) -> PdError:
    if isinstance(error, ReplyTimeout):
        return DaemonSilent(error.text)
    return error if isinstance(error, PdError) else PdError(Kind.INTERNAL, f"it cannot be attached to: {error!r}")
