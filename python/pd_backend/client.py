"""The two clients: `SenderClient` beside a prefill worker, `ReceiverClient` beside a decode worker."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
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
    RequestFailed,
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

    #: Which daemon this client is for.
    role: str

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

        Raises `ReplyTimeout` when nobody answers, `ProtocolError` for another version, `ClientMisuse` for the other
        role, `MappingError` when the buffer cannot be mapped.
        """
        self.endpoint = endpoint
        self._reply_timeout_s = reply_timeout_s
        self._wait_timeout_s = wait_timeout_s
        self._next_id = 1
        self._pending: dict[int, Pending[Any]] = {}
        self._events: deque[m.Event] = deque()
        self._buffer: PdBuffer | CudaBuffer | None = None
        self._order: StreamOrder | None = None
        #: What is to be cancelled as soon as it can be said.
        self._given_up: deque[str] = deque()
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
        return self._start(lambda id: m.StatusQuery(id=id), m.StatusReply, lambda reply: reply.status).result()

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
            lambda id: m.Cancel(id=id, req_id=req_id, after=after), m.Cancelled, _nothing, self._wait_timeout_s
        )

    def give_up(self, req_id: str) -> None:
        """As `cancel`, for a caller whom the answer does not concern. Never waits, and raises nothing: of a daemon that is
        lost nothing has to be given back."""
        self._given_up.append(req_id)
        self._say_given_up()

    def reset(self) -> None:
        """Nothing that was computed before this is to be used: drops ready chunks, and fails what has not ended."""
        self._start(lambda id: m.Reset(id=id), m.ResetDone, _nothing).result()

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
                self._start(lambda id: m.Detach(id=id), m.Detached, _nothing).result()
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
            lambda id: m.Attach(id=id, version=m.CONNECTOR_API_VERSION, client=name), m.Attached, _itself
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
        if attached.role != self.role:
            raise ClientMisuse(f"{self.endpoint} is a pd-{attached.role}, expected a pd-{self.role}")
        return attached

    def _map_buffer(self) -> None:
        if isinstance(self.attached.buffer, m.DeviceBuffer):
            self._buffer = CudaBuffer.attached(self.attached)
            self._order = StreamOrder(self._buffer.device)
        else:
            self._buffer = PdBuffer.attached(self.attached)

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
            news = news or isinstance(reply, (m.Sent, m.Failed)) or reply.id != self._ping
            if isinstance(reply, (m.Sent, m.Failed)):
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
            self._start(lambda id: m.StatusQuery(id=id), m.StatusReply, _nothing).abandon()
        elif silence.over:
            self._channel.lose(self._channel.silent(silence.timeout_s))
            self._channel.raise_loss()

    def _acknowledge(self, event: m.Event) -> None:
        """Tells the daemon that this client knows of a failure: it fills none of the request's slots any more."""
        if isinstance(event, m.Failed):
            self.give_up(event.req_id)

    def _say_given_up(self) -> None:
        while self._given_up and self._channel.usable:
            req_id = self._given_up[0]
            try:
                after = self._after(None)
            except CudaError:
                after = None  # A device that is lost: nothing on it is written any more.
            except RequestRefused:
                return  # The stream has to get on first.
            try:
                self._start(lambda id: m.Cancel(id=id, req_id=req_id, after=after), m.Cancelled, _nothing).abandon()
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
                self._start(lambda id: m.Release(id=id, lease=lease), m.Released, _nothing).abandon()
            except PdError:
                pass  # As there.


