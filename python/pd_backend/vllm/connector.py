"""`PdConnector`: vLLM's KV connector over pd-sender and pd-receiver. docs/vllm.md says how to run it.

vLLM makes one instance in the scheduler's process, and one in each worker's; they never meet. An instance hands what it is
asked to plain objects, of which it has one for each direction, and translates between vLLM's types and theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.logger import init_logger

from ..client import Client
from ..daemon import find_binary
from ..node_client import NodeClient
from ..paged import PagedKv
from ..receiver_client import ReceiverClient
from ..sender_client import SenderClient
from . import checkpoint, longest_prompt, prompt_tokens
from .adapters import Adapters
from .attachment import Attachment
from .bootstrap import EngineAt
from .bootstrap_server import BootstrapServer
from .consumer import ConsumerWorker
from .engine import (
    LOADED_ADAPTERS,
    adapter_folder,
    dtype_name,
    engine_facts,
    groups_of,
    images_by_count,
    one_of_several,
    running_model,
    watch_adapter_loads,
)
from .finder import ReceiverFinder
from .halves import is_sent, own_hosts
from .hosts import HostList
from .keys import chunk_key
from .layout import EngineLayout
from .memory import block_strides, memory_of
from .metaserver import Metaservers
from .metrics import PdPromMetrics, PdStats
from .naming import Naming
from .observations import DaemonFigures, Observations
from .options import Options
from .pairing import connect_receivers
from .prefill_servers import PrefillServers
from .pins import BlockPins
from .producer import ProducerWorker
from .rank import Rank
from .consumer_scheduler import ConsumerScheduler
from .producer_scheduler import ProducerScheduler
from .spec import DisaggSpec, Rendezvous, SpecError
from .step import ConsumerStep, ProducerStep, SendOutcomes
from .supervisor import Supervisor
from .unhealthy import end_engine
from .weights import Weights
from .whereabouts import DaemonAt, Daemons, Whereabouts

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = init_logger("vllm.pd_backend")


#: The program and the client of it, by `kv_role`.
_DAEMONS: dict[str, tuple[str, type[Client]]] = {
    "kv_producer": ("pd-sender", SenderClient),
    "kv_consumer": ("pd-receiver", ReceiverClient),
    "kv_both": ("pd-sender", NodeClient),
}


@dataclass
class PdMetadata(KVConnectorMetadata):
    """From the scheduler to the workers, with each step: for the halves that there are."""

    sends: ProducerStep | None
    loads: ConsumerStep | None


@dataclass
class PdHandshake(KVConnectorHandshakeMetadata):
    """From a worker to the scheduler, at start: where its daemon is."""

    daemon: DaemonAt


class PdNews(KVConnectorWorkerMetadata):
    """From the workers to the scheduler: what became of requests, and where daemons are now."""

    def __init__(
        self,
        outcomes: SendOutcomes | None = None,
        here: Sequence[str] = (),
        returned: Sequence[str] = (),
        daemons: Sequence[DaemonAt] = (),
        adapters: Mapping[int, str] | None = None,
    ) -> None:
        self.outcomes = outcomes or SendOutcomes()
        #: These two: once for each worker that says so.
        self.here = list(here)
        self.returned = list(returned)
        self.daemons = list(daemons)
        #: Adapters that were loaded, by vLLM's number: what their files were.
        self.adapters = dict(adapters or {})

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        assert isinstance(other, PdNews)
        self.outcomes.merge(other.outcomes)
        self.here += other.here
        self.returned += other.returned
        self.daemons += other.daemons
        for lora_id, signature in other.adapters.items():
            if self.adapters.setdefault(lora_id, signature) != signature:
                self.adapters[lora_id] = ""  # They differ from rank to rank: it is nothing that has a name.
        return self


class PdConnector(KVConnectorBase_V1, SupportsHMA):
    """`kv_producer` sends with a pd-sender, `kv_consumer` receives with a pd-receiver, one beside each worker. `kv_both` does
    either, as each request says, with a daemon that has both halves.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._options = Options.parse(self._kv_transfer_config.kv_connector_extra_config)
        kv_role = self._kv_transfer_config.kv_role
        if kv_role not in _DAEMONS:
            raise ValueError(
                f"kv_role = {kv_role!r}; expected kv_producer for prefill, kv_consumer for decode, or kv_both"
            )
        self._sends, self._receives = kv_role != "kv_consumer", kv_role != "kv_producer"
        self._program, self._client_type = _DAEMONS[kv_role]
        self._own_hosts: frozenset[str] = frozenset()
        parallel = vllm_config.parallel_config
        if parallel.pipeline_parallel_size > 1:
            raise ValueError(
                f"pipeline_parallel_size = {parallel.pipeline_parallel_size}; PdConnector sends all layers of a rank "
                "together: use tensor parallelism alone"
            )
        for option in ("decode_context_parallel_size", "prefill_context_parallel_size"):
            size = getattr(parallel, option, 1)
            if size > 1:
                raise ValueError(
                    f"{option} = {size}; with it the ranks share out the tokens of a prompt, and PdConnector moves all tokens of "
                    "a rank's heads: use tensor parallelism alone"
                )
        self._tp_size = parallel.tensor_parallel_size
        self._groups = groups = groups_of(kv_cache_config, self._options.chunk_tokens())
        self._model = self._options.model(vllm_config.model_config.model)
        self._dtype = dtype_name(vllm_config)

        self._producer_scheduler: ProducerScheduler | None = None
        self._consumer_scheduler: ConsumerScheduler | None = None
        self._producer: ProducerWorker | None = None
        self._consumer: ConsumerWorker | None = None
        self._finder: ReceiverFinder | None = None
        self._bootstrap: BootstrapServer | None = None
        self._failed_blocks: set[int] = set()
        self._handshake: PdHandshake | None = None
        self._whereabouts: Whereabouts | None = None
        self._observations = Observations()
        self._figures: DaemonFigures | None = None
        self._supervisor: Supervisor[Any] | None = None
        self._attachment: Attachment[Any] | None = None
        self._daemons = Daemons(self._tp_size, self._client_type)
        self._kv_cache_manager: Any = None
        self._engine_cache: Any = None
        adapters_are_seen = vllm_config.lora_config is not None and watch_adapter_loads()
        self._naming = naming = Naming(
            last_is_computed=not groups.is_plain,
            images_by_count=images_by_count(vllm_config),
            adapters=Adapters(adapter_folder) if adapters_are_seen else None,
        )
        self._one_of_several = one_of_several(vllm_config)
        if role != KVConnectorRole.SCHEDULER:
            return
        if self._sends:
            self._producer_scheduler = ProducerScheduler(
                groups,
                self._tp_size,
                naming,
                self._rendezvous,
                # A server of both roles cannot tell a prompt that is to be prefilled from one of a single token.
                self._options.unsolicited and kv_role == "kv_producer",
                BlockPins(lambda: self._kv_cache_manager.block_pool),
            )
            self._bootstrap = self._start_bootstrap()
        if self._receives:
            if self._options.lookup:
                self._finder = ReceiverFinder(self._key)
            said = self._options.prefill_hosts()
            hosts = None if said is None else HostList(said)
            self._consumer_scheduler = ConsumerScheduler(
                groups,
                kv_cache_config.num_blocks,
                self._tp_size,
                self._finder,
                naming,
                self._rendezvous if self._sends else lambda: None,
                self._options.kv_recompute_threshold if self._sends else 0,
                prefill_servers=PrefillServers(self._tp_size, hosts, self._bootstrap_port()),
                metaservers=Metaservers(self._receivers, self._options.receive_wait_s or self._options.wait_timeout_s(), hosts),
                own_ports=self._daemons.init_ports if self._one_of_several else lambda: None,
            )
        if self._sends and self._receives:
            self._own_hosts = own_hosts(self._options.own_hosts())

    # ---- worker
    # ----------------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        from vllm.distributed import get_tensor_model_parallel_rank

        tensor = get_tensor_model_parallel_rank() if self._tp_size > 1 else 0
        rank = Rank(self._vllm_config.parallel_config.data_parallel_index, tensor, self._tp_size)
        options = self._options
        identity = options.weights_id or checkpoint.identity(self._vllm_config, psutil.Process().create_time())
        weights = Weights(identity, running_model(self._vllm_config))
        memory = memory_of(kv_caches, self._kv_cache_config, self._groups, self.make_paged)
        layout = EngineLayout(
            model=self._model,
            chunk_tokens=self._groups.chunk_tokens,
            block_tokens=self._groups[0].block_tokens,
            block_bytes=memory.parts[0].block_bytes,
            layers=memory.parts[0].layers,
            tp_rank=tensor,
            tp_size=self._tp_size,
            engine=engine_facts(
                self._vllm_config, self._kv_cache_config, memory.parts, self._groups, identity, options.vllm_version
            ),
            several=self._groups if memory.group_bytes else None,
            group_bytes=memory.group_bytes,
        )
        arguments = options.daemon_args(str(memory.parts[0].device), rank, both=self._sends and self._receives)
        arguments += options.rendezvous_args(rank) if self._sends else []
        limits: dict[str, Any] = {
            "ready_timeout_s": options.ready_timeout_s,
            "restarts_max": options.restarts_max,
            "restart_window_s": options.restart_window_s,
            "wait_timeout_s": options.wait_timeout_s(),
            "silence_timeout_s": options.silence_timeout_s,
            "echo_log": options.daemon_log,
            "given_up": end_engine,
        }
        binary = find_binary(self._program, options.binary_dir)
        logger.info("starting %s of %s: chunks of %s", binary, rank, layout)
        if layout.several is not None:
            logger.info("groups of layers: %s; %s", layout.json()["groups"], layout.json()["engine"])
        with ExitStack() as undo:  # Whatever is raised from here on: the daemon is not left behind.
            supervisor: Supervisor[Any] = Supervisor(binary, arguments, layout.json(), self._client_type, **limits)
            undo.callback(supervisor.close)
            daemon = self._attachment = Attachment(supervisor, memory.kv)
            self._supervisor, self._observations = supervisor, Observations(tensor)
            self._figures = DaemonFigures(self._observations)
            known: dict[str, Any] = {"adapters": LOADED_ADAPTERS, "weights": weights, "observations": self._observations}
            long = longest_prompt.warning(
                supervisor.client().attached,
                self._vllm_config.model_config.max_model_len,
                sends=self._sends,
                receives=self._receives,
            )
            # Of windows less is sent than the groups hold of a whole prompt.
            if long is not None and tensor == 0 and self._groups.is_plain:
                logger.warning("%s", long)
            if self._sends:
                connect_receivers(supervisor.client())
                pushes = 1 if self._vllm_config.parallel_config.enable_dbo else options.layer_pushes
                self._producer = ProducerWorker(
                    daemon, layout, self._dtype, slot_wait_s=options.slot_wait_s, layer_pushes=pushes, **known
                )
            if self._receives:
                self._consumer = ConsumerWorker(
                    daemon, layout, self._dtype, receive_wait_s=options.receive_wait_s, **known
                )
            self._whereabouts = Whereabouts(tensor, supervisor, weights)
            at = self._whereabouts.news()
            self._handshake = None if at is None else PdHandshake(at)
            undo.pop_all()

    def make_paged(self, kv_caches: dict[str, torch.Tensor]) -> PagedKv:
        """Layers that keep blocks of one shape under one block table. A subclass may copy otherwise."""
        config = self._kv_cache_config
        return PagedKv(kv_caches, num_blocks=config.num_blocks, block_strides_bytes=block_strides(config))

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return self._handshake

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, PdMetadata)
        sends, loads = connector_metadata.sends, connector_metadata.loads
        if self._producer is not None and sends is not None:
            self._producer.begin_step(sends)
        if self._consumer is not None and loads is not None:
            self._consumer.begin_step(loads)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Loading is asynchronous: `get_finished` does it, between steps."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is loaded within a step."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        if self._producer is not None:
            self._producer.layer_computed(layer_name)

    def wait_for_save(self) -> None:
        if self._producer is not None:
            self._producer.end_step()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        sent = None if self._producer is None else self._producer.finished_sending()
        if self._consumer is None:
            return sent or None, None
        loaded, failed = self._consumer.progress()
        self._failed_blocks |= failed
        return sent or None, loaded or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        results = super().get_transfer_results(finished_req_ids)
        if self._consumer is not None:
            results.failed_recving |= self._consumer.failed_requests()
        return results

    def get_block_ids_with_load_errors(self) -> set[int]:
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def get_kv_connector_stats(self) -> PdStats | None:
        if self._figures is None or self._attachment is None or self._supervisor is None:
            return None  # The scheduler's instance sees nothing.
        self._figures.look(self._attachment.client, self._supervisor.metrics_port)
        seen = self._observations.take()
        return None if seen is None else PdStats(seen)

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> PdStats:
        return PdStats(data)

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> PdPromMetrics:
        return PdPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        news = PdNews(adapters=LOADED_ADAPTERS.news())
        if self._producer is not None:
            news.outcomes = self._producer.outcomes() or news.outcomes
        if self._consumer is not None:
            news.here, news.returned = self._consumer.here(), self._consumer.returned()
        at = None if self._whereabouts is None else self._whereabouts.news()
        if at is not None:
            news.daemons.append(at)
        return news if any((news.outcomes, news.here, news.returned, news.daemons, news.adapters)) else None

    def shutdown(self) -> None:
        for part in (self._producer, self._consumer, self._finder, self._bootstrap):
            if part is not None:
                part.close()
        self._producer = self._consumer = self._finder = self._bootstrap = None

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Full graphs skip the layers' hooks, and the layers are pushed after the step then: slower, but right.

        Where there are graphs this is asked before the model is loaded, so that a misspelt option costs no minutes.
        """
        Options.parse(extra_config)
        return False

    # ---- scheduler
    # -------------------------------------------------------------------------------------------------------

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        for handshake in metadata.values():
            if isinstance(handshake, PdHandshake):
                self._daemon_is(handshake.daemon)

    def _daemon_is(self, at: DaemonAt) -> None:
        self._daemons.attach(at)
        if self._finder is not None:
            self._finder.attach(at)

    def _rendezvous(self) -> Rendezvous | None:
        """Where decode servers ask for what is parked here."""
        ports, options = self._daemons.rendezvous_ports(), self._options
        if ports is None:
            return None
        engine = str(self._kv_transfer_config.engine_id)
        return Rendezvous(options.advertised_host(), tuple(ports), engine, options.transfer_mode)

    def _receivers(self, req_id: str) -> DisaggSpec:
        """Where chunks of a request are to be sent. Raises `SpecError` while that is not known."""
        host, init, alloc = self._options.receiver_host(), self._daemons.init_ports(), self._daemons.alloc_ports()
        if host is None:
            raise SpecError("its router is to be told where the receivers are, which pd_advertise_host does not say")
        if init is None or alloc is None:
            raise SpecError("its router is to be told where the receivers are, and not all of them have started")
        return DisaggSpec(req_id, host, tuple(init), tuple(alloc))

    def _bootstrap_port(self) -> int | None:
        return self._options.bootstrap(self._kv_transfer_config.kv_connector)

    def _start_bootstrap(self) -> BootstrapServer | None:
        """Where routers of Mooncake's dialect ask for what `_rendezvous` says, if they are to."""
        port, host = self._bootstrap_port(), self._options.rendezvous_bind_host()
        if port is None:
            return None

        def engine() -> EngineAt | None:
            at = self._rendezvous()
            return None if at is None else EngineAt(at.engine, at.host, at.ports)

        # The ports of a server's data-parallel ranks follow each other.
        index = getattr(self._vllm_config.parallel_config, "data_parallel_index", 0)
        try:
            started = BootstrapServer(host, port, index, engine)
        except (OSError, OverflowError) as error:
            raise ValueError(
                f"bootstrap_port {port} + {index} cannot be listened to at {host}: {error}; give this server another one"
            ) from error
        logger.info("asked by routers of Mooncake's dialect at http://%s:%d/query", host, started.port)
        return started

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        self._kv_cache_manager = kv_cache_manager

    def reset_cache(self) -> bool:
        """Everything that was computed before is void, at this server's daemons. False where one has not confirmed it."""
        if self._consumer_scheduler is not None:
            self._consumer_scheduler.reset()
        return self._daemons.reset()

    def _prefills(self, request: Any) -> bool:
        """Whether the request's KV goes to another server; what comes from there is decoded here."""
        if not (self._sends and self._receives):
            return self._sends
        max_tokens = request.max_tokens if self._one_of_several else None
        return is_sent(request.kv_transfer_params, self._own_hosts, self._daemons.init_ports() or (), max_tokens)

    def on_new_request(self, request: Any) -> None:
        if self._producer_scheduler is not None and self._prefills(request):
            self._producer_scheduler.arrived(request)
        if self._consumer_scheduler is None:
            return
        if not self._prefills(request):
            self._consumer_scheduler.arrived(request)
        elif request.kv_transfer_params.get("do_remote_decode"):
            self._consumer_scheduler.arrived_to_be_prefilled(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        if not self._is_loaded(request):
            return 0, False
        assert self._consumer_scheduler is not None
        return self._consumer_scheduler.matched(request, num_computed_tokens)

    def get_loaded_kv_cache_group_ids(self, request: Any) -> tuple[int, ...]:
        """All that are loaded at all: none of their blocks is to be cleared meanwhile."""
        return tuple(sorted(member for group in self._groups for member in group.members))

    def _is_loaded(self, request: Any) -> bool:
        """Whether KV of the request may come from elsewhere."""
        scheduler = self._consumer_scheduler
        return scheduler is not None and (not self._prefills(request) or scheduler.knows(request.request_id))

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if self._producer_scheduler is not None and self._prefills(request):
            self._producer_scheduler.allocated(request)
        if self._is_loaded(request):
            assert self._consumer_scheduler is not None
            self._consumer_scheduler.allocated(request, blocks.get_block_ids(), num_external_tokens)
            if num_external_tokens > 0 and not self._prefills(request):
                prompt_tokens.transferred_are_not_cached(request)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        producer, consumer = self._producer_scheduler, self._consumer_scheduler
        if producer is not None and self._engine_cache_was_reset():
            producer.cache_reset()
        return PdMetadata(
            None if producer is None else producer.build(scheduler_output),
            None if consumer is None else consumer.build(scheduler_output),
        )

    def update_connector_output(self, connector_output: Any) -> None:
        news = connector_output.kv_connector_worker_meta
        if isinstance(news, PdNews):
            self._naming.adapters_loaded(news.adapters)
            if self._producer_scheduler is not None:
                self._producer_scheduler.update(news.outcomes)
            if self._consumer_scheduler is not None:
                self._consumer_scheduler.here(news.here)
                self._consumer_scheduler.returned(news.returned)
            for at in news.daemons:
                self._daemon_is(at)
        if self._consumer_scheduler is not None:
            self._consumer_scheduler.received(
                connector_output.finished_recving or (),
                connector_output.invalid_block_ids or (),
                getattr(connector_output, "failed_recving", None) or (),
            )

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        producer, consumer = self._producer_scheduler, self._consumer_scheduler
        prefills, loads = self._prefills(request), self._is_loaded(request)
        was_decoded = consumer is not None and loads and consumer.finished(request)
        if producer is not None and prefills:
            return producer.finished(request, block_ids)
        if producer is not None and was_decoded and self._options.kv_recompute_threshold:
            keep, params = producer.keep(request, block_ids)
            return keep, params if self._options.bidirectional_kv_xfer else None
        return False, None

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, block_ids[0])

    def has_pending_push_work(self) -> bool:
        # The first thing that an engine asks which has started.
        if self._bootstrap is not None:
            self._bootstrap.engine_runs()
        schedulers = (self._producer_scheduler, self._consumer_scheduler)
        return any(scheduler is not None and scheduler.pending() for scheduler in schedulers)

    def _engine_cache_was_reset(self) -> bool:
        """Whether vLLM's own cache was emptied since the last call: it makes a new map of what it has then."""
        cache = getattr(getattr(self._kv_cache_manager, "block_pool", None), "cached_block_hash_to_block", None)
        before, self._engine_cache = self._engine_cache, cache
        return cache is not before

    def _key(self, rank: int, weights: str, chunk_hash: str) -> str:
        return chunk_key(self._model, self._tp_size, rank, weights, chunk_hash, self._dtype)


#: For routers and scripts that choose by these names, which speak dialects that it knows: give the module's path as well.
NixlConnector = MooncakeConnector = PdConnector
