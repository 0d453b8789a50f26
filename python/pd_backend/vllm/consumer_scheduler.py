"""Decode's scheduler side of the connector: which chunks of which request come, and into which blocks, step by step.

No daemon is talked to, but for the look-up that decode makes of requests whose router names none.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from .adapters import Adapter
from .groups import Groups
from .metaserver import Metaservers, Post, metaserver_of
from .naming import Naming, Unnamed
from .prefill_servers import PrefillServers
from .spec import (
    RemoteSpec,
    Rendezvous,
    SpecError,
    decode_req_id,
    own_name,
    remote_spec,
    turn_spec,
    was_sent,
    why_not_sent,
)
from .step import ConsumerStep, HoldPlan, ReceivePlan, ReleasePlan, TurnPlan
from .transfer_id import TransferSpec, transfer_spec

logger = logging.getLogger("vllm.pd_backend")

#: How long a request waits for chunks that prefill pushes before it was asked. They are a moment away where prefill has answered;
#: those of another prompt with the same beginning may still be computed.
_COMING_WAIT_S = 10.0
#: How names begin of what a metaserver was told. No router's do.
_LAYERWISE = "layerwise"


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
    #: Why its chunks do not come, where its router knows.
    not_sent: str | None = None
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
    #: vLLM has made it in place of one that it refused: its prompt is another one.
    is_in_place: bool = False
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
        groups: Groups,
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
        self._groups = groups
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
            elif req_id is not None and req_id.startswith(f"{_LAYERWISE} ") and (params or {}).get("do_remote_decode"):
                # Both servers that its router chose are this one: nothing is sent.
                self._prefilled_here(req_id)
                req_id = None
            elif metaserver is None:
                remote = remote_spec(params, self._tp_size)
            elif self._metaservers is not None and self._can_be_named(request):
                req_id = own_name(_LAYERWISE, request.request_id)
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
        elif req_id is not None and (not_sent := why_not_sent(params)) is not None:
            # The engine's policy says what comes of it. Nobody is waited for.
            receiving.not_sent, receiving.here = not_sent, self._tp_size
        elif req_id is not None:
            self._step.announced.append((request.request_id, req_id))
            if was_sent(params):
                self._step.sent.append(request.request_id)

    def _prefilled_here(self, req_id: str) -> None:
        """This very server was asked to prefill what a request of its waits for by this name."""
        for receiving in self._receiving.values():
            if receiving.post is not None and receiving.req_id == req_id:
                receiving.post.is_here = True

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
            self._release(receiving, request, remote)
            receiving.req_id, receiving.failed = None, True
        else:
            receiving.req_id, receiving.remote = request.request_id[:256], remote
            self._step.holds.append(HoldPlan(request.request_id, remote, hashes))

    def _release(self, receiving: _Receiving, request: Any, remote: RemoteSpec) -> None:
        """What is parked there for this request is not wanted, or not any more."""
        hashes: list[str] = []
        if not receiving.is_in_place:
            try:
                hashes, _ = self._hashes(request, request.num_prompt_tokens)
            except Unnamed:
                pass
        self._step.released.append(ReleasePlan(request.request_id, remote, hashes[-1] if hashes else None))

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
                self._release(receiving, request, remote)

    def arrived_to_be_prefilled(self, request: Any) -> None:
        """A new request, whose KV this server computes and sends: what another server has of it may be fetched first."""
        # Where windows have moved on, of the turn before only its end is anywhere.
        may_ask = self._next_turn_tokens and self._finder is not None and self._groups.is_plain
        if may_ask and request.request_id not in self._receiving:
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
                level = logging.INFO if receiving.post.is_here else logging.WARNING
                logger.log(level, "request %s is computed here: %s", request.request_id, error)
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
                    receiving.tokens = self._groups.sent_tokens(request.num_prompt_tokens)
                except Unnamed:  # It could be when it came. What was announced of it is given back.
                    receiving.failed = True
        elif receiving.failed or self._finder is None:
            receiving.tokens, receiving.hashes = 0, []
        elif receiving.lookup_of != request.num_tokens or computed < receiving.first_chunk * self._groups.chunk_tokens:
            receiving.lookup_of = request.num_tokens
            first = receiving.first_chunk = min(receiving.first_chunk, computed // self._groups.chunk_tokens)
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
            held = sum(self._early_blocks.values()) + self._blocks(computed, receiving.tokens)
            if held > self._early_blocks_max:
                return None, False
        return more, True

    def _ask(self, request: Any, receiving: _Receiving, computed: int) -> None:
        """Has the workers ask for the turn before, if enough of the prompt is missing; otherwise it is computed."""
        receiving.may_ask = False
        size = self._groups.chunk_tokens
        first, whole = computed // size, request.num_prompt_tokens // size
        try:
            hashes = self._hashes(request, whole * size)[0][first:]
        except Unnamed:
            hashes = []
        if not hashes or request.num_prompt_tokens - computed < self._next_turn_tokens:
            receiving.failed = True
            return
        remote = turn_spec(request.kv_transfer_params, self._tp_size)
        receiving.asked, receiving.here, receiving.first_chunk = True, 0, first
        self._step.turns.append(TurnPlan(request.request_id, hashes, remote))

    def allocated(self, request: Any, tables: Sequence[list[int]], external_tokens: int) -> None:
        """The engine has given the request its blocks, a table for each of its groups, and expects so many tokens from us."""
        receiving = self._receiving.get(request.request_id)
        if receiving is None or receiving.loading:
            return
        named = receiving.req_id if not receiving.used else None
        if external_tokens > 0:
            computed = receiving.tokens - external_tokens
            if named is not None and not self._is_here(receiving):
                self._early_blocks[request.request_id] = self._blocks(computed, receiving.tokens)
            block_ids, *more_block_ids = self._tables(receiving.tokens, tables)
            self._step.loads.append(
                ReceivePlan(
                    request.request_id,
                    named,
                    receiving.hashes,
                    receiving.tokens,
                    computed // self._groups[0].block_tokens,
                    block_ids,
                    receiving.adapter,
                    receiving.remote if named is not None else None,
                    receiving.first_chunk,
                    receiving.not_sent if named is not None else None,
                    tuple(more_block_ids),
                )
            )
            receiving.loading = True
            receiving.block_ids = block_ids
        elif named is not None and receiving.remote is not None:
            self._release(receiving, request, receiving.remote)
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

    def received(
        self, request_ids: Iterable[str], failed_block_ids: Collection[int], failed_request_ids: Collection[str] = ()
    ) -> None:
        """All workers have loaded these requests, or given up; these blocks, or all those of these requests, are not what they
        should be, which one worker may say steps before the last one is through.
        """
        for request_id, receiving in self._receiving.items() if failed_block_ids or failed_request_ids else ():
            if request_id in failed_request_ids or any(block in failed_block_ids for block in receiving.block_ids):
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
            self._receiving[request.request_id].is_in_place = True
        self._forget(request.request_id)
        self._early_blocks.pop(request.request_id, None)
        receiving = self._receiving.pop(request.request_id, None)
        if request.request_id in self._asking:
            return False  # What is parked is released once it is known where.
        parked_here = self._parked_here.pop(request.request_id, None)
        if parked_here is not None and receiving is not None:
            self._release(receiving, request, parked_here)
        if receiving is not None and receiving.loading and receiving.transfer is not None:
            # It may have failed: where that ends the request, vLLM says so before it says what has failed.
            self._prefill_servers.failed(receiving.transfer)
        if receiving is not None and receiving.remote is not None and not receiving.used:
            self._release(receiving, request, receiving.remote)
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

    def _blocks(self, computed: int, sent: int) -> int:
        """Blocks that are loaded into, of a request of which the engine has `computed` tokens."""
        count = 0
        for group in self._groups:
            needed = group.needed(sent)
            count += max(0, needed.stop - max(needed.start, computed // group.block_tokens)) * len(group.members)
        return count

    def _tables(self, sent: int, tables: Sequence[list[int]]) -> list[list[int]]:
        """As far as the tokens that are sent take them."""
        block_tokens = {member: group.block_tokens for group in self._groups for member in group.members}
        return [
            table[: -(-sent // block_tokens[member])] if member in block_tokens else []
            for member, table in enumerate(tables)
        ]

    def _hashes(self, request: Any, tokens: int) -> tuple[list[str], Adapter | None]:
        """Of what is sent of the request's first `tokens` tokens."""
        named = self._naming.name(request, tokens)
        sent = self._groups.sent_tokens(tokens)
        return self._groups.names(request.all_token_ids[:sent], self._groups.pieces(sent), named.context), named.adapter

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
            sent = self._groups.sent_tokens(length)
            if sent <= max(computed, best[0]):
                continue
            try:
                hashes, adapter = self._hashes(request, length)
            except Unnamed:
                continue
            found, more = finder.find(request.request_id, hashes[first_chunk:])
            found += first_chunk
            comes |= more
            # A beginning is of use only where every token is kept.
            beginning = found * self._groups.chunk_tokens if self._groups.is_plain else 0
            covered = sent if found == len(hashes) else beginning
            if covered > best[0]:
                best = (covered, hashes[:found], adapter)
            if found == len(hashes):
                break
        if best[0] <= computed:
            finder.forget(request.request_id)
            return (0, [], None), comes
        return best, comes
