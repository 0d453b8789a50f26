"""What the scheduler's side tells the workers with each step, and what they tell it back."""

from __future__ import annotations

from dataclasses import dataclass, field

from .adapters import Adapter
from .spec import DisaggSpec, ParkSpec, RemoteSpec

_IDLE_WAIT_S_MIN = 0.001
_IDLE_WAIT_S_MAX = 0.005


def idle_wait_s(waited_s: float) -> float:
    """How long a step that computes nothing waits for news of a request that has been waited for so long.

    At first as long as the engine itself sleeps between such steps. Then longer, for each of these steps costs most of a
    millisecond of a core, and up to what a new request may well be kept waiting.
    """
    return min(max(waited_s / 16, _IDLE_WAIT_S_MIN), _IDLE_WAIT_S_MAX)


@dataclass(frozen=True)
class SendPlan:
    """A request that prefill is about to compute."""

    request_id: str
    spec: DisaggSpec | ParkSpec
    #: Of its chunks.
    hashes: list[str]
    #: Tokens whose KV is sent.
    tokens: int
    #: What has to be loaded for the hashes to be true.
    adapter: Adapter | None = None
    #: The group of each chunk; empty where there is one.
    groups: tuple[int, ...] = ()
    #: Whether its beginning comes from the engine's own cache.
    cached: bool = False
    #: Set where decode keeps it for the conversation's next turn, if there is room for it now: where this very server is asked.
    kept: RemoteSpec | None = None


@dataclass(frozen=True)
class ChunkBlocks:
    """A chunk that is computed once this step has run, and the blocks that hold it, in the order of `Groups.block_ids`."""

    request_id: str
    chunk: int
    block_ids: list[int]
    group: int = 0


@dataclass
class ProducerStep:
    """One step of a prefill engine."""

    plans: list[SendPlan] = field(default_factory=list)
    chunks: list[ChunkBlocks] = field(default_factory=list)
    #: Their blocks are somebody else's from now on; what was not copied is computed, and told, again.
    preempted: list[str] = field(default_factory=list)
    #: Given up: nothing more of them is sent.
    dropped: list[str] = field(default_factory=list)
    #: Ended, and their blocks are kept until this worker reports that it has copied them.
    finishing: list[str] = field(default_factory=list)
    #: The engine's own cache was emptied since the step before.
    cache_reset: bool = False
    #: Requests that have come and will be parked, once they are computed: what the daemon will call each, and what those call it who
    #: ask for it.
    expected: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    #: Of these, requests that are not parked after all.
    unexpected: list[str] = field(default_factory=list)
    #: Requests, and the rank whose turn it is to ask its receiver for slots: those before it have theirs.
    turns: list[tuple[str, int]] = field(default_factory=list)
    #: Of these another rank cannot send its part: whoever has not asked for slots does not ask any more.
    given_up: list[str] = field(default_factory=list)
    #: The engine computes nothing in this step.
    idle: bool = False


@dataclass(frozen=True)
class ReceivePlan:
    """What decode loads: blocks of the prompt's chunks, from `first_block` on."""

    request_id: str
    #: None: the chunks are looked up.
    req_id: str | None
    hashes: list[str]
    #: Tokens that are loaded or already here.
    tokens: int
    first_block: int
    #: All of the request's blocks up to `tokens`, those before `first_block` included.
    block_ids: list[int]
    #: What has to be loaded for the hashes to be true.
    adapter: Adapter | None = None
    #: Where the chunks are parked, if they have to be asked for.
    remote: RemoteSpec | None = None
    #: The first of them that is looked up: the engine has those before it.
    first_chunk: int = 0
    #: Why they do not come, where that is known: then nobody is asked for them.
    not_sent: str | None = None
    #: What `block_ids` is in the first of the engine's block tables, in the others.
    more_block_ids: tuple[list[int], ...] = ()


@dataclass(frozen=True)
class HoldPlan:
    """Chunks that are parked elsewhere, and wanted once the request has its turn."""

    request_id: str
    remote: RemoteSpec
    hashes: list[str]


@dataclass(frozen=True)
class ReleasePlan:
    """A request that wants nothing of what is parked for it."""

    request_id: str
    remote: RemoteSpec
    #: Of its last chunk, which tells it from others that have its names; None where that is not known.
    last_hash: str | None


@dataclass(frozen=True)
class TurnPlan:
    """Chunks that prefill lacks, and that other servers may have from the conversation's turn before."""

    request_id: str
    hashes: list[str]
    #: Where its router says that they are.
    remote: RemoteSpec | None


@dataclass
class ConsumerStep:
    """One step of a decode engine."""

    #: Requests that have come: `(request, req_id)`. Waiting for their chunks may begin.
    announced: list[tuple[str, str]] = field(default_factory=list)
    #: Of these, those whose chunks are here, or are not going to come.
    sent: list[str] = field(default_factory=list)
    loads: list[ReceivePlan] = field(default_factory=list)
    #: Requests that have come whose chunks are parked: they are to be kept.
    holds: list[HoldPlan] = field(default_factory=list)
    #: Of these nothing is wanted of what is parked.
    released: list[ReleasePlan] = field(default_factory=list)
    #: Nothing of these is needed, but their chunks come all the same and have to be given back.
    unneeded: list[str] = field(default_factory=list)
    #: Given up.
    dropped: list[str] = field(default_factory=list)
    #: Of these the chunks of the turn before are asked for.
    turns: list[TurnPlan] = field(default_factory=list)
    #: Of these nothing more of that is waited for, and what came is held by whoever looked it up.
    turns_over: list[str] = field(default_factory=list)
    #: The engine computes nothing in this step.
    idle: bool = False


@dataclass
class SendOutcomes:
    """What became of requests at the workers of a prefill engine: for each, one entry per worker that has news of it.
    """

    #: None where a worker's part was sent, otherwise why it was not.
    ended: dict[str, list[str | None]] = field(default_factory=dict)
    #: Requests, and the rank that has slots for its part.
    granted: list[tuple[str, int]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.ended or self.granted)

    def merge(self, other: SendOutcomes) -> None:
        """Takes in what another worker says."""
        self.granted += other.granted
        for request_id, outcomes in other.ended.items():
            self.ended.setdefault(request_id, []).extend(outcomes)
