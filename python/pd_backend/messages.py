"""The messages of the connector API, one struct each: docs/connector-api.md says what they mean.

Field names, order and the tag `type` are those of src/connector/message.rs. A field that is left out and one that is nil
mean the same. Unknown fields from a newer daemon are ignored.
"""

from __future__ import annotations

from typing import Union

import msgspec

#: The version of the connector API that this client speaks.
CONNECTOR_API_VERSION = 2


def _snake(name: str) -> str:
    return "".join("_" + c.lower() if c.isupper() and i else c.lower() for i, c in enumerate(name))


class _Message(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="type", tag=_snake):
    pass


class _Value(msgspec.Struct, frozen=True, omit_defaults=True):
    pass


# ---- values inside messages ------------------------------------------------------------------------------------------


class PeerAddress(_Value, frozen=True):
    """Where a receiver listens: the two ports of `disagg_spec`."""

    host: str
    init_port: int
    alloc_port: int


class SourceAddress(_Value, frozen=True):
    """A sender's rendezvous port, at which receivers ask for what it has parked."""

    host: str
    port: int


class SendPart(_Value, frozen=True):
    """Part of a staged slot, in bytes from the slot's start; the whole of its chunk without `len_bytes`."""

    slot: int
    offset_bytes: int = 0
    len_bytes: int | None = None


class StagedSlot(_Value, frozen=True):
    """A local slot to fill: `len_bytes` bytes at `offset_bytes` of the buffer, for position `chunk` of the keys."""

    chunk: int
    slot: int
    offset_bytes: int
    len_bytes: int


class ReadyChunk(_Value, frozen=True):
    """A chunk that can be read: `len_bytes` bytes at `offset_bytes` of the buffer."""

    key: str
    group: int
    slot: int
    offset_bytes: int
    len_bytes: int


class Group(_Value, frozen=True):
    """Layers that keep the same shape of cache; the only group of a layout has no name."""

    name: str
    token_bytes: int


class Timings(_Value, frozen=True):
    """Phases of a sent request, in microseconds."""

    alloc_us: int
    transfer_us: int
    commit_us: int


class HostBuffer(_Value, frozen=True, tag_field="kind", tag="host"):
    """A pd_buffer in host memory: the file behind `/proc/<pid>/fd/<fd>`."""

    pid: int
    fd: int
    len_bytes: int
    inode: int
    #: How much of it has its pages, from the start; the rest comes when the buffer grows.
    present_bytes: int


class DeviceBuffer(_Value, frozen=True, tag_field="kind", tag="cuda"):
    """A pd_buffer in a GPU's memory: `len_bytes` bytes at `offset_bytes` of an allocation that `ipc_handle` opens."""

    pid: int
    #: The GPU's UUID: its number may be another one in each process.
    device: str
    #: The daemon's number for it.
    ordinal: int
    #: The 64 bytes of the driver's IPC handle, in hexadecimal digits.
    ipc_handle: str
    offset_bytes: int
    #: Length of the allocation.
    allocation_bytes: int
    len_bytes: int


class BufferUsage(_Value, frozen=True):
    """How full and how fragmented a pd_buffer is, in bytes; `chunks_fit` counts whole chunks of each group."""

    len_bytes: int
    len_max_bytes: int
    used_bytes: int
    free_bytes: int
    largest_free_bytes: int
    free_range_count: int
    chunks_fit: list[int]


class Failure(_Value, frozen=True):
    """Why something did not go well: a value of `Kind`, and what a person should know."""

    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


class ReceiverStatus(_Value, frozen=True):
    """A receiver that a sender was told of at start, and how far it has come with it."""

    address: PeerAddress
    #: `connecting`, `connected`, `refused` or `unreachable`.
    state: str
    #: Why it is refused or unreachable.
    failure: Failure | None = None


class Status(_Value, frozen=True):
    """What a daemon counts; counters start at 0 with its process."""

    role: str
    engine: str
    slot_count: int
    slots_free: int
    slots_reserved: int
    slots_ready: int
    slots_quarantined: int
    requests_active: int
    requests_done: int
    requests_failed: int
    bytes: int
    peers: int
    clients: int
    buffer: BufferUsage
    #: Of the ready slots, those that a request or a lease needs.
    slots_held: int = 0
    #: Sender: of those, slots that are kept for whoever asks for them.
    slots_parked: int = 0
    #: Of the active requests, those that wait for slots of the receiver.
    requests_waiting: int = 0
    #: Clients' calls that wait: `stage` at a sender, `wait` at a receiver.
    waits: int = 0
    #: Receiver: leases that clients have not released.
    leases: int = 0
    #: Sender: transfers that the engine has not finished.
    transfers_in_flight: int = 0
    #: Receiver: chunks freed because nobody fetched or used them in time.
    chunks_expired: int = 0
    #: Whether it was told to stop, and takes no new requests.
    draining: bool = False
    #: `requests_failed` by kind; kinds that have not happened are left out.
    failures: dict[str, int] = {}
    #: For how many ms the daemon's engine thread has not taken up what it was asked. Above some seconds it is stuck.
    engine_silent_ms: int = 0
    #: Sender: the receivers that it was told of at start (`pd_receivers`), in that order.
    receivers: list[ReceiverStatus] = []
    #: Sender: rendezvous ports of the receivers that it is connected to, of those that park chunks themselves.
    sources: list[SourceAddress] = []


