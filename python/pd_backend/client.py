"""What both clients share: `SenderClient` and `ReceiverClient` are in files of their own."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from . import messages as m
from ._channel import Channel
from ._silence import Silence
from .buffer import PdBuffer
from .cuda_buffer import CudaBuffer, CudaView
from .cuda_order import StreamOrder
from .errors import (
    ClientMisuse,
    CudaError,
    DaemonGone,
    DaemonLost,
    MappingError,
    PdError,
    ProtocolError,
    ReplyTimeout,
    RequestRefused,
)

if TYPE_CHECKING:
    from typing_extensions import Self  # typing.Self is newer than Python 3.10

T = TypeVar("T")


class Pending(Generic[T]):
    """A reply that has not come yet. Ask `done()` between an engine's steps, or wait for it with `result()`."""

    def __init__(self, client: Client, request: m.Request, expected: type, convert: Callable[[Any], T], wait_s: float):
        self._client = client
        self._request = request
        self._expected = expected
        self._convert = convert
        self._deadline = time.monotonic() + wait_s
        self._reply: m.Answer | None = None
        self._abandoned = False

    def done(self) -> bool:
        """Whether `result()` would return, or raise, at once. Never waits.

        So it is, too, once a daemon that lives and says nothing (it was stopped, or hangs) has had its time.

        Raises `DaemonLost` when no reply can come any more.
        """
        if self._reply is None:
            self._client._pump(0.0)
        return self._reply is not None or time.monotonic() >= self._deadline

    def result(self, timeout_s: float | None = None) -> T:
        """The reply; waits for it, by default until the daemon has had a little longer than it would wait itself.

        Raises `RequestRefused` for an `error`, `ReplyTimeout` when nothing came in time (the reply is then abandoned:
        what it brings late is given back), `DaemonLost` when the daemon has ended or answers nobody.
        """
        deadline = self._deadline if timeout_s is None else time.monotonic() + timeout_s
        while self._reply is None:
            left_s = deadline - time.monotonic()
            self._client._pump(max(0.0, left_s))
            if self._reply is None and left_s <= 0:
                self.abandon()
                raise ReplyTimeout(
                    f"no reply to {type(self._request).__name__.lower()} from {self._client.endpoint} in time"
                )
        if isinstance(self._reply, m.Error):
            raise RequestRefused(self._reply.kind, self._reply.text, self._reply.peer)
        if not isinstance(self._reply, self._expected):
            raise ProtocolError(
                f"{self._client.endpoint} answered {type(self._request).__name__} with {type(self._reply).__name__}"
            )
        return self._convert(self._reply)

    def abandon(self) -> None:
        """Nobody will ask for the result. A late grant is cancelled and a late lease released when it comes in."""
        self._abandoned = True
        if self._reply is not None:
            self._client._give_back(self._reply)

    def _resolve(self, reply: m.Answer) -> bool:
        """Whether anybody wants it."""
        self._reply = reply
        return not self._abandoned


