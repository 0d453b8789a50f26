"""Something that listens, and answers by HTTP or otherwise: what a server meets where it was told to ask."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Answering = Callable[[socket.socket], None]


@contextmanager
def answering(answer: Answering) -> Iterator[tuple[int, list[bytes]]]:
    """Something that is connected to, and what it was asked."""
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    try:
                        heard.append(_request(connection))
                        answer(connection)
                    except OSError:
                        pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1], heard
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def _request(connection: socket.socket) -> bytes:
    """A request of HTTP, with its body."""
    heard, length = b"", 0
    while b"\r\n\r\n" not in heard or len(heard.split(b"\r\n\r\n", 1)[1]) < length:
        more = connection.recv(65536)
        if not more:
            break
        heard += more
        said = re.search(rb"content-length: *([0-9]+)", heard, re.IGNORECASE)
        length = 0 if said is None else int(said[1])
    return heard


def says(status: str, body: bytes = b"", *headers: str) -> Answering:
    text = "\r\n".join([f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]).encode() + body
    return lambda connection: connection.sendall(text)


def says_nothing(connection: socket.socket) -> None:
    connection.settimeout(60)
    while connection.recv(65536):
        pass


def says_little_by_little(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    while True:
        connection.sendall(b"X: y\r\n")
        connection.settimeout(0.02)
        try:
            if not connection.recv(65536):
                return
        except TimeoutError:
            pass


def says_without_end(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        connection.sendall(b"[" * 65536)
