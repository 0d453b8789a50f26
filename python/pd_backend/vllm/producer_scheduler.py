"""Prefill's scheduler side of the connector: which chunk of which request is computed, step by step.

No daemon is talked to.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .groups import Groups, Piece
from .naming import NULL_BLOCK, Naming, Unnamed
from .pins import NoPins, Pins
from .spec import (
    DisaggSpec,
    ParkSpec,
    RemoteSpec,
    Rendezvous,
    SpecError,
    kept_spec,
    park_spec,
    parked_answer,
    prefill_spec,
    unsolicited_spec,
)
from .step import ChunkBlocks, ProducerStep, SendOutcomes, SendPlan

logger = logging.getLogger("vllm.pd_backend")

#: States in which the engine has a request's whole prompt computed, by the names that it gives them.
_COMPLETE = frozenset({"FINISHED_STOPPED", "FINISHED_LENGTH_CAPPED", "FINISHED_REPETITION"})


@dataclass
class _Sending:
    """A prefill request, as far as the scheduler knows."""

    plan: SendPlan
    #: The engine's own cache may have other KV under the request's name.
    stale_hits: bool = False
    #: What each of its chunks is.
    pieces: list[Piece] = field(default_factory=list)
    planned: bool = False
    #: By the engine's groups.
    tables: list[list[int]] = field(default_factory=list)
    #: Chunks that the workers have been told of.
    told: int = 0
    #: Blocks of chunks that the engine would give away while the request is computed, or once it has ended.
    pinned: list[int] = field(default_factory=list)
    error: str | None = None
    #: Workers that have said how it ended.
    ended: int = 0
    #: Tokens of the prompt that the engine had when it was first scheduled.
    cached_tokens: int = 0


class ProducerScheduler:
    """Prefill: tells the workers of each chunk once its tokens are computed."""

    def __init__(
        self,
        groups: Groups,
        tp_size: int,
        naming: Naming,
        rendezvous: Callable[[], Rendezvous | None] = lambda: None,
        unsolicited: bool = False,
        pins: Pins | None = None,
    ) -> None:
        """`rendezvous`: where what is parked here is asked for, once that is known. `unsolicited`: whether requests of one token
        whose router says nothing are pushed to a receiver that is guessed. `pins`: keeps blocks that a window has left."""
        self._groups = groups
        self._pins = pins or NoPins()
        self._rendezvous = rendezvous
        self._unsolicited = unsolicited
        self._tp_size = tp_size
        self._naming = naming
        self._sending: dict[str, _Sending] = {}
        #: Requests whose `disagg_spec` cannot be followed, and why.
        self._refused: dict[str, str] = {}
        #: Requests that are not sent because decode computes them, and why.
        self._unnamed: dict[str, str] = {}
        #: Ended at the engine, under way at the workers.
        self._draining: dict[str, _Sending] = {}
        #: What is under way, by the router's names.
        self._by_req_id: dict[str, str] = {}
        self._step = ProducerStep()
        #: Requests that have come and are not computed yet, by what the daemon will call them.
        self._expected: dict[str, str] = {}

    def arrived(self, request: Any) -> None:
        """A new request: decode may be asking for its chunks already, and waits while it is in the engine's queue."""
        spec = park_spec(request.kv_transfer_params, request.request_id)
        if spec is not None and request.request_id not in self._sending:
            self._expected[request.request_id] = spec.req_id
            self._step.expected.append((spec.req_id, spec.ids))

    def _expect_no_more(self, request_id: str, *, parked: bool = False) -> None:
        name = self._expected.pop(request_id, None)
        if name is not None and not parked:
            self._step.unexpected.append(name)

    def allocated(self, request: Any) -> None:
        """The engine has given the request its first blocks: it is going to be computed."""
        request_id = request.request_id
        if request_id in self._sending or request_id in self._refused or request_id in self._unnamed:
            return
        try:
            spec = prefill_spec(request.kv_transfer_params, self._tp_size)
        except SpecError as error:
            logger.warning("request %s is computed, but not sent: %s", request_id, error)
            self._refused[request_id] = str(error)
            return
        if spec is None:
            spec = park_spec(request.kv_transfer_params, request_id)
        # What is pooled has one token as well.
        if spec is None and self._unsolicited and getattr(request, "pooling_params", None) is None:
            spec = unsolicited_spec(request.kv_transfer_params, request_id, request.max_tokens)
        if spec is None:
            return
        try:
            named = self._naming.name(request, request.num_prompt_tokens)
        except Unnamed as unnamed:
            if not self._is_unsolicited(spec):
                self._unnamed[request_id] = str(unnamed)
            self._expect_no_more(request_id)
            return
        tokens = list(request.prompt_token_ids)
        tokens = tokens[: self._groups.sent_tokens(len(tokens))]
        pieces = self._groups.pieces(len(tokens))
        hashes = self._groups.names(tokens, pieces, named.context)
        other = self._of(self._by_req_id.get(spec.req_id))
        if other is not None:
            # Another sample of the same request: its chunks are sent already.
            if other.plan.hashes != hashes:
                self._refused[request_id] = f"disagg_spec.req_id = {spec.req_id!r} is that of another prompt under way"
            return
        self._by_req_id[spec.req_id] = request_id
        groups = () if self._groups.is_plain else tuple(piece.group for piece in pieces)
        plan = SendPlan(request_id, spec, hashes, len(tokens), named.adapter, groups)
        self._sending[request_id] = _Sending(plan, named.stale_hits, pieces)

    @staticmethod
    def _is_unsolicited(spec: DisaggSpec | ParkSpec) -> bool:
        """Whether nobody waits to hear what becomes of it."""
        return isinstance(spec, ParkSpec) and spec.unsolicited

    def build(self, output: Any) -> ProducerStep:
        """What the workers need for this step; `output` is the engine's `SchedulerOutput`."""
        step, self._step = self._step, ProducerStep()
        step.idle = output.total_num_scheduled_tokens == 0
        for request_id in getattr(output, "preempted_req_ids", None) or ():
            sending = self._sending.get(request_id)
            if sending is not None:
                self._start_over(sending)
                step.preempted.append(request_id)
        for new in output.scheduled_new_reqs:
            self._advance(step, new.req_id, new.block_ids, True, new.num_computed_tokens, output)
        cached = output.scheduled_cached_reqs
        for index, request_id in enumerate(cached.req_ids):
            anew = request_id in cached.resumed_req_ids
            self._advance(
                step, request_id, cached.new_block_ids[index], anew, cached.num_computed_tokens[index], output
            )
        return step

    def _advance(
        self, step: ProducerStep, request_id: str, blocks: Any, anew: bool, computed: int, output: Any
    ) -> None:
        sending = self._sending.get(request_id)
        if sending is None:
            return
        if anew:
            self._start_over(sending)
            if computed and sending.stale_hits:
                self._give_up(
                    step, sending, "vLLM's own cache may have KV of another adapter of this name; /reset_prefix_cache"
                )
                return
        if blocks is not None:
            sending.tables = sending.tables or [[] for _ in blocks]
            for table, added in zip(sending.tables, blocks, strict=True):
                table.extend(added)
        if not sending.planned:
            sending.planned = True
            sending.plan = replace(sending.plan, cached=computed > 0)
            sending.cached_tokens = computed
            step.plans.append(sending.plan)
        after = computed + output.num_scheduled_tokens[request_id]
        while sending.told < len(sending.pieces):
            piece = sending.pieces[sending.told]
            if piece.end > after:
                break
            block_ids = self._groups.block_ids(piece, sending.tables)
            if NULL_BLOCK in block_ids:
                self._give_up(step, sending, f"vLLM keeps no KV of chunk {sending.told}: its blocks are skipped")
                return
            if not self._groups[piece.group].keeps_all:
                self._pins.pin(block_ids)
                sending.pinned += block_ids
            step.chunks.append(ChunkBlocks(request_id, sending.told, block_ids, piece.group))
            sending.told += 1

    def _start_over(self, sending: _Sending) -> None:
        """Its blocks are others from now on, or none."""
        sending.tables, sending.told = [], 0
        self._unpin(sending)

    def _unpin(self, sending: _Sending) -> None:
        pinned, sending.pinned = sending.pinned, []
        self._pins.unpin(pinned)

    def _give_up(self, step: ProducerStep, sending: _Sending, why: str) -> None:
        """The request is computed, and not sent: decode computes it as well."""
        request_id = sending.plan.request_id
        del self._sending[request_id]
        self._forget(sending)
        if not self._is_unsolicited(sending.plan.spec):
            logger.warning("request %s is not sent: %s", request_id, why)
            self._unnamed[request_id] = why
        if sending.plan in step.plans:
            step.plans.remove(sending.plan)  # The workers have not heard of it.
            self._expect_no_more(request_id)
        else:
            step.dropped.append(request_id)

    def finished(self, request: Any, block_ids: Sequence[int] = ()) -> tuple[bool, dict[str, Any] | None]:
        """Whether the engine has to keep the request's blocks until the workers report it, and what its response says.
        """
        request_id = request.request_id
        sending = self._sending.get(request_id)
        self._expect_no_more(request_id, parked=sending is not None and sending.planned)
        refused = self._refused.pop(request_id, None)
        if refused is not None:
            return False, self._response(request, refused)
        unnamed = self._unnamed.pop(request_id, None)
        if unnamed is not None and park_spec(request.kv_transfer_params, request_id) is not None:
            return False, None  # Its router asks decode without any, which computes it.
        if unnamed is not None:
            return False, self._response(request, None) | {"not_sent": unnamed}
        sending = self._sending.pop(request_id, None)
        if sending is None:
            return False, None
        complete = getattr(request.status, "name", str(request.status)) in _COMPLETE
        if not sending.planned:
            self._forget(sending)
            return False, None
        if not complete or sending.told < len(sending.plan.hashes):
            self._step.dropped.append(request_id)
            self._forget(sending)
            return False, None
        if sending.error is not None and sending.ended >= self._tp_size:
            self._step.dropped.append(request_id)
            self._forget(sending)
            return False, self._answer(request, sending, block_ids) or None
        self._step.finishing.append(request_id)
        if sending.ended < self._tp_size:
            self._draining[request_id] = sending
        else:
            self._forget(sending)
        return True, self._answer(request, sending, block_ids) or None

    def keep(self, request: Any, block_ids: Sequence[int]) -> tuple[bool, dict[str, Any] | None]:
        """Parks the whole chunks of a request that was decoded here, for the next turn of its conversation. As `finished`."""
        if not self._groups.is_plain:
            return False, None  # The next turn needs what windows have left by now.
        at, request_id = self._rendezvous(), request.request_id
        complete = getattr(request.status, "name", str(request.status)) in _COMPLETE
        # The last token of the answer is not computed.
        computed = min(request.num_tokens - 1, request.num_computed_tokens)
        chunk_tokens, block_tokens = self._groups.chunk_tokens, self._groups[0].block_tokens
        chunks = computed // chunk_tokens
        if at is None or not complete or not chunks or request_id in self._draining:
            return False, None
        tokens = chunks * chunk_tokens
        blocks = list(block_ids[: tokens // block_tokens])
        try:
            named = self._naming.name(request, request.num_tokens)
        except Unnamed:
            return False, None
        if named.stale_hits or NULL_BLOCK in blocks or len(blocks) * block_tokens < tokens:
            return False, None
        pieces = self._groups.pieces(tokens)
        hashes = self._groups.names(request.all_token_ids[:tokens], pieces, named.context)
        spec = kept_spec(request_id)
        own = RemoteSpec(at.host, at.ports, spec.ids, in_turn=True)
        plan = SendPlan(request_id, spec, hashes, tokens, named.adapter, cached=True, kept=own)
        self._draining[request_id] = _Sending(plan, planned=True, told=chunks)
        step = self._step
        step.plans.append(plan)
        for chunk, piece in enumerate(pieces):
            step.chunks.append(ChunkBlocks(request_id, chunk, self._groups.block_ids(piece, [blocks])))
        step.finishing.append(request_id)
        return True, parked_answer(request_id, at, blocks, tokens)

    def update(self, outcomes: SendOutcomes) -> None:
        """What the workers have said."""
        for request_id, rank in outcomes.granted:
            sending = self._of(request_id)
            if sending is not None and sending.error is None:
                self._step.turns.append((request_id, rank + 1))
        for request_id, said in outcomes.ended.items():
            sending = self._of(request_id)
            if sending is None:
                continue
            sending.ended += len(said)
            sending.error = next((error for error in said if error is not None), sending.error)
            if sending.error is not None and sending.ended < self._tp_size and isinstance(sending.plan.spec, DisaggSpec):
                self._step.given_up.append(request_id)
            if sending.ended >= self._tp_size and self._draining.pop(request_id, None) is not None:
                self._forget(sending)

    def cache_reset(self) -> None:
        """The engine's own cache is empty."""
        self._naming.cache_reset()
        self._step.cache_reset = True

    def pending(self) -> bool:
        """Whether the engine has to go on stepping for what is under way."""
        step = self._step
        return bool(self._draining or step.dropped or step.finishing or step.turns or step.given_up or step.unexpected)

    def _of(self, request_id: str | None) -> _Sending | None:
        if request_id is None:
            return None
        return self._sending.get(request_id) or self._draining.get(request_id)

    def _forget(self, sending: _Sending) -> None:
        self._unpin(sending)
        self._by_req_id.pop(sending.plan.spec.req_id, None)

    def _answer(self, request: Any, sending: _Sending, block_ids: Sequence[int]) -> dict[str, Any]:
        spec = sending.plan.spec
        if not isinstance(spec, ParkSpec):
            response = self._response(request, sending.error)
            # By the name that vLLM gives it in answers that say `do_remote_prefill`.
            return response if sending.error else response | {"remote_prefill_cached_tokens": sending.cached_tokens}
        at = self._rendezvous() if spec.is_answered else None
        # Where there is nothing to ask for, a router of NIXL's dialect has to be told nothing: decode computes it.
        if sending.error is not None or at is None:
            return {}
        answer = parked_answer(request.request_id, at, block_ids, sending.plan.tokens)
        transfer_id = request.kv_transfer_params.get("transfer_id")
        # MoRIIO's routers copy it from here.
        return answer if transfer_id is None else answer | {"transfer_id": transfer_id}

    @staticmethod
    def _response(request: Any, error: str | None) -> dict[str, Any]:
        """`kv_transfer_params` of the response: what LMCache's proxies ask for, and what went wrong."""
        response: dict[str, Any] = {}
        if (request.kv_transfer_params or {}).get("ret_first_tok") and request.output_token_ids:
            response["first_tok"] = request.output_token_ids[0]
        if error is not None:
            response["error"] = error
        return response
