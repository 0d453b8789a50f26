"""What a prefill server answers to `GET /query`, as routers of Mooncake's dialect and decode servers read it.

    {"0": {"engine_id": "...", "worker_addr": {"0": {"0": "tcp://10.0.0.1:5600"}}}}

By data-parallel rank: the engine's id, and by tensor-parallel and pipeline rank where that worker is asked. Here this is the
rendezvous port.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from .untrusted import ADDRESS_LEN_MAX, NAME_LEN_BYTES_MAX, SpecError, is_host, is_text, number, shown

#: Where Mooncake's prefill servers are asked.
MOONCAKE_PORT = 8998

_ENGINES_MAX = 1024
_RANKS_MAX = 256


@dataclass(frozen=True)
class EngineAt:
    """The engine of a data-parallel rank, and where its workers are asked for what they have parked."""

    engine: str
    host: str
    #: By tensor-parallel rank.
    ports: tuple[int, ...]


def query_answer(engines: Mapping[int, EngineAt]) -> dict[str, Any]:
    """What is answered, by data-parallel rank."""
    return {
        str(rank): {
            "engine_id": at.engine,
            "worker_addr": {
                str(worker): {"0": f"tcp://{_bracketed(at.host)}:{port}"} for worker, port in enumerate(at.ports)
            },
        }
        for rank, at in sorted(engines.items())
    }


def engines_in(answer: Any) -> dict[int, EngineAt]:
    """The engines of an answer, by data-parallel rank. Raises `SpecError`."""
    if not isinstance(answer, Mapping) or not 1 <= len(answer) <= _ENGINES_MAX:
        raise SpecError(f"it answered {shown(answer)}; expected a map of 1 to {_ENGINES_MAX} engines by rank")
    return {_rank(rank): _engine(entry) for rank, entry in answer.items()}


def _engine(entry: Any) -> EngineAt:
    engine = entry.get("engine_id") if isinstance(entry, Mapping) else None
    if not is_text(engine):
        raise SpecError(f"engine_id = {shown(engine)}; expected a text of 1 to {NAME_LEN_BYTES_MAX} bytes")
    workers = entry.get("worker_addr")
    if not isinstance(workers, Mapping) or not 1 <= len(workers) <= _RANKS_MAX:
        raise SpecError(f"worker_addr = {shown(workers)}; expected a map of 1 to {_RANKS_MAX} workers by rank")
    by_rank = {_rank(rank): _worker(stages) for rank, stages in workers.items()}
    if sorted(by_rank) != list(range(len(by_rank))):
        raise SpecError(f"worker_addr has the ranks {shown(sorted(by_rank))}; expected all from 0 on")
    hosts = {host for host, _ in by_rank.values()}
    if len(hosts) != 1:
        raise SpecError(f"the workers of {shown(engine)} are on {shown(sorted(hosts))}; expected one host")
    return EngineAt(engine, hosts.pop(), tuple(by_rank[rank][1] for rank in range(len(by_rank))))


def _worker(stages: Any) -> tuple[str, int]:
    """Host and port of a worker, of which there is one: a connector that sends all layers together has no others."""
    if not isinstance(stages, Mapping) or list(stages) != ["0"]:
        raise SpecError(f"a worker is at {shown(stages)}; expected the address of pipeline rank 0, and no other")
    (address,) = stages.values()
    try:
        parts = urlsplit(address) if isinstance(address, str) and len(address) <= ADDRESS_LEN_MAX else None
        found = None if parts is None else (parts.scheme, parts.hostname, parts.port)
    except ValueError:
        found = None
    if found is None or found[0] != "tcp" or not found[1] or not found[2]:
        raise SpecError(f"a worker is at {shown(address)}; expected tcp://HOST:PORT")
    return found[1], found[2]


def http_address(given: Any) -> tuple[str, int]:
    """Host and port of `http://HOST:PORT`. Raises `SpecError`."""
    try:
        parts = urlsplit(given) if isinstance(given, str) and len(given) <= ADDRESS_LEN_MAX and given.isprintable() else None
        port = None if parts is None else parts.port
    except ValueError:
        parts = port = None
    if (
        parts is None or parts.scheme != "http" or not parts.hostname or not port or parts.username is not None
        or parts.path not in ("", "/") or parts.query or parts.fragment or not is_host(parts.hostname)
    ):
        raise SpecError(f"{shown(given)} is no address such as http://10.0.0.1:{MOONCAKE_PORT}")
    return parts.hostname, port


def _rank(text: Any) -> int:
    rank = number(text)
    if rank is None:
        raise SpecError(f"rank {shown(text)}; expected a whole number from 0 up")
    return rank


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host
