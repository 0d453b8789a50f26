"""Mooncake's dialect, and MoRIIO's, without vLLM: what routers say, the bootstrap port, and who asks there."""

from __future__ import annotations

import json
import logging
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pytest

from answering import Answering, answering, says, says_little_by_little, says_nothing, says_without_end
from free_ports import free_ports
from pd_backend.vllm import prefill_servers
from pd_backend.vllm.bootstrap import EngineAt, engines_in, http_address, query_answer
from pd_backend.vllm.bootstrap_server import BootstrapServer
from pd_backend.vllm.hosts import HostList
from pd_backend.vllm.naming import Naming
from pd_backend.vllm.options import OptionError, Options
from pd_backend.vllm.prefill_servers import PrefillServers
from pd_backend.vllm.consumer_scheduler import ConsumerScheduler
from pd_backend.vllm.groups import Groups
from pd_backend.vllm.producer_scheduler import ProducerScheduler
from pd_backend.vllm.spec import RemoteSpec, Rendezvous, SpecError, park_spec
from pd_backend.vllm.transfer_id import TransferSpec, transfer_spec
from pd_backend.vllm.keys import chunk_hashes
from pd_backend.vllm.step import ReleasePlan
from test_vllm_scheduler import BLOCK, CHUNK, output, request
from waiting import eventually

