"""The client beside a decode worker."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import TracebackType

import numpy as np

from . import messages as m
from .client import Client, Pending, milliseconds, nothing
from .cuda_buffer import CudaView
from .errors import MappingError, PdError


class Lease:
    """Ready chunks that stay where they are until `release`, or the end of the `with` block."""

    def __init__(
        self,
        client: ReceiverClient,
        lease: int | None,
        chunks: Sequence[m.ReadyChunk | None],
        granted: Sequence[int] = (),
        coming: Sequence[int] = (),
    ) -> None:
        self._client = client
        self._lease = lease
        #: Positions of keys looked up whose chunks a sender is pushing ahead: looked up a moment later they are ready, or are
        #: not coming.
        self.coming = tuple(coming)
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
        return self._client._start(lambda id: m.Release(id=id, lease=lease, after=after), m.Released, nothing)

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

    def start_wait(
        self, req_id: str, *, wait_s: float | None = None, uncommitted: bool = False, until_announced: bool = False
    ) -> Pending[Lease]:
        """As `wait`, without waiting. With `until_announced` the time is for a sender to announce the request: one that is
        under way, or stands in line for slots, is waited for until it is ready or has ended."""
        return self._start(
            lambda id: m.Wait(
                id=id,
                req_id=req_id,
                wait_ms=milliseconds(wait_s),
                uncommitted=uncommitted,
                until_announced=until_announced,
            ),
            m.Ready,
            lambda reply: Lease(self, reply.lease, reply.chunks),
            math.inf if until_announced else self._wait_of(wait_s),
        )

    def fetch(
        self,
        req_id: str,
        source: m.SourceAddress,
        keys: Sequence[str],
        *,
        ids: Sequence[str] = (),
        wait_s: float | None = None,
        register_wait_s: float = 0.0,
    ) -> Lease:
        """What the sender at `source` has parked of these chunks, sent here, with a lease on them.

        `req_id` is any name that no other request has here; `ids` are the prefill server's names for the request.
        `register_wait_s` is for a request that prefill may not have begun: without it what the sender does not know is
        refused at once. Raises `RequestRefused`: of kind `unknown` when nothing is known of it there.
        """
        return self.start_fetch(req_id, source, keys, ids=ids, wait_s=wait_s, register_wait_s=register_wait_s).result()

    def start_fetch(
        self,
        req_id: str,
        source: m.SourceAddress,
        keys: Sequence[str],
        *,
        ids: Sequence[str] = (),
        wait_s: float | None = None,
        register_wait_s: float = 0.0,
        until_announced: bool = False,
    ) -> Pending[Lease]:
        """As `fetch`, without waiting. With `until_announced` it waits for as long as the sender answers."""
        return self._start(
            lambda id: m.Fetch(
                id=id,
                req_id=req_id,
                source=source,
                keys=list(keys),
                ids=list(ids),
                wait_ms=milliseconds(wait_s),
                register_wait_ms=milliseconds(register_wait_s) or 0,
                until_announced=until_announced,
            ),
            m.Ready,
            lambda reply: Lease(self, reply.lease, reply.chunks),
            math.inf if until_announced else self._wait_of(wait_s),
        )

    def start_hold(
        self,
        req_id: str,
        source: m.SourceAddress,
        keys: Sequence[str],
        *,
        ids: Sequence[str] = (),
        register_wait_s: float = 0.0,
    ) -> Pending[None]:
        """Has the sender keep what it has of these chunks until a `fetch` of the same name, `release_parked`, or the end of
        this client. Does not wait for its answer."""
        return self._start(
            lambda id: m.Fetch(
                id=id,
                req_id=req_id,
                source=source,
                keys=list(keys),
                ids=list(ids),
                register_wait_ms=milliseconds(register_wait_s) or 0,
                hold=True,
            ),
            m.Held,
            nothing,
            self._wait_timeout_s,
        )

    def start_release_parked(
        self, req_id: str, source: m.SourceAddress, ids: Sequence[str], last_key: str | None = None
    ) -> Pending[None]:
        """What the sender has parked under these names is not wanted: it makes room. Ends what was asked as `req_id`. `last_key`: of
        the last of its chunks, which tells it from other prompts of a list and other samples.
        """
        return self._start(
            lambda id: m.ReleaseParked(id=id, req_id=req_id, source=source, ids=list(ids), last_key=last_key),
            m.Released,
            nothing,
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
            lambda reply: Lease(self, reply.lease, reply.chunks, reply.granted, reply.coming),
        )
