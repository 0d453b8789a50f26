"""What routers and their clients send, and what answers where they say: how long it may be, and how it is shown."""

from __future__ import annotations

import reprlib
from typing import Any

#: Of a name: no daemon takes a longer one.
NAME_LEN_BYTES_MAX = 256
#: Of a host: no name that resolves is longer.
HOST_LEN_BYTES_MAX = 255
#: Of an address with its scheme and port.
ADDRESS_LEN_MAX = 300


class SpecError(ValueError):
    """What was sent cannot be followed, and why."""


def is_text(given: Any, len_bytes_max: int = NAME_LEN_BYTES_MAX) -> bool:
    """Whether this is a text, not an empty one, that a daemon can be told."""
    try:
        return isinstance(given, str) and 1 <= len(given.encode()) <= len_bytes_max
    except UnicodeEncodeError:  # JSON can hold halves of surrogate pairs.
        return False


def is_host(given: Any) -> bool:
    """Whether this can be a host's name or address, without the brackets of one of version 6."""
    return is_text(given, HOST_LEN_BYTES_MAX) and given.isascii() and all(c.isalnum() or c in ".-_:%" for c in given)


def number(text: Any) -> int | None:
    """A port or a rank that is written as text, which may be of any length."""
    written = isinstance(text, str) and text.isascii() and text.isdigit() and len(text) <= 5
    return int(text) if written else None


def shown(given: Any) -> str:
    """For an error: what was sent may be megabytes long."""
    return reprlib.repr(given)


def one_line(text: str) -> str:
    """Of an error that may quote what was answered: for a log."""
    return "".join(each if each.isprintable() else "?" for each in text[:200])
