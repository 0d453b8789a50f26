"""An end for connections: a timeout of a socket begins again with each byte, and who answers slowly would be read for ever."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def answered_by(deadline: float, connection: socket.socket, within_s: float) -> Iterator[None]:
    """Within it the connection has time until `deadline`, by the monotonic clock: then both of its directions end.

    Raises `TimeoutError` that names `within_s` if it came to that, and `OSError` where there is no thread for it.
    """
    over = threading.Event()

    def end() -> None:
        over.set()
        try:
            connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # It has ended by itself.

    late = TimeoutError(f"no answer within {within_s:g} s")
    timer = threading.Timer(max(0.0, deadline - time.monotonic()), end)
    timer.daemon = True
    try:
        timer.start()
    except RuntimeError as error:
        raise OSError(str(error)) from error
    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        raise late if over.is_set() or isinstance(error, TimeoutError) else error
    finally:
        timer.cancel()
    if over.is_set():
        raise late
