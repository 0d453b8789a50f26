"""Order between an engine's stream and the daemon, without anybody waiting: events that the daemon polls."""

from __future__ import annotations

from collections import deque

from .cuda import Device, Event, current_stream
from .errors import CudaError, Kind, RequestRefused

#: Messages whose stream has not got there yet.
WAITING_MAX = 4096


class StreamOrder:
    """The events of one client."""

    def __init__(self, device: Device) -> None:
        self._device = device
        #: The stream whose work is waited for; None: torch's current one, or the legacy default stream.
        self.stream: int | None = None
        self._free: list[Event] = []
        self._told: deque[Event] = deque()

    def mark(self, stream: int | None) -> str:
        """Records an event behind what is on the stream now; its handle, for the daemon."""
        event = self._take()
        chosen = self.stream if stream is None else stream
        event.record(current_stream(self._device.ordinal) if chosen is None else chosen)
        self._told.append(event)
        return event.handle

    def close(self) -> None:
        """Destroys the events."""
        for event in [*self._free, *self._told]:
            try:
                event.close()
            except CudaError:
                pass  # A device that is lost.
        self._free, self._told = [], deque()

    def _take(self) -> Event:
        # An event that the GPU has passed can be recorded again: for a daemon that has not looked yet it then stands
        # for more than it has to, never for less.
        while self._told and self._told[0].is_done():
            self._free.append(self._told.popleft())
        if self._free:
            return self._free.pop()
        if len(self._told) >= WAITING_MAX:
            text = f"{WAITING_MAX} messages wait for the engine's stream: let it get on first"
            raise RequestRefused(Kind.LIMIT, text)
        return Event(self._device)