class Client:
    """What both roles share: attach, status, events, detach. A context manager; `close` is its end.

    For one thread at a time, and for the process that made it: see the package's README.
    """

    #: Which half of a daemon this client is for.
    role: str
    #: Whether it fills slots.
    writes: bool = False

    def __init__(
        self,
        endpoint: str,
        *,
        name: str = "pd_backend (Python)",
        map_buffer: bool = True,
        reply_timeout_s: float = 10.0,
        wait_timeout_s: float = 120.0,
        silence_timeout_s: float = 10.0,
        pid: int | None = None,
        populate: bool = True,
    ) -> None:
        """Attaches to the daemon at `endpoint`, the `connector` of its ready line, and maps its buffer.

        `reply_timeout_s` bounds every answer that the daemon gives at once, and is what it gets beyond a wait of its
        own. `wait_timeout_s` bounds waits whose length is left to the daemon's configuration. A daemon that has said
        nothing while it was listened to is asked for its status; if `silence_timeout_s` pass without any word, it is lost
        (`DaemonSilent`). `map_buffer=False` is for a process that only talks (an engine's scheduler). Where the daemon's
        `pid` is known, its end is noticed before it has answered for the first time as well. `populate=False` leaves the
        pages of a buffer in host memory to `PdBuffer.populate`.

        Raises `ReplyTimeout` when nobody answers, `ProtocolError` for another version, `ClientMisuse` for a daemon
        that lacks the half, `MappingError` when the buffer cannot be mapped.
        """
        self.endpoint = endpoint
        self._reply_timeout_s = reply_timeout_s
        self._wait_timeout_s = wait_timeout_s
        self._next_id = 1
        self._pending: dict[int, Pending[Any]] = {}
        self._events: deque[m.Event] = deque()
        self._buffer: PdBuffer | CudaBuffer | None = None
        self._order: StreamOrder | None = None
        #: What is to be cancelled, or acknowledged, as soon as it can be said: of a message's number, and an event on the GPU.
        self._given_up: deque[Callable[[int, str | None], m.Cancel]] = deque()
        #: None until it has attached: what is not attached is not answered.
        self._silence: Silence | None = None
        #: What it was last asked for no other reason than to hear from it.
        self._ping: int | None = None
        self._channel = Channel(endpoint)
        try:
            if pid is not None:
                self._channel.watch(pid)
            #: The daemon's answer to `attach`: chunk and slot sizes, layout.
            self.attached: m.Attached = self._attach(name)
            self._channel.watch(self.attached.buffer.pid)
            if map_buffer:
                self._map_buffer()
                if populate and isinstance(self._buffer, PdBuffer):
                    self._buffer.populate()
            self._silence = Silence(silence_timeout_s)
        except BaseException:
            self._channel.close()
            self._close_buffer()
            raise

    @property
    def buffer(self) -> PdBuffer | CudaBuffer:
        """The mapped pd_buffer. Raises `MappingError` when it was not asked for."""
        if self._buffer is None:
            raise MappingError("this client was made with map_buffer=False, or closed")
        return self._buffer

    def view(self, chunk: m.StagedSlot | m.ReadyChunk) -> np.ndarray | CudaView:
        """The bytes of a staged slot or a ready chunk, without copying: a uint8 array, or a view of GPU memory."""
        return self.buffer.view(chunk)

    def order_by(self, stream: int | None) -> None:
        """Which CUDA stream fills, or reads, the slots of a buffer in GPU memory: `torch.cuda.Stream.cuda_stream`.

        What is on it when a call is made comes before what the call says: `send` of slots that it writes, `release` of
        chunks that it reads. None, as at first: torch's current stream of the calling thread, or without torch the
        legacy default stream. For a buffer in host memory it means nothing.
        """
        if self._order is not None:
            self._order.stream = stream

    def status(self) -> m.Status:
        """The daemon's counters."""
        return self.start_status().result()

    def start_status(self) -> Pending[m.Status]:
        """As `status`, without waiting."""
        return self._start(lambda id: m.StatusQuery(id=id), m.StatusReply, lambda reply: reply.status)

    def cancel(self, req_id: str) -> None:
        """Gives a request up; returns when nothing is written for it any more. No event follows.

        Raises `RequestRefused` of kind `unknown` when there is no such request, or it has ended already.
        """
        self.start_cancel(req_id).result()

    def start_cancel(self, req_id: str, *, stream: int | None = None) -> Pending[None]:
        """As `cancel`, without waiting. With a buffer in GPU memory it takes effect once the stream has done what is on
        it now: the slots are given up with it."""
        after = self._after(stream)
        return self._start(
            lambda id: m.Cancel(id=id, req_id=req_id, after=after), m.Cancelled, nothing, self._wait_timeout_s
        )

    def give_up(self, req_id: str) -> None:
        """As `cancel`, for a caller whom the answer does not concern. Never waits, and raises nothing: of a daemon that is
        lost nothing has to be given back."""
        self._give_up(lambda id, after: m.Cancel(id=id, req_id=req_id, after=after))

    def reset(self) -> None:
        """Nothing that was computed before this is to be used: drops ready chunks, and fails what has not ended."""
        self._start(lambda id: m.Reset(id=id), m.ResetDone, nothing).result()

    def wait_for_news(self, timeout_s: float) -> None:
        """Waits up to `timeout_s` until the daemon has said something, for a caller that has nothing else to do.

        Raises `DaemonLost` when nothing more can be heard.
        """
        self._pump(timeout_s)

    def poll_events(self) -> list[m.Event]:
        """The events that have arrived since the last call, oldest first. Never waits.

        Raises `DaemonLost` when there are none and nothing more can be heard, and `Unreadable` for what cannot be read;
        the events before that stay for the next call.
        """
        try:
            self._pump(0.0)
        except DaemonLost:
            if not self._events:
                raise
        return self.take_events()

    def take_events(self) -> list[m.Event]:
        """As `poll_events`, without looking for more: what has come with other answers. Raises nothing."""
        events = list(self._events)
        self._events.clear()
        for event in events:
            self._acknowledge(event)
        return events

    def close(self) -> None:
        """Detaches, so that the daemon takes everything back now, and closes. Closing twice does nothing.

        With a buffer in GPU memory it waits for what this process has on that GPU, which may be using the buffer.
        """
        if isinstance(self._buffer, CudaBuffer):
            try:
                self._buffer.finish()
            except PdError:
                pass  # A device that is lost: nothing on it uses the buffer any more.
        if self._channel.usable:
            try:
                self._start(lambda id: m.Detach(id=id), m.Detached, nothing).result()
            except PdError:
                pass  # The daemon notices that the connection ended, and takes everything back all the same.
        self._channel.close()
        self._close_buffer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close()

    def _attach(self, name: str) -> m.Attached:
        attach: Pending[m.Attached] = self._start(
            lambda id: m.Attach(id=id, version=m.CONNECTOR_API_VERSION, client=name), m.Attached, itself
        )
        try:
            attached = attach.result()
        except ReplyTimeout:
            raise ReplyTimeout(
                f"no daemon answered at {self.endpoint} within {self._reply_timeout_s} s; is it running, and is this "
                "the connector of its ready line?"
            ) from None
        if attached.version != m.CONNECTOR_API_VERSION:
            raise ProtocolError(
                f"{self.endpoint} speaks connector API version {attached.version}, this client "
                f"{m.CONNECTOR_API_VERSION}; install the client that came with the daemon"
            )
        if attached.role not in (self.role, "both"):
            seen = f"{self.endpoint} is a pd-{attached.role}"
            if self.role == "both":
                raise ClientMisuse(f"{seen}, expected a daemon with both halves; start it with pd_role: both")
            raise ClientMisuse(f"{seen}, expected a pd-{self.role}, or a daemon with both halves")
        return attached

    def _map_buffer(self) -> None:
        if isinstance(self.attached.buffer, m.DeviceBuffer):
            self._buffer = CudaBuffer(self.attached.buffer, writable=self.writes)
            self._order = StreamOrder(self._buffer.device)
        else:
            self._buffer = PdBuffer(self.attached.buffer, writable=self.writes)

    def _close_buffer(self) -> None:
        if self._order is not None:
            self._order.close()
            self._order = None
        if self._buffer is not None:
            self._buffer.close()
            self._buffer = None

    def _start(
        self, request: Callable[[int], m.Request], expected: type, convert: Callable[[Any], T], wait_s: float = 0.0
    ) -> Pending[T]:
        message = request(self._next_id)
        pending = Pending(self, message, expected, convert, wait_s + self._reply_timeout_s)
        self._send(message)
        self._pending[self._next_id] = pending
        self._next_id += 1
        return pending

    def _send(self, message: m.Request) -> None:
        try:
            self._channel.send(message)
        except DaemonGone:
            self._daemon_has_gone()
            raise

    def _after(self, stream: int | None) -> str | None:
        """An event behind what is on the stream now, for a message that gives slots away; none for host memory."""
        return None if self._order is None else self._order.mark(stream)

    def _daemon_has_gone(self) -> None:
        """Gives GPU memory back: while it is open here the GPU keeps it, and the next daemon would miss it."""
        if isinstance(self._buffer, CudaBuffer):
            self._close_buffer()

    def _wait_of(self, wait_s: float | None) -> float:
        return self._wait_timeout_s if wait_s is None else wait_s

    def _pump(self, timeout_s: float) -> None:
        """Takes in what has arrived, waiting up to `timeout_s` for the first of it."""
        deadline = time.monotonic() + timeout_s
        while True:
            left_s = max(0.0, deadline - time.monotonic())
            silence = self._silence
            try:
                replies = self._channel.receive(left_s if silence is None else min(left_s, silence.look_s))
            except DaemonGone:
                self._daemon_has_gone()
                raise
            news = self._take_in(replies)
            if silence is not None:
                self._listen(silence, bool(replies))
            if news or left_s <= 0:
                break
        self._say_given_up()

    def _take_in(self, replies: list[m.Reply]) -> bool:
        """All of them, whatever becomes of one: what is given back is given back afterwards. Whether there is any news."""
        unwanted: list[m.Answer] = []
        news = False
        for reply in replies:
            is_event = isinstance(reply, (m.Sent, m.Parked, m.Failed))
            news = news or is_event or reply.id != self._ping
            if is_event:
                self._events.append(reply)
                continue
            pending = self._pending.pop(reply.id, None)
            if pending is not None and not pending._resolve(reply):
                unwanted.append(reply)
        for answer in unwanted:
            self._give_back(answer)
        return news

    def _listen(self, silence: Silence, heard: bool) -> None:
        """Asks a daemon that has said nothing for long whether it is there. Raises `DaemonSilent` for one that is not."""
        if heard:
            silence.heard()
            return
        silence.looked()
        if silence.wants_ping():
            self._ping = self._next_id
            self._start(lambda id: m.StatusQuery(id=id), m.StatusReply, nothing).abandon()
        elif silence.over:
            self._channel.lose(self._channel.silent(silence.timeout_s))
            self._channel.raise_loss()

    def _acknowledge(self, event: m.Event) -> None:
        """Tells the daemon that this client knows of a failure: it fills none of the request's slots any more."""
        if isinstance(event, m.Failed):
            req_id, attempt = event.req_id, event.attempt
            self._give_up(
                lambda id, after: m.Cancel(id=id, req_id=req_id, after=after, acknowledges=True, attempt=attempt)
            )

    def _give_up(self, cancel: Callable[[int, str | None], m.Cancel]) -> None:
        self._given_up.append(cancel)
        self._say_given_up()

    def _say_given_up(self) -> None:
        while self._given_up and self._channel.usable:
            cancel = self._given_up[0]
            try:
                after = self._after(None)
            except CudaError:
                after = None  # A device that is lost: nothing on it is written any more.
            except RequestRefused:
                return  # The stream has to get on first.
            try:
                self._start(lambda id: cancel(id, after), m.Cancelled, nothing).abandon()
            except PdError:
                return  # Lost, which the next call says: the daemon gives up what was opened here.
            self._given_up.popleft()

    def _give_back(self, reply: m.Answer) -> None:
        """Returns what a reply that nobody waits for has brought. Raises nothing, as `give_up`."""
        if isinstance(reply, m.Opened):
            self.give_up(reply.req_id)
        elif isinstance(reply, (m.Ready, m.Found)) and reply.lease is not None:
            lease = reply.lease
            try:
                self._start(lambda id: m.Release(id=id, lease=lease), m.Released, nothing).abandon()
            except PdError:
                pass  # As there.


def itself(reply: Any) -> Any:
    """For a call whose result is the reply."""
    return reply


def nothing(_reply: Any) -> None:
    """For a call that has no result."""
    return None


def milliseconds(seconds: float | None) -> int | None:
    """A wait as messages have it."""
    return None if seconds is None else max(0, int(seconds * 1000))