class SenderClient(Client):
    """Beside a prefill worker: open a request, stage slots, fill them, send them."""

    role = "sender"

    def open(
        self,
        req_id: str,
        keys: Sequence[str],
        *,
        last_chunk_tokens: int,
        receiver: m.PeerAddress,
        groups: Sequence[int] = (),
        wait_s: float | None = None,
        stage: bool = False,
    ) -> m.Opened:
        """Asks the receiver for room for all these chunks; returns once it is granted.

        `groups` names the group of layers of each chunk, by its position in `attached.groups`; without it all are of
        the first. The last chunk of each group has `last_chunk_tokens` tokens. `already_sent` of the result lists
        positions in `keys` that are neither staged nor sent. `wait_s` bounds the
        wait for slots; the daemon's configuration does when it is left out. With `stage` the result's `slots` are those
        of all other chunks, which saves the call of that name: none are there when too few were free, and then that
        call waits for them. Raises `RequestRefused`.
        """
        return self.start_open(
            req_id,
            keys,
            last_chunk_tokens=last_chunk_tokens,
            receiver=receiver,
            groups=groups,
            wait_s=wait_s,
            stage=stage,
        ).result()

    def start_open(
        self,
        req_id: str,
        keys: Sequence[str],
        *,
        last_chunk_tokens: int,
        receiver: m.PeerAddress,
        groups: Sequence[int] = (),
        wait_s: float | None = None,
        stage: bool = False,
    ) -> Pending[m.Opened]:
        """As `open`, without waiting."""
        return self._start(
            lambda id: m.Open(
                id=id,
                req_id=req_id,
                keys=list(keys),
                last_chunk_tokens=last_chunk_tokens,
                receiver=receiver,
                groups=list(groups),
                wait_ms=_milliseconds(wait_s),
                stage=stage,
            ),
            m.Opened,
            _itself,
            self._wait_of(wait_s),
        )

    def stage(self, req_id: str, chunks: Iterable[int], *, wait_s: float | None = None) -> list[m.StagedSlot]:
        """Local slots for these positions in the request's keys, all at once; waits while there are too few.

        Raises `RequestRefused`: of kind `no_slots` when the wait was in vain.
        """
        return self.start_stage(req_id, chunks, wait_s=wait_s).result()

    def start_stage(
        self, req_id: str, chunks: Iterable[int], *, wait_s: float | None = None
    ) -> Pending[list[m.StagedSlot]]:
        """As `stage`, without waiting."""
        positions = list(chunks)
        return self._start(
            lambda id: m.Stage(id=id, req_id=req_id, chunks=positions, wait_ms=_milliseconds(wait_s)),
            m.Staged,
            lambda reply: reply.slots,
            self._wait_of(wait_s),
        )

    def send(
        self, req_id: str, parts: Iterable[m.SendPart | m.StagedSlot], *, last: bool, stream: int | None = None
    ) -> None:
        """Says that these bytes are final. A staged slot stands for the whole of its chunk.

        With a buffer in GPU memory they are final once `stream` (see `order_by`) has done what is on it now; nothing
        here waits for that, the daemon does.

        The event `sent` or `failed` follows once for the whole request, after the call with `last`. Raises
        `RequestRefused`; nothing of a refused call is written.
        """
        self.start_send(req_id, parts, last=last, stream=stream).result()

    def start_send(
        self, req_id: str, parts: Iterable[m.SendPart | m.StagedSlot], *, last: bool, stream: int | None = None
    ) -> Pending[None]:
        """As `send`, without waiting for the daemon's acceptance."""
        ranges = [m.SendPart(slot=part.slot) if isinstance(part, m.StagedSlot) else part for part in parts]
        after = self._after(stream) if ranges else None
        return self._start(
            lambda id: m.Send(id=id, req_id=req_id, parts=ranges, last=last, after=after), m.Accepted, _nothing
        )

    def wait_sent(self, req_id: str, timeout_s: float | None = None) -> m.Sent:
        """The event `sent` of this request; those of other requests stay for `poll_events`.

        Raises `RequestFailed` for the event `failed`, and `ReplyTimeout`.
        """
        limit_s = self._wait_timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + limit_s
        while True:
            event = self._take_event(req_id)
            if isinstance(event, m.Failed):
                raise RequestFailed(event.req_id, event.kind, event.text, event.peer)
            if event is not None:
                return event
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise ReplyTimeout(f"request {req_id} was neither sent nor failed within {limit_s} s")
            self._pump(left_s)

    def _take_event(self, req_id: str) -> m.Event | None:
        for index, event in enumerate(self._events):
            if event.req_id == req_id:
                del self._events[index]
                self._acknowledge(event)
                return event
        return None


