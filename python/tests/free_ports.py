"""Ports for those who cannot be told to take any."""

from __future__ import annotations

import random
import socket
from pathlib import Path


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody has now, and that nobody is given who takes any: those come from the kernel's range,
    which NIXL's listeners and every connection draw from.
    """
    first_of_kernel = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    candidates = list(range(10_000, first_of_kernel))
    random.shuffle(candidates)
    ports: list[int] = []
    for port in candidates:
        if len(ports) == count:
            return ports
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        ports.append(port)
    raise RuntimeError(f"{len(ports)} of the ports from 10000 to {first_of_kernel} are free, {count} are wanted")
