"""How long tests wait for what has to come."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

#: Longer than anything takes that works, on a machine that is busy with other things as well.
PATIENCE_S = 120.0
#: Deadlines of daemons for tests that are not about them: a daemon that gets no processor for some seconds is not dead, and
#: what is left of requests when a test is over is not waited for.
DEADLINES = (
    f"pd_peer_timeout_sec={PATIENCE_S:.0f}",
    f"pd_handshake_timeout_sec={PATIENCE_S:.0f}",
    f"pd_commit_timeout_sec={PATIENCE_S:.0f}",
    "pd_shutdown_timeout_sec=1",
)


def eventually(probe: Callable[[], T], pause_s: float = 0.01, left: Callable[[], object] = lambda: None) -> T:
    """What `probe` returns once it is true. `left` says what was seen when it never is."""
    deadline = time.monotonic() + PATIENCE_S
    while not (seen := probe()):
        assert time.monotonic() < deadline, f"it never came true: {left()}"
        time.sleep(pause_s)
    return seen
