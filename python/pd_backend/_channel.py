"""The socket under a client: bounded sends and receives, and the daemon's death noticed at once."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import zmq

from . import messages as m
from .errors import ClientClosed, ClientMisuse, DaemonGone, ProtocolError, ReplyTimeout

# No reply comes near: 4096 ready chunks with keys of 1024 bytes are some 5 MiB.
_MESSAGE_LEN_BYTES_MAX = 64 * 1024 * 1024


class Channel:
    """One DEALER to one daemon. For one thread of one process: anything else is refused with `ClientMisuse`."""

    def __init__(self, endpoint: str, send_timeout_s: float) -> None:
        """Starts to connect; libzmq goes on in the background, so a wrong name shows as a reply that never comes."""
        self.endpoint = endpoint
        self._owner_pid = os.getpid()
        self._busy = threading.Lock()
        self._daemon_pid: int | None = None
        self._pidfd: int | None = None
        self._gone = False
        self._context = zmq.Context()
        self._socket: zmq.Socket | None = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDTIMEO, max(1, int(send_timeout_s * 1000)))
        self._socket.setsockopt(zmq.MAXMSGSIZE, _MESSAGE_LEN_BYTES_MAX)
        self._poller = zmq.Poller()
        try:
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise ProtocolError(f"{endpoint} is no endpoint of a connector API: {error}") from error
        self._poller.register(self._socket, zmq.POLLIN)

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
            self._gone = True
        except (OSError, AttributeError):
            return
        else:
            self._poller.register(self._pidfd, zmq.POLLIN)

    def send(self, message: m.Request) -> None:
        """Queues a message. Raises `ReplyTimeout` when the daemon has not taken earlier ones for too long."""
        with self._exclusive() as socket:
            if self._gone:
                raise self.gone()
            try:
                socket.send_multipart([b"", m.encode(message)])
            except zmq.Again:
                raise ReplyTimeout(f"{self.endpoint} takes no messages: its queue is full") from None

    def receive(self, timeout_s: float) -> Iterator[m.Reply]:
        """What has arrived; waits up to `timeout_s` for the first. Nothing at all when that passes.

        Raises `DaemonGone` when nothing is left to read and the daemon has ended.
        """
        taken: list[m.Reply] = []
        with self._exclusive() as socket:
            self._take(socket, taken)
            deadline = time.monotonic() + timeout_s
            while not taken and not self._gone:
                left_ms = int(max(0.0, deadline - time.monotonic()) * 1000 + 0.999)
                ready = dict(self._poller.poll(left_ms))
                self._take(socket, taken)
                if self._pidfd is not None and self._pidfd in ready:
                    self._gone = True
                if left_ms == 0:
                    break
        if not taken and self._gone:
            raise self.gone()
        return iter(taken)

    def gone(self) -> DaemonGone:
        """The error that says so."""
        return DaemonGone(f"the daemon at {self.endpoint} (pid {self._daemon_pid}) has ended; start it and attach anew")

    @property
    def usable(self) -> bool:
        """Whether a message could still be sent: open, in its own process, with a living daemon."""
        return self._socket is not None and not self._gone and os.getpid() == self._owner_pid

    def close(self) -> None:
        """Closes the socket. In a forked child this touches nothing that the parent uses."""
        socket, self._socket = self._socket, None
        if socket is None:
            return
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
        if os.getpid() == self._owner_pid:
            socket.close()
            self._context.term()

    def __del__(self) -> None:
        # A context that is collected before its socket waits for it without end.
        if getattr(self, "_socket", None) is not None:
            self.close()

    def _take(self, socket: zmq.Socket, taken: list[m.Reply]) -> None:
        while True:
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(frames) != 2 or frames[0]:
                raise ProtocolError(f"{self.endpoint} sent {len(frames)} frames, expected an empty one and a payload")
            try:
                taken.append(m.decode_reply(frames[1]))
            except m.UNDECODABLE as error:
                raise ProtocolError(f"{self.endpoint} sent what this client does not understand: {error}") from error

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