# ---- from the client -------------------------------------------------------------------------------------------------


class Attach(_Message, frozen=True):
    """First message of every client. Answered by `Attached`."""

    id: int
    version: int
    client: str


class Detach(_Message, frozen=True):
    """Last message: gives back leases, cancels requests. Answered by `Detached`."""

    id: int


class StatusQuery(_Message, frozen=True, tag="status"):
    """Answered by `StatusReply`."""

    id: int


class Open(_Message, frozen=True):
    """Sender: a request for a receiver. Answered by `Opened` once slots are granted for all of it."""

    id: int
    req_id: str
    keys: list[str]
    last_chunk_tokens: int
    receiver: PeerAddress
    wait_ms: int | None = None
    #: Of which group each chunk is; all of the first when left out.
    groups: list[int] = []
    #: Whether `Opened` is to bring slots for every chunk to send, if there are any free at that moment.
    stage: bool = False


class Park(_Message, frozen=True):
    """Sender: a request whose chunks are kept for whoever asks for them.

    Answered by `Opened`, with slots for all chunks that are not kept here already.
    """

    id: int
    req_id: str
    keys: list[str]
    last_chunk_tokens: int
    #: What those call it who will ask for it.
    ids: list[str] = []
    groups: list[int] = []
    wait_ms: int | None = None
    #: Nobody is told where they are kept: they are only pushed ahead.
    unsolicited: bool = False
    #: They are not to be pushed ahead.
    stays: bool = False


class Expect(_Message, frozen=True):
    """Sender: a request that will be parked as `req_id`. Who asks for it by one of `ids` waits until then. Answered by
    `Accepted`; a `Cancel` gives it up.
    """

    id: int
    req_id: str
    ids: list[str]


class Stage(_Message, frozen=True):
    """Sender: local slots for these positions in the keys. Answered by `Staged`."""

    id: int
    req_id: str
    chunks: list[int]
    wait_ms: int | None = None


class Send(_Message, frozen=True):
    """Sender: these staged bytes are final. Answered by `Accepted`."""

    id: int
    req_id: str
    parts: list[SendPart]
    last: bool
    after: str | None = None
    """An event of this process, in hexadecimal digits: the parts are final once the GPU has passed it."""


class Cancel(_Message, frozen=True):
    """Either: give the request up. Answered by `Cancelled`."""

    id: int
    req_id: str
    after: str | None = None
    """As in `Release`."""
    acknowledges: bool = False
    """Only says that the client knows of the event `Failed`: ends nothing that has not failed."""
    attempt: int | None = None
    """With `acknowledges`: from the event. None: all that have failed under this name are meant."""


class Lookup(_Message, frozen=True):
    """Receiver: which of these are ready? Answered by `Found`."""

    id: int
    keys: list[str]
    uncommitted: bool = False
    """The caller has heard from the proxy that they are written: what a stock LMCache sender was granted counts as ready."""
    fetch: bool = False
    """Nobody will wait for their requests by name: a ready request of which every chunk is found counts as fetched."""


class Wait(_Message, frozen=True):
    """Receiver: answered by `Ready` when every chunk of the request is."""

    id: int
    req_id: str
    wait_ms: int | None = None
    uncommitted: bool = False
    """As in `Lookup`."""
    #: `wait_ms` is for the request to be announced: one that is under way is waited for until it is ready or has ended.
    until_announced: bool = False


class Fetch(_Message, frozen=True):
    """Receiver: have a sender send what it has parked of these. Answered by `Ready`, or with `hold` by `Held`."""

    id: int
    req_id: str
    source: SourceAddress
    keys: list[str]
    #: What the prefill server calls the request.
    ids: list[str] = []
    wait_ms: int | None = None
    #: How long the sender may wait for a request that it has not heard of.
    register_wait_ms: int = 0
    #: Whether the chunks are only to be kept.
    hold: bool = False
    #: As in `Wait`.
    until_announced: bool = False


class ReleaseParked(_Message, frozen=True):
    """Receiver: what a sender has parked under these names is not wanted. Answered by `Released`."""

    id: int
    req_id: str
    source: SourceAddress
    ids: list[str] = []
    #: The last of its chunks, which tells it from others that have the same name. None: all of them are meant.
    last_key: str | None = None