class Lease:
    """Ready chunks that stay where they are until `release`, or the end of the `with` block."""

    def __init__(
        self,
        client: ReceiverClient,
        lease: int | None,
        chunks: Sequence[m.ReadyChunk | None],
        granted: Sequence[int] = (),
    ) -> None:
        self._client = client
        self._lease = lease
        #: Positions of keys looked up that a stock LMCache sender was granted, and that nobody has said are written.
        self.granted = tuple(granted)
        #: One for each chunk of the request, or each key looked up; None where there is no ready chunk.
        self.chunks = tuple(chunks)

    def view(self, index: int) -> np.ndarray | CudaView:
        """The bytes of a chunk, read-only, without copying: to be used before the release.

        Raises `KeyError` when that chunk is not ready, `MappingError` after the release.
        """
        chunk = self.chunks[index]
        if chunk is None:
            raise KeyError(f"chunk {index} is not ready")
        if self._lease is None:
            raise MappingError("the lease was released: its slots may hold other chunks by now")
        return self._client.view(chunk)

    def release(self, *, stream: int | None = None) -> None:
        """Says that the chunks have been copied. Releasing twice does nothing. Raises `RequestRefused`.

        With a buffer in GPU memory they have been once `stream` (see `order_by`) has done what is on it now. Nothing
        here waits for that, nor for the daemon's answer; the daemon keeps the chunks until then.
        """
        released = self.start_release(stream=stream)
        if released is None:
            return
        if self._client._order is None:
            released.result()
        else:
            released.abandon()

    def start_release(self, *, stream: int | None = None) -> Pending[None] | None:
        """As `release`, without waiting; None when it was released before."""
        lease = self._lease
        if lease is None:
            return None
        after = self._client._after(stream)
        self._lease = None
        return self._client._start(lambda id: m.Release(id=id, lease=lease, after=after), m.Released, _nothing)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        try:
            self.release()
        except PdError:
            if error is None:
                raise


class ReceiverClient(Client):
    """Beside a decode worker: wait for a request's chunks, read them, release them."""

    role = "receiver"

    def wait(self, req_id: str, *, wait_s: float | None = None, uncommitted: bool = False) -> Lease:
        """Every chunk of the request, in the order of the prompt; it need not have been announced yet.

        `uncommitted` says that the proxy was told of the request, so that it is written: a stock LMCache sender tells
        nobody else. Chunks of our own senders are committed, and need it never.

        Raises `RequestRefused` when it failed, or was not ready in time.
        """
        return self.start_wait(req_id, wait_s=wait_s, uncommitted=uncommitted).result()

    def start_wait(self, req_id: str, *, wait_s: float | None = None, uncommitted: bool = False) -> Pending[Lease]:
        """As `wait`, without waiting."""
        return self._start(
            lambda id: m.Wait(id=id, req_id=req_id, wait_ms=_milliseconds(wait_s), uncommitted=uncommitted),
            m.Ready,
            lambda reply: Lease(self, reply.lease, reply.chunks),
            self._wait_of(wait_s),
        )

    def lookup(self, keys: Sequence[str], *, uncommitted: bool = False, fetch: bool = False) -> Lease:
        """Which of these chunks are ready, with a lease on those; `uncommitted` as for `wait`.

        The lease's `granted` has the positions of those that would be ready with it. `fetch` is for a router that names
        no requests: those of which every chunk is found need not be kept for a `wait`, which would be told that they
        were fetched.
        """
        return self.start_lookup(keys, uncommitted=uncommitted, fetch=fetch).result()

    def start_lookup(self, keys: Sequence[str], *, uncommitted: bool = False, fetch: bool = False) -> Pending[Lease]:
        """As `lookup`, without waiting."""
        return self._start(
            lambda id: m.Lookup(id=id, keys=list(keys), uncommitted=uncommitted, fetch=fetch),
            m.Found,
            lambda reply: Lease(self, reply.lease, reply.chunks, reply.granted),
        )


def _itself(reply: Any) -> Any:
    return reply


def _nothing(_reply: Any) -> None:
    return None


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else max(0, int(seconds * 1000))
