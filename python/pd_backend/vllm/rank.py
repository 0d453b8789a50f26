"""Which of a server's workers a daemon is beside, and which of the ports that its configuration names are its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_PORT_MAX = 65535


class PortError(ValueError):
    """A configured port or list of ports in which there is none for a rank."""


@dataclass(frozen=True)
class Rank:
    """One worker of a server, by vLLM's numbers: of its engine among the server's, and of the worker in that engine."""

    #: Over all hosts, also where each host or each rank has a server of its own.
    data: int = 0
    tensor: int = 0
    tensor_size: int = 1

    @property
    def number(self) -> int:
        """From 0 up, over all workers of all engines: ports are counted by it."""
        return self.data * self.tensor_size + self.tensor

    def port(self, name: str, ports: Sequence[int]) -> int:
        """This rank's, of what the configuration says under `name`: one port is that of the first rank, and the others take
        the next ones; of several each rank has its own. 0 is any free port. Raises `PortError`.
        """
        if len(ports) == 1:
            port = ports[0] and ports[0] + self.number
        elif self.number < len(ports):
            port = ports[self.number]
        else:
            raise PortError(
                f"{name} = {list(ports)} has no port for {self}; write a port for each rank, or one port alone, from which "
                "the ranks count up"
            )
        if port > _PORT_MAX:
            raise PortError(f"{name} = {ports[0]} leaves {self} the port {port}; expected at most {_PORT_MAX}")
        return port

    def __str__(self) -> str:
        return f"rank {self.number} (data parallel {self.data}, tensor parallel {self.tensor})"


def port_args(key: str, port: int, tensor: int) -> list[str]:
    """Tells a daemon one of its ports. It looks for it where its tensor-parallel rank is in the list. The others are not said: one
    port of two ranks is refused.
    """
    return ["--set", f"{key}=[{', '.join(['0'] * tensor + [str(port)])}]"]
