"""What can go wrong between an engine and its daemon, sorted by who can do something about it."""

from __future__ import annotations


class Kind:
    """Values of `PdError.kind`: those of the daemon, then those that this client adds.

    A newer daemon may send kinds that are not listed here: compare, never enumerate.
    """

    BAD_REQUEST = "bad_request"
    UNKNOWN = "unknown"
    LIMIT = "limit"
    BUSY = "busy"
    TOO_LARGE = "too_large"
    NO_SLOTS = "no_slots"
    DEADLINE = "deadline"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    PEER_UNREACHABLE = "peer_unreachable"
    PEER_LOST = "peer_lost"
    HANDSHAKE_REFUSED = "handshake_refused"
    LAYOUT_MISMATCH = "layout_mismatch"
    TRANSFER_FAILED = "transfer_failed"
    CORRUPTED = "corrupted"
    SHUTTING_DOWN = "shutting_down"
    INTERNAL = "internal"
    OTHER = "other"

    CLIENT_TIMEOUT = "client_timeout"
    CLIENT_CLOSED = "client_closed"
    CLIENT_MISUSE = "client_misuse"
    CLIENT_PROTOCOL = "client_protocol"
    CLIENT_MAPPING = "client_mapping"
    CLIENT_CUDA = "client_cuda"
    DAEMON_LOST = "daemon_lost"
    DAEMON_GONE = "daemon_gone"
    DAEMON_SILENT = "daemon_silent"
    DAEMON_START = "daemon_start"


class PdError(Exception):
    """Base of everything this package raises on purpose."""

    #: For programs: a value of `Kind`, or one that a newer daemon knows.
    kind: str
    #: For people: what was seen, what was expected, what to do.
    text: str
    #: The peer concerned, if any.
    peer: str | None

    def __init__(self, kind: str, text: str, peer: str | None = None) -> None:
        super().__init__(kind, text, peer)
        self.kind = kind
        self.text = text
        self.peer = peer

    def __str__(self) -> str:
        where = f" (peer {self.peer})" if self.peer else ""
        return f"{self.kind}: {self.text}{where}"


class RequestRefused(PdError):
    """The daemon answered a message with `error`."""


class RequestFailed(PdError):
    """An opened request ended with the event `failed`."""

    #: Which request.
    req_id: str

    def __init__(self, req_id: str, kind: str, text: str, peer: str | None = None) -> None:
        super().__init__(kind, text, peer)
        self.args = (req_id, kind, text, peer)
        self.req_id = req_id

    def __str__(self) -> str:
        return f"request {self.req_id}: {super().__str__()}"


class ReplyTimeout(PdError):
    """Nothing came within the time that the caller gave."""

    def __init__(self, text: str) -> None:
        super().__init__(Kind.CLIENT_TIMEOUT, text)
        self.args = (text,)


class DaemonLost(PdError):
    """The client is of no use any more, and the daemon takes back what it held: close it, and attach anew.

    Of this class itself where the daemon lives, and has closed the connection.
    """

    def __init__(self, text: str, kind: str = Kind.DAEMON_LOST) -> None:
        super().__init__(kind, text)
        self.args = (text,)


class DaemonGone(DaemonLost):
    """The daemon's process has ended: its slots, leases and requests went with it."""

    def __init__(self, text: str) -> None:
        super().__init__(text, Kind.DAEMON_GONE)


class DaemonSilent(DaemonLost):
    """The daemon's process is there and answers nothing: it is stopped, or hangs. When it goes on it finds the
    connection closed, and takes everything back that this client had of it."""

    def __init__(self, text: str) -> None:
        super().__init__(text, Kind.DAEMON_SILENT)


class ClientClosed(PdError):
    """The client was closed before."""

    def __init__(self, text: str) -> None:
        super().__init__(Kind.CLIENT_CLOSED, text)
        self.args = (text,)


class ClientMisuse(PdError):
    """The caller's own mistake: two threads in one client, a client used after a fork, a sender's call to a receiver."""

    def __init__(self, text: str) -> None:
        super().__init__(Kind.CLIENT_MISUSE, text)
        self.args = (text,)


class ProtocolError(PdError):
    """The daemon said something that this client does not understand: their versions differ."""

    def __init__(self, text: str) -> None:
        super().__init__(Kind.CLIENT_PROTOCOL, text)
        self.args = (text,)


class Unreadable(ProtocolError):
    """The daemon said something that cannot be read: what it answers, if anything, is not known."""


class MappingError(PdError):
    """The pd_buffer cannot be mapped, or a range lies outside of it."""

    def __init__(self, text: str) -> None:
        super().__init__(Kind.CLIENT_MAPPING, text)
        self.args = (text,)


class CudaError(PdError):
    """The CUDA driver is not there, or refused a call."""

    def __init__(self, text: str) -> None:
        super().__init__(Kind.CLIENT_CUDA, text)
        self.args = (text,)


class DaemonStartError(PdError):
    """A daemon did not come up; `stderr` is the end of what it had to say."""

    #: The daemon's exit code; None when it was still running at the deadline, and negative for a signal.
    exit_code: int | None
    #: The last lines of its standard error.
    stderr: str

    def __init__(self, text: str, exit_code: int | None, stderr: str) -> None:
        super().__init__(Kind.DAEMON_START, text)
        self.args = (text, exit_code, stderr)
        self.exit_code = exit_code
        self.stderr = stderr

    def __str__(self) -> str:
        said = self.stderr.strip()
        return f"{super().__str__()}\n{said}" if said else super().__str__()
