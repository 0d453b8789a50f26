"""The scheduler's sides of the connector: which chunk of which request is where, step by step.

No daemon is talked to, but for the look-up that decode makes of requests whose router names none.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from .adapters import Adapter
from .keys import chunk_hashes
from .metaserver import Metaservers, Post, metaserver_of
from .naming import NULL_BLOCK, Naming, Unnamed
from .prefill_servers import PrefillServers
from .spec import (
    DisaggSpec,
    ParkSpec,
    RemoteSpec,
    Rendezvous,
    SpecError,
    decode_req_id,
    kept_spec,
    own_name,
    park_spec,
    parked_answer,
    prefill_spec,
    remote_spec,
    turn_spec,
    unsolicited_spec,
)
from .step import ChunkBlocks, ConsumerStep, HoldPlan, ProducerStep, ReceivePlan, SendOutcomes, SendPlan, TurnPlan
from .transfer_id import TransferSpec, transfer_spec

logger = logging.getLogger("vllm.pd_backend")

#: How long a request waits for chunks that prefill pushes before it was asked. They are a moment away where prefill has answered;
#: those of another prompt with the same beginning may still be computed.
_COMING_WAIT_S = 10.0

#: States in which the engine has a request's whole prompt computed, by the names that it gives them.
_COMPLETE = frozenset({"FINISHED_STOPPED", "FINISHED_LENGTH_CAPPED", "FINISHED_REPETITION"})


def blocks_of(chunk: int, chunk_tokens: int, block_tokens: int, tokens: int) -> range:
    """Positions, in a request's block table, of the blocks of one chunk of so many tokens."""
    end = min((chunk + 1) * chunk_tokens, tokens)
    return range(chunk * chunk_tokens // block_tokens, -(-end // block_tokens))


@dataclass
class _Sending:
    """A prefill request, as far as the scheduler knows."""

    plan: SendPlan
    #: The engine's own cache may have other KV under the request's name.
    stale_hits: bool = False
    planned: bool = False
    block_ids: list[int] = field(default_factory=list)
    #: Chunks that the workers have been told of.
    told: int = 0
    error: str | None = None
    #: Workers that have said how it ended.
    ended: int = 0


class ProducerScheduler:
    """Prefill: tells the workers of each chunk once its tokens are computed."""

    def __init__(
        self,
        chunk_tokens: int,
        block_tokens: int,
        tp_size: int,
        naming: Naming,
        rendezvous: Callable[[], Rendezvous | None] = lambda: None,
        unsolicited: bool = False,
    ) -> None:
        """`rendezvous`: where what is parked here is asked for, once that is known. `unsolicited`: whether requests of one token
        whose router says nothing are pushed to a receiver that is guessed."""
        self._rendezvous = rendezvous
        self._unsolicited = unsolicited
        self._chunk_tokens = chunk_tokens
        self._block_tokens = block_tokens
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
            # The last token of the answer is not computed.
            named = self._naming.name(request, request.num_prompt_tokens + request.max_tokens - 1)
        except Unnamed as unnamed:
            if not self._is_unsolicited(spec):
                self._unnamed[request_id] = str(unnamed)
            return
        tokens = list(request.prompt_token_ids)
        hashes = chunk_hashes(tokens, self._chunk_tokens, named.context)
        other = self._of(self._by_req_id.get(spec.req_id))
        if other is not None:
            # Another sample of the same request: its chunks are sent already.
            if other.plan.hashes != hashes:
                self._refused[request_id] = f"disagg_spec.req_id = {spec.req_id!r} is that of another prompt under way"
            return
        self._by_req_id[spec.req_id] = request_id
        plan = SendPlan(request_id, spec, hashes, len(tokens), named.adapter)
        self._sending[request_id] = _Sending(plan, named.stale_hits)

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
                sending.told = 0
                sending.block_ids = []
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
            sending.block_ids, sending.told = [], 0
            if computed and sending.stale_hits:
                self._give_up(
                    step, sending, "vLLM's own cache may have KV of another adapter of this name; /reset_prefix_cache"
                )
                return
        if blocks is not None:
            sending.block_ids.extend(blocks[0])
        if not sending.planned:
            sending.planned = True
            sending.plan = replace(sending.plan, cached=computed > 0)
            step.plans.append(sending.plan)
        tokens = sending.plan.tokens
        after = min(computed + output.num_scheduled_tokens[request_id], tokens)
        while sending.told < len(sending.plan.hashes):
            end = min((sending.told + 1) * self._chunk_tokens, tokens)
            if end > after:
                break
            where = blocks_of(sending.told, self._chunk_tokens, self._block_tokens, tokens)
            block_ids = sending.block_ids[where.start : where.stop]
            if NULL_BLOCK in block_ids:
                self._give_up(step, sending, f"vLLM keeps no KV of chunk {sending.told}: its blocks are skipped")
                return
            step.chunks.append(ChunkBlocks(request_id, sending.told, block_ids))
            sending.told += 1

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
        else:
            step.dropped.append(request_id)

    def finished(self, request: Any, block_ids: Sequence[int] = ()) -> tuple[bool, dict[str, Any] | None]:
        """Whether the engine has to keep the request's blocks until the workers report it, and what its response says.
        """
        request_id = request.request_id
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
        at, request_id = self._rendezvous(), request.request_id
        complete = getattr(request.status, "name", str(request.status)) in _COMPLETE
        # The last token of the answer is not computed.
        computed = min(request.num_tokens - 1, request.num_computed_tokens)
        chunks = computed // self._chunk_tokens
        if at is None or not complete or not chunks or request_id in self._draining:
            return False, None
        tokens = chunks * self._chunk_tokens
        blocks = list(block_ids[: tokens // self._block_tokens])
        try:
            named = self._naming.name(request, request.num_tokens)
        except Unnamed:
            return False, None
        if named.stale_hits or NULL_BLOCK in blocks or len(blocks) * self._block_tokens < tokens:
            return False, None
        hashes = chunk_hashes(request.all_token_ids[:tokens], self._chunk_tokens, named.context)
        spec = kept_spec(request_id)
        own = RemoteSpec(at.host, at.ports, spec.ids, in_turn=True)
        plan = SendPlan(request_id, spec, hashes, tokens, named.adapter, cached=True, kept=own)
        self._draining[request_id] = _Sending(plan, planned=True, told=chunks)
        step, per_chunk = self._step, self._chunk_tokens // self._block_tokens
        step.plans.append(plan)
        for chunk in range(chunks):
            step.chunks.append(ChunkBlocks(request_id, chunk, blocks[chunk * per_chunk : (chunk + 1) * per_chunk]))
        step.finishing.append(request_id)
        return True, parked_answer(request_id, at, blocks, tokens)

    def update(self, outcomes: SendOutcomes) -> None:
        """What the workers have said."""
        for request_id, said in outcomes.ended.items():
            sending = self._of(request_id)
            if sending is None:
                continue
            sending.ended += len(said)
            sending.error = next((error for error in said if error is not None), sending.error)
            if sending.ended >= self._tp_size and self._draining.pop(request_id, None) is not None:
                self._forget(sending)

    def cache_reset(self) -> None:
        """The engine's own cache is empty."""
        self._naming.cache_reset()
        self._step.cache_reset = True

    def pending(self) -> bool:
        """Whether the engine has to go on stepping for what is under way."""
        step = self._step
        return bool(self._draining or step.dropped or step.finishing)

    def _of(self, request_id: str | None) -> _Sending | None:
        if request_id is None:
            return None
        return self._sending.get(request_id) or self._draining.get(request_id)

    def _forget(self, sending: _Sending) -> None:
        self._by_req_id.pop(sending.plan.spec.req_id, None)

    def _answer(self, request: Any, sending: _Sending, block_ids: Sequence[int]) -> dict[str, Any]:
        spec = sending.plan.spec
        if not isinstance(spec, ParkSpec):
            return self._response(request, sending.error)
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


@dataclass
class _Receiving:
    """A decode request, as far as the scheduler knows."""

    req_id: str | None
    #: Where its chunks are parked, if they have to be asked for.
    remote: RemoteSpec | None = None
    #: Whom that is asked of, where the router does not say it: `remote` is None until it is known.
    transfer: TransferSpec | None = None
    #: What its router was told, to ask prefill for it.
    post: Post | None = None
    #: Set once the router's request has been planned for: its chunks are handed out once.
    used: bool = False
    #: Workers that wait for none of its chunks any more.
    here: int = 0
    loading: bool = False
    hashes: list[str] = field(default_factory=list)
    tokens: int = 0
    adapter: Adapter | None = None
    #: For how many tokens of the request chunks were looked up last.
    lookup_of: int = -1
    #: Since when it waits for chunks that nobody asked for, and that are on their way.
    coming_since: float | None = None
    #: Of the load under way.
    block_ids: list[int] = field(default_factory=list)
    #: It was loaded, and nothing more is claimed until a preemption takes that away: of a prompt of one token the
    #: engine counts nothing as computed after its load, and asks again.
    loaded: bool = False
    #: Of a request that is prefilled here: whether the turn before of its conversation is still to be asked for, and was.
    may_ask: bool = False
    asked: bool = False
    #: Of such a request: the first chunk that is looked up. The engine has those before it, and its daemon may not.
    first_chunk: int = 0
    #: It cannot be named, or what was loaded could not be used: the engine computes it, and nothing is looked up for it.
    failed: bool = False


class Finder(Protocol):
    """Looks chunks up, and keeps those that it found from being let go until it is told to forget them."""

    def find(self, request_id: str, hashes: Sequence[str]) -> tuple[int, bool]:
        """How many of these, from the first on, are ready; and whether the next one is on its way."""

    def forget(self, request_id: str) -> None:
        """What was found for this request is not needed any more."""


class ConsumerScheduler:
    """Decode: claims the tokens that come from prefill, and tells the workers which blocks they belong into."""

    def __init__(
        self,
        chunk_tokens: int,
        block_tokens: int,
        num_blocks: int,
        tp_size: int,
        finder: Finder | None,
        naming: Naming,
        rendezvous: Callable[[], Rendezvous | None] = lambda: None,
        next_turn_tokens: int = 0,
        *,
        prefill_servers: PrefillServers | None = None,
        metaservers: Metaservers | None = None,
        own_ports: Callable[[], Sequence[int] | None] = lambda: None,
    ) -> None:
        """`num_blocks` are the engine's. Without a `finder`, requests whose router names none are computed here, and without
        `metaservers` those whose router names one. `rendezvous`: where this very server is asked for what it has parked, if it
        also prefills. `next_turn_tokens`: how many tokens of a prompt have to be missing for the turn before to be asked for; 0:
        it never is. `own_ports`: as `decode_req_id` takes them.
        """
        self._rendezvous = rendezvous
        self._next_turn_tokens = next_turn_tokens
        self._prefill_servers = prefill_servers or PrefillServers(tp_size)
        self._metaservers = metaservers
        #: Requests whose prefill server is being asked where their chunks are. Some of them have ended meanwhile.
        self._asking: dict[str, tuple[_Receiving, Any]] = {}
        self._tp_size = tp_size
        self._own_ports = own_ports
        #: Blocks that requests may hold while they wait for chunks. More would keep them from requests whose chunks are
        #: here, and the slots of those are what the others wait for.
        self._early_blocks_max = num_blocks // 4
        #: What they hold, by request.
        self._early_blocks: dict[str, int] = {}
        self._chunk_tokens = chunk_tokens
        self._block_tokens = block_tokens
        self._finder = finder
        self._naming = naming
        self._receiving: dict[str, _Receiving] = {}
        #: Requests that were prefilled by this very server: their chunks are here, and parked until they end.
        self._parked_here: dict[str, RemoteSpec] = {}
        #: Unneeded or given up, by how many workers may still get chunks for them, and have to give them back.
        self._returning: dict[str, int] = {}
        self._step = ConsumerStep()

    def arrived(self, request: Any) -> None:
        """A new request: its chunks may be waited for from now on."""
        if request.request_id in self._receiving:
            return
        params, remote, transfer, post = request.kv_transfer_params, None, None, None
        try:
            req_id, metaserver = decode_req_id(params, self._own_ports()), metaserver_of(params)
            transfer = transfer_spec(params, request.request_id, self._prefill_servers.bootstrap_port)
            if transfer is not None:
                remote = self._prefill_servers.find(transfer)
            elif metaserver is None:
                remote = remote_spec(params, self._tp_size)
            elif self._metaservers is not None and self._can_be_named(request):
                req_id = own_name("layerwise", request.request_id)
                post = self._metaservers.post(metaserver, request.request_id, req_id)
        except SpecError as error:
            logger.warning("request %s is computed here: %s", request.request_id, error)
            req_id = transfer = None
        receiving = self._receiving[request.request_id] = _Receiving(req_id, transfer=transfer, post=post)
        if remote is not None:
            self._found(receiving, request, remote)
        elif transfer is not None:
            receiving.req_id = request.request_id[:256]
            self._asking[request.request_id] = receiving, request
        elif not self._can_be_named(request):
            receiving.req_id, receiving.failed = None, True
        elif req_id is not None:
            self._step.announced.append((request.request_id, req_id))

    def _can_be_named(self, request: Any) -> bool:
        try:
            self._naming.name(request, request.num_prompt_tokens)
        except Unnamed:
            return False
        return True

    def _found(self, receiving: _Receiving, request: Any, remote: RemoteSpec) -> None:
        """It is known where its chunks are parked: they are kept until the request has its turn, if it can be named."""
        own = None if remote.engine is None else self._rendezvous()
        if own is not None and own.engine_id == remote.engine:
            # Both servers that the router chose are this one.
            self._parked_here[request.request_id] = remote
            receiving.req_id, receiving.failed = None, not self._can_be_named(request)
            return
        try:
            hashes, _ = self._hashes(request, request.num_prompt_tokens)
        except Unnamed:
            self._step.released.append((request.request_id, remote))
            receiving.req_id, receiving.failed = None, True
        else:
            receiving.req_id, receiving.remote = request.request_id[:256], remote
            self._step.holds.append(HoldPlan(request.request_id, remote, hashes))

    def _ask_where(self) -> None:
        """Which requests' prefill servers have said by now where their chunks are."""
        for request_id, (receiving, request) in list(self._asking.items()):
            assert receiving.transfer is not None
            try:
                remote = self._prefill_servers.find(receiving.transfer)
                if remote is None:
                    continue
            except SpecError as error:
                logger.warning("request %s is computed here: %s", request_id, error)
                receiving.req_id = receiving.transfer = remote = None
            del self._asking[request_id]
            if remote is not None and self._receiving.get(request_id) is receiving:
                self._found(receiving, request, remote)
            elif remote is not None:
                self._step.released.append((request_id, remote))

    def arrived_to_be_prefilled(self, request: Any) -> None:
        """A new request, whose KV this server computes and sends: what another server has of it may be fetched first."""
        if self._next_turn_tokens and self._finder is not None and request.request_id not in self._receiving:
            self._receiving[request.request_id] = _Receiving(None, may_ask=True)

    def knows(self, request_id: str) -> bool:
        """Whether it has arrived, and not finished."""
        return request_id in self._receiving

    def matched(self, request: Any, computed: int) -> tuple[int | None, bool]:
        """How many tokens beyond `computed` come from prefill, and whether they come between steps. None where it has to
        wait before it is given blocks.
        """
        self.arrived(request)
        receiving = self._receiving[request.request_id]
        if request.request_id in self._asking:
            self._ask_where()
            if request.request_id in self._asking:
                return None, False
        missing = computed < request.num_prompt_tokens
        if receiving.post is not None and missing and not receiving.used and not self._is_here(receiving):
            # Nothing of it holds blocks while its router may yet say that nothing comes.
            try:
                receiving.post.check()
                return None, False
            except SpecError as error:
                logger.warning("request %s is computed here: %s", request.request_id, error)
                receiving.req_id = receiving.post = None
                self._step.dropped.append(request.request_id)
                self._returning[request.request_id] = self._tp_size
        if receiving.loaded:
            return 0, False
        if receiving.may_ask:
            self._ask(request, receiving, computed)
        if receiving.asked and receiving.here < self._tp_size:
            return None, False
        if receiving.req_id is not None and not receiving.used:
            if not receiving.hashes and not receiving.failed:
                try:
                    receiving.hashes, receiving.adapter = self._hashes(request, request.num_prompt_tokens)
                    receiving.tokens = request.num_prompt_tokens
                except Unnamed:  # It could be when it came. What was announced of it is given back.
                    receiving.failed = True
        elif receiving.failed or self._finder is None:
            receiving.tokens, receiving.hashes = 0, []
        elif receiving.lookup_of != request.num_tokens or computed < receiving.first_chunk * self._chunk_tokens:
            receiving.lookup_of = request.num_tokens
            first = receiving.first_chunk = min(receiving.first_chunk, computed // self._chunk_tokens)
            found, comes = self._look_up(self._finder, request, computed, first)
            if comes and self._waits(receiving):
                receiving.lookup_of = -1
                return None, False
            receiving.tokens, receiving.hashes, receiving.adapter = found
        if receiving.asked:
            # What came is held by the look-up now.
            receiving.asked = False
            self._step.turns_over.append(request.request_id)
        more = receiving.tokens - computed
        if more <= 0:
            return 0, False
        if receiving.req_id is not None and not receiving.used and not self._is_here(receiving):
            held = sum(self._early_blocks.values()) + self._blocks(more)
            if held > self._early_blocks_max:
                return None, False
        return more, True

    def _ask(self, request: Any, receiving: _Receiving, computed: int) -> None:
        """Has the workers ask for the turn before, if enough of the prompt is missing; otherwise it is computed."""
        receiving.may_ask = False
        first, whole = computed // self._chunk_tokens, request.num_prompt_tokens // self._chunk_tokens
        try:
            hashes = self._hashes(request, whole * self._chunk_tokens)[0][first:]
        except Unnamed:
            hashes = []
        if not hashes or request.num_prompt_tokens - computed < self._next_turn_tokens:
            receiving.failed = True
            return
        remote = turn_spec(request.kv_transfer_params, self._tp_size)
        receiving.asked, receiving.here, receiving.first_chunk = True, 0, first
        self._step.turns.append(TurnPlan(request.request_id, hashes, remote))

    def allocated(self, request: Any, block_ids: list[int], external_tokens: int) -> None:
        """The engine has given the request its blocks, and expects so many tokens from us."""
        receiving = self._receiving.get(request.request_id)
        if receiving is None or receiving.loading:
            return
        named = receiving.req_id if not receiving.used else None
        if external_tokens > 0:
            computed = receiving.tokens - external_tokens
            blocks = self._blocks(receiving.tokens)
            if named is not None and not self._is_here(receiving):
                self._early_blocks[request.request_id] = self._blocks(external_tokens)
            self._step.loads.append(
                ReceivePlan(
                    request.request_id,
                    named,
                    receiving.hashes,
                    receiving.tokens,
                    computed // self._block_tokens,
                    block_ids[:blocks],
                    receiving.adapter,
                    receiving.remote if named is not None else None,
                    receiving.first_chunk,
                )
            )
            receiving.loading = True
            receiving.block_ids = block_ids[:blocks]
        elif named is not None and receiving.remote is not None:
            self._step.released.append((request.request_id, receiving.remote))
        elif named is not None:
            self._step.unneeded.append(request.request_id)
            self._returning[request.request_id] = self._tp_size
        if not receiving.used and (receiving.remote is not None or request.request_id in self._parked_here):
            # One transfer for each request; vLLM itself reads this when a request is refused. The map is shared with the other
            # prompts of a list, and with other samples.
            request.kv_transfer_params = {**request.kv_transfer_params, "do_remote_prefill": False}
        receiving.used = True

    def build(self, output: Any) -> ConsumerStep:
        """What the workers need for this step; `output` is the engine's `SchedulerOutput`."""
        self._ask_where()
        step, self._step = self._step, ConsumerStep()
        step.idle = output.total_num_scheduled_tokens == 0
        for request_id in getattr(output, "preempted_req_ids", None) or ():
            receiving = self._receiving.get(request_id)
            if receiving is not None:
                # It comes back with nothing computed; what is still at the receiver is found by key.
                receiving.loaded = False
                receiving.lookup_of = -1
        return step

    def received(self, request_ids: Iterable[str], failed_block_ids: Collection[int]) -> None:
        """All workers have loaded these requests, or given up; these blocks are not what they should be, which one
        worker may say steps before the last one is through.
        """
        for receiving in self._receiving.values() if failed_block_ids else ():
            if any(block in failed_block_ids for block in receiving.block_ids):
                receiving.failed = True
                if receiving.transfer is not None:
                    self._prefill_servers.failed(receiving.transfer)
        for request_id in request_ids:
            self._forget(request_id)
            self._early_blocks.pop(request_id, None)
            receiving = self._receiving.get(request_id)
            if receiving is not None:
                receiving.loading, receiving.loaded = False, True
                receiving.block_ids, receiving.hashes = [], []
                receiving.tokens, receiving.lookup_of = 0, -1

    def reset(self) -> None:
        """What was looked up before this is not there any more."""
        for request_id, receiving in self._receiving.items():
            if not receiving.loading and (receiving.req_id is None or receiving.used):
                self._forget(request_id)
                receiving.tokens, receiving.hashes, receiving.lookup_of = 0, [], -1

    def finished(self, request: Any) -> bool:
        """The request has ended, in whatever way. Whether a router of NIXL's dialect had it decoded here."""
        if request.request_id not in self._receiving and "metaserver" not in (request.kv_transfer_params or {}):
            # One that was refused before it came here: vLLM says so with another of its own making, and the same parameters.
            self.arrived(request)
        self._forget(request.request_id)
        self._early_blocks.pop(request.request_id, None)
        receiving = self._receiving.pop(request.request_id, None)
        if request.request_id in self._asking:
            return False  # What is parked is released once it is known where.
        parked_here = self._parked_here.pop(request.request_id, None)
        if parked_here is not None:
            self._step.released.append((request.request_id, parked_here))
        if receiving is not None and receiving.loading and receiving.transfer is not None:
            # It may have failed: where that ends the request, vLLM says so before it says what has failed.
            self._prefill_servers.failed(receiving.transfer)
        if receiving is not None and receiving.remote is not None and not receiving.used:
            self._step.released.append((request.request_id, receiving.remote))
        if receiving is not None and (receiving.loading or (receiving.req_id is not None and not receiving.used)):
            self._step.dropped.append(request.request_id)
            self._returning[request.request_id] = self._tp_size
        if receiving is not None and receiving.asked:
            self._step.turns_over.append(request.request_id)
        return parked_here is not None or (receiving is not None and receiving.remote is not None)

    def here(self, request_ids: Iterable[str]) -> None:
        """So said a worker, or several: the chunks of these requests are here, or are not going to come."""
        for request_id in request_ids:
            receiving = self._receiving.get(request_id)
            if receiving is not None:
                receiving.here += 1
                if self._is_here(receiving):
                    self._early_blocks.pop(request_id, None)

    def returned(self, request_ids: Iterable[str]) -> None:
        """So said a worker, or several: nothing of these requests is kept there any more."""
        for request_id in request_ids:
            left = self._returning.pop(request_id, 1) - 1
            if left > 0:
                self._returning[request_id] = left

    def pending(self) -> bool:
        """Whether the engine has to go on stepping for the workers to hear what they have to, and to do it."""
        return bool(self._returning or self._asking or self._step.turns_over)

    def _is_here(self, receiving: _Receiving) -> bool:
        """Whether no worker waits for its chunks any more. Of what has blocks the workers say only that it is loaded."""
        return receiving.remote is not None or receiving.here >= self._tp_size

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._block_tokens)

    def _hashes(self, request: Any, tokens: int) -> tuple[list[str], Adapter | None]:
        named = self._naming.name(request, tokens)
        return chunk_hashes(request.all_token_ids[:tokens], self._chunk_tokens, named.context), named.adapter

    def _forget(self, request_id: str) -> None:
        if self._finder is not None:
            self._finder.forget(request_id)

    @staticmethod
    def _waits(receiving: _Receiving) -> bool:
        """Whether what is on its way is waited for any longer."""
        now = time.monotonic()
        if receiving.coming_since is None:
            receiving.coming_since = now
        return now - receiving.coming_since < _COMING_WAIT_S

    def _look_up(
        self, finder: Finder, request: Any, computed: int, first_chunk: int
    ) -> tuple[tuple[int, list[str], Adapter | None], bool]:
        """The longest beginning of the request whose chunks are ready, from the first one on that is looked up, and whether more
        of it is on its way.
        """
        tokens = request.num_tokens
        # A router that got the first token from prefill sends it along: the last chunk was sent with one token less.
        # After a preemption the prompt may be followed by any number of our own tokens.
        best: tuple[int, list[str], Adapter | None] = (0, [], None)
        comes = False
        for length in sorted({tokens, tokens - 1, request.num_prompt_tokens}, reverse=True):
            if length <= max(computed, best[0]):
                continue
            try:
                hashes, adapter = self._hashes(request, length)
            except Unnamed:
                continue
            found, more = finder.find(request.request_id, hashes[first_chunk:])
            found += first_chunk
            comes |= more
            covered = length if found == len(hashes) else found * self._chunk_tokens
            if covered > best[0]:
                best = (covered, hashes[:found], adapter)
            if found == len(hashes):
                break
        if best[0] <= computed:
            finder.forget(request.request_id)
            return (0, [], None), comes
        return best, comes
