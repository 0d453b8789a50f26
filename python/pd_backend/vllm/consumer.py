"""The worker's side of decode: chunks from the receiver's slots into the blocks that the scheduler gave."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..client import Pending
from ..errors import ClientClosed, DaemonLost, Kind, PdError, RequestRefused, Unreadable
from ..receiver_client import Lease, ReceiverClient
from .adapters import LoadedAdapters
from .attachment import Attachment
from .keys import chunk_key
from .layout import EngineLayout
from .naming import NULL_BLOCK
from .observations import Observations
from .spec import RemoteSpec
from .step import ConsumerStep, HoldPlan, ReceivePlan, ReleasePlan, idle_wait_s
from .turns import Turns
from .weights import Weights

logger = logging.getLogger("vllm.pd_backend")

#: How long a request waits for a daemon that is being started again, or is silent.
_RESTART_WAIT_S = 30.0
#: How long prefill may not have heard of a request that is asked for at the same time.
_REGISTER_WAIT_S = 10.0
#: Before the daemon is asked again that had no place for one more question.
_BUSY_PAUSE_S = 0.1
#: After these nothing is heard through a client any more; nor is it known what an answer that cannot be read has granted,
#: which goes back with the client.
_LOST = (DaemonLost, ClientClosed, Unreadable)


class LoadError(Exception):
    """What has come is not what the request needs."""


@dataclass
class _Request:
    request_id: str
    req_id: str | None
    began: float
    #: Chunks that are asked for; None: all.
    wanted: Sequence[int] | None = None
    plan: ReceivePlan | None = None
    #: Whether the scheduler was told that there is nothing to wait for any more.
    told: bool = False
    arriving: Pending[Lease] | None = None
    #: Whom it was asked of: what that one grants is in its buffer, not in that of a daemon started after it.
    asked: ReceiverClient | None = None
    #: Why nothing comes of that any more.
    lost: PdError | None = None
    #: Not asked again before that: the daemon had no place for the question.
    again_at: float = 0.0
    #: Its chunks are here, or are not going to come.
    sent: bool = False

    @property
    def waits(self) -> bool:
        """Whether anything is to come of it."""
        return self.plan is None or self.plan.not_sent is None


class ConsumerWorker:
    """Loads one worker's part of each request. For the thread in which the worker steps."""

    def __init__(
        self,
        daemon: Attachment[ReceiverClient],
        layout: EngineLayout,
        dtype: str,
        *,
        receive_wait_s: float | None = None,
        adapters: LoadedAdapters | None = None,
        weights: Weights | None = None,
        observations: Observations | None = None,
    ) -> None:
        self._daemon = daemon
        self._observations = observations or Observations(layout.tp_rank)
        self._weights = weights or Weights("", None)
        self._adapters = adapters or LoadedAdapters()
        self._paged = daemon.groups
        self._layout = layout
        self._dtype = dtype
        self._receive_wait_s = receive_wait_s
        self._requests: dict[str, _Request] = {}
        self._finished: set[str] = set()
        self._failed_blocks: set[int] = set()
        self._failed_requests: set[str] = set()
        #: Of requests that need nothing of it any more: what has not come yet is given back when it comes.
        self._returning: dict[str, _Request] = {}
        self._returned: list[str] = []
        self._here: list[str] = []
        self._idle = False
        self._turns = Turns(daemon, self._keys, layout.tp_rank)
        # What the buffer and the engine's memory do not have in common is said before the engine serves.
        daemon.use(self._lost)

    # ---- hooks of a step, in their order ----------------------------------------------------------------------------------

    def begin_step(self, step: ConsumerStep) -> None:
        """What has come, what is to be loaded, and what is not needed any more."""
        now = time.monotonic()
        self._idle = step.idle
        for request_id, req_id in step.announced:
            request = self._requests[request_id] = _Request(request_id, req_id, now, sent=request_id in step.sent)
            self._try_start(request)
        for release in step.released:
            self._release(release)
        # A hold after its own release would never end.
        released = {release.request_id for release in step.released}
        for hold in step.holds:
            if hold.request_id not in released:
                self._hold(hold)
        for plan in step.loads:
            request = self._requests.get(plan.request_id)
            if request is None:
                request = self._requests[plan.request_id] = _Request(plan.request_id, plan.req_id, now)
            request.plan = plan
            self._try_start(request)
        for turn in step.turns:
            self._turns.begin(turn)
        for request_id in step.turns_over:
            self._turns.end(request_id)
        for request_id in step.unneeded:
            self._return(request_id, self._requests.pop(request_id, None))
        for request_id in step.dropped:
            self._drop(request_id)

    def progress(self) -> tuple[set[str], set[int]]:
        """Loads what has arrived. Requests that are through, loaded or not, and the blocks that could not be loaded."""
        if self._idle and (self._requests or self._returning):
            self._wait_a_little()
        for request in list(self._returning.values()) if self._returning else ():
            self._try_return(request)
        for request in list(self._requests.values()) if self._requests else ():
            if request.plan is None:
                self._tell_if_here(request)
                continue
            try:
                if request.plan.not_sent is not None:
                    raise LoadError(f"prefill has not sent it: {request.plan.not_sent}")
                if not self._answered(request):
                    continue
                lease = self._arrived(request)
                if lease is None:
                    continue
                self._load(request, request.plan, lease)
            except (PdError, LoadError, ValueError) as error:
                self._fail(request, request.plan, error)
                if isinstance(error, RequestRefused):
                    self._refused(request, error)
            del self._requests[request.request_id]
            self._finished.add(request.request_id)
        if not self._finished:
            return set(), set()
        finished, self._finished = self._finished, set()
        failed, self._failed_blocks = self._failed_blocks, set()
        return finished, failed

    def failed_requests(self) -> set[str]:
        """Requests of which nothing was loaded, since the last call, where blocks of an engine do not say whose they are."""
        failed, self._failed_requests = self._failed_requests, set()
        return failed

    def here(self) -> list[str]:
        """Announced requests whose chunks are here, or are not going to come, since the last call: once they have blocks,
        nothing of them waits for anybody.
        """
        here, self._here = self._here + self._turns.through(), []
        return here

    def returned(self) -> list[str]:
        """Requests that were unneeded or dropped, and of which nothing is kept any more, since the last call."""
        returned, self._returned = self._returned, []
        return returned

    def close(self) -> None:
        """The worker ends: its leases go back with its client."""
        self._daemon.close()

    # ---- towards the daemon -----------------------------------------------------------------------------------------------

    def _lost(self, client: ReceiverClient, why: PdError) -> None:
        """Of a client that is of no more use: what was asked of its daemon does not come."""
        for request in (*self._requests.values(), *self._returning.values()):
            if request.asked is client:
                request.lost = why
        self._turns.lost(client)

    def _wait_a_little(self) -> None:
        """Lets an answer that is on its way come in this step instead of the next one."""
        expected = [request for request in self._requests.values() if request.plan is not None or not request.told]
        expected += self._returning.values()
        try:
            waiting = [request for request in expected if request.arriving is not None and not self._done(request)]
            if waiting and len(waiting) == len(expected) and self._daemon.client is not None:
                newest = max(request.began for request in waiting)
                self._daemon.client.wait_for_news(idle_wait_s(time.monotonic() - newest))
        except _LOST as lost:
            self._daemon.let_go(lost)

    def _try_start(self, request: _Request) -> None:
        """As `_start`, at the beginning of a step, where no failure can be told: `progress` meets it again."""
        try:
            self._start(request)
        except (PdError, ValueError):
            pass

    def _start(self, request: _Request) -> None:
        """Begins to wait for its chunks, or looks them up. A daemon that is being started again is waited for."""
        if request.arriving is not None or not request.waits or time.monotonic() < request.again_at:
            return
        try:
            client = self._daemon.attach()
            try:
                if request.req_id is not None and request.plan is not None and request.plan.remote is not None:
                    request.arriving = self._fetch(client, request, request.plan, request.plan.remote)
                elif request.req_id is not None:
                    wait_s = 0.0 if request.sent else self._receive_wait_s
                    request.arriving = client.start_wait(
                        request.req_id, wait_s=wait_s, uncommitted=request.sent, until_announced=not request.sent
                    )
                elif request.plan is not None:
                    request.wanted = range(request.plan.first_chunk, len(request.plan.hashes))
                    request.arriving = client.start_lookup(self._wanted_keys(request, request.plan), fetch=True)
            except DaemonLost as lost:
                self._daemon.let_go(lost)
                raise
            request.asked = client
        except DaemonLost:
            # What had been sent went with the daemon, and does not come to the next one.
            if request.sent or time.monotonic() - request.began > _RESTART_WAIT_S:
                raise

    def _fetch(
        self, client: ReceiverClient, request: _Request, plan: ReceivePlan, remote: RemoteSpec
    ) -> Pending[Lease]:
        """Asks for those of its chunks that are not here yet."""
        groups, computed = self._layout.groups, plan.first_block * self._layout.groups[0].block_tokens
        request.wanted = [
            chunk
            for chunk, piece in enumerate(groups.pieces(plan.tokens))
            if piece.blocks.stop > computed // groups[piece.group].block_tokens
        ]
        return client.start_fetch(
            plan.request_id,
            remote.source(self._layout.tp_rank),
            self._wanted_keys(request, plan),
            ids=remote.ids,
            wait_s=self._receive_wait_s,
            register_wait_s=0.0 if remote.in_turn else _REGISTER_WAIT_S,
            until_announced=True,
        )

    def _hold(self, hold: HoldPlan) -> None:
        """Has the sender keep what it has until the request has its turn. If that fails, so does what comes then."""
        remote = hold.remote
        try:
            self._daemon.attach().start_hold(
                hold.request_id,
                remote.source(self._layout.tp_rank),
                self._keys(hold.hashes),
                ids=remote.ids,
                register_wait_s=0.0 if remote.in_turn else _REGISTER_WAIT_S,
            ).abandon()
        except (PdError, ValueError):
            pass

    def _release(self, release: ReleasePlan) -> None:
        """Of what is parked there for this request nothing is wanted."""
        remote = release.remote
        try:
            source = remote.source(self._layout.tp_rank)
            last_key = None if release.last_hash is None else self._keys([release.last_hash])[0]
            self._daemon.attach().start_release_parked(release.request_id, source, remote.ids, last_key).abandon()
        except (PdError, ValueError):
            pass  # The lease ends by itself.

    def _answered(self, request: _Request) -> bool:
        """Whether the daemon has said what became of its chunks."""
        self._start(request)
        return request.arriving is not None and self._done(request)

    def _done(self, request: _Request) -> bool:
        """Whether what it asked for has come. Raises why it does not come any more."""
        assert request.arriving is not None
        try:
            if request.lost is None and request.arriving.done():
                return True
        except _LOST as lost:
            self._daemon.let_go(lost)
        if request.lost is not None:
            raise request.lost
        return False

    def _tell_if_here(self, request: _Request) -> None:
        if request.told:
            return
        try:
            request.told = self._answered(request)
        except (PdError, ValueError):
            request.told = True  # It fails once it is planned.
        if request.told:
            self._here.append(request.request_id)

    def _arrived(self, request: _Request) -> Lease | None:
        """What the daemon has answered; None where it has to be asked otherwise."""
        assert request.arriving is not None
        try:
            return request.arriving.result()
        except RequestRefused as refused:
            if refused.kind == Kind.BUSY:
                request.arriving, request.again_at = None, time.monotonic() + _BUSY_PAUSE_S
                return None
            if request.sent and refused.kind == Kind.DEADLINE:
                raise LoadError(
                    "it was reported across, and it is not here: the receiver was started again since, or the router has named "
                    f"another one ({refused})"
                ) from None
            if request.req_id is None or refused.kind != Kind.UNKNOWN:
                raise
        # Handed out before, to another sample of the same request, or to one that was retried: its chunks may be there
        # still.
        request.req_id = request.arriving = None
        return None

    def _keys(self, hashes: Iterable[str]) -> list[str]:
        layout, weights = self._layout, self._weights.identity()
        return [chunk_key(layout.model, layout.tp_size, layout.tp_rank, weights, name, self._dtype) for name in hashes]

    def _wanted_keys(self, request: _Request, plan: ReceivePlan) -> list[str]:
        hashes = plan.hashes
        return self._keys(hashes if request.wanted is None else [hashes[chunk] for chunk in request.wanted])

    def _load(self, request: _Request, plan: ReceivePlan, lease: Lease) -> None:
        """Copies the chunks of a lease, as far as they are not here yet, and releases it."""
        began, moved_bytes = time.monotonic(), 0
        try:
            chunks = lease.chunks
            keys = self._wanted_keys(request, plan)
            if [chunk.key for chunk in chunks if chunk is not None] != keys:
                came = [None if chunk is None else chunk.key for chunk in chunks]
                at = next((i for i, (a, b) in enumerate(zip(came, keys)) if a != b), min(len(came), len(keys)))
                seen = came[at] if at < len(came) else "not there"
                expected = keys[at] if at < len(keys) else "no such chunk"
                raise LoadError(
                    f"chunk {at} is {seen}, expected {expected}: "
                    "prefill was given another prompt or has other weights, or the chunk has gone"
                )
            if not self._adapters.may_be(plan.adapter):
                raise LoadError("the files of its LoRA adapter have changed since it was loaded; load it anew")
            groups = self._layout.groups
            pieces = groups.pieces(plan.tokens)
            tables, computed = (plan.block_ids, *plan.more_block_ids), plan.first_block * groups[0].block_tokens
            for index, chunk in zip(range(len(pieces)) if request.wanted is None else request.wanted, chunks, strict=True):
                assert chunk is not None
                piece = pieces[index]
                group, paged = groups[piece.group], self._paged[piece.group]
                first = max(piece.blocks.start, computed // group.block_tokens)
                if piece.blocks.stop <= first:
                    continue
                len_bytes = paged.chunk_bytes(len(piece.blocks) * len(group.members))
                if chunk.len_bytes != len_bytes:
                    raise LoadError(
                        f"chunk {index} has {chunk.len_bytes} bytes, expected {len_bytes}: {len(piece.blocks)} blocks"
                    )
                moved_bytes += chunk.len_bytes
                block_ids = groups.block_ids(piece, tables, first)
                if not group.keeps_all and NULL_BLOCK in block_ids:
                    raise LoadError(f"vLLM keeps no KV of chunk {index}: its blocks are skipped")
                paged.scatter(
                    block_ids,
                    self._daemon.buffer[chunk.offset_bytes : chunk.offset_bytes + chunk.len_bytes],
                    first_block=first - piece.blocks.start,
                )
        finally:
            try:
                lease.start_release()
            except PdError as error:
                logger.warning("the lease of request %s could not be released: %s", request.req_id, error)
        self._observations.took("wait", began - request.began)
        self._observations.took("load", time.monotonic() - began)
        tokens = plan.tokens - plan.first_block * self._layout.block_tokens
        self._observations.moved("received", tokens, moved_bytes)

    # ---- ends of requests -------------------------------------------------------------------------------------------------

    def _fail(self, request: _Request, plan: ReceivePlan, error: Exception) -> None:
        logger.error("request %s was not loaded: %s", request.req_id or request.request_id, error)
        self._observations.failed("received", error)
        if self._layout.groups.is_plain:
            self._failed_blocks.update(plan.block_ids[plan.first_block :])
        else:
            self._failed_requests.add(request.request_id)

    def _refused(self, request: _Request, refused: RequestRefused) -> None:
        """A name's failure is told once: it is that of other samples of the request, too. What comes after a deadline is unwanted."""
        is_fetched = request.plan is not None and request.plan.remote is not None
        if request.req_id is None or is_fetched or refused.kind == Kind.LIMIT:
            return
        for other in self._requests.values():
            if other is request or other.req_id != request.req_id or other.arriving is None or other.lost is not None:
                continue
            try:
                if other.arriving.done():
                    continue
            except _LOST:
                continue
            other.arriving.abandon()
            other.lost = refused
        if refused.kind == Kind.DEADLINE and self._daemon.client is not None:
            self._daemon.client.give_up(request.req_id)

    def _return(self, request_id: str, request: _Request | None) -> None:
        """What the request asked for is not taken: it is given back now, or once it is here."""
        if request is None or request.arriving is None:
            self._returned.append(request_id)
        else:
            self._returning[request_id] = request

    def _try_return(self, request: _Request) -> None:
        assert request.arriving is not None
        try:
            if not self._done(request):
                return
            request.arriving.abandon()
        except PdError:
            pass  # The daemon is lost: so is the lease.
        del self._returning[request.request_id]
        self._returned.append(request.request_id)

    def _drop(self, request_id: str) -> None:
        """The engine has given the request up. Its blocks are kept until it is reported, where some were given."""
        request = self._requests.pop(request_id, None)
        self._return(request_id, request)
        if request is None:
            return
        if request.plan is not None:
            self._finished.add(request_id)
        wanted = any(other.req_id == request.req_id and other.waits for other in self._requests.values())
        if request.req_id is not None and not wanted and self._daemon.client is not None:
            # Nobody else will fetch it: the sender is told, and the slots are free at once.
            self._daemon.client.give_up(request.req_id)


def requests_of(worker: ConsumerWorker) -> Iterable[str]:
    """Requests that the worker still knows of: for tests, that nothing is left behind."""
    return [*worker._requests, *worker._returning, *worker._turns]
