"""The client of a worker's daemon and its mapped buffer: one of each, for all that use them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from ..client import Client
from ..errors import DaemonGone, PdError
from .supervisor import Supervisor

C = TypeVar("C", bound=Client)


class Memory(Protocol):
    """The engine's KV memory: a `PagedKv`, or a `PagedGroups`."""

    @property
    def groups(self) -> Sequence[Any]:
        """What copies the blocks of each group of layers."""

    def memory(self, buffer: Any) -> Any:
        """A daemon's buffer, as its copies take parts of it."""


class Attachment(Generic[C]):
    """What a worker that sends, one that receives, or both of them have of their daemon. For the thread in which they step.

    A client that one of them loses is lost to the other as well, before it is closed: they share its buffer.
    """

    def __init__(self, supervisor: Supervisor[C], memory: Memory) -> None:
        self._supervisor = supervisor
        self._memory = memory
        #: From which and into which the buffer's chunks are copied.
        self.groups = memory.groups
        #: None while there is no daemon, or none that was looked for.
        self.client: C | None = None
        self.buffer: Any = None
        self._users: list[Callable[[C, PdError], None]] = []

    def use(self, lost: Callable[[C, PdError], None]) -> None:
        """One more uses it, and attaches now. `lost` is called with each client that is of no more use, and why.

        Raises as `attach`, and what the buffer and the engine's memory do not have in common.
        """
        self._users.append(lost)
        self.attach()

    @property
    def is_shared(self) -> bool:
        """Whether what one of its users hears may have been for another one."""
        return len(self._users) > 1

    def attach(self) -> C:
        """The client of the daemon that runs. Never waits. Raises why there is none."""
        client = self._supervisor.client()
        if client is not self.client:
            self.let_go(DaemonGone("the daemon that had its chunks has ended; another one was started since"))
            self.client = client
            self.buffer = self._memory.memory(client.buffer.range(0, client.buffer.len_bytes))
        return client

    def let_go(self, why: PdError) -> None:
        """Nothing more is heard through the client: what was asked of its daemon ends here."""
        client, self.client, self.buffer = self.client, None, None
        if client is None:
            return
        for lost in self._users:
            lost(client, why)
        self._supervisor.lost(client, why)

    def close(self) -> None:
        """Ends the daemon. What is under way there ends by its own rules. Closing twice does nothing."""
        self._supervisor.close()
