"""`pd_prefill_hosts`: which hosts decode may ask that a request names. The daemon reads the same list in the same way."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable


class HostList:
    """Names, addresses, and ranges of addresses. A name is in the list by itself: names are not looked up."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._names: set[str] = set()
        self._ranges: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
        for text in texts:
            try:
                self._ranges.append(ipaddress.ip_network(text, strict=False))
            except ValueError:
                self._names.add(text.lower())

    def __contains__(self, host: str) -> bool:
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return host.lower() in self._names
        # An address of version 4 that is written as one of version 6 is the same host.
        mapped = getattr(address, "ipv4_mapped", None)
        return any((mapped or address) in each for each in self._ranges)
