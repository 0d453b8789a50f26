"""A prefill and a decode worker beside real daemons; the engine's memory is a numpy array."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from conftest import binary
from free_ports import free_ports
from pd_backend import Client, ReceiverClient, SenderClient
from pd_backend.errors import PdError
from pd_backend.vllm.attachment import Attachment
from pd_backend.vllm.consumer import ConsumerWorker
from pd_backend.vllm.consumer import requests_of as consumer_requests
from pd_backend.vllm.keys import chunk_hashes
from pd_backend.vllm.layout import EngineLayout
from pd_backend.vllm.producer import ProducerWorker
from pd_backend.vllm.producer import requests_of as producer_requests
from pd_backend.vllm.spec import DisaggSpec
from pd_backend.vllm.step import ConsumerStep, ProducerStep, ReceivePlan, SendPlan
from pd_backend.vllm.supervisor import Supervisor
from pd_backend.vllm.weights import Weights
from waiting import DEADLINES, PATIENCE_S, eventually

LAYERS, BLOCKS, BLOCK_BYTES = 4, 16, 64
CHUNK, BLOCK = 16, 8
LAYOUT = EngineLayout("tests/worker", CHUNK, BLOCK, BLOCK_BYTES, LAYERS, engine={"vllm": "test"})
NAMES = [f"layer.{i}" for i in range(LAYERS)]


class Memory:
    """What `PagedKv` is to the workers, over one array [layers, blocks, bytes]."""

    def __init__(self, seed: int) -> None:
        self.kv = np.random.default_rng(seed).integers(0, 255, (LAYERS, BLOCKS, BLOCK_BYTES), dtype=np.uint8)
        self.layers = LAYERS
        self.layer_index = {name: index for index, name in enumerate(NAMES)}
        self.gathered: list[range] = []
        #: All layers are one group.
        self.groups = (self,)

    @staticmethod
    def memory(array: np.ndarray) -> np.ndarray:
        return array

    def layer_bytes(self, blocks: int) -> int:
        return blocks * BLOCK_BYTES

    def chunk_bytes(self, blocks: int) -> int:
        return LAYERS * blocks * BLOCK_BYTES

    def gather(self, block_ids: Sequence[int], slot: np.ndarray, *, layers: range = range(LAYERS)) -> None:
        self.gathered.append(layers)
        shaped = slot.reshape(LAYERS, len(block_ids), BLOCK_BYTES)
        shaped[layers.start : layers.stop] = self.kv[layers.start : layers.stop, list(block_ids)]

    def scatter(self, block_ids: Sequence[int], slot: np.ndarray, *, first_block: int) -> None:
        shaped = slot.reshape(LAYERS, first_block + len(block_ids), BLOCK_BYTES)
        self.kv[:, list(block_ids)] = shaped[:, first_block:]


class Pair:
    """A prefill and a decode worker, each with its daemon."""

    def __init__(
        self,
        stack: ExitStack,
        sender_slots: int = 8,
        receiver_slots: int = 16,
        receive_wait_s: float = PATIENCE_S,
        consumer_weights: Weights | None = None,
        told: bool = False,
        layout: EngineLayout = LAYOUT,
        memory: Callable[[int], Any] = Memory,
        **options: Any,
    ) -> None:
        """`told`: the sender parks, and knows the receiver in advance. `memory` makes each end's, of another seed."""
        self.layout = layout

        def supervisor(name: str, client: type[Client], slots: int, *sets: str) -> Supervisor[Any]:
            arguments = []
            for key in ("transfer_channel=local", f"pd_buffer_size={slots * layout.chunk_bytes}", *DEADLINES, *sets):
                arguments += ["--set", key]
            watched = Supervisor(
                binary(name), arguments, layout.json(), client, echo_log=False, restarts_max=2, restart_window_s=3600
            )
            stack.callback(watched.close)
            return watched

        # Ports that it can have again when it is restarted.
        init_port, alloc_port = free_ports(2)
        ports = ("pd_peer_host=127.0.0.1", f"pd_peer_init_port={init_port}", f"pd_peer_alloc_port={alloc_port}")
        named = ("pd_rendezvous_port=0", f"pd_receivers=[127.0.0.1:{init_port}:{alloc_port}]") if told else ()
        self.receiver = supervisor("pd-receiver", ReceiverClient, receiver_slots, *ports)
        self.sender = supervisor("pd-sender", SenderClient, sender_slots, *named)
        self.source, self.target = memory(1), memory(2)
        self.producer = ProducerWorker(Attachment(self.sender, self.source), layout, "uint8", **options)
        self.consumer = ConsumerWorker(
            Attachment(self.receiver, self.target),
            layout,
            "uint8",
            receive_wait_s=receive_wait_s,
            weights=consumer_weights,
        )

    def plan(self, request_id: str, tokens: Sequence[int]) -> SendPlan:
        ready = self.receiver.ready
        spec = DisaggSpec(f"router-{request_id}", "127.0.0.1", (ready.init_port,), (ready.alloc_port,))
        return SendPlan(request_id, spec, chunk_hashes(tokens, CHUNK), len(tokens))

    def produce(self, step: ProducerStep, layers: bool = True) -> set[str]:
        """One step of a prefill engine."""
        self.producer.begin_step(step)
        for name in NAMES if layers else ():
            self.producer.layer_computed(name)
        self.producer.end_step()
        return self.producer.finished_sending()

    def ended(self, request_id: str, step: Callable[[], Any] = lambda: None) -> str | None:
        """Steps on until it is known how a request ended."""

        def end() -> tuple[str | None, ...] | None:
            step()
            self.produce(ProducerStep())
            outcomes = self.producer.outcomes()
            return outcomes and outcomes.ended.get(request_id)

        return eventually(end, 0.001)[0]

    def polled_until(self, probe: Callable[[], Any]) -> None:
        """Lets prefill's worker look at the daemon's answers until something is true, all of it within one step."""
        eventually(lambda: (self.producer._poll(), probe())[1], 0.001)

    def stepped_until(self, probe: Callable[[], Any]) -> None:
        """Steps on with nothing new until something is true."""
        eventually(lambda: (self.produce(ProducerStep()), probe())[1], 0.001)

    def consume(self, step: ConsumerStep, until: str) -> set[int]:
        """Steps of a decode engine until a request is through; the blocks that failed."""
        self.consumer.begin_step(step)

        def through() -> list[set[int]]:
            finished, failed = self.consumer.progress()
            return [failed] if until in finished else []

        return eventually(through, 0.001)[0]

    def nothing_left(self) -> None:
        """Neither worker nor daemon keeps anything of any request."""

        def left() -> list[Any]:
            self.produce(ProducerStep())
            self.producer.outcomes()
            self.consumer.progress()
            statuses = [self.sender.client().status(), self.receiver.client().status()]
            counts = [(s.requests_active, s.leases, s.waits, s.slots_reserved, s.slots_held) for s in statuses]
            known = [*producer_requests(self.producer), *consumer_requests(self.consumer)]
            return known + [count for count in counts if any(count)]

        eventually(lambda: not left(), left=left)


@pytest.fixture
def pair() -> Iterator[Callable[..., Pair]]:
    with ExitStack() as stack:
        yield lambda **options: Pair(stack, **options)


def load(
    request_id: str, tokens: Sequence[int], block_ids: list[int], first_block: int = 0, named: bool = True
) -> ConsumerStep:
    req_id = f"router-{request_id}" if named else None
    plan = ReceivePlan(request_id, req_id, chunk_hashes(tokens, CHUNK), len(tokens), first_block, block_ids)
    return ConsumerStep(announced=[] if req_id is None else [(request_id, req_id)], loads=[plan])


def restarted(supervisor: Supervisor[Any], pid: int) -> None:
    def is_restarted() -> bool:
        try:
            return supervisor.ready.pid != pid
        except PdError:
            return False

    eventually(is_restarted)
