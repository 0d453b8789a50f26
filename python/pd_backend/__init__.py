"""Client of the connector API of pd-sender and pd-receiver: see docs/connector-api.md."""

from .buffer import PdBuffer
from .client import Client, Pending
from .cuda_buffer import CudaBuffer, CudaView
from .daemon import Daemon, ReadyLine, find_binary
from .errors import (
    ClientClosed,
    ClientMisuse,
    CudaError,
    DaemonGone,
    DaemonLost,
    DaemonSilent,
    DaemonStartError,
    Kind,
    MappingError,
    PdError,
    ProtocolError,
    ReplyTimeout,
    RequestFailed,
    RequestRefused,
)
from .messages import (
    CONNECTOR_API_VERSION,
    Attached,
    Failed,
    Failure,
    Opened,
    PeerAddress,
    SourceAddress,
    ReadyChunk,
    ReceiverStatus,
    SendPart,
    Sent,
    StagedSlot,
    Status,
    Timings,
)
from .node_client import NodeClient
from .receiver_client import Lease, ReceiverClient
from .sender_client import SenderClient

__all__ = [
    "CONNECTOR_API_VERSION",
    "Attached",
    "Client",
    "ClientClosed",
    "ClientMisuse",
    "CudaBuffer",
    "CudaError",
    "CudaView",
    "Daemon",
    "DaemonGone",
    "DaemonLost",
    "DaemonSilent",
    "DaemonStartError",
    "Failed",
    "Failure",
    "Kind",
    "Lease",
    "MappingError",
    "NodeClient",
    "Opened",
    "PdBuffer",
    "PdError",
    "PeerAddress",
    "SourceAddress",
    "Pending",
    "ProtocolError",
    "ReadyChunk",
    "ReadyLine",
    "ReceiverClient",
    "ReceiverStatus",
    "ReplyTimeout",
    "RequestFailed",
    "RequestRefused",
    "SendPart",
    "SenderClient",
    "Sent",
    "StagedSlot",
    "Status",
    "Timings",
    "find_binary",
]
