"""The dialect of vllm-ascend's layerwise proxy: decode is asked first, and has the router ask prefill.

The router names a metaserver. Decode posts what prefill is to be told, which the router passes on as it is: so it says there where
its receivers are, as LMCache's routers do. The router answers once prefill has ended.
"""

from __future__ import annotations

import http.client
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from .deadline import answered_by
from .hosts import HostList
from .spec import DisaggSpec
from .threads import Threads
from .untrusted import SpecError, is_host, one_line, shown

#: How many routers' answers are waited for at a time. Each takes as long as prefill does.
_POSTS_MAX = 256
#: How many of them at one host, which any client can name.
_POSTS_OF_ONE_HOST_MAX = 128
#: How long chunks may come after the router has said that prefill has ended.
_AFTER_S = 10.0
_CONNECT_S = 3.0


@dataclass
class Post:
    """What was posted, and what comes of it. Of a thread, which writes `ended` last."""

    error: str | None = None
    ended: float | None = None
    #: The router has asked this very server to prefill: nothing is sent, and the engine's own cache has it then.
    is_here: bool = False

    def check(self) -> None:
        """Raises `SpecError` if no chunks are going to come of it."""
        if self.ended is None:
            return
        if self.error is not None:
            raise SpecError(f"its metaserver: {self.error}")
        if self.is_here:
            raise SpecError("its router had it prefilled by this very server")
        if time.monotonic() - self.ended > _AFTER_S:
            raise SpecError(f"its router said {_AFTER_S:g} s ago that prefill has ended, and nothing came; see prefill's log")


class Metaservers:
    """Has routers ask prefill, each in a thread. For the scheduler's thread."""

    def __init__(
        self, receivers: Callable[[str], DisaggSpec], wait_s: float = 120.0, hosts: HostList | None = None
    ) -> None:
        """`receivers`: where chunks of a request of this name are to be sent; `wait_s`: the longest that a router may take to
        answer; `hosts`: those that may be asked, None for any.
        """
        self._receivers = receivers
        self._wait_s = wait_s
        self._hosts = hosts
        what = "requests are being prefilled by way of a metaserver"
        self._threads = Threads("pd metaserver", what, _POSTS_MAX, _POSTS_OF_ONE_HOST_MAX)

    def post(self, url: str, request_id: str, req_id: str) -> Post:
        """Has prefill asked to send a request's chunks here, as `req_id`. Raises `SpecError` for what is not asked."""
        host, port, path = _parts(url)
        if self._hosts is not None and host not in self._hosts:
            raise SpecError(f"its metaserver's host {host} is not among pd_prefill_hosts")
        body = json.dumps(_message(request_id, self._receivers(req_id))).encode()
        post = Post()

        def ask() -> None:
            try:
                _post((host, port), path, body, self._wait_s)
            except (OSError, http.client.HTTPException, ValueError) as error:
                post.error = one_line(str(error) or type(error).__name__)
            finally:
                post.ended = time.monotonic()

        self._threads.start(host, ask)
        return post


def metaserver_of(params: Mapping[str, Any] | None) -> str | None:
    """Where a request's router is asked to ask prefill; None for other dialects. Raises `SpecError` for no such address."""
    params = params or {}
    if not params.get("do_remote_prefill") or params.get("disagg_spec") is not None or "metaserver" not in params:
        return None
    _parts(params["metaserver"])
    return params["metaserver"]


def _parts(url: Any) -> tuple[str, int, str]:
    """Host, port and path."""
    try:
        parts = urlsplit(url) if isinstance(url, str) and len(url) <= 1000 and url.isascii() and url.isprintable() else None
        port = None if parts is None else parts.port or 80
    except ValueError:
        parts = port = None
    if (
        parts is None or port is None or parts.scheme != "http" or not parts.hostname or parts.username is not None
        or not is_host(parts.hostname) or " " in parts.path
    ):
        raise SpecError(f"metaserver = {shown(url)}; expected an address such as http://10.0.0.1:8000/v1/metaserver")
    return parts.hostname, port, parts.path or "/"


def _message(request_id: str, receivers: DisaggSpec) -> dict[str, Any]:
    """What prefill is told. The router knows the request by its name without the suffix that vLLM has appended."""
    return {
        "request_id": re.sub(r"-[0-9a-f]{8}$", "", request_id),
        "do_remote_prefill": False,
        "do_remote_decode": True,
        "remote_block_ids": [[]],
        "remote_engine_id": receivers.req_id,
        "remote_host": receivers.receiver_host,
        "remote_port": receivers.receiver_init_ports[0],
        "remote_tp_size": len(receivers.receiver_init_ports),
        "disagg_spec": {
            "req_id": receivers.req_id,
            "receiver_host": receivers.receiver_host,
            "receiver_init_port": list(receivers.receiver_init_ports),
            "receiver_alloc_port": list(receivers.receiver_alloc_ports),
        },
    }


def _post(address: tuple[str, int], path: str, body: bytes, wait_s: float) -> None:
    """Returns once it is answered with 2xx. What is answered besides is not read."""
    connection = http.client.HTTPConnection(*address, timeout=_CONNECT_S)
    connection.connect()
    reached = connection.sock
    reached.settimeout(wait_s)
    try:
        with answered_by(time.monotonic() + wait_s, reached, wait_s):
            connection.request("POST", path, body, {"Content-Type": "application/json", "Connection": "close"})
            status = connection.getresponse().status
    finally:
        connection.close()
        reached.close()
    if not 200 <= status < 300:
        raise ValueError(f"it answered with status {status}; expected 200")
