"""Ports for those who cannot be told to take any."""

from __future__ import annotations

import random
import socket
from pathlib import Path


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody has now, and that nobody is given who takes any: those come from the kernel's range,
    which NIXL's listeners and every connection draw from.
    """
    ports: list[int] = []
    for port in _candidates():
        if len(ports) == count:
            return ports
        if _is_free(port):
            ports.append(port)
    raise RuntimeError(f"{len(ports)} of the ports from 10000 up are free, {count} are wanted")


def free_ports_in_a_row(count: int) -> int:
    """The first of so many, each one above the other."""
    for port in _candidates():
        if all(_is_free(port + place) for place in range(count)):
            return port
    raise RuntimeError(f"of the ports from 10000 up there are nowhere {count} in a row free")


def _candidates() -> list[int]:
    first_of_kernel = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    candidates = list(range(10_000, first_of_kernel))
    random.shuffle(candidates)
    return candidates


def _is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True
