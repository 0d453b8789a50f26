"""What a router says of a request in `kv_transfer_params`: LMCache's `disagg_spec`, or what NIXL's routers send.

`transfer_id` has what Mooncake's and MoRIIO's send to decode.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..messages import PeerAddress, SourceAddress
from .untrusted import HOST_LEN_BYTES_MAX, NAME_LEN_BYTES_MAX, SpecError, is_text, number, shown

#: Of a router's text, what is shown.
_ERROR_LEN_MAX = 1000


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


@dataclass(frozen=True)
class ParkSpec:
    """A request whose receiver is not known: its chunks are kept for whoever asks for them."""

    #: What the daemon calls it.
    req_id: str
    #: What those call it who will ask.
    ids: tuple[str, ...]
    #: Whether the router wants to be told where that is.
    is_answered: bool = True
    #: Nobody will, for nobody is told: they are pushed to a receiver that is guessed, and looked up there.
    unsolicited: bool = False


@dataclass(frozen=True)
class RemoteSpec:
    """Where a request's chunks are parked, and what the prefill server calls it."""

    host: str
    #: Of the rendezvous ports, by rank.
    ports: tuple[int, ...]
    ids: tuple[str, ...]
    #: Prefill had ended when it was asked for: what is not known there never comes.
    in_turn: bool
    #: The prefill server's own name, if it is said.
    engine: str | None = None

    def source(self, tp_rank: int) -> SourceAddress:
        """The sender beside the prefill worker of this rank."""
        return SourceAddress(host=self.host, port=self.ports[tp_rank])


@dataclass(frozen=True)
class Rendezvous:
    """Where a prefill server is asked for what it has parked, and what its routers are told of it."""

    host: str
    #: By rank.
    ports: tuple[int, ...]
    engine: str
    #: `pull` or `push`.
    transfer_mode: str

    @property
    def engine_id(self) -> str:
        """The server's name as routers are told it. All ranks' ports are in it, for those that keep nothing else of ours."""
        return engine_id(self.engine, self.ports)


def own_name(kind: str, request_id: str) -> str:
    """What the daemon calls a request to which a router gives no name: no other request's, however long the engine's id is, of which
    a client may write the beginning.
    """
    name = f"{kind} {request_id}"
    if len(name.encode("utf-8", "replace")) <= NAME_LEN_BYTES_MAX:
        return name
    return f"{kind} {hashlib.blake2b(request_id.encode('utf-8', 'replace'), digest_size=16).hexdigest()}"


def park_spec(params: Mapping[str, Any] | None, request_id: str) -> ParkSpec | None:
    """Whether a router that names no receiver wants the request's chunks kept; None for any other request."""
    params = params or {}
    if not params.get("do_remote_decode"):
        return None
    names, transfer_id = _names(request_id), params.get("transfer_id")
    if is_text(transfer_id):
        names = (transfer_id, *names)
    # Mooncake's routers ask at the bootstrap port instead. MoRIIO's give a `transfer_id` too, and what NIXL's give.
    is_answered = "transfer_id" not in params or "remote_engine_id" in params
    # No router's name begins so: these are the engine's own.
    return ParkSpec(own_name("parked", request_id), names, is_answered)


def kept_spec(request_id: str) -> ParkSpec:
    """As `park_spec`, of what decode keeps for the conversation's next turn, which is asked for by its keys. No other request has a name
    of it, so what becomes of it is no news of theirs.
    """
    name = own_name("kept", request_id)
    return ParkSpec(name, (name,))


def unsolicited_spec(params: Mapping[str, Any] | None, request_id: str, max_tokens: int) -> ParkSpec | None:
    """Whether a router that says nothing may have sent this to be prefilled: it wants one token."""
    if params or max_tokens != 1:
        return None
    return ParkSpec(own_name("unsolicited", request_id), (), is_answered=False, unsolicited=True)


def _names(request_id: str) -> tuple[str, ...]:
    """What decode may call a request that the engine calls so: routers that ask both servers at once know the header
    `X-Request-Id` alone, of which vLLM makes `cmpl-HEADER-INDEX-SUFFIX` or `chatcmpl-HEADER-SUFFIX`.
    """
    base = re.sub(r"-[0-9a-f]{8}$", "", request_id)
    header = re.sub(r"^(chat)?cmpl-", "", base)
    names = dict.fromkeys((request_id, base, header, re.sub(r"-[0-9]+$", "", header)))
    return tuple(name[:NAME_LEN_BYTES_MAX] for name in names if name)


def parked_answer(
    request_id: str, at: Rendezvous, block_ids: Sequence[int], tokens: int
) -> dict[str, Any]:
    """What prefill answers: NIXL's fields, which routers copy, and the ports of all ranks."""
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_block_ids": [list(block_ids)],
        "remote_engine_id": at.engine_id,
        "remote_request_id": request_id,
        "remote_host": at.host,
        "remote_port": at.ports[0],
        "tp_size": len(at.ports),
        "dcp_size": 1,
        "pp_size": 1,
        "remote_num_tokens": tokens,
        "remote_blocks_expiry_time": None,
        "transfer_mode": at.transfer_mode,
        "pd": {"v": 1, "ports": list(at.ports)},
    }


def remote_spec(params: Mapping[str, Any] | None, tp_size: int) -> RemoteSpec | None:
    """Where a decode server asks for a request's chunks; None where the router says nothing of it.

    Raises `SpecError` for what cannot be followed.
    """
    params = params or {}
    if not params.get("do_remote_prefill") or params.get("disagg_spec") is not None:
        return None
    return _remote(params, tp_size)


