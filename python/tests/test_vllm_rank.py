"""Daemons of several ranks on one host: what the configuration says once for all of them is of no two the same."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from conftest import binary
from free_ports import free_ports, free_ports_in_a_row
from pd_backend import Daemon
from pd_backend.vllm.layout import EngineLayout
from pd_backend.vllm.options import OptionError, Options
from pd_backend.vllm.rank import PortError, Rank
from vllm_pair import BLOCK, BLOCK_BYTES, CHUNK, LAYERS
from waiting import PATIENCE_S

#: Two engines of two workers each, in the order of their numbers.
RANKS = [Rank(data, tensor, 2) for data in (0, 1) for tensor in (0, 1)]
SHARED = {"transfer_channel": "local", "pd_buffer_size": "1MiB"}


class TestPorts:
    @pytest.mark.parametrize(
        ("ports", "own"),
        [
            # One port is that of the first rank.
            ([7300], [7300, 7301, 7302, 7303]),
            ([7300, 7310, 7320, 7330], [7300, 7310, 7320, 7330]),
            ([0], [0, 0, 0, 0]),
        ],
    )
    def test_each_rank_has_its_own(self, ports: list[int], own: list[int]) -> None:
        # Broken in production: the second engine of a server does not start, because the first has its ports.
        assert [rank.number for rank in RANKS] == [0, 1, 2, 3]
        assert [rank.port("p", ports) for rank in RANKS] == own

    def test_what_there_is_none_in_says_so(self) -> None:
        # Broken in production: a list by tensor-parallel rank, which is right with one engine, gives two workers one port.
        with pytest.raises(PortError) as refused:
            RANKS[2].port("pd_peer_init_port", [7300, 7301])
        assert str(refused.value) == (
            "pd_peer_init_port = [7300, 7301] has no port for rank 2 (data parallel 1, tensor parallel 0); write a port for "
            "each rank, or one port alone, from which the ranks count up"
        )
        with pytest.raises(PortError, match="leaves rank 3 .* the port 65536; expected at most 65535"):
            RANKS[3].port("rendezvous_port", [65533])


def ready_lines(program: str, options: Options, folder: Path) -> list[Daemon]:
    """Starts the daemons of all ranks as the connector does, beside each other, and ends them. What they were."""
    with ExitStack() as stack:
        daemons = []
        for rank in RANKS:
            layout = folder / f"{rank.number}.json"
            engine = EngineLayout("m", CHUNK, BLOCK, BLOCK_BYTES, LAYERS, tp_rank=rank.tensor, tp_size=rank.tensor_size)
            layout.write_text(json.dumps(engine.json()))
            arguments = options.daemon_args("cpu", rank)
            if program == "pd-sender":
                arguments += options.rendezvous_args(rank)
            daemon = Daemon(binary(program), [*arguments, "--kv-layout", str(layout)], ready_timeout_s=PATIENCE_S)
            daemons.append(stack.enter_context(daemon))
        return daemons


class TestDaemons:
    def test_receivers_count_up_from_one_port(self, tmp_path: Path) -> None:
        # Broken in production: a server with several engines or workers does not start with fixed ports.
        init, metrics = free_ports_in_a_row(4), free_ports_in_a_row(4)
        alloc = free_ports(4)
        sets = SHARED | {
            "pd_peer_host": "127.0.0.1", "pd_peer_init_port": init, "pd_peer_alloc_port": alloc,
            "pd_metrics_port": metrics, "pd_connector_endpoint": f"ipc://{tmp_path}/{{role}}-{{rank}}.sock",
        }
        ready = [daemon.ready for daemon in ready_lines("pd-receiver", Options.parse({"set": sets}), tmp_path)]
        assert [line.init_port for line in ready] == [init + number for number in range(4)]
        assert [line.alloc_port for line in ready] == alloc
        assert [urlsplit(line.metrics or "").port for line in ready] == [metrics + number for number in range(4)]
        names = [line.connector.removeprefix(f"ipc://{tmp_path}/receiver-") for line in ready]
        assert names == ["0.sock", "1.sock", "dp1-0.sock", "dp1-1.sock"]

    @pytest.mark.parametrize("by", ["option", "set", "file"])
    def test_senders_count_up_from_the_rendezvous_port(self, by: str, tmp_path: Path) -> None:
        # Broken in production: decode asks one engine for what another one has, or the second one does not start.
        port = free_ports_in_a_row(4)
        given: dict[str, object] = {"set": SHARED | ({"pd_rendezvous_port": port} if by == "set" else {})}
        if by == "option":
            given["rendezvous_port"] = port
        elif by == "file":
            pytest.importorskip("yaml", reason="no PyYAML: run `scripts/setup-deps python` for this test")
            file = tmp_path / "sender.yaml"
            file.write_text(f"pd_rendezvous_port: {port}\npd_metrics_port: none\n")
            given["config_file"] = str(file)
        ready = [daemon.ready for daemon in ready_lines("pd-sender", Options.parse(given), tmp_path)]
        assert [line.rendezvous_port for line in ready] == [port + number for number in range(4)]


class TestArguments:
    def test_older_names_of_ports_count_up_as_well(self, tmp_path: Path) -> None:
        # Broken in production: an lmcache.yaml of an older release starts the first engine alone.
        pytest.importorskip("yaml", reason="no PyYAML: run `scripts/setup-deps python` for this test")
        file = tmp_path / "lmcache.yaml"
        file.write_text("nixl_peer_init_port: 7300\nnixl_peer_alloc_port: '7400,7401'\npd_metrics_port: none\n")
        assert Options.parse({"config_file": str(file)}).daemon_args("cpu", Rank(1))[-4:] == [
            "--set", "pd_peer_init_port=[7301]", "--set", "pd_peer_alloc_port=[7401]",
        ]

    @pytest.mark.parametrize("ports", ["soon", "[7300, x]", "70000", "", "none", True, 1.5])
    def test_what_is_no_port_is_left_to_the_daemon(self, ports: object) -> None:
        # Broken in production: the error is about a list that nobody wrote.
        options = Options.parse({"set": {"pd_metrics_port": ports}})
        assert options.daemon_args("cpu", Rank(1)) == options.daemon_args("cpu")

    def test_an_endpoint_that_two_engines_would_share_is_refused(self) -> None:
        # Broken in production: the second engine's connector talks to the first one's daemon.
        options = Options.parse({"set": {"pd_connector_endpoint": "ipc:///tmp/pd.sock"}})
        assert options.daemon_args("cpu")
        with pytest.raises(OptionError, match=r"pd_connector_endpoint = .* put \{rank\} into it"):
            options.daemon_args("cpu", Rank(1))

    @pytest.mark.parametrize(("kv", "own"), [("cuda:3", ["--set", "pd_buffer_device=cuda:3"]), ("cpu", [])])
    def test_the_gpu_of_another_engine_is_that_of_its_kv(self, kv: str, own: list[str]) -> None:
        # Broken in production: `cuda` means the GPU of the tensor-parallel rank, which is the first engine's.
        options = Options.parse({"set": {"pd_buffer_device": "cuda"}})
        assert options.daemon_args(kv, Rank(1))[len(options.daemon_args(kv)) :] == own
