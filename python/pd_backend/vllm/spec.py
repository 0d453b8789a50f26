"""What a router says of a request: LMCache's `kv_transfer_params.disagg_spec`."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..messages import PeerAddress


class SpecError(ValueError):
    """A `disagg_spec` that cannot be used, and why."""


@dataclass(frozen=True)
class DisaggSpec:
    """Whom a request goes to, and what both sides call it: engines number their requests each for itself."""

    req_id: str
    receiver_host: str
    receiver_init_ports: tuple[int, ...]
    receiver_alloc_ports: tuple[int, ...]

    def receiver(self, tp_rank: int) -> PeerAddress:
        """The receiver beside the decode worker of this rank."""
        return PeerAddress(
            host=self.receiver_host,
            init_port=self.receiver_init_ports[tp_rank],
            alloc_port=self.receiver_alloc_ports[tp_rank],
        )


def prefill_spec(params: Mapping[str, Any] | None, tp_size: int) -> DisaggSpec | None:
    """Where a prefill worker sends a request's chunks; None for a request that stays here.

    Raises `SpecError` for one that cannot be followed.
    """
    spec = _spec(params)
    if spec is None:
        return None
    return DisaggSpec(
        _req_id(spec),
        _host(spec.get("receiver_host")),
        _ports(spec, "receiver_init_port", tp_size),
        _ports(spec, "receiver_alloc_port", tp_size),
    )


def decode_req_id(params: Mapping[str, Any] | None) -> str | None:
    """What a decode worker waits for; None where the router does not say, and the chunks are looked up."""
    spec = _spec(params)
    return None if spec is None else _req_id(spec)


def _spec(params: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    spec = (params or {}).get("disagg_spec")
    if spec is None:
        return None
    if not isinstance(spec, Mapping):
        raise SpecError(
            f"disagg_spec = {_shown(spec)}; expected a map with req_id, receiver_host, receiver_init_port and "
            "receiver_alloc_port"
        )
    return spec


def _req_id(spec: Mapping[str, Any]) -> str:
    req_id = spec.get("req_id")
    if not _is_text(req_id, 256):
        raise SpecError(f"disagg_spec.req_id = {_shown(req_id)}; expected a text of 1 to 256 bytes")
    return req_id


def _host(host: Any) -> str:
    # No name that resolves is longer.
    if not _is_text(host, 255):
        raise SpecError(
            f"disagg_spec.receiver_host = {_shown(host)}; expected a host name or address, of 1 to 255 bytes"
        )
    return host


def _ports(spec: Mapping[str, Any], name: str, tp_size: int) -> tuple[int, ...]:
    given = spec.get(name)
    ports = [given] if isinstance(given, int) else given
    valid = isinstance(ports, (list, tuple)) and all(
        isinstance(port, int) and not isinstance(port, bool) and 0 < port < 65536 for port in ports
    )
    if not valid or len(ports) < tp_size:
        raise SpecError(
            f"disagg_spec.{name} = {_shown(given)}; expected {tp_size} ports, one for each tensor-parallel rank"
        )
    return tuple(ports)


def _is_text(given: Any, len_bytes_max: int) -> bool:
    try:
        return isinstance(given, str) and 1 <= len(given.encode()) <= len_bytes_max
    except UnicodeEncodeError:  # JSON can hold halves of surrogate pairs, which the daemon could not be told.
        return False


def _shown(given: Any) -> str:
    """For an error: what a stranger sends may be megabytes long."""
    return reprlib.repr(given)
