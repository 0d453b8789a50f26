"""A daemon's side of the connector API in this process: a ROUTER, a memfd, and a script of answers."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable, Iterable

import zmq

from pd_backend import messages as m

Script = Callable[[m.Request], Iterable[m.Reply | bytes]]

CHUNK_BYTES = 4096
SLOT_COUNT = 4


class FakeDaemon:
    """Answers `attach` and `detach` by itself and everything else by `script`; ends with its `with` block."""

    def __init__(
        self,
        role: str,
        script: Script | None = None,
        *,
        version: int = m.CONNECTOR_API_VERSION,
        pid: int | None = None,
    ) -> None:
        self.role = role
        self.endpoint = f"ipc://@pd-backend/test-{uuid.uuid4()}"
        self.seen: list[m.Request] = []
        self._script = script or (lambda request: ())
        self._version = version
        self.pid = os.getpid() if pid is None else pid
        self.fd = os.memfd_create("pd-backend-test")
        os.ftruncate(self.fd, CHUNK_BYTES * SLOT_COUNT)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(self.endpoint)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    @property
    def handle(self) -> m.HostBuffer:
        """How to map the memfd."""
        inode = os.fstat(self.fd).st_ino
        length = CHUNK_BYTES * SLOT_COUNT
        return m.HostBuffer(pid=self.pid, fd=self.fd, len_bytes=length, inode=inode, present_bytes=length)

    def seen_of(self, kind: type) -> list[m.Request]:
        """The messages of a type that have arrived."""
        return [request for request in self.seen if isinstance(request, kind)]

    def __enter__(self) -> FakeDaemon:
        return self

    def __exit__(self, *_: object) -> None:
        self.hang_up()
        os.close(self.fd)

    def hang_up(self) -> None:
        """Closes its connections, as if it had ended."""
        self._stop.set()
        self._thread.join(timeout=5)
        self._socket.close()
        self._context.term()

    def _serve(self) -> None:
        while not self._stop.is_set():
            if not self._socket.poll(20):
                continue
            client, empty, payload = self._socket.recv_multipart()
            assert empty == b""
            request = m.decode_request(payload)
            self.seen.append(request)
            for reply in self._answer(request):
                body = reply if isinstance(reply, bytes) else m.encode(reply)
                self._socket.send_multipart([client, b"", body])

    def _answer(self, request: m.Request) -> Iterable[m.Reply | bytes]:
        if isinstance(request, m.Attach):
            yield m.Attached(
                id=request.id,
                version=self._version,
                role=self.role,
                buffer=self.handle,
                chunk_bytes=CHUNK_BYTES,
                slot_count=SLOT_COUNT,
                chunk_tokens=16,
                groups=[m.Group(name="", token_bytes=CHUNK_BYTES // 16)],
                layout=[("model", "tests/tiny")],
            )
        elif isinstance(request, m.Detach):
            yield m.Detached(id=request.id)
        else:
            yield from self._script(request)
