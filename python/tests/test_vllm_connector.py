"""`PdConnector` without vLLM, whose modules are played: what becomes of its daemon."""

from __future__ import annotations

import importlib
import json
import logging
import platform
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from conftest import binary, children
from free_ports import free_ports
from pd_backend.errors import PdError
from pd_backend.vllm import attachment
from pd_backend.vllm.adapters import LoadedAdapters
from pd_backend.vllm.groups import Groups
from pd_backend.vllm.whereabouts import DaemonAt
from vllm_pair import BLOCK, Memory


class Base:
    """What vLLM's base class of connectors does, as far as it is used."""

    def __init__(self, config: Any, role: Any, kv_cache_config: Any) -> None:
        self._vllm_config, self._kv_cache_config = config, kv_cache_config
        self._kv_transfer_config = config.kv_transfer_config


@pytest.fixture
def connector(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """`pd_backend.vllm.connector`, imported with vLLM's modules played."""
    base = "vllm.distributed.kv_transfer.kv_connector.v1.base"
    names = [base.rsplit(".", depth)[0] for depth in range(1, 6)]
    stats = base.replace("base", "metrics")
    for name in [*names, base, stats, "vllm.logger"]:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name in ("KVConnectorStats", "KVConnectorPromMetrics"):
        setattr(sys.modules[stats], name, type(name, (), {}))
    played = sys.modules[base]
    for name in ("Handshake", "", "Worker"):
        setattr(played, f"KVConnector{name}Metadata", type(f"KVConnector{name}Metadata", (), {}))
    for name, value in {
        "KVConnectorBase_V1": Base,
        "KVConnectorTransferResults": SimpleNamespace,
        "SupportsHMA": type("SupportsHMA", (), {}),
        "KVConnectorRole": SimpleNamespace(SCHEDULER=0, WORKER=1),
    }.items():
        setattr(played, name, value)
    sys.modules["vllm.distributed"].get_tensor_model_parallel_rank = lambda: 0  # type: ignore[attr-defined]
    sys.modules["vllm.logger"].init_logger = lambda name: SimpleNamespace(info=print)  # type: ignore[attr-defined]
    process = SimpleNamespace(create_time=time.time)
    monkeypatch.setitem(sys.modules, "psutil", SimpleNamespace(Process=lambda: process))
    # What is read of vLLM's configuration.
    engine = SimpleNamespace(
        LOADED_ADAPTERS=LoadedAdapters(),
        adapter_folder=str,
        dtype_name=lambda _: "bfloat16",
        engine_facts=lambda *_: {},
        images_by_count=lambda _: False,
        one_of_several=lambda _: False,
        running_model=lambda _: None,
        watch_adapter_loads=lambda: True,
        groups_of=lambda config, chunk: Groups.plain(chunk, config.kv_cache_groups[0].kv_cache_spec.block_size),
    )
    monkeypatch.setitem(sys.modules, "pd_backend.vllm.engine", engine)
    for name in ("connector", "metrics"):
        monkeypatch.delitem(sys.modules, f"pd_backend.vllm.{name}", raising=False)
    module = importlib.import_module("pd_backend.vllm.connector")
    yield module
    for name in ("connector", "metrics"):
        sys.modules.pop(f"pd_backend.vllm.{name}")


def config(role: str) -> Any:
    sets = {"transfer_channel": "local", "pd_buffer_size": "1MiB", "pd_peer_host": "127.0.0.1"}
    sets |= {"pd_peer_init_port": 0, "pd_peer_alloc_port": 0} if role == "kv_consumer" else {}
    extra = {"set": sets, "chunk_size": 2 * BLOCK, "binary_dir": str(Path(binary("pd-sender")).parent), "weights_id": "tiny"}
    return SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_role=role, kv_connector_extra_config=extra),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1, tensor_parallel_size=1, data_parallel_index=0, enable_dbo=False
        ),
        model_config=SimpleNamespace(model="tests/tiny", max_model_len=16),
        lora_config=None,
    )


def caches() -> Any:
    group = SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=BLOCK))
    return SimpleNamespace(kv_cache_groups=[group], num_blocks=16, kv_cache_tensors=[])


