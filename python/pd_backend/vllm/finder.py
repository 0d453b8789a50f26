"""Looks chunks up at the receivers of a decode server, from the scheduler's process."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable, Sequence

from ..client import Pending
from ..errors import PdError
from ..receiver_client import Lease, ReceiverClient
from .whereabouts import DaemonAt

logger = logging.getLogger("vllm.pd_backend")

# The scheduler waits for these answers, so it is not made to wait long, nor often for a receiver that has gone.
_REPLY_S = 0.5
_PAUSE_S = 5.0


class ReceiverFinder:
    """What is ready at the receiver of every rank: what one of them lacks, its worker could not load.

    A receiver on another machine cannot be asked, and is taken to have what the others have.
    """

    def __init__(self, key: Callable[[int, str, str], str]) -> None:
        """`key`: of a rank, its weights, and a chunk's hash."""
        self._key = key
        self._endpoints: dict[int, str] = {}
        self._weights: dict[int, str] = {}
        self._clients: dict[int, ReceiverClient] = {}
        #: By request, then by rank.
        self._leases: dict[str, dict[int, Lease]] = {}
        self._not_before = 0.0

    def attach(self, receiver: DaemonAt) -> None:
        """Where a receiver is: at first, and whenever it was started again; or other weights of its rank."""
        self._weights[receiver.rank] = receiver.weights
        if receiver.host != platform.node() or receiver.connector == self._endpoints.get(receiver.rank):
            return
        self._detach(receiver.rank)
        self._endpoints[receiver.rank], self._not_before = receiver.connector, 0.0

    def find(self, request_id: str, hashes: Sequence[str]) -> tuple[int, bool]:
        """How many of these, from the first on, are ready at all of them; and whether the next one is, or is on its way there."""
        self.forget(request_id)
        if not self._endpoints or time.monotonic() < self._not_before:
            return 0, False
        asked: dict[int, Pending[Lease]] = {}
        #: How many of them, from the first on, will be there.
        found = expected = len(hashes)
        try:
            for rank in self._endpoints:
                keys = [self._key(rank, self._weights[rank], name) for name in hashes]
                asked[rank] = self._client(rank).start_lookup(keys, fetch=True)
            for rank in self._endpoints:
                lease = self._leases.setdefault(request_id, {})[rank] = asked.pop(rank).result()
                missing = [at for at, chunk in enumerate(lease.chunks) if chunk is None]
                found = min([found, *missing[:1]])
                coming = set(lease.coming)
                expected = min([expected, *(at for at in missing if at not in coming)])
        except PdError as error:
            logger.warning("chunks are not looked up, and computed here: %s", error)
            self.close()
            self._not_before = time.monotonic() + _PAUSE_S
            return 0, False
        return found, expected > found

    def forget(self, request_id: str) -> None:
        """What was found for this request is not needed any more."""
        for lease in self._leases.pop(request_id, {}).values():
            try:
                lease.start_release()
            except PdError as error:
                logger.warning("a lease could not be released: %s", error)

    def close(self) -> None:
        """Detaches from all of them: their leases go back."""
        for rank in list(self._clients):
            self._detach(rank)

    def _client(self, rank: int) -> ReceiverClient:
        if rank not in self._clients:
            self._clients[rank] = ReceiverClient(
                self._endpoints[rank], name="vllm scheduler", map_buffer=False, reply_timeout_s=_REPLY_S
            )
        return self._clients[rank]

    def _detach(self, rank: int) -> None:
        for leases in self._leases.values():
            leases.pop(rank, None)
        client = self._clients.pop(rank, None)
        if client is not None:
            client.close()
