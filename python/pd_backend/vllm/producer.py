"""The worker's side of prefill: chunks from paged memory into slots, and on their way, as they are computed.

Nothing here waits for the daemon: what it has not answered by the end of a step is looked at again after the next one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..client import Pending
from ..errors import ClientClosed, DaemonLost, Kind, PdError, RequestRefused, Unreadable
from ..messages import Event, Failed, Parked, SendPart, Sent, StagedSlot
from ..receiver_client import ReceiverClient
from ..sender_client import SenderClient
from .adapters import LoadedAdapters
from .attachment import Attachment
from .keys import chunk_key
from .layout import EngineLayout
from .observations import Observations
from .spec import DisaggSpec, ParkSpec, RemoteSpec
from .step import ProducerStep, SendOutcomes, SendPlan, idle_wait_s
from .weights import Weights

logger = logging.getLogger("vllm.pd_backend")

#: Before the daemon is asked again that had no place for one more request.
_BUSY_PAUSE_S = 0.1
#: After these nothing is heard through a client any more.
_LOST = (DaemonLost, ClientClosed)


@dataclass
class _Chunk:
    """A chunk whose tokens are computed, or are by the end of this step, and that is not sent yet."""

    block_ids: list[int]
    group: int = 0
    slot: StagedSlot | None = None
    #: Layers, from the first on, that are in the slot and told to be sent.
    layers: int = 0


@dataclass
class _Request:
    plan: SendPlan
    began: float
    #: Where it was opened: its slots are in that daemon's buffer, not in that of one started after it.
    client: SenderClient | None = None
    opening: Pending[Any] | None = None
    #: When it is opened again, if the daemon had no place for it.
    again_at: float | None = None
    #: It is opened once the rank before this one has its slots.
    waits_turn: bool = False
    already: frozenset[int] | None = None
    staging: Pending[list[StagedSlot]] | None = None
    chunks: dict[int, _Chunk] = field(default_factory=dict)
    #: Slots of chunks that were taken from us by a preemption before they were filled.
    spare: dict[int, _Chunk] = field(default_factory=dict)
    sent: set[int] = field(default_factory=set)
    replies: list[Pending[None]] = field(default_factory=list)
    #: The daemon has every byte, and was told that this is all.
    complete: bool = False
    #: The engine waits for us before it frees the request's blocks.
    finishing: bool = False
    #: How it ended; the first of the tuple says whether it has.
    ended: bool = False

    @property
    def opened(self) -> bool:
        return self.already is not None


class ProducerWorker:
    """Sends one worker's part of each request. For the thread in which the worker steps."""

    def __init__(
        self,
        daemon: Attachment[SenderClient],
        layout: EngineLayout,
        dtype: str,
        *,
        slot_wait_s: float | None = None,
        layer_pushes: int = 1,
        adapters: LoadedAdapters | None = None,
        weights: Weights | None = None,
        observations: Observations | None = None,
    ) -> None:
        self._daemon = daemon
        self._observations = observations or Observations(layout.tp_rank)
        self._weights = weights or Weights("", None)
        #: Those that the keys of requests under way say.
        self._of_weights = self._weights.last
        #: They have changed since the engine's own cache was emptied: that may have KV of the former ones.
        self._cache_is_stale = False
        self._adapters = adapters or LoadedAdapters()
        #: By group.
        self._paged = daemon.groups
        #: Layers that are pushed one after the other: those of the only group.
        self._layers = self._paged[0].layers if len(self._paged) == 1 else 1
        self._layout = layout
        self._dtype = dtype
        self._slot_wait_s = slot_wait_s
        #: Layers that are pushed together.
        self._push_layers = -(-self._layers // max(1, layer_pushes))
        self._requests: dict[str, _Request] = {}
        #: By the name that both sides have for it.
        self._by_req_id: dict[str, _Request] = {}
        self._computed_layers = 0
        #: Between `begin_step` and `end_step`: what this step computes is not all there yet.
        self._stepping = False
        self._idle = False
        #: Requests of which chunks are being computed in this step.
        self._current: list[_Request] = []
        self._outcomes = SendOutcomes()
        # What the buffer and the engine's memory do not have in common is said before the engine serves.
        daemon.use(self._lost)

    # ---- hooks of a step, in their order ----------------------------------------------------------------------------------

    def begin_step(self, step: ProducerStep) -> None:
        """Before the forward: what is going to be computed, and what is not any more."""
        self._stepping, self._idle = True, step.idle
        self._computed_layers = 0
        self._current = []
        self._expect(step)
        for request_id in step.dropped:
            self._drop(request_id)
        for request_id in step.preempted:
            self._preempted(request_id)
        if step.plans or step.chunks or step.cache_reset:
            self._look_at_weights()
        if step.cache_reset:
            self._cache_is_stale = False
        for plan in step.plans:
            request = self._requests[plan.request_id] = _Request(plan, time.monotonic())
            if plan.spec.req_id in self._by_req_id:
                # What the daemon says of the name would be taken for this one's.
                self._end(request, "another request of this name is under way")
                continue
            self._by_req_id[plan.spec.req_id] = request
            if plan.cached and self._cache_is_stale:
                text = "vLLM's own cache may have KV of the former weights; /reset_prefix_cache after changing them"
                self._end(request, text)
                continue
            # Receivers decide each for itself whom they grant slots: all ranks of all requests take theirs in one order, so that
            # none has slots that another waits for.
            request.waits_turn = self._layout.tp_rank > 0 and isinstance(plan.spec, DisaggSpec)
            if not request.waits_turn:
                self._open(request)
        for request_id, rank in step.turns:
            if rank == self._layout.tp_rank:
                self._turn_has_come(request_id)
        for request_id in step.given_up:
            request = self._requests.get(request_id)
            if request is not None and request.waits_turn and not request.ended:
                self._end(request, None)  # The rank that cannot send says why.
        for told in step.chunks:
            request = self._requests.get(told.request_id)
            if request is None or request.ended or told.chunk in request.sent or told.chunk in request.chunks:
                continue
            chunk = request.spare.pop(told.chunk, None) or _Chunk([])
            chunk.block_ids, chunk.group = told.block_ids, told.group
            request.chunks[told.chunk] = chunk
            if request not in self._current:
                self._current.append(request)
        for request_id in step.finishing:
            request = self._requests.get(request_id)
            if request is not None:
                request.finishing = True
        if self._requests:
            self._poll()

    def _expect(self, step: ProducerStep) -> None:
        """Tells the daemon what stands in the engine's queue, and what does not any more. Where it is lost, decode asks anew."""
        try:
            for name, ids in step.expected:
                self._daemon.attach().start_expect(name, ids).abandon()
            for name in step.unexpected:
                self._daemon.attach().give_up(name)
        except PdError:
            pass

    def _turn_has_come(self, request_id: str) -> None:
        request = self._requests.get(request_id)
        if request is not None and request.waits_turn and not request.ended:
            request.waits_turn = False
            self._open(request)

    def _look_at_weights(self) -> None:
        """Where the weights have changed, what is still being computed is of both, and has no name."""
        if self._weights.identity() == self._of_weights:
            return
        self._of_weights, self._cache_is_stale = self._weights.last, True
        for request in list(self._by_req_id.values()):
            if len(request.sent.union(request.chunks)) < len(request.plan.hashes):
                self._fail(request, PdError("unnamed", "the weights were changed while it was computed; send it again"))

    def layer_computed(self, layer_name: str) -> None:
        """Within the forward: this layer's KV is written. Pushes layers of the chunks that this step completes."""
        if not self._current or self._push_layers >= self._layers:
            return
        index = self._paged[0].layer_index.get(layer_name)
        # Only as far as every earlier layer was seen: an engine that skips hooks gets the rest at the end of the step.
        if index != self._computed_layers:
            return
        self._computed_layers += 1
        if self._computed_layers % self._push_layers or self._computed_layers == self._layers:
            return
        self._poll()
        for request in self._current:
            self._push(request, self._computed_layers)

    def end_step(self) -> None:
        """After the forward: everything of this step is computed."""
        self._stepping = False
        self._current = []
        if not self._requests:
            return
        self._poll(self._idle_wait_s() if self._idle else 0.0)
        for request in list(self._requests.values()):
            self._push(request, self._layers)

    def finished_sending(self) -> set[str]:
        """Requests whose blocks the engine kept for us, and may free now."""
        if not self._requests:
            return set()
        self._poll()
        done = set()
        for request_id, request in list(self._requests.items()):
            # With speculative decoding the engine asks before the draft's layers are computed.
            if not request.ended and not self._stepping:
                self._push(request, self._layers)
            if request.finishing and (request.complete or request.ended):
                done.add(request_id)
                request.finishing = False
                del self._requests[request_id]
        return done

    def outcomes(self) -> SendOutcomes | None:
        """What has become of requests since the last call; None for no news."""
        if self._by_req_id:
            self._poll()
        if not self._outcomes:
            return None
        outcomes, self._outcomes = self._outcomes, SendOutcomes()
        return outcomes

    def close(self) -> None:
        """The worker ends: what is under way at the daemon ends by the daemon's own rules."""
        self._daemon.close()

    # ---- towards the daemon -----------------------------------------------------------------------------------------------

    def _lost(self, client: SenderClient, why: PdError) -> None:
        """Of a client that is of no more use: what was opened there goes with it, but for what has been heard of."""
        try:
            client.wait_for_news(0.0)
        except PdError:
            pass
        self._ends(client, client.take_events())
        self._fail_all(client, why)

    def _open(self, request: _Request) -> None:
        plan, layout = request.plan, self._layout
        keys = [
            chunk_key(layout.model, layout.tp_size, layout.tp_rank, self._of_weights, name, self._dtype)
            for name in plan.hashes
        ]
        try:
            request.client = client = self._daemon.attach()
            spec, last_chunk_tokens = plan.spec, layout.last_chunk_tokens(plan.tokens)
            if isinstance(spec, ParkSpec):
                wait_s = self._slot_wait_s if plan.kept is None else 0.0
                request.opening = client.start_park(
                    spec.req_id,
                    keys,
                    last_chunk_tokens=last_chunk_tokens,
                    groups=plan.groups,
                    ids=spec.ids,
                    wait_s=wait_s,
                    unsolicited=spec.unsolicited,
                    # For a turn that may never come, and whose prefill asks for what it lacks.
                    stays=plan.kept is not None,
                )
            else:
                request.opening = client.start_open(
                    spec.req_id,
                    keys,
                    last_chunk_tokens=last_chunk_tokens,
                    groups=plan.groups,
                    receiver=spec.receiver(layout.tp_rank),
                    wait_s=self._slot_wait_s,
                )
        except PdError as error:
            self._fail(request, error)

    def _poll(self, wait_s: float = 0.0) -> None:
        """Takes in what the daemon has said. Waits only as long as it is told to, for an answer that is on its way."""
        client = self._daemon.client
        if client is None:
            return
        try:
            if wait_s > 0:
                client.wait_for_news(wait_s)
            self._ends(client, client.poll_events())
            for request in list(self._by_req_id.values()):
                if request.client is not client:
                    continue
                try:
                    self._answers(request)
                except RequestRefused as refused:
                    if refused.kind == Kind.BUSY and not request.opened:
                        request.again_at = time.monotonic() + _BUSY_PAUSE_S
                        continue
                    # Why may have come just before this answer, which says no more than that the request has ended.
                    self._ends(client, client.poll_events())
                    if not request.ended:
                        self._fail(request, refused)
                except (*_LOST, Unreadable):
                    raise
                except PdError as error:
                    self._fail(request, error)
        except _LOST as lost:
            self._daemon.let_go(lost)
        except PdError as error:
            if self._daemon.is_shared and isinstance(error, Unreadable):
                return self._daemon.let_go(error)  # It may have brought chunks to whoever loads.
            # What could not be read may have been about any of them. The daemon lives, and is told.
            self._ends(client, client.take_events())
            self._fail_all(client, error)

    def _ends(self, client: SenderClient, events: Iterable[Event]) -> None:
        for event in events:
            request = self._by_req_id.get(event.req_id)
            # One that was asked for again has the name of what it takes the place of.
            if request is not None and request.client is client:
                self._see(request, event)
                self._end(request, f"{event.kind}: {event.text}" if isinstance(event, Failed) else None)

    def _see(self, request: _Request, event: Event) -> None:
        if isinstance(event, Sent):
            self._observations.moved("sent", request.plan.tokens)
            timings = event.timings
            phases = (("alloc", timings.alloc_us), ("transfer", timings.transfer_us), ("commit", timings.commit_us))
            for phase, microseconds in phases:
                self._observations.took(phase, microseconds / 1e6)
        elif isinstance(event, Parked) and request.plan.kept is None:
            self._observations.moved("parked", request.plan.tokens)

    def _fail_all(self, client: SenderClient, error: PdError) -> None:
        for request in list(self._by_req_id.values()):
            if request.client is client:
                self._fail(request, error)

    def _idle_wait_s(self) -> float:
        """How long a step that computes nothing waits for an answer, so that it need not wait for the next step."""
        if not self._by_req_id:
            return 0.0
        newest = max(request.began for request in self._by_req_id.values())
        return idle_wait_s(time.monotonic() - newest)

    def _answers(self, request: _Request) -> None:
        if request.again_at is not None and time.monotonic() >= request.again_at:
            request.again_at = None
            self._open(request)
        if request.opening is not None and request.opening.done():
            opening, request.opening = request.opening, None
            opened = opening.result()
            request.already = frozenset(opened.already_sent)
            request.sent |= request.already
            if isinstance(request.plan.spec, DisaggSpec) and self._layout.tp_rank + 1 < self._layout.tp_size:
                self._outcomes.granted.append((request.plan.request_id, self._layout.tp_rank))
            self._staged(request, opened.slots)
            self._completed(request)
        if request.staging is not None and request.staging.done():
            staging, request.staging = request.staging, None
            self._staged(request, staging.result())
        if request.opened and request.staging is None:
            for chunk in [chunk for chunk in request.chunks if chunk in request.sent]:
                del request.chunks[chunk]
            wanted = [index for index, chunk in request.chunks.items() if chunk.slot is None]
            # A few at a time where the buffer is small: more than it has could never be staged together.
            client = self._daemon.client
            if wanted and client is not None:
                most = max(1, client.attached.slot_count // 4)
                request.staging = client.start_stage(
                    request.plan.spec.req_id, wanted[:most], wait_s=self._slot_wait_s
                )
        while request.replies and request.replies[0].done():
            request.replies.pop(0).result()

    @staticmethod
    def _staged(request: _Request, slots: Iterable[StagedSlot]) -> None:
        """Slots for chunks that are computed, or will be."""
        for slot in slots:
            chunk = request.chunks.get(slot.chunk)
            if chunk is None:
                chunk = request.spare[slot.chunk] = _Chunk([])
            chunk.slot = slot

    def _push(self, request: _Request, layers: int) -> None:
        """Copies what is computed of staged chunks, up to so many layers, and tells the daemon to send it."""
        if request.ended or request.complete or self._daemon.client is None:
            return
        if not self._adapters.may_be(request.plan.adapter):
            text = "the files of its LoRA adapter have changed since it was loaded; load it anew"
            return self._fail(request, PdError("unnamed", text))
        parts: list[SendPart] = []
        for index, chunk in list(request.chunks.items()):
            slot = chunk.slot
            if slot is None or not chunk.block_ids or chunk.layers >= layers:
                continue
            view = self._daemon.buffer[slot.offset_bytes : slot.offset_bytes + slot.len_bytes]
            paged = self._paged[chunk.group]
            paged.gather(chunk.block_ids, view, layers=range(chunk.layers, layers))
            per_layer = paged.layer_bytes(len(chunk.block_ids))
            parts.append(
                SendPart(slot.slot, chunk.layers * per_layer, (layers - chunk.layers) * per_layer)
            )
            chunk.layers = layers
            if layers == self._layers:
                request.sent.add(index)
                del request.chunks[index]
        if parts:
            self._send(request, parts)

    def _send(self, request: _Request, parts: list[SendPart]) -> None:
        last = len(request.sent) == len(request.plan.hashes)
        try:
            client = self._daemon.client
            assert client is not None
            request.replies.append(client.start_send(request.plan.spec.req_id, parts, last=last))
        except PdError as error:
            self._fail(request, error)
            return
        request.complete = last

    def _completed(self, request: _Request) -> None:
        """The receiver has every chunk already: nothing is left to send but that."""
        if not request.complete and len(request.sent) == len(request.plan.hashes):
            request.chunks.clear()
            self._send(request, [])

    # ---- ends of requests -------------------------------------------------------------------------------------------------

    def _preempted(self, request_id: str) -> None:
        """The blocks of what was not copied are gone; their slots stay, for when it is computed again."""
        request = self._requests.get(request_id)
        if request is None:
            return
        request.spare.update(request.chunks)
        request.chunks = {}

    def _drop(self, request_id: str) -> None:
        """The engine has given the request up."""
        request = self._requests.pop(request_id, None)
        if request is None or request.ended:
            return
        self._cancel(request)
        self._forget(request)

    def _fail(self, request: _Request, error: PdError) -> None:
        """This request alone: the engine goes on, and so do the others."""
        self._cancel(request)
        self._end(request, str(error))

    def _cancel(self, request: _Request) -> None:
        """At the daemon: its slots are given back there, and the receiver's. One that is lost does so by itself."""
        client = request.client
        if client is None or client is not self._daemon.client:
            return
        if request.opening is not None:
            # What it brings late is cancelled when it comes.
            request.opening.abandon()
        client.give_up(request.plan.spec.req_id)

    def _end(self, request: _Request, error: str | None) -> None:
        request.ended = True
        request.chunks.clear()
        self._forget(request)
        if request.plan.kept is not None:
            self._end_kept(request, request.plan.kept, error)
        elif error is not None:
            spec = request.plan.spec
            # A guess that is not taken is no news.
            level = logging.DEBUG if isinstance(spec, ParkSpec) and spec.unsolicited else logging.ERROR
            if level == logging.ERROR:
                self._observations.failed("sent", error)
            logger.log(level, "request %s was not sent: %s", spec.req_id, error)
        self._outcomes.ended.setdefault(request.plan.request_id, []).append(error)

    def _end_kept(self, request: _Request, own: RemoteSpec, error: str | None) -> None:
        """What is kept is not leased: its slots are there for whatever else needs them."""
        if error is not None:
            logger.info("request %s is not kept for a next turn: %s", request.plan.request_id, error)
        elif isinstance(client := request.client, ReceiverClient):
            try:
                client.start_release_parked(request.plan.spec.req_id, own.source(self._layout.tp_rank), own.ids).abandon()
            except PdError:
                pass  # Its lease ends by itself.

    def _forget(self, request: _Request) -> None:
        if self._by_req_id.get(request.plan.spec.req_id) is request:
            del self._by_req_id[request.plan.spec.req_id]


def requests_of(worker: ProducerWorker) -> Iterable[str]:
    """Requests that the worker still knows of: for tests, that nothing is left behind."""
    return [*worker._requests, *worker._by_req_id]
