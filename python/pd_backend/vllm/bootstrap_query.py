"""`GET /query` at a bootstrap port, with a deadline."""

from __future__ import annotations

import http.client
import json
import socket
import time

from .bootstrap import EngineAt, engines_in
from .deadline import answered_by

_LEN_BYTES_MAX = 256 * 1024

Address = tuple[str, int]


def ask(address: Address, answer_s: float) -> dict[int, EngineAt]:
    """The engines that are answered there, by data-parallel rank. Nothing that answers slowly, or without end, is read for long.

    Raises `OSError` where nobody answers in time, `ValueError` for another answer than is expected.
    """
    found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
    deadline = time.monotonic() + answer_s
    connection = http.client.HTTPConnection(*address)
    reached = connection.sock = _connected(found, deadline)
    try:
        with answered_by(deadline, reached, answer_s):
            connection.request("GET", "/query", headers={"Accept": "application/json", "Connection": "close"})
            response = connection.getresponse()
            if response.status != 200:
                raise ValueError(f"it answered with status {response.status}; expected 200")
            text = response.read(_LEN_BYTES_MAX + 1)
    except http.client.HTTPException as error:
        raise ValueError(f"it answered otherwise than HTTP: {type(error).__name__} {error}") from error
    finally:
        connection.close()
        reached.close()
    if len(text) > _LEN_BYTES_MAX:
        raise ValueError(f"it answered with more than {_LEN_BYTES_MAX} bytes")
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it answered what is no JSON: {text[:40]!r}") from error
    return engines_in(answer)


def _connected(found: list[tuple], deadline: float) -> socket.socket:
    """To the first of these addresses that takes the connection."""
    why: OSError = OSError("the name has no address")
    for family, kind, protocol, _, where in found:
        try:
            connection = socket.socket(family, kind, protocol)
        except OSError as error:  # This machine has no addresses of that family.
            why = error
            continue
        try:
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            connection.connect(where)
        except OSError as error:
            connection.close()
            why = error
        else:
            return connection
    raise why