def turn_spec(params: Mapping[str, Any] | None, tp_size: int) -> RemoteSpec | None:
    """Where a router says that prefill finds the turn before of a request's conversation: it sends what decode answered then,
    with the two flags exchanged. None where it says nothing of it, or what cannot be followed.
    """
    params = params or {}
    if not params.get("do_remote_decode") or params.get("remote_host") is None:
        return None
    if "transfer_id" in params or params.get("disagg_spec") is not None:
        return None  # Other dialects, in which this is where the decode server is.
    try:
        return _remote(params, tp_size)
    except SpecError:
        return None


def _remote(params: Mapping[str, Any], tp_size: int) -> RemoteSpec:
    host, size = params.get("remote_host"), params.get("tp_size")
    if not is_text(host, HOST_LEN_BYTES_MAX):
        raise SpecError(
            f"remote_host = {shown(host)}; expected a host name or address, of 1 to {HOST_LEN_BYTES_MAX} bytes"
        )
    if size is not None and size != tp_size:
        raise SpecError(f"tp_size = {shown(size)} at prefill, {tp_size} here; start both with the same")
    ids, engine = params.get("remote_request_id"), params.get("remote_engine_id")
    return RemoteSpec(
        host,
        _rendezvous(params, tp_size),
        (ids,) if is_text(ids) else (),
        "remote_num_tokens" in params,
        engine if isinstance(engine, str) else None,
    )


def _rendezvous(params: Mapping[str, Any], tp_size: int) -> tuple[int, ...]:
    ours = params.get("pd")
    if isinstance(ours, Mapping) and _are_ports(ours.get("ports"), tp_size):
        return tuple(ours["ports"])
    engine = params.get("remote_engine_id")
    if is_ours(engine):
        ports = [number(text) for text in engine.rsplit(":", 1)[-1].split("+")]
        if _are_ports(ports, tp_size):
            return tuple(ports)
    port = params.get("remote_port")
    first = number(port) if isinstance(port, str) else port
    if _are_ports([first], 1) and first + tp_size - 1 < 65536:
        return tuple(range(first, first + tp_size))
    raise SpecError(f"remote_port = {shown(port)}; expected the rendezvous port of prefill's first rank")


#: How the id of an engine begins that parks chunks for ours.
_ENGINE = "pd1:"


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


def decode_req_id(params: Mapping[str, Any] | None, own_ports: Sequence[int] | None = None) -> str | None:
    """What a decode worker waits for; None where the router does not say, and the chunks are looked up.

    `own_ports`: of the handshakes with this engine's receivers, where its server has several engines. What is sent to another
    engine's receivers never comes here. Raises `SpecError` unless these are named.
    """
    spec = _spec(params)
    if spec is None:
        return None
    req_id = _req_id(spec)
    if own_ports is not None:
        given = spec.get("receiver_init_port")
        ports = [given] if isinstance(given, int) else given
        if not _are_ports(ports, len(own_ports)) or list(ports[: len(own_ports)]) != list(own_ports):
            raise SpecError(
                f"disagg_spec.receiver_init_port = {shown(given)}; this data-parallel rank has {list(own_ports)}: ask the rank "
                "whose receivers are named (header X-data-parallel-rank), and name them to decode as well"
            )
    return req_id


def why_not_sent(params: Mapping[str, Any] | None) -> str | None:
    """Why the chunks that a `disagg_spec` names do not come, where the router was told and passes that on; None where it says nothing of
    it. The field is that of prefill's own answer.
    """
    error = (params or {}).get("error")
    return str(error)[:_ERROR_LEN_MAX] if error else None


def was_sent(params: Mapping[str, Any] | None) -> bool:
    """Whether the router says that all chunks of the request have been reported across: what is not here by then does not come."""
    return (params or {}).get("sent") is True


def _spec(params: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    spec = (params or {}).get("disagg_spec")
    if spec is None:
        return None
    if not isinstance(spec, Mapping):
        raise SpecError(
            f"disagg_spec = {shown(spec)}; expected a map with req_id, receiver_host, receiver_init_port and "
            "receiver_alloc_port"
        )
    return spec


def _req_id(spec: Mapping[str, Any]) -> str:
    req_id = spec.get("req_id")
    if not is_text(req_id):
        raise SpecError(f"disagg_spec.req_id = {shown(req_id)}; expected a text of 1 to {NAME_LEN_BYTES_MAX} bytes")
    return req_id


def _host(host: Any) -> str:
    if not is_text(host, HOST_LEN_BYTES_MAX):
        raise SpecError(
            f"disagg_spec.receiver_host = {shown(host)}; expected a host name or address, of 1 to {HOST_LEN_BYTES_MAX} bytes"
        )
    return host


def _ports(spec: Mapping[str, Any], name: str, tp_size: int) -> tuple[int, ...]:
    given = spec.get(name)
    ports = [given] if isinstance(given, int) else given
    if not _are_ports(ports, tp_size):
        raise SpecError(
            f"disagg_spec.{name} = {shown(given)}; expected {tp_size} ports, one for each tensor-parallel rank"
        )
    return tuple(ports)


def engine_id(engine: str, ports: Sequence[int]) -> str:
    """A server's name as routers are told it: vLLM's, and the rendezvous ports of its ranks."""
    return f"{_ENGINE}{engine}:{'+'.join(map(str, ports))}"


def is_ours(engine: Any) -> bool:
    """Whether this is such a name."""
    return isinstance(engine, str) and engine.startswith(_ENGINE)


def _are_ports(given: Any, count: int) -> bool:
    """Whether these are ports, so many at least."""
    return (
        isinstance(given, (list, tuple))
        and len(given) >= count
        and all(isinstance(port, int) and not isinstance(port, bool) and 0 < port < 65536 for port in given)
    )