class Release(_Message, frozen=True):
    """Receiver: the chunks of this lease have been copied. Answered by `Released`."""

    id: int
    lease: int
    after: str | None = None
    """An event of this process, in hexadecimal digits: it is said once the GPU has passed it."""


class Reset(_Message, frozen=True):
    """Either: nothing that was computed before is to be used. Answered by `ResetDone`."""

    id: int


# ---- from the daemon -------------------------------------------------------------------------------------------------


class Attached(_Message, frozen=True):
    """How to use this daemon."""

    id: int
    version: int
    role: str
    buffer: HostBuffer | DeviceBuffer
    chunk_bytes: int
    slot_count: int
    chunk_tokens: int
    groups: list[Group]
    layout: list[tuple[str, str]]


class Detached(_Message, frozen=True):
    """To `Detach`."""

    id: int


class StatusReply(_Message, frozen=True, tag="status"):
    """To `StatusQuery`."""

    id: int
    status: Status


class Opened(_Message, frozen=True):
    """To `Open`: positions in `already_sent` need neither be staged nor sent.

    `slots` are for all others, as in `Staged`, if `Open` asked for them and enough were free.
    """

    id: int
    req_id: str
    already_sent: list[int]
    slots: list[StagedSlot] = []


class Staged(_Message, frozen=True):
    """To `Stage`: one slot for each chunk asked for, in that order."""

    id: int
    slots: list[StagedSlot]


class Accepted(_Message, frozen=True):
    """To `Send`: the parts are queued."""

    id: int


class Cancelled(_Message, frozen=True):
    """To `Cancel`: nothing is written for the request any more."""

    id: int
    req_id: str


class Found(_Message, frozen=True, kw_only=True):
    """To `Lookup`: one entry for each key asked for, in that order."""

    id: int
    lease: int | None = None
    chunks: list[ReadyChunk | None]
    granted: list[int] = []
    """Positions of keys that a stock LMCache sender was granted: it does not say when they are written."""
    coming: list[int] = []
    """Positions of keys whose chunks a sender is pushing ahead: a moment later they are ready, or are not coming."""


class Ready(_Message, frozen=True):
    """To `Wait`: all chunks of the request, in the order of the prompt."""

    id: int
    req_id: str
    lease: int
    chunks: list[ReadyChunk]


class Held(_Message, frozen=True):
    """To `Fetch` with `hold`."""

    id: int


class Released(_Message, frozen=True):
    """To `Release` and `ReleaseParked`."""

    id: int


class ResetDone(_Message, frozen=True, tag="reset"):
    """To `Reset`: ready chunks are found no more, and what had not ended has failed."""

    id: int


class Error(_Message, frozen=True):
    """To any request that was refused or failed."""

    id: int
    kind: str
    text: str
    peer: str | None = None


class Sent(_Message, frozen=True):
    """Event: the receiver has committed every chunk."""

    req_id: str
    chunks: int
    bytes: int
    timings: Timings


class Parked(_Message, frozen=True):
    """Event: every chunk of a parked request is kept from now on, for the time of its lease."""

    req_id: str
    chunks: int


class Failed(_Message, frozen=True):
    """Event: the request has ended without being sent."""

    req_id: str
    kind: str
    text: str
    peer: str
    attempt: int | None = None
    """Which of those that had this name, for the `Cancel` that acknowledges it."""


Request = Union[
    Attach, Detach, StatusQuery, Open, Park, Expect, Stage, Send, Cancel, Lookup, Wait, Fetch, ReleaseParked, Release, Reset
]
Answer = Union[
    Attached, Detached, StatusReply, Opened, Staged, Accepted, Cancelled, Found, Ready, Held, Released, ResetDone, Error
]
Event = Union[Sent, Parked, Failed]
Reply = Union[Answer, Event]

_encoder = msgspec.msgpack.Encoder()
#: What decoding raises on any bytes: msgspec lets the errors of a text that is no UTF-8, and of deep nesting, through.
UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

_reply_decoder = msgspec.msgpack.Decoder(Reply)
_request_decoder = msgspec.msgpack.Decoder(Request)


def encode(message: Request | Reply) -> bytes:
    """The payload frame of a message."""
    return _encoder.encode(message)


def decode_reply(payload: bytes) -> Reply:
    """What a daemon says.

    Raises one of `UNDECODABLE` (a `ValidationError` for a well-formed map that is no message of this version).
    """
    return _reply_decoder.decode(payload)


def decode_request(payload: bytes) -> Request:
    """What a client says: for test doubles of a daemon. Raises as `decode_reply` does."""
    return _request_decoder.decode(payload)
