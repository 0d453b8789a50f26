"""A port in front of a server, through which requests go: they can be held there, or answered in its place."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

_ERROR = b'{"error": {"message": "out of order", "type": "InternalServerError", "code": 500}}'
_ANSWER = b"HTTP/1.1 500 Internal Server Error\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"


class Gate:
    """Passes bytes on, both ways. That either end has gone is passed on as well."""

    def __init__(self, url: str) -> None:
        #: The server behind it, which may be another one from now on.
        self.behind = url
        #: Requests that are held.
        self.held = 0
        self._open = threading.Event()
        self._open.set()
        self._refusing = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Requests that come meanwhile go on afterwards, if they are wanted still."""
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Requests that come meanwhile are answered with an error."""
        self._refusing = True
        try:
            yield
        finally:
            self._refusing = False

    def close(self) -> None:
        self._open.set()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        server: _Server | None = None
        try:
            while piece := client.recv(1 << 16):
                # A head is sent at once, and what else begins so is in no body here.
                if piece.startswith(b"POST /v1/"):
                    # While a request is held, a server would close the connection that has been idle.
                    if server is not None:
                        server.close()
                    server = None
                    if not self._admitted(client):
                        break
                if server is None:
                    server = _Server(self.behind, client)
                server.connection.sendall(piece)
        except OSError:
            pass
        if server is not None:
            server.close()
        client.close()

    def _admitted(self, client: socket.socket) -> bool:
        if self._refusing:
            client.sendall(_ANSWER % (len(_ERROR), _ERROR))
            return False
        self.held += 1
        try:
            while not self._open.wait(0.01):
                if _gone(client):
                    return False
        finally:
            self.held -= 1
        return True


class _Server:
    """A connection to a server, whose answers go to a client."""

    def __init__(self, url: str, client: socket.socket) -> None:
        at = urlsplit(url)
        self.connection = socket.create_connection((at.hostname, at.port))
        self._client = client
        self._closed = threading.Event()
        self._answering = threading.Thread(target=self._answer, daemon=True)
        self._answering.start()

    def close(self) -> None:
        """The client hears no more of this one."""
        self._closed.set()
        _end(self.connection)
        self._answering.join()
        self.connection.close()

    def _answer(self) -> None:
        try:
            while piece := self.connection.recv(1 << 16):
                self._client.sendall(piece)
        except OSError:
            pass
        if not self._closed.is_set():
            _end(self._client)


def _end(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


def _gone(client: socket.socket) -> bool:
    try:
        return client.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
