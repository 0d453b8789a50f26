"""The socket under a client: sends that never wait, bounded receives, and the daemon's death noticed at once."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import zmq

from . import messages as m
from .errors import ClientClosed, ClientMisuse, DaemonGone, DaemonLost, DaemonSilent, ProtocolError, Unreadable

# No reply comes near: 4096 ready chunks with keys of 1024 bytes are some 5 MiB.
_MESSAGE_LEN_BYTES_MAX = 64 * 1024 * 1024
#: Messages that wait for a daemon to read them; thousands, for one step of an engine may end as many requests.
QUEUED_MAX = 16_384
# A daemon that dies closes its connections and then ends: how long one of the two is waited for after the other.
_END_WAIT_S = 1.0


class Channel:
    """One DEALER to one daemon. For one thread of one process: anything else is refused with `ClientMisuse`."""

    def __init__(self, endpoint: str) -> None:
        """Starts to connect; libzmq goes on in the background, so a wrong name shows as a reply that never comes."""
        self.endpoint = endpoint
        self._owner_pid = os.getpid()
        self._busy = threading.Lock()
        self._daemon_pid: int | None = None
        self._pidfd: int | None = None
        self._lost: DaemonLost | None = None
        #: Raised once everything has been handed out that came before it.
        self._unreadable: Unreadable | None = None
        self._socket: zmq.Socket | None = None
        self._disconnected: zmq.Socket | None = None
        self._context = zmq.Context()
        try:
            self._socket = self._context.socket(zmq.DEALER)
            self._socket.setsockopt(zmq.LINGER, 0)
            self._socket.setsockopt(zmq.SNDHWM, QUEUED_MAX)
            self._socket.setsockopt(zmq.MAXMSGSIZE, _MESSAGE_LEN_BYTES_MAX)
            # libzmq connects anew by itself, to a daemon that then knows nothing of this client.
            self._disconnected = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            self._poller = zmq.Poller()
            for end in (self._socket, self._disconnected):
                self._poller.register(end, zmq.POLLIN)
            self._socket.connect(endpoint)
        except BaseException as error:
            self.close()
            if isinstance(error, zmq.ZMQError):
                raise ProtocolError(f"{endpoint} is no endpoint of a connector API: {error}") from error
            raise

    def watch(self, daemon_pid: int) -> None:
        """From now on the end of this process ends every wait. A kernel without pidfds leaves the deadlines alone."""
        if daemon_pid == self._daemon_pid:
            return
        if self._pidfd is not None:
            self._poller.unregister(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None
        self._daemon_pid = daemon_pid
        try:
            self._pidfd = os.pidfd_open(daemon_pid)
        except ProcessLookupError:
            self.lose(self._gone())
        except (OSError, AttributeError):
            return
        else:
            self._poller.register(self._pidfd, zmq.POLLIN)

    def send(self, message: m.Request) -> None:
        """Queues a message; never waits. Raises `DaemonLost`.

        A daemon that has let the queue fill up is lost: what could not be said to it (a cancel, a release) would never
        be, while the end of the connection says it all.
        """
        with self._exclusive() as socket:
            if self._lost is None:
                try:
                    socket.send_multipart([b"", m.encode(message)], zmq.NOBLOCK)
                    return
                except zmq.Again:
                    self.lose(
                        DaemonSilent(
                            f"the daemon at {self.endpoint} (pid {self._daemon_pid}) has left {QUEUED_MAX} messages "
                            "unread; see whether it is stopped, and attach anew"
                        )
                    )
        self.raise_loss()

    def receive(self, timeout_s: float) -> list[m.Reply]:
        """What has arrived; waits up to `timeout_s` for the first. Nothing at all when that passes.

        Raises `Unreadable`, and `DaemonLost`, each once everything that came before it has
        been returned.
        """
        taken: list[m.Reply] = []
        with self._exclusive() as socket:
            self._take(socket, taken)
            deadline = time.monotonic() + timeout_s
            while not taken and self._unreadable is None and self._lost is None:
                left_ms = int(max(0.0, deadline - time.monotonic()) * 1000 + 0.999)
                ready = dict(self._poller.poll(left_ms))
                self._take(socket, taken)
                if self._pidfd in ready or self._disconnected in ready:
                    self._end(ready)
                    # What it said last is here once the connection has ended.
                    self._take(socket, taken)
                if left_ms == 0:
                    break
        if not taken:
            unreadable, self._unreadable = self._unreadable, None
            if unreadable is not None:
                raise unreadable
            self.raise_loss()
        return taken

    def lose(self, why: DaemonLost) -> None:
        """From now on nothing is sent, and once what has come is read every call raises this."""
        self._lost = self._lost or why

    def silent(self, for_s: float) -> DaemonSilent:
        """The error that says so."""
        return DaemonSilent(
            f"the daemon at {self.endpoint} (pid {self._daemon_pid}) has answered nothing for {for_s:g} s; see whether "
            "it is stopped or hangs, and attach anew"
        )

    def _end(self, ready: dict[Any, int]) -> None:
        """The process or the connection has ended; which of them, is known once both have, or one for a while."""
        exited = self._pidfd in ready
        other = self._disconnected if exited else self._pidfd
        if other is not None and other not in ready:
            poller = zmq.Poller()
            poller.register(other, zmq.POLLIN)
            came = bool(poller.poll(int(_END_WAIT_S * 1000)))
            exited = exited or came
        self.lose(
            self._gone()
            if exited
            else DaemonLost(f"the daemon at {self.endpoint} (pid {self._daemon_pid}) has closed the connection; attach anew")
        )

    def _gone(self) -> DaemonGone:
        return DaemonGone(f"the daemon at {self.endpoint} (pid {self._daemon_pid}) has ended; start it and attach anew")

    def raise_loss(self) -> None:
        """What `lose` was told, if anything."""
        if self._lost is not None:
            # A new one each time: one that is raised again and again grows by its tracebacks.
            raise type(self._lost)(self._lost.text)

    @property
    def usable(self) -> bool:
        """Whether a message could still be sent: open, in its own process, with a living daemon."""
        return self._socket is not None and self._lost is None and os.getpid() == self._owner_pid

    def close(self) -> None:
        """Closes the socket. In a forked child this touches nothing that the parent uses."""
        socket, self._socket = self._socket, None
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
        if os.getpid() != self._owner_pid:
            return
        monitor, self._disconnected = self._disconnected, None
        if socket is not None:
            socket.disable_monitor()
            socket.close()
        if monitor is not None:
            monitor.close(linger=0)
        if not self._context.closed:
            self._context.term()

    def __del__(self) -> None:
        # A context that is collected before its socket waits for it without end.
        if getattr(self, "_socket", None) is not None:
            self.close()

    def _take(self, socket: zmq.Socket, taken: list[m.Reply]) -> None:
        while self._unreadable is None:
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(frames) != 2 or frames[0]:
                self._unreadable = Unreadable(
                    f"{self.endpoint} sent {len(frames)} frames, expected an empty one and a payload"
                )
                return
            try:
                taken.append(m.decode_reply(frames[1]))
            except m.UNDECODABLE as error:
                self._unreadable = Unreadable(f"{self.endpoint} sent what this client does not understand: {error}")
                self._unreadable.__cause__ = error

    @contextmanager
    def _exclusive(self) -> Iterator[zmq.Socket]:
        if os.getpid() != self._owner_pid:
            raise ClientMisuse(f"this client belongs to process {self._owner_pid}: make a new one after a fork")
        if not self._busy.acquire(blocking=False):
            raise ClientMisuse("two threads are in one client: use one client per thread")
        try:
            if self._socket is None:
                raise ClientClosed(f"the client of {self.endpoint} was closed")
            yield self._socket
        finally:
            self._busy.release()
