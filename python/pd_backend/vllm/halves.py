"""Which half of a server that both prefills and decodes a request is for: its router says."""

from __future__ import annotations

import platform
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any


def is_sent(
    params: Mapping[str, Any] | None,
    own_hosts: Collection[str],
    own_init_ports: Sequence[int],
    max_tokens: int | None = None,
) -> bool:
    """Whether this server prefills the request for another one. Any other request is decoded here.

    A router may send both servers the same `disagg_spec`: it names a receiver, and that one is either another server's,
    or ours, which has the init ports `own_init_ports`, by rank, at any of `own_hosts`. `max_tokens`: of the answer, where this
    server has several engines. These do not know each other's ports: ports of this machine may be another engine's of this server,
    or another server's. What is to be prefilled has one token.
    """
    params = params or {}
    spec = params.get("disagg_spec")
    if spec is None:
        return bool(params.get("do_remote_decode"))
    if not isinstance(spec, Mapping) or spec.get("receiver_host") is None:
        return False
    host, ports = spec["receiver_host"], spec.get("receiver_init_port")
    named = [ports] if isinstance(ports, int) else ports
    ports_are_ours = isinstance(named, (list, tuple)) and list(named[: len(own_init_ports)]) == list(own_init_ports) != []
    if not isinstance(host, str) or host not in own_hosts:
        return True
    of_this_server = max_tokens is not None and max_tokens > 1 and not params.get("do_remote_decode")
    return not (ports_are_ours or of_this_server)


def own_hosts(configured: Iterable[Any]) -> frozenset[str]:
    """What this machine is called: its name, its addresses, and what its configuration says.

    Nobody is asked for a name, because what is compared comes from any client.
    """
    import psutil  # vLLM depends on it; nothing else here does.

    addresses = (address.address for card in psutil.net_if_addrs().values() for address in card)
    names = {"localhost", platform.node(), *(str(name) for name in configured if name)}
    return frozenset(names.union(address.split("%")[0] for address in addresses))