def test_mooncakes_name_opens_the_port_that_its_routers_ask(
    connector: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Broken in production: a server that is started as Mooncake's connector is asked where nobody listens.
    (port,) = free_ports(1)
    monkeypatch.setenv("VLLM_MOONCAKE_BOOTSTRAP_PORT", str(port))
    given = config("kv_producer")
    given.kv_transfer_config.kv_connector, given.kv_transfer_config.engine_id = "MooncakeConnector", "e0"
    given.parallel_config.data_parallel_index = 0
    made = connector.MooncakeConnector(given, 0, caches())
    assert isinstance(made, connector.PdConnector)
    url = f"http://127.0.0.1:{port}/query"
    with pytest.raises(urllib.error.HTTPError, match="503"):
        urllib.request.urlopen(url, timeout=60)
    at = DaemonAt(0, "ipc", platform.node(), "w", 5600)
    made.set_xfer_handshake_metadata({0: connector.PdHandshake(at)})
    with urllib.request.urlopen(url, timeout=60) as answer:
        said = json.loads(answer.read())
    assert said == {"0": {"engine_id": "e0", "worker_addr": {"0": {"0": "tcp://127.0.0.1:5600"}}}}
    # Of several ranks all are named, which listen once the engine runs.
    given.kv_transfer_config.engine_id = "e0_dp0"
    with pytest.raises(urllib.error.HTTPError, match="503"):
        urllib.request.urlopen(url, timeout=60)
    assert not made.has_pending_push_work()
    with urllib.request.urlopen(url, timeout=60) as answer:
        assert json.loads(answer.read())["0"]["engine_id"] == "e0_dp0"
    # Another server with the same port does not start, and says which one it is.
    with pytest.raises(ValueError, match=f"bootstrap_port {port} .* cannot be listened to at 127.0.0.1"):
        connector.MooncakeConnector(given, 0, caches())
    made.shutdown()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url, timeout=60)


@pytest.mark.parametrize(
    "params",
    [
        {"do_remote_prefill": True, "transfer_id": "x", "remote_bootstrap_addr": "http://127.0.0.1:1"},
        {"do_remote_prefill": True, "transfer_id": "x", "remote_host": "127.0.0.1"},
        {"do_remote_prefill": True, "metaserver": "http://127.0.0.1:1/"},
    ],
    ids=["mooncake", "moriio", "layerwise"],
)
def test_what_decode_asks_by_http_is_on_the_list(
    connector: ModuleType, caplog: pytest.LogCaptureFixture, params: dict[str, object]
) -> None:
    # Broken in production: pd_prefill_hosts holds for the receiver, and any client has the engine itself connect elsewhere.
    given = config("kv_consumer")
    given.kv_transfer_config.kv_connector = "PdConnector"
    extra = given.kv_transfer_config.kv_connector_extra_config
    extra["bootstrap_port"], extra["set"]["pd_prefill_hosts"] = 1, ["10.0.0.0/8"]
    made = connector.PdConnector(given, 0, caches())
    at = DaemonAt(0, "ipc", platform.node(), "w", None, 7300, 7400)
    made.set_xfer_handshake_metadata({0: connector.PdHandshake(at)})
    prompt = list(range(100))
    request = SimpleNamespace(
        request_id="a", prompt_token_ids=prompt, all_token_ids=prompt, num_prompt_tokens=100, kv_transfer_params=params
    )
    with caplog.at_level(logging.WARNING, "vllm.pd_backend"):
        made.on_new_request(request)
    (record,) = caplog.records
    assert "127.0.0.1 is not among pd_prefill_hosts" in record.getMessage()
    made.shutdown()


@pytest.mark.parametrize("option", ["decode_context_parallel_size", "prefill_context_parallel_size"])
@pytest.mark.parametrize("role", ["kv_producer", "kv_consumer", "kv_both"])
def test_context_parallelism_is_refused_at_start(connector: ModuleType, option: str, role: str) -> None:
    # Broken in production: an engine starts whose ranks share out a prompt's tokens, and ends at its first request.
    given = config(role)
    setattr(given.parallel_config, option, 2)
    with pytest.raises(ValueError, match=f"{option} = 2; .*: use tensor parallelism alone"):
        connector.PdConnector(given, 1, caches())


class Refused(PdError):
    """What is raised at some point of the start."""


@pytest.mark.parametrize("role, program", [("kv_producer", "pd-sender"), ("kv_consumer", "pd-receiver"), ("kv_both", "pd-sender")])
@pytest.mark.parametrize("where", ["nowhere", "memory", "worker", "after"])
def test_a_daemon_is_not_left_by_an_engine_that_does_not_start(
    connector: ModuleType, monkeypatch: pytest.MonkeyPatch, role: str, program: str, where: str
) -> None:
    # Broken in production: an engine whose start fails after its daemon's leaves the daemon, with its ports and the memory
    # of its buffer, and the next one does not start either.
    def refuse(*_: Any, **__: Any) -> Any:
        raise Refused("test", where)

    made = connector.PdConnector(config(role), 1, caches())
    paged = Memory(1)
    paged.block_bytes, paged.device = 64, "cpu"
    made.make_paged = lambda _: paged
    if where == "memory":
        paged.memory = refuse
    elif where == "worker":
        monkeypatch.setattr(attachment.Attachment, "attach", refuse)
    elif where == "after":
        monkeypatch.setattr(connector, "connect_receivers", refuse)
        monkeypatch.setattr(connector, "PdHandshake", refuse)
    if where == "nowhere":
        made.register_kv_caches({})
        assert len(children(program)) == 1
        made.shutdown()
    else:
        with pytest.raises(Refused):
            made.register_kv_caches({})
    assert children(program) == []
