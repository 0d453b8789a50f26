"""The client beside a worker that prefills and decodes."""

from __future__ import annotations

from .receiver_client import ReceiverClient
from .sender_client import SenderClient


class NodeClient(SenderClient, ReceiverClient):
    """Beside a worker that does both, with a daemon of `pd_role: both`: what either client does, over one buffer."""

    role = "both"
