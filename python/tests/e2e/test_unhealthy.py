"""A server that has lost its KV path for good: the very last tests, for they end a server."""

from __future__ import annotations

import os
import signal
import urllib.error
import urllib.request

from conftest import Deployment
from harness import Server, until


def health(server: Server) -> int | None:
    """What it answers to a probe; None where nobody answers."""
    try:
        with urllib.request.urlopen(server.url + "/health", timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def test_a_server_is_unhealthy_once_its_daemon_is_given_up_and_not_before(deployment: Deployment) -> None:
    # Broken in production: every request of a server fails, and whatever looks after it keeps it, because it says 200.
    server = deployment.decode
    given_up = "is not started again"
    while given_up not in server.log():
        pid = int(server.daemon_ready()["pid"])
        assert health(server) == 200, "a daemon that is started again is no reason"
        os.kill(pid, signal.SIGKILL)
        until(
            lambda: int(server.daemon_ready()["pid"]) != pid or given_up in server.log(),
            "its daemon is neither started again nor given up",
        )
    until(lambda: health(server) != 200, "it says that it is healthy")
    assert "the KV path of this engine is given up" in server.log()
    assert health(deployment.small_decode) == 200, "the others go on"
