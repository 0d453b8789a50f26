"""What routers of Mooncake's and MoRIIO's dialects say of a request: a `transfer_id`, which both servers are told."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .bootstrap import http_address
from .spec import is_ours
from .untrusted import NAME_LEN_BYTES_MAX, SpecError, is_text, shown


@dataclass(frozen=True)
class TransferSpec:
    """A decode request whose chunks are parked, or will be, at a prefill server that says by HTTP where it is asked."""

    #: Of `GET /query`.
    host: str
    port: int
    #: What the router calls the engine, if it says.
    engine: str | None
    ids: tuple[str, ...]


def transfer_spec(
    params: Mapping[str, Any] | None, request_id: str, bootstrap_port: int | None
) -> TransferSpec | None:
    """Which prefill server a decode server asks where the request's chunks are; None for other dialects.

    Mooncake's routers name the address. MoRIIO's name the host alone, in the request's id: it is asked at
    `bootstrap_port`. Raises `SpecError` for what cannot be followed.
    """
    params = params or {}
    if not params.get("do_remote_prefill") or params.get("disagg_spec") is not None or "transfer_id" not in params:
        return None
    engine = params.get("remote_engine_id")
    if is_ours(engine):
        return None  # It came from prefill's own answer, which names the ports.
    transfer_id, address = params["transfer_id"], params.get("remote_bootstrap_addr")
    if not is_text(transfer_id):
        raise SpecError(f"transfer_id = {shown(transfer_id)}; expected a text of 1 to {NAME_LEN_BYTES_MAX} bytes")
    if address is not None:
        try:
            host, port = http_address(address)
        except SpecError as error:
            raise SpecError(f"remote_bootstrap_addr: {error}") from error
    else:
        host, port = _host(params, request_id), bootstrap_port
        if port is None:
            raise SpecError(
                f"its router names the prefill host {shown(host)} and no port (MoRIIO's dialect); set bootstrap_port, to "
                "the same at prefill and decode"
            )
    return TransferSpec(host, port, engine if is_text(engine) else None, (transfer_id,))


def _host(params: Mapping[str, Any], request_id: str) -> str:
    named = params.get("remote_host")
    if named is None:
        # MoRIIO's own servers have themselves called `host:H,handshake:P,notify:P`, others `H:P`.
        pair = re.search(r"___prefill_addr_(.{1,300}?)___decode_addr_", request_id[:2048])
        named = "" if pair is None else pair[1].removeprefix("http://")
        if named.startswith("host:"):
            named = named.removeprefix("host:").split(",", 1)[0]
        else:
            named = re.sub(r":[0-9]+$", "", named)
        named = named.strip("[]")
    try:
        bracketed = f"[{named}]" if isinstance(named, str) and ":" in named else named
        return http_address(f"http://{bracketed}:1" if isinstance(named, str) else None)[0]
    except SpecError as error:
        raise SpecError(
            "its router gives a transfer_id, and neither remote_bootstrap_addr nor a host of prefill (seen: "
            f"{shown(named)})"
        ) from error