ENGINE = EngineAt("e0", "10.0.0.1", (5600, 5601))
ANSWER = {"0": {"engine_id": "e0", "worker_addr": {"0": {"0": "tcp://10.0.0.1:5600"}, "1": {"0": "tcp://10.0.0.1:5601"}}}}
#: What vllm-router 0.1.17 was recorded to send to decode; the stub's port and engine are those of a test.
MOONCAKE = {
    "do_remote_decode": False,
    "do_remote_prefill": True,
    "transfer_id": "xfer-615f1a48-a44e-43a3-9c9e-a7a5c65b0ae9",
    "remote_bootstrap_addr": "http://127.0.0.1:18998",
    "remote_engine_id": "stub-mooncake-engine-0",
}
#: The same to prefill.
MOONCAKE_PREFILL = {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": MOONCAKE["transfer_id"]}
#: In MoRIIO's write mode, where the addresses are in the request's id.
MORIIO = {
    "do_remote_decode": False, "do_remote_prefill": True, "remote_engine_id": None, "remote_block_ids": None,
    "transfer_id": "tx-c0d09a85bd16438e91346fe8be10790b", "remote_dp_size": 1, "remote_tp_size": 1,
}
MORIIO_PREFILL = MORIIO | {"do_remote_decode": True, "do_remote_prefill": False}


def moriio_id(prefill: str) -> str:
    return f"cmpl-___prefill_addr_{prefill}___decode_addr_127.0.0.1:22001_33432a44fd63417caf622ea27b684c5b-0-1a2b3c4d"


class TestAnswer:
    def test_it_is_of_mooncakes_form(self) -> None:
        # Broken in production: a router finds no engine in the answer, and starts with no prefill server.
        assert query_answer({0: ENGINE}) == ANSWER
        two = {1: EngineAt("e1", "fd00::1", (7,)), 0: ENGINE}
        assert list(query_answer(two)) == ["0", "1"]
        assert query_answer(two)["1"]["worker_addr"] == {"0": {"0": "tcp://[fd00::1]:7"}}
        assert engines_in(json.loads(json.dumps(query_answer(two)))) == two

    @pytest.mark.parametrize(
        ("answer", "text"),
        [
            ([], "expected a map of 1 to"),
            ({}, "expected a map of 1 to"),
            ({"0": 7}, "engine_id = None"),
            ({"x": ANSWER["0"]}, "rank 'x'"),
            ({"0": ANSWER["0"] | {"engine_id": "e" * 10_000}}, "expected a text of 1 to 256 bytes"),
            ({"0": ANSWER["0"] | {"worker_addr": {}}}, "expected a map of 1 to 256 workers"),
            ({"0": ANSWER["0"] | {"worker_addr": {"1": {"0": "tcp://h:1"}}}}, "expected all from 0 on"),
            ({"0": ANSWER["0"] | {"worker_addr": {"0": {"0": "tcp://h:1", "1": "tcp://h:2"}}}}, "and no other"),
            ({"0": ANSWER["0"] | {"worker_addr": {"0": {"0": "http://h:1"}}}}, "expected tcp://HOST:PORT"),
            ({"0": ANSWER["0"] | {"worker_addr": {"0": {"0": "tcp://h:70000"}}}}, "expected tcp://HOST:PORT"),
            ({"0": ANSWER["0"] | {"worker_addr": {"0": {"0": "tcp://[h:1"}}}}, "expected tcp://HOST:PORT"),
            ({"0": ANSWER["0"] | {"worker_addr": {"0": {"0": "t" * 10_000}}}}, "expected tcp://HOST:PORT"),
            ({"0": ANSWER["0"] | {"worker_addr": {"0": {"0": "tcp://h:1"}, "1": {"0": "tcp://i:1"}}}}, "expected one host"),
        ],
    )
    def test_another_form_is_refused_in_a_line(self, answer: Any, text: str) -> None:
        # Broken in production: what answers at some address ends the engine, or fills its log.
        with pytest.raises(SpecError) as refused:
            engines_in(answer)
        assert text in str(refused.value) and len(str(refused.value)) < 300

    def test_addresses(self) -> None:
        # Broken in production: a request has decode open what is no prefill server's address.
        assert http_address("http://10.0.0.1:8998") == http_address("http://10.0.0.1:8998/") == ("10.0.0.1", 8998)
        assert http_address("http://[fd00::1]:8998") == ("fd00::1", 8998)
        wrong: list[Any] = [
            None, 7, "", "10.0.0.1:8998", "https://h:1", "file:///etc/passwd", "http://h", "http://h:0", "http://h:99999",
            "http://u:p@h:1", "http://h:1/metrics", "http://h:1?q", "http://h:1\r\nX: y", "http://" + "h" * 10_000 + ":1",
            "http://[::1", "http://h h:1", "http://ä:1",
        ]
        for given in wrong:
            with pytest.raises(SpecError) as refused:
                http_address(given)
            assert len(str(refused.value)) < 200


class TestSpec:
    def test_what_mooncakes_routers_send(self) -> None:
        # Broken in production: under vllm-router --kv-connector mooncake nothing is transferred.
        asked = transfer_spec(MOONCAKE, "cmpl-x", None)
        assert asked == TransferSpec("127.0.0.1", 18998, "stub-mooncake-engine-0", (MOONCAKE["transfer_id"],))
        parked = park_spec(MOONCAKE_PREFILL, "cmpl-x-0-1a2b3c4d")
        assert parked is not None and parked.ids[0] == MOONCAKE["transfer_id"] and not parked.is_answered

    @pytest.mark.parametrize(
        "prefill",
        ["127.0.0.1:21001", "host:127.0.0.1,handshake:6301,notify:61005", "127.0.0.1", "http://127.0.0.1:8100"],
    )
    def test_what_moriios_routers_send(self, prefill: str) -> None:
        # Broken in production: in MoRIIO's write mode decode asks nobody, though the request's id names prefill.
        asked = transfer_spec(MORIIO, moriio_id(prefill), 8998)
        assert asked == TransferSpec("127.0.0.1", 8998, None, (MORIIO["transfer_id"],))
        parked = park_spec(MORIIO_PREFILL, moriio_id(prefill))
        assert parked is not None and parked.ids[0] == MORIIO["transfer_id"] and parked.is_answered
        with pytest.raises(SpecError, match="set bootstrap_port"):
            transfer_spec(MORIIO, moriio_id(prefill), None)

    def test_addresses_of_version_6_in_a_moriio_id(self) -> None:
        # Broken in production: the host of an address of version 6 is cut at one of its colons.
        for prefill in ("[fd00::1]:21001", "host:fd00::1,handshake:1,notify:2", "host:[fd00::1],handshake:1,notify:2"):
            asked = transfer_spec(MORIIO, moriio_id(prefill), 8998)
            assert asked is not None and asked.host == "fd00::1"

    def test_other_dialects_are_not_theirs(self) -> None:
        # Broken in production: a request of NIXL's or LMCache's dialect is sent to look for a bootstrap port.
        ours = {"remote_engine_id": "pd1:e:5600", "remote_host": "h", "remote_port": 1}
        for params in (
            None, {}, {"do_remote_prefill": True}, MOONCAKE | {"do_remote_prefill": False},
            MOONCAKE | {"disagg_spec": {"req_id": "r"}}, MORIIO | ours,
        ):
            assert transfer_spec(params, "cmpl-x", None) is None

    @pytest.mark.parametrize(
        "change",
        [
            {"transfer_id": 7}, {"transfer_id": ""}, {"transfer_id": "x" * 10_000}, {"transfer_id": "\ud800"},
            {"transfer_id": ["x"]}, {"remote_bootstrap_addr": 7}, {"remote_bootstrap_addr": "x" * 10_000},
            {"remote_bootstrap_addr": {"a": 1}}, {"remote_bootstrap_addr": None},
            {"remote_bootstrap_addr": None, "remote_host": 7}, {"remote_bootstrap_addr": None, "remote_host": "a/b"},
            {"remote_bootstrap_addr": None, "remote_host": "h" * 10_000},
        ],
    )
    def test_what_cannot_be_followed_says_why_in_a_line(self, change: dict[str, Any]) -> None:
        # Broken in production: what a client writes into its request ends the engine, or fills its log.
        with pytest.raises(SpecError) as refused:
            transfer_spec(MOONCAKE | change, "cmpl-x", 8998)
        assert len(str(refused.value)) < 400

    def test_prefill_parks_under_other_names_what_has_a_bad_one(self) -> None:
        # Broken in production: a transfer_id that the daemon refuses fails a request whose chunks are found by their keys.
        for bad in ("x" * 10_000, 7, None, "", "\ud800", {}):
            parked = park_spec(MOONCAKE_PREFILL | {"transfer_id": bad}, "cmpl-x-0-1a2b3c4d")
            assert parked is not None and not parked.is_answered
            assert parked.ids == park_spec({"do_remote_decode": True}, "cmpl-x-0-1a2b3c4d").ids


class TestOptions:
    def test_which_port(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # Broken in production: a router that asks where Mooncake listens finds nobody, or two servers want one port.
        monkeypatch.delenv("VLLM_MOONCAKE_BOOTSTRAP_PORT", raising=False)
        assert Options().bootstrap("PdConnector") is None
        assert Options().bootstrap("MooncakeConnector") == 8998
        monkeypatch.setenv("VLLM_MOONCAKE_BOOTSTRAP_PORT", "9000")
        assert Options().bootstrap("PdConnector") == Options().bootstrap("MooncakeConnector") == 9000
        assert Options.parse({"bootstrap_port": 9001}).bootstrap("MooncakeConnector") == 9001
        for wrong in ("", "x", "0", "70000", "-1"):
            monkeypatch.setenv("VLLM_MOONCAKE_BOOTSTRAP_PORT", wrong)
            with pytest.raises(OptionError, match="VLLM_MOONCAKE_BOOTSTRAP_PORT = "):
                Options().bootstrap("PdConnector")
        for bad in (0, 70000, "8998", True):
            with pytest.raises(OptionError, match="bootstrap_port = "):
                Options.parse({"bootstrap_port": bad})

    def test_which_hosts(self, tmp_path: Any) -> None:
        # Broken in production: decode asks by HTTP a host that its receiver would not ask.
        assert Options().prefill_hosts() is None
        assert Options.parse({"set": {"pd_prefill_hosts": None}}).prefill_hosts() is None
        for given, texts in [
            (["10.1.0.0/16", "prefill-0"], ["10.1.0.0/16", "prefill-0"]), ("prefill-0", ["prefill-0"]), (["::1"], ["::1"]),
            ([], []), ("['a', \"b\"]", ["a", "b"]),
        ]:
            assert Options.parse({"set": {"pd_prefill_hosts": given}}).prefill_hosts() == texts
        pytest.importorskip("yaml", reason="no PyYAML: run `scripts/setup-deps python` for this test")
        file = tmp_path / "c.yaml"
        file.write_text("pd_prefill_hosts: [10.1.0.0/16, prefill-0]\n")
        from_file = Options.parse({"config_file": str(file)})
        assert from_file.prefill_hosts() == ["10.1.0.0/16", "prefill-0"]
        assert Options.parse({"config_file": str(file), "set": {"pd_prefill_hosts": "b"}}).prefill_hosts() == ["b"]

    def test_hosts_are_compared_as_the_daemon_does(self) -> None:
        # Broken in production: an address outside the list is asked because it is written in another way.
        hosts = HostList(["10.1.0.0/16", "127.0.0.1", "fd00::/8", "Prefill-0"])
        for inside in ("10.1.2.3", "::ffff:10.1.2.3", "127.0.0.1", "fd00::7", "prefill-0", "PREFILL-0"):
            assert inside in hosts
        for outside in ("10.2.0.1", "127.0.0.2", "localhost", "prefill-1", "0x7f.1", "2130706433", "::1", ""):
            assert outside not in hosts
        assert "127.0.0.1" not in HostList([])


def asked(port: int, path: str = "/query") -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


@contextmanager
def serving(engine: Callable[[], EngineAt | None], port: int = 0, index: int = 0, runs: bool = True) -> Iterator[int]:
    """A bootstrap server, by its port; `runs`: that of an engine which takes requests."""
    server = BootstrapServer("127.0.0.1", port, index, engine)
    if runs:
        server.engine_runs()
    try:
        yield server.port
    finally:
        server.close()


def several(count: int) -> int:
    """The first of so many ports that follow each other."""
    for first in free_ports(40):
        try:
            with ExitStack() as stack:
                for port in range(first, first + count):
                    stack.enter_context(socket.create_server(("127.0.0.1", port)))
            return first
        except OSError:
            pass
    raise RuntimeError(f"no {count} free ports follow each other")


class TestServer:

    def test_it_says_what_is_known_at_that_time(self) -> None:
        # Broken in production: a router that asks early takes "no engines" for an answer, and asks no more.
        known: list[EngineAt] = []
        with serving(lambda: known[0] if known else None) as port:
            assert asked(port)[0] == 503
            known.append(ENGINE)
            assert asked(port) == asked(port, "/query?a=b") == (200, ANSWER)
            assert asked(port, "/")[0] == asked(port, "/metrics")[0] == 404

    def test_nobody_who_is_slow_keeps_others_waiting(self) -> None:
        # Broken in production: one client that says nothing keeps routers from starting.
        with serving(lambda: ENGINE) as port, ExitStack() as stack:
            slow = []
            for said in [b"", b"GET /query HTTP/1.1\r\n", b"GET /qu", b"\0" * 100_000] * 50:
                connection = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                slow.append(connection)
                try:
                    connection.sendall(said)
                except OSError:
                    pass  # It was closed to make room for another.
            assert asked(port) == (200, ANSWER)
            # And they are not kept for ever, nor are their threads.
            for connection in slow:
                connection.settimeout(60)
                try:
                    while connection.recv(65536):
                        pass
                except ConnectionError:
                    pass
            assert asked(port) == (200, ANSWER)

    def test_its_port_is_free_again_when_it_has_ended(self) -> None:
        # Broken in production: a server that is started again does not start, because its port is taken.
        (port,) = free_ports(1)
        for _ in range(2):
            with serving(lambda: None, port):
                with pytest.raises(OSError):
                    BootstrapServer("127.0.0.1", port, 0, lambda: None)
                assert asked(port)[0] == 503

    def test_the_first_rank_answers_for_all(self) -> None:
        # Broken in production: a router knows of one data-parallel rank alone, or of a stranger's at the next port.
        engines = [EngineAt(f"e_dp{index}", "127.0.0.1", (100 + index,)) for index in range(3)]
        known = {0: engines[0], 1: engines[1]}
        first = several(4)
        with (
            serving(lambda: known.get(0), first), serving(lambda: known.get(1), first, 1),
            serving(lambda: known.get(2), first, 2), serving(lambda: EngineAt("other_dp0", "h", (1,)), first + 3),
        ):
            # Until all are known none is named, for a router asks once.
            assert asked(first)[0] == 503
            known[2] = engines[2]
            assert asked(first) == (200, query_answer(dict(enumerate(engines))))
            assert asked(first + 1) == (200, query_answer({1: engines[1]}))
            # A server that is alone asks nobody.
            known[0] = EngineAt("e", "127.0.0.1", (1,))
            assert asked(first) == (200, query_answer({0: known[0]}))


    def test_the_first_rank_says_nothing_before_all_listen(self) -> None:
        # Broken in production: a router that asks while ranks are still starting knows of the first one alone, for ever.
        engines = [EngineAt(f"e_dp{index}", "127.0.0.1", (100 + index,)) for index in range(2)]
        first = several(2)
        with serving(lambda: engines[0], first, runs=False):
            assert asked(first)[0] == 503
        with serving(lambda: engines[0], first), serving(lambda: engines[1], first, 1, runs=False):
            assert asked(first) == (200, query_answer(dict(enumerate(engines))))
        # One that is alone waits for nobody.
        with serving(lambda: ENGINE, first, runs=False):
            assert asked(first) == (200, ANSWER)


def spec(port: int, engine: str | None = "e0", host: str = "127.0.0.1") -> TransferSpec:
    return TransferSpec(host, port, engine, ("xfer",))


def found(servers: PrefillServers, which: TransferSpec) -> RemoteSpec:
    """What comes of it in the end."""
    return eventually(lambda: servers.find(which))


class TestPrefillServers:
    def test_an_address_is_asked_once(self) -> None:
        # Broken in production: each request costs a round trip of HTTP more.
        with answering(says("200 OK", json.dumps(ANSWER).encode())) as (port, heard):
            servers = PrefillServers(2)
            assert servers.find(spec(port)) is None
            expected = RemoteSpec("10.0.0.1", (5600, 5601), ("xfer",), in_turn=False, engine="pd1:e0:5600+5601")
            assert found(servers, spec(port)) == servers.find(spec(port)) == expected
            assert len(heard) == 1 and heard[0].startswith(b"GET /query HTTP/1.1\r\n")

    def test_after_a_restart_it_is_asked_again(self) -> None:
        # Broken in production: after a restart of prefill decode asks at the ports of before, for ever.
        engines = [EngineAt("before", "127.0.0.1", (1,))]
        with serving(lambda: engines[-1]) as port:
            servers = PrefillServers(1)
            assert found(servers, spec(port, "before")).ports == (1,)
            engines.append(EngineAt("after", "127.0.0.1", (2,)))
            # Another id than the one that is known; and a router that still has the old one costs nothing.
            eventually(lambda: getattr(servers.find(spec(port, "after")), "ports", None) == (2,))
            assert found(servers, spec(port, "before")).ports == (2,)
            assert found(servers, spec(port, None)).ports == (2,)
            # The same id, and other ports: its daemon was started again. What was asked there has failed.
            engines.append(EngineAt("after", "127.0.0.1", (3,)))
            assert found(servers, spec(port, "after")).ports == (2,)
            servers.failed(spec(port))
            assert found(servers, spec(port, "after")).ports == (3,)

    def test_each_engine_of_several_is_found_by_its_id(self) -> None:
        # Broken in production: a data-parallel rank is asked for what another one has.
        both = {0: EngineAt("e0", "127.0.0.1", (1,)), 1: EngineAt("e1", "127.0.0.1", (2,))}
        with answering(says("200 OK", json.dumps(query_answer(both)).encode())) as (port, _):
            servers = PrefillServers(1)
            assert found(servers, spec(port, "e1")).ports == (2,)
            assert found(servers, spec(port, "e0")).ports == (1,)
            for unknown in ("e2", None):
                with pytest.raises(SpecError, match=r"has no engine .*, but \['e0', 'e1'\]"):
                    found(servers, spec(port, unknown))

    @pytest.mark.parametrize(
        ("answer", "text"),
        [
            (says("500 Internal Server Error", b"{}"), "status 500; expected 200"),
            (says("404 Not Found"), "status 404; expected 200"),
            (says("302 Found", b"", "Location: http://127.0.0.1:1/query"), "status 302; expected 200"),
            (says("200 OK", b"\x00garbage"), "what is no JSON"),
            (says("200 OK", b"[" * 100_000), ""),
            (says("200 OK", b"{}"), "expected a map"),
            (says("200 OK", json.dumps({"0": {"engine_id": 7}}).encode()), "engine_id = 7"),
            (says("200 OK", b" " * 4_000_000), "more than 262144 bytes"),
            (says_without_end, "more than 262144 bytes"),
            (says_nothing, "no answer within"),
            (says_little_by_little, "no answer within"),
            (lambda connection: None, ""),
            (lambda connection: connection.sendall(b"\xff\x00\x7f" * 1000), "otherwise than HTTP"),
            (lambda connection: connection.sendall(b"H" * 1_000_000), "otherwise than HTTP"),
            (says("200 \x1b[31mOK\x0b a line of its own"), "what is no JSON"),
            (lambda connection: connection.sendall(b"\x1b[31m\x0b a line of its own\r\n\r\n"), "otherwise than HTTP"),
        ],
        ids=["500", "404", "redirect", "garbage", "nested", "empty", "types", "megabytes", "endless", "silent", "slow", "ends",
             "binary", "long line", "reason", "escapes"],
    )
    def test_what_answers_otherwise_is_told_in_a_line(self, answer: Answering, text: str) -> None:
        # Broken in production: a request has decode read for ever, follow somebody elsewhere, or end.
        with answering(answer) as (port, heard):
            servers = PrefillServers(1, answer_s=0.5)
            for _ in range(3):
                with pytest.raises(SpecError) as refused:
                    found(servers, spec(port))
                said = str(refused.value)
                assert text in said and len(said) < 300 and said.isprintable()
            assert len(heard) == 1, "it is left alone for a while"

    def test_nobody_there(self) -> None:
        # Broken in production: a prefill server that has gone costs each request of it seconds.
        servers = PrefillServers(1)
        with pytest.raises(SpecError, match="refused"):
            found(servers, spec(free_ports(1)[0]))
        with pytest.raises(SpecError):
            found(servers, spec(80, host="no such host"))

    def test_another_size_is_refused(self) -> None:
        # Broken in production: a rank asks for chunks that its partner cuts otherwise.
        with answering(says("200 OK", json.dumps(ANSWER).encode())) as (port, _):
            with pytest.raises(SpecError, match="2 ranks at .*, 1 here"):
                found(PrefillServers(1), spec(port))

    def test_hosts_that_are_not_on_the_list_are_not_asked(self) -> None:
        # Broken in production: any client has decode connect wherever it says.
        with answering(says("200 OK", json.dumps(ANSWER).encode())) as (port, heard):
            servers = PrefillServers(2, HostList(["10.0.0.0/8"]))
            for host in ("127.0.0.1", "localhost", "::ffff:127.0.0.1"):
                with pytest.raises(SpecError, match="not among pd_prefill_hosts"):
                    servers.find(spec(port, host=host))
            assert heard == []

    def test_few_are_asked_at_a_time_and_few_are_remembered(self) -> None:
        # Broken in production: one client that names many addresses has decode start as many threads, and keep them.
        with ExitStack() as stack:
            # Connected to, and silent.
            listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(40)]
            servers = PrefillServers(1, answer_s=5.0)
            refused = 0
            for listener in listeners:
                try:
                    assert servers.find(spec(listener.getsockname()[1])) is None
                except SpecError as error:
                    assert "being asked already" in str(error)
                    refused += 1
            assert refused == len(listeners) - prefill_servers._ASKED_MAX > 0
            for number in range(2 * prefill_servers._KNOWN_MAX):
                with pytest.raises(SpecError, match="being asked already"):
                    servers.find(spec(1, host=f"127.0.{number // 200}.{number % 200}"))
            assert len(servers._known) <= prefill_servers._KNOWN_MAX
        eventually(lambda: not [each for each in threading.enumerate() if each.name == "pd bootstrap query"])


class Played:
    """Prefill servers that are played."""

    bootstrap_port = 8998

    def __init__(self) -> None:
        self.remote: RemoteSpec | None = None
        self.error: str | None = None
        self.failures: list[TransferSpec] = []

    def find(self, asked: TransferSpec) -> RemoteSpec | None:
        if self.error is not None:
            raise SpecError(self.error)
        return self.remote

    def failed(self, asked: TransferSpec) -> None:
        self.failures.append(asked)


#: The hash of the last chunk of `request(700)`.
LAST = chunk_hashes(list(range(700)), CHUNK)[-1]
REMOTE = RemoteSpec("10.0.0.1", (5600,), ("xfer",), in_turn=False)


class TestDecode:
    def scheduler(self, servers: Played) -> ConsumerScheduler:
        return ConsumerScheduler(Groups.plain(CHUNK, BLOCK), 1000, 1, None, Naming(), prefill_servers=servers)  # type: ignore

    def test_a_request_waits_until_its_prefill_server_has_said_where(self) -> None:
        # Broken in production: a step of the engine waits for HTTP, or decode computes the prompt meanwhile.
        servers = Played()
        scheduler = self.scheduler(servers)
        one = request(700, dict(MOONCAKE))
        scheduler.arrived(one)
        assert scheduler.build(output()).holds == []
        assert scheduler.pending() and scheduler.matched(one, 0) == (None, False)
        servers.remote = REMOTE
        # Also of a request that is not asked for in a step: its chunks are to be kept.
        (hold,) = scheduler.build(output()).holds
        assert (hold.request_id, hold.remote) == ("a", REMOTE)
        assert scheduler.matched(one, 0) == (700, True)
        scheduler.allocated(one, ([4, 5, 6, 7, 8, 9],), 700)
        step = scheduler.build(output())
        assert [load.remote for load in step.loads] == [REMOTE] and step.holds == []
        assert one.kv_transfer_params["do_remote_prefill"] is False
        scheduler.received(["a"], {5})
        assert [asked.port for asked in servers.failures] == [18998]
        assert not scheduler.pending()

    def test_one_that_fails_with_its_load_has_prefill_asked_again(self) -> None:
        # Broken in production: with the policy `fail` decode asks at the ports of before prefill's restart, for ever.
        servers = Played()
        servers.remote = REMOTE
        scheduler = self.scheduler(servers)
        one = request(700, dict(MOONCAKE))
        scheduler.matched(one, 0)
        scheduler.allocated(one, ([4, 5, 6, 7, 8, 9],), 700)
        # As vLLM has it: the request ends, and only then the connector is told which blocks were not loaded.
        scheduler.finished(one)
        scheduler.received(["a"], {4, 5, 6, 7, 8, 9})
        assert [asked.port for asked in servers.failures] == [18998]

    def test_a_known_one_is_asked_at_once(self) -> None:
        # Broken in production: each request waits for a step more than it has to.
        servers = Played()
        servers.remote = REMOTE
        scheduler = self.scheduler(servers)
        one = request(700, dict(MORIIO), moriio_id("127.0.0.1:21001"))
        scheduler.arrived(one)
        assert [hold.remote for hold in scheduler.build(output()).holds] == [REMOTE]
        assert scheduler.matched(one, 0) == (700, True)

    @pytest.mark.parametrize("when", ["at once", "later"])
    def test_what_cannot_be_asked_is_computed(self, when: str, caplog: pytest.LogCaptureFixture) -> None:
        # Broken in production: a request waits for ever for a prefill server that does not say where it is.
        servers = Played()
        servers.error = "why" if when == "at once" else None
        scheduler = self.scheduler(servers)
        one = request(700, dict(MOONCAKE))
        with caplog.at_level(logging.WARNING, "vllm.pd_backend"):
            scheduler.arrived(one)
            servers.error = "why"
            assert scheduler.matched(one, 0) == (0, False)
        assert [record.getMessage() for record in caplog.records] == ["request a is computed here: why"]
        scheduler.allocated(one, ([1, 2, 3, 4, 5, 6],), 0)
        scheduler.finished(one)
        step = scheduler.build(output())
        assert (step.holds, step.released, step.dropped, scheduler.pending()) == ([], [], [], False)

    @pytest.mark.parametrize("known", [False, True])
    def test_one_that_ends_early_gives_its_chunks_back(self, known: bool) -> None:
        # Broken in production: clients that leave fill prefill's buffer until its leases end.
        servers = Played()
        servers.remote = REMOTE if known else None
        scheduler = self.scheduler(servers)
        one = request(700, dict(MOONCAKE))
        scheduler.arrived(one)
        if not known:
            assert scheduler.build(output()).released == []
        scheduler.finished(one)
        assert scheduler.pending()
        servers.remote = REMOTE
        step = scheduler.build(output())
        assert step.released == [ReleasePlan("a", REMOTE, LAST)] and len(step.holds) == (1 if known else 0)
        scheduler.returned(["a"])
        assert not scheduler.pending()

    def test_a_router_that_chose_one_server_for_both_parts(self) -> None:
        # Broken in production: with kv_both a server waits for itself to send what it has in its own cache.
        servers = Played()
        own = Rendezvous("10.0.0.1", (5600,), "e0", "pull")
        scheduler = ConsumerScheduler(
            Groups.plain(CHUNK, BLOCK), 1000, 1, None, Naming(), lambda: own, prefill_servers=servers  # type: ignore[arg-type]
        )
        one = request(700, dict(MOONCAKE))
        scheduler.arrived(one)
        servers.remote = replace(REMOTE, engine=own.engine_id)
        assert scheduler.build(output()).holds == [] and not scheduler.pending()
        assert scheduler.matched(one, 512) == (0, False)
        scheduler.allocated(one, ([1, 2, 3, 4, 5, 6],), 0)
        scheduler.finished(one)
        step = scheduler.build(output())
        assert step.released == [ReleasePlan("a", servers.remote, LAST)] and step.dropped == []

    def test_one_that_never_came_gives_its_chunks_back(self) -> None:
        # Broken in production: of a request that decode refuses prefill keeps everything until its lease ends.
        servers = Played()
        scheduler = self.scheduler(servers)
        # What vLLM makes in place of one that it refused has another prompt.
        scheduler.finished(request(1, dict(MOONCAKE)))
        assert scheduler.pending()
        servers.remote = REMOTE
        assert scheduler.build(output()).released == [ReleasePlan("a", REMOTE, None)]

    def test_a_prompt_without_names_is_computed(self) -> None:
        # Broken in production: a prompt of embeddings ends the engine once prefill has said where it is.
        servers = Played()
        scheduler = self.scheduler(servers)
        one = request(700, dict(MOONCAKE))
        one.prompt_token_ids = None
        scheduler.arrived(one)
        servers.remote = REMOTE
        step = scheduler.build(output())
        assert (step.holds, step.released) == ([], [ReleasePlan("a", REMOTE, None)])
        assert scheduler.matched(one, 0) == (0, False)
        assert not scheduler.pending()


class TestPrefill:
    def finished(self, params: dict[str, Any]) -> tuple[bool, dict[str, Any] | None]:
        at = Rendezvous("10.0.0.1", (5600,), "e0", "pull")
        scheduler = ProducerScheduler(Groups.plain(CHUNK, BLOCK), 1, Naming(), lambda: at)
        one = request(100, params)
        scheduler.allocated(one)
        assert len(scheduler.build(output(new=[("a", [1], 0, 100)])).plans) == 1
        return scheduler.finished(one, [1])

    def test_mooncakes_routers_are_told_nothing(self) -> None:
        # Broken in production: a router passes on what decode does not expect from it.
        assert self.finished(dict(MOONCAKE_PREFILL)) == (True, None)

    def test_moriios_routers_are_told_where(self) -> None:
        # Broken in production: in MoRIIO's read mode decode is told nothing, and computes the prompt.
        kept, answer = self.finished(dict(MORIIO_PREFILL))
        assert kept and answer is not None
        assert (answer["transfer_id"], answer["remote_port"]) == (MORIIO["transfer_id"], 5600)
        assert answer["remote_block_ids"] == [[1]]
